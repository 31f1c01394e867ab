"""Numbers to their codes in int8 or float8_e4m3fn: what the kernels that quantise have in common."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagemill.kernels.attention import QUANTISED_KV

__all__ = ["largest_code", "to_codes"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def largest_code(dtype: torch.dtype) -> float:
    """The largest code of int8 (127) or float8_e4m3fn (448)."""
    return QUANTISED_KV[dtype]


@triton.jit
def to_codes(y, at):
    """float32 `y`, at most the largest code, to the type that the pointers `at` point to; to nearest, ties to even."""
    if at.dtype.element_ty == tl.int8:
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23
    elif _INTERPRETED:
        # The interpreter's conversion to fp8 drops the carry out of the mantissa: give it what it need not round. Normal numbers
        # keep three bits of their mantissa, smaller ones are multiples of 2^-9.
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (y + 24576.0) - 24576.0  # 1.5 * 2^14
        y = tl.where(tl.abs(y) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return y.to(at.dtype.element_ty)
