"""One decoded page to patches, exactly as the Qwen2-VL image processor does it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagemill.errors import CheckpointError, ConfigError, PageError
from pagemill.kernels.patchify import Kernel, patchify
from pagemill.kernels.pixels import normalisation

MAX_ASPECT_RATIO = 200  # a limit of the Qwen2-VL image processor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 12845056
) -> tuple[int, int]:
    """Return the `(height, width)` in pixels that a page is resized to.

    Both are multiples of `factor`, their product lies between `min_pixels` and `max_pixels` where the aspect
    ratio allows it, and the aspect ratio is kept as nearly as possible. Sides round half to even, as in the
    Qwen2-VL image processor. Raises PageError for an empty page or an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise PageError(f"the page is empty ({width}x{height} px)")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise PageError(
            f"the page is {width}x{height} px, an aspect ratio of {ratio:.0f}, and the model takes at most "
            f"{MAX_ASPECT_RATIO}; cut it into pieces"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """What the vision tower and the prompt need of one page.

    `patches` is uint8 [t * h * w, 3 * patch_size**2], `levels` is what each byte stands for, float32 [3, 256]
    (`pagemill.kernels.pixels`), `grid` is `(t, h, w)` in patches, and `num_tokens` is `t * h * w // merge_size**2`
    image placeholders. `content_hash` (16 bytes, BLAKE2b of the patches, the page's size and every setting that shapes
    what the model sees) is equal for two pages if and only if the model sees the same.
    """

    patches: npt.NDArray[np.uint8]
    levels: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    num_tokens: int
    content_hash: bytes


@dataclass(frozen=True)
class ImageProcessor:
    """The image settings of a checkpoint; the defaults are those of Qwen2-VL."""

    min_pixels: int = 3136
    """The resized page has at least this many pixels."""
    max_pixels: int = 12845056
    """The resized page has at most this many pixels."""
    patch_size: int = 14
    """Pixels a side of one patch."""
    temporal_patch_size: int = 2
    """Moments in one patch; a still page repeats."""
    merge_size: int = 2
    """Patches a side of one image token."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel, on a scale of 0 to 1."""
    image_std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each channel, on a scale of 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, not {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels ({self.min_pixels}) must not exceed max_pixels ({self.max_pixels})"
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not _is_triple(values) or (name == "image_std" and min(values) <= 0):
                raise ConfigError(
                    f"{name} must be three finite numbers (positive for image_std), not {values!r}"
                )

    @classmethod
    def from_folder(cls, path: str | Path) -> ImageProcessor:
        """Read a checkpoint's image settings.

        They stand in `preprocessor_config.json`, or under `image_processor` in `processor_config.json`; a
        folder with neither has the defaults of Qwen2-VL. Pixel limits are read from `min_pixels` and
        `max_pixels`, else from `size` (`shortest_edge` and `longest_edge`, which count pixels despite their
        names). Raises CheckpointError for a file that cannot be read and for settings that would need other
        arithmetic than Qwen2-VL's.
        """
        file = Path(path) / "preprocessor_config.json"
        settings = _read_json(file)
        if settings is None:
            file = Path(path) / "processor_config.json"
            settings = (_read_json(file) or {}).get("image_processor", {})
        if not isinstance(settings, dict):
            raise CheckpointError(f"{file}: the image settings must be a JSON object")
        _require_qwen2_vl(file, settings)
        size = settings.get("size") or {}
        if not isinstance(size, dict):
            raise CheckpointError(
                f"{file}: size must be an object with shortest_edge and longest_edge, not {size!r}"
            )
        values: dict[str, Any] = {
            "min_pixels": _first(
                settings.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")
            ),
            "max_pixels": _first(
                settings.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")
            ),
        }
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            values[name] = settings.get(name)
        for name in ("image_mean", "image_std"):
            value = settings.get(name)
            values[name] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from None

    @property
    def max_tokens(self) -> int:
        """Image tokens of the largest page."""
        return self.max_pixels // (self.patch_size * self.merge_size) ** 2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the `(height, width)` in pixels that a page of `height` x `width` is resized to; see `smart_resize`."""
        factor = self.patch_size * self.merge_size
        return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)

    def prepare(
        self, rgb: npt.NDArray[np.uint8], kernel: Kernel = "native", size: tuple[int, int] | None = None
    ) -> PreparedImage:
        """Make the patches of a page, uint8 [H, W, 3], resized to `size`, or to that of the checkpoint's settings.

        `size` is `(height, width)` in pixels, multiples of `patch_size * merge_size`. Raises PageError where the page's
        shape cannot be resized.
        """
        height, width = size or self.size(*rgb.shape[:2])
        patches = patchify(
            rgb,
            height,
            width,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            kernel=kernel,
        )
        settings = (
            self.patch_size,
            self.temporal_patch_size,
            self.merge_size,
            self.image_mean,
            self.image_std,
        )
        digest = hashlib.blake2b(repr((height, width, settings)).encode(), digest_size=16)
        digest.update(patches.data)
        return PreparedImage(
            patches=patches,
            levels=normalisation(self.image_mean, self.image_std),
            grid=(1, height // self.patch_size, width // self.patch_size),
            num_tokens=patches.shape[0] // self.merge_size**2,
            content_hash=digest.digest(),
        )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return value


def _require_qwen2_vl(file: Path, settings: dict[str, Any]) -> None:
    """Refuse settings that ask for another preparation than the one done here."""
    expected: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (3,),  # bicubic
    }
    for name, accepted in expected.items():
        if settings.get(name) is not None and settings[name] not in accepted:
            raise CheckpointError(f"{file}: {name} is {settings[name]!r}, only {accepted[0]!r} is supported")
    factor = settings.get("rescale_factor")
    if factor is not None and not (isinstance(factor, (int, float)) and math.isclose(factor, 1 / 255)):
        raise CheckpointError(f"{file}: rescale_factor is {factor!r}, only 1/255 is supported")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_triple(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 3
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    )
