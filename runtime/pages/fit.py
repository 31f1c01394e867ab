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

_CLOSE_ENOUGH = 0.1  # text within a tenth of the preferred height is left as it is
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

    A PDF page is rendered at `dpi` first, or so that its longer side has N pixels. Raises what `load_page` and
    `ImageProcessor.prepare` raise.
    """
    rgb = load_page(ref, dpi)
    if is_pdf(ref):
        longest = max(rgb.shape[:2])
        if isinstance(options.resolution, int) and longest != options.resolution:
            rgb = load_page(ref, dpi * options.resolution / longest)
        elif (wanted := _scale(measure_ink(rgb), options)) > 1:
            rgb = load_page(ref, dpi * wanted)
    return fit_pixels(rgb, options, processor)


def fit_pixels(
    rgb: npt.NDArray[np.uint8], options: FitOptions, processor: ImageProcessor
) -> tuple[PreparedImage, PageInk]:
    """Measure a decoded page, uint8 [H, W, 3], and prepare it at the size that `options` ask for.

    The statistics are those of the page as given, before cropping and scaling.
    """
    ink = measure_ink(rgb)
    page = crop(rgb, ink) if options.crop else rgb
    scale = _scale(ink, options)
    if isinstance(options.resolution, int):
        scale = min(1.0, options.resolution / max(page.shape[:2]))
    if scale == 1:
        return processor.prepare(page), ink
    height, width = (max(1, round(side * scale)) for side in page.shape[:2])
    return processor.prepare(page, size=processor.size(height, width)), ink


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
    scale = min(options.preferred_height / ink.text_height, MAX_ENLARGEMENT)
    return 1.0 if abs(scale - 1) <= _CLOSE_ENOUGH else scale
