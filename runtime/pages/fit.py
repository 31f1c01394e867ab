"""The size at which a page is shown to the model.

Cost is linear in image tokens, and a model reads type best near the height that it learned. `auto` measures the page's type
(pages/ink.py) and scales the page so that it lands there. A PDF page that has to grow is rendered anew, so that it gains detail
and not only pixels; everything else is one resampling, the one that makes the patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pagemill.errors import ConfigError
from pagemill.pages.ink import PageInk, measure_ink
from pagemill.pages.preprocess import ImageProcessor, PreparedImage
from pagemill.pages.source import PageRef, is_pdf, load_page

Resolution = Literal["auto", "full"] | int
"""`auto`: by the height of the text; `full`: all pixels that the checkpoint takes; N: at most N pixels on the longer side.

N counts pixels and not tokens, as models publish it (olmOCR: 1288), and means the same for any patch size."""

MAX_ENLARGEMENT = 2.0
"""`auto` never makes a page larger than this: beyond, pixels are added and no detail."""

# Scaling by factors between these costs sharpness, and gains no score or few tokens.
_KEPT = (0.9, 1.4)
_SPREAD = 1.25  # how much higher than preferred most text may become for the sake of the smallest type
_LEAST = 0.5  # of the preferred height: how low the smallest type may become for the sake of the others
_MARGIN = 0.02  # what cropping leaves around the print, of the page's longer side


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How pages are sized; raises ConfigError for a resolution or height that cannot be meant."""

    resolution: Resolution = "auto"
    crop: bool = False
    """Cut empty margins and dark scan borders."""
    preferred_height: float | None = None
    """Height in pixels, as `PageInk.text_height` defines it, of the type that the model reads best; None makes `auto` `full`."""

    def __post_init__(self) -> None:
        value, height = self.resolution, self.preferred_height
        if value not in ("auto", "full") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 28
        ):
            raise ConfigError(f"resolution should be auto, full or a number of pixels from 28, not {value!r}")
        if height is not None and not (math.isfinite(height) and height > 0):
            raise ConfigError(f"the preferred text height should be a positive number, not {height!r}")


def fit_page(
    ref: PageRef, dpi: float, options: FitOptions, processor: ImageProcessor
) -> tuple[PreparedImage, PageInk]:
    """Load a page, measure it, and prepare it at the size that `options` ask for.

    A PDF page is rendered at `dpi`, and once more where its text has to grow, or for N pixels on the longer side; the
    statistics are those of the last rendering. Raises what `load_page` and `ImageProcessor.prepare` raise.
    """
    rgb = load_page(ref, dpi)
    if not is_pdf(ref):
        return fit_pixels(rgb, options, processor)
    if isinstance(options.resolution, int):
        if (longest := max(rgb.shape[:2])) != options.resolution:
            rgb = load_page(ref, dpi * options.resolution / longest)
        return fit_pixels(rgb, options, processor)
    ink = measure_ink(rgb)
    if (scale := _scale(ink, options)) > 1:
        rgb = load_page(ref, dpi * scale)
        ink, scale = measure_ink(rgb), 1.0
    return _prepare(rgb, ink, scale, options, processor), ink


def fit_pixels(
    rgb: npt.NDArray[np.uint8], options: FitOptions, processor: ImageProcessor
) -> tuple[PreparedImage, PageInk]:
    """Measure a decoded page, uint8 [H, W, 3], and prepare it at the size that `options` ask for.

    The statistics are those of the page as given, before cropping and scaling.
    """
    ink = measure_ink(rgb)
    return _prepare(rgb, ink, _scale(ink, options), options, processor), ink


def _prepare(
    rgb: npt.NDArray[np.uint8], ink: PageInk, scale: float, options: FitOptions, processor: ImageProcessor
) -> PreparedImage:
    page = crop(rgb, ink) if options.crop else rgb
    if isinstance(options.resolution, int):
        scale = min(1.0, options.resolution / max(page.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in page.shape[:2])
    return processor.prepare(page, size=processor.size(height, width))


def crop(rgb: npt.NDArray[np.uint8], ink: PageInk) -> npt.NDArray[np.uint8]:
    """Return the part of a page that is printed, with a small border; a blank page stays as it is."""
    if ink.box is None:
        return rgb
    margin = math.ceil(max(rgb.shape[:2]) * _MARGIN)
    top, left, bottom, right = ink.box
    return rgb[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]


def _scale(ink: PageInk, options: FitOptions) -> float:
    """Return what `auto` scales a page by; 1 where there is nothing to go by."""
    if options.resolution != "auto" or options.preferred_height is None or ink.text_height is None:
        return 1.0
    small = ink.small_height or ink.text_height
    height = min(max(small, ink.text_height / _SPREAD), small / _LEAST)
    scale = min(options.preferred_height / height, MAX_ENLARGEMENT)
    return 1.0 if _KEPT[0] <= scale <= _KEPT[1] else scale
