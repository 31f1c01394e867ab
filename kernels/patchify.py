"""patchify: one page to the patches a Qwen2-VL vision tower reads.

Contract
--------
In:  `rgb` uint8 [H, W, 3], C-contiguous; a target `height` x `width` in pixels, multiples of
     `patch_size * merge_size`.
Out: `patches` float32 [grid_h * grid_w, 3 * temporal_patch_size * patch_size**2] and
     `pixels` uint8 [3, height, width], the resized page that the patches were cut from.

1. Resize: bicubic (a = -0.5, widened by the scale when shrinking) in Pillow's 8-bit fixed-point arithmetic,
   two passes rounded to 8 bits each. The order of the passes is that of Pillow 13: vertical first where the
   height shrinks by more than twice the pixels that the width does, else horizontal first.
2. Normalise: `(float32(pixel / 255) - mean) / std` in float32.
3. Patch order: groups of `merge_size` x `merge_size` patches in raster order, the patches of a group in
   raster order; within a patch channel, moment, row, column. A still page repeats over the
   `temporal_patch_size` moments.

This is the arithmetic of `Qwen2VLImageProcessorPil` (transformers), and both implementations follow it bit
for bit, on any instruction set and any installed Pillow.

Errors: KernelUnavailable for an unknown `kernel`; ValueError for a page, a size or a setting outside the
contract.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

import pagemill._native as _native
from pagemill.errors import KernelUnavailable

Kernel = Literal["native", "reference"]
Patches = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]
Triple = tuple[float, float, float]


@lru_cache(maxsize=16)
def normalisation(mean: Triple, std: Triple) -> npt.NDArray[np.float32]:
    """Return the normalised value of every byte: float32 [3, 256], read-only."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.setflags(write=False)
    return table


def reference(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Triple,
    std: Triple,
) -> Patches:
    """State the contract with Pillow and numpy."""
    in_height, in_width = rgb.shape[:2]
    vertical_first = in_height > height and in_height - height > 2 * (in_width - width)
    between = (in_width, height) if vertical_first else (width, in_height)
    image = Image.fromarray(rgb)
    for size in (between, (width, height)):  # one axis a call, so that Pillow has no order to choose
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    normal = np.stack([table[plane] for table, plane in zip(normalisation(mean, std), pixels, strict=True)])
    p, m, t = patch_size, merge_size, temporal_patch_size
    grid_h, grid_w = height // p, width // p
    blocks = normal.reshape(3, grid_h // m, m, p, grid_w // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    moments = np.broadcast_to(blocks[:, :, :, :, :, None], (*blocks.shape[:5], t, p, p))
    return moments.reshape(grid_h * grid_w, 3 * t * p * p), pixels


def native(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Triple,
    std: Triple,
) -> Patches:
    """Do all three steps in one pass over the page in C++, without the GIL (csrc/body_patchify.h)."""
    patches, pixels = _native.patchify(
        rgb,
        height,
        width,
        patch_size,
        merge_size,
        temporal_patch_size,
        normalisation(mean, std),
    )
    return patches, pixels


def patchify(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    mean: Triple,
    std: Triple,
    kernel: Kernel = "native",
) -> Patches:
    """Return `(patches, pixels)` of a page; see the contract above.

    One page is the work of the calling thread; pages are prepared side by side by calling from several.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(
            f"patchify takes a non-empty uint8 page [height, width, 3], got {rgb.dtype} {list(rgb.shape)}"
        )
    factor = patch_size * merge_size
    if height < 1 or width < 1 or height % factor or width % factor:
        raise ValueError(
            f"patchify makes pages of positive multiples of {factor} px, asked for {height}x{width}"
        )
    rgb = np.ascontiguousarray(rgb)
    if kernel == "native":
        return native(
            rgb,
            height,
            width,
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=temporal_patch_size,
            mean=mean,
            std=std,
        )
    if kernel == "reference":
        return reference(
            rgb,
            height,
            width,
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=temporal_patch_size,
            mean=mean,
            std=std,
        )
    raise KernelUnavailable(f"patchify has the kernels native and reference, not {kernel!r}")
