"""patchify: one page to the patches a Qwen2-VL vision tower reads, as bytes.

Contract
--------
In:  `rgb` uint8 [H, W, 3], C-contiguous; a target `height` x `width` in pixels, multiples of
     `patch_size * merge_size`.
Out: `patches` uint8 [grid_h * grid_w, 3 * patch_size**2].

1. Resize: bicubic (a = -0.5, widened by the scale when shrinking) in Pillow's 8-bit fixed-point arithmetic,
   two passes rounded to 8 bits each. The order of the passes is that of Pillow 13: vertical first where the
   height shrinks by more than twice the pixels that the width does, else horizontal first.
2. Patch order: groups of `merge_size` x `merge_size` patches in raster order, the patches of a group in
   raster order; within a patch channel, row, column.

`pagemill.kernels.pixels` makes numbers of the bytes. Together they are the arithmetic of `Qwen2VLImageProcessorPil`
(transformers), and both implementations follow it bit for bit, on any instruction set and any installed Pillow.

Errors: KernelUnavailable for an unknown `kernel`; ValueError for a page, a size or a setting outside the
contract.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

import pagemill._native as _native
from pagemill.errors import KernelUnavailable

Kernel = Literal["native", "reference"]
Patches = npt.NDArray[np.uint8]


def reference(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int,
    merge_size: int,
) -> Patches:
    """State the contract with Pillow and numpy."""
    in_height, in_width = rgb.shape[:2]
    vertical_first = in_height > height and in_height - height > 2 * (in_width - width)
    between = (in_width, height) if vertical_first else (width, in_height)
    image = Image.fromarray(rgb)
    for size in (between, (width, height)):  # one axis a call, so that Pillow has no order to choose
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    p, m = patch_size, merge_size
    grid_h, grid_w = height // p, width // p
    blocks = pixels.reshape(3, grid_h // m, m, p, grid_w // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    return blocks.reshape(grid_h * grid_w, 3 * p * p)


def native(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int,
    merge_size: int,
) -> Patches:
    """Do both steps in one pass over the page in C++, without the GIL (csrc/body_patchify.h)."""
    patches: Patches = _native.patchify(rgb, height, width, patch_size, merge_size)
    return patches


def patchify(
    rgb: npt.NDArray[np.uint8],
    height: int,
    width: int,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    kernel: Kernel = "native",
) -> Patches:
    """Return the patches of a page; see the contract above.

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
        )
    if kernel == "reference":
        return reference(
            rgb,
            height,
            width,
            patch_size=patch_size,
            merge_size=merge_size,
        )
    raise KernelUnavailable(f"patchify has the kernels native and reference, not {kernel!r}")
