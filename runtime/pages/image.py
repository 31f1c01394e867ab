"""Decode one image file to RGB, whatever its pixels are stored as."""

from __future__ import annotations

from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from pagemill.errors import PageError

MAX_PAGE_PIXELS = 178_956_970
"""Images above this are refused from their header, before their pixels are decoded: twice what Pillow warns
at, and where it refuses by default. A3 at 900 DPI has 174 million."""

# The formats' own classes, since `Image.open` would try other formats, and judges the size of an image by a
# setting and by warnings that belong to the whole process.
_READERS: dict[str, Any] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(file: BinaryIO, kind: str) -> npt.NDArray[np.uint8]:
    """Return the image in `file`, of the format `kind`, as uint8 [H, W, 3] RGB.

    It is turned upright by its EXIF orientation, and transparency lies over white. Deep grey becomes 8 bits
    by its full range: 16 and 12 bits by the depth; 32-bit integers by 255 or 65535 where all values fit,
    floats by 1 or 255 where they fit, and both by their own smallest and largest value otherwise. Raises
    PageError for an image above MAX_PAGE_PIXELS, and anything a damaged file makes a decoder raise.
    """
    try:
        with cast(Image.Image, _READERS[kind](file)) as picture:
            width, height = picture.size
            if width * height > MAX_PAGE_PIXELS:
                raise PageError(
                    f"is {width}x{height} px, more than the limit of {MAX_PAGE_PIXELS / 1e6:.0f} million"
                )
            tags = getattr(picture, "tag_v2", {})
            bits, photometric = tags.get(_BITS_PER_SAMPLE), tags.get(_PHOTOMETRIC)
            picture.load()
            return _to_rgb(picture, depth=12 if bits == (12,) else 16, white_is_zero=photometric == 0)
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):  # formats that know their size late
        raise PageError(f"has more pixels than the limit of {MAX_PAGE_PIXELS / 1e6:.0f} million") from None


def _to_rgb(picture: Image.Image, depth: int, white_is_zero: bool) -> npt.NDArray[np.uint8]:
    turn = _UPRIGHT.get(_orientation(picture))
    if picture.mode.startswith("I;16"):
        picture = _deep_grey(picture, depth, white_is_zero)
    elif picture.mode in ("I", "F"):
        picture = _wide_grey(picture, white_is_zero)
    elif picture.has_transparency_data:
        picture = _over_white(picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if turn is not None:
        picture = picture.transpose(turn)
    return np.asarray(picture)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels, so the page is read as it lies
        return 1


def _deep_grey(picture: Image.Image, depth: int, white_is_zero: bool) -> Image.Image:
    values = np.asarray(picture)
    top = (1 << depth) - 1
    grey = np.minimum((values.astype(np.uint32) * 255 + top // 2) // top, 255).astype(np.uint8)
    if white_is_zero:  # Pillow inverts such grey only up to 8 bits
        grey = 255 - grey
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _wide_grey(picture: Image.Image, white_is_zero: bool) -> Image.Image:
    values = np.asarray(picture).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    tops = (1.0, 255.0) if picture.mode == "F" else (255.0, 65535.0)
    if low >= 0 and high <= tops[1]:
        low, high = 0.0, next(top for top in tops if high <= top)
    values = np.nan_to_num(values, nan=high, posinf=high, neginf=low)
    grey = np.rint((values - low) * (255 / ((high - low) or 1))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":  # converts to LA alone
        picture = picture.convert("LA")
    layers = picture.convert("RGBA")
    page = Image.new("RGB", layers.size, "white")
    page.paste(layers, mask=layers.getchannel("A"))
    return page
