"""The bytes of patches to the numbers that a vision tower reads, in Triton; the contract is that of `pagemill.kernels.pixels`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["pixel_values"]

_TILE = 1024


@triton.jit
def pixel_values_kernel(
    patches, order, levels, out, width, area, MOMENTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """TILE bytes of one row: looked up in their channel's levels, written MOMENTS times."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = i < width
    byte = tl.load(patches + tl.load(order + row) * width + i, mask=mask, other=0).to(tl.int32)
    channel = i // area
    value = tl.load(levels + channel * 256 + byte, mask=mask, other=0.0)
    at = out + row * width * MOMENTS + channel * area * MOMENTS + i % area
    for moment in tl.static_range(MOMENTS):
        tl.store(at + moment * area, value, mask=mask)


def pixel_values(patches: Tensor, order: Tensor, levels: Tensor, moments: int, out: Tensor) -> None:
    """`pixel_values_reference`, every tensor contiguous; `order` is not checked, which would wait for the device."""
    rows, width = out.shape[0], patches.shape[1]
    if rows and width:
        pixel_values_kernel[(rows, triton.cdiv(width, _TILE))](
            patches, order, levels, out, width, width // levels.shape[0], MOMENTS=moments, TILE=_TILE,
        )  # fmt: skip
