"""Angles of M-RoPE looked up in tables by position, in Triton; the contract is that of `pagemill.kernels.angles`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mrope_angles"]


@triton.jit(do_not_specialize=["tokens"])
def mrope_angles_kernel(
    positions, axis, cos, sin, cos_out, sin_out, tokens, F, TILE: tl.constexpr
):  # fmt: skip
    """One token's frequencies; TILE >= F, a power of two."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, TILE)
    there = f < F
    turned_by = tl.load(axis + f, mask=there, other=0)
    at = tl.load(positions + turned_by * tokens + token, mask=there, other=0) * F + f
    tl.store(cos_out + token * F + f, tl.load(cos + at, mask=there, other=0.0), mask=there)
    tl.store(sin_out + token * F + f, tl.load(sin + at, mask=there, other=0.0), mask=there)


def mrope_angles(positions: Tensor, axis: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`mrope_angles_reference`, every tensor contiguous; positions and axes are not checked, which would wait for the device."""
    tokens, frequencies = positions.shape[-1], axis.shape[0]
    found = cos.new_empty(tokens, frequencies), cos.new_empty(tokens, frequencies)
    if tokens and frequencies:
        mrope_angles_kernel[(tokens,)](
            positions, axis, cos, sin, *found, tokens, frequencies, TILE=triton.next_power_of_2(frequencies), num_warps=1,
        )  # fmt: skip
    return found
