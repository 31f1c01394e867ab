"""RMSNorm in Triton, with the quantisation after it in the same pass.

The contract is that of `pagemill.kernels.norm`; a row is one program and stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagemill.kernels.gpu.codes import largest_code, to_codes

__all__ = ["rms_norm", "rms_norm_quantized"]


@triton.jit
def rms_norm_kernel(
    x, weight, out, scale, H, x_row, out_row, eps, LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """LARGEST > 0: `out` is int8 or float8, out = y / scale, scale = max |y| / LARGEST. TILE >= out_row, a power of two."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, TILE)
    there = h < H
    v = tl.load(x + row * x_row + h, mask=there, other=0.0).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, 0) / H + eps)
    kind = weight.dtype.element_ty
    y = (v.to(kind).to(tl.float32) * tl.load(weight + h, mask=there, other=0.0).to(tl.float32)).to(kind)
    if LARGEST > 0:
        y = y.to(tl.float32)
        step = tl.maximum(tl.max(tl.abs(y), 0) / LARGEST, 1e-30)
        tl.store(scale + row, step)
        tl.store(out + row * out_row + h, to_codes(y / step, out), mask=h < out_row)
    else:
        tl.store(out + row * out_row + h, y.to(out.dtype.element_ty), mask=there)


def _warps(tile: int) -> int:
    return 4 if tile <= 2048 else 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`."""
    m, h = x.shape
    out = torch.empty(m, h, dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(h)
    if m:
        rms_norm_kernel[(m,)](
            x, weight, out, out, h, x.stride(0), h, eps, LARGEST=0.0, TILE=tile, num_warps=_warps(tile),
        )  # fmt: skip
    return out


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same rows as int8 or float8_e4m3fn `[M, Hp]` (H rounded up to 64, zeros), and their float32 scales `[M]`."""
    m, h = x.shape
    padded = -(-h // 64) * 64
    out = torch.empty(m, padded, dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    tile = triton.next_power_of_2(padded)
    if m:
        rms_norm_kernel[(m,)](
            x, weight, out, scale, h, x.stride(0), padded, eps, LARGEST=largest_code(dtype), TILE=tile,
            num_warps=_warps(tile),
        )  # fmt: skip
    return out, scale
