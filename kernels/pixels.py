"""pixel_values: the bytes of patches (`pagemill.kernels.patchify`) to the numbers that a vision tower reads.

A page is kept as bytes until its tower runs: they are an eighth of its numbers in float32 (a still page's moments
are equal), and the numbers are written once, in the tower's own order and dtype.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["normalisation", "pixel_values_native", "pixel_values_reference"]

_DTYPES = (torch.float32, torch.bfloat16)
Triple = tuple[float, float, float]


@lru_cache(maxsize=16)
def normalisation(mean: Triple, std: Triple) -> npt.NDArray[np.float32]:
    """Return `(float32(byte / 255) - mean) / std` of every byte, in float32: [3, 256], read-only."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.setflags(write=False)
    return table


def pixel_values_reference(patches: Tensor, order: Tensor, levels: Tensor, moments: int, out: Tensor) -> None:
    """Fill row i of `out [N, C * moments * A]` with patch `order[i]` of `patches`, uint8 `[P, C * A]`.

    `levels [C, 256]` is the value of each byte, a channel each, in the dtype of `out` (float32 or bfloat16); `order` is int64
    `[N]`. A row is channel, moment, pixel: the pixels of a channel come `moments` times. ValueError for an order out of range.
    """
    expect_tensor("levels", levels, _DTYPES, (None, 256))
    channels = levels.shape[0]
    expect_tensor("patches", patches, torch.uint8, (None, None))
    count, width = patches.shape
    expect(
        channels > 0 and width % channels == 0, "patches", f"columns that {channels} channels share", width
    )
    expect(moments >= 1, "moments", "a number >= 1", moments)
    expect_tensor("order", order, torch.int64, (None,))
    expect_tensor("out", out, levels.dtype, (order.shape[0], width * moments))
    if order.numel():
        low, high = int(order.min()), int(order.max())
        expect(low >= 0 and high < count, "order", f"0..{count - 1}", f"{low}..{high}")
    taken = patches[order].view(len(order), channels, width // channels).long()
    values = levels[torch.arange(channels, device=levels.device)[:, None], taken]
    out.view(len(order), channels, moments, width // channels).copy_(values[:, :, None])


def pixel_values_native(patches: Tensor, order: Tensor, levels: Tensor, moments: int, out: Tensor) -> None:
    """`pixel_values_reference` in C++ (`csrc/body_elementwise.h`), the same bits; every tensor contiguous."""
    _native.pixel_values(dl(patches), dl(order), dl(levels), moments, dl(out))
