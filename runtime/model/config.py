"""config.json to `ModelConfig`: both dialects in the wild, every number bounded and checked.

Dialect one (Qwen2.5-VL as published) keeps the text fields flat beside `vision_config`; dialect two (written by
transformers 5) nests them in `text_config`. Fields that a shipped `vision_config` leaves out take the
architecture's class defaults (the 3B's).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagemill.errors import CheckpointError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower. `window_size` is in pixels, `window_cells` in merged cells a side."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    full_attention_blocks: frozenset[int]
    out_hidden_size: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_bytes(self) -> int:
        """Bytes of one patch of a still page, whose moments are equal."""
        return self.in_channels * self.patch_size**2

    @property
    def window_cells(self) -> int:
        """Side of an attention window in cells of `spatial_merge_size` x `spatial_merge_size` patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ModelConfig:
    """All that the model's arithmetic needs to know of a checkpoint."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    eos_token_ids: frozenset[int]
    dtype: str
    """The checkpoint's own dtype: bfloat16, float16 or float32."""


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from `path`; raise `CheckpointError` when it is missing, oversized or malformed."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB, too large for a settings file"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is not a whole checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold one JSON object, found {type(value).__name__}")
    return value


class _Fields:
    """Typed, bounded access to one JSON object, with errors that name the file and the field."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} should be a JSON object, found {values!r}")
        self.where, self.values = where, values

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, list) and len(set(map(repr, value))) == 1:  # patch_size may be written [14, 14]
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: {name} should be an integer from {low} to {high}, found {value!r}"
            )
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(f"{self.where}: {name} should be a positive number, found {value!r}")
        return float(value)

    def integers(self, name: str, default: list[int]) -> list[int]:
        value = self.values.get(name, default)
        if not isinstance(value, list) or not all(isinstance(v, int) and 0 <= v < 1 << 24 for v in value):
            raise CheckpointError(f"{self.where}: {name} should be a list of integers, found {value!r}")
        return value


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` (and the end tokens of `generation_config.json`) of a checkpoint folder.

    Raises `CheckpointError` for another architecture, or a field that cannot be.
    """
    path = folder / "config.json"
    root = read_json(path)
    architectures = root.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"{path}: architectures should be a list, found {architectures!r}")
    if ARCHITECTURE not in architectures and root.get("model_type") != "qwen2_5_vl":
        found = ", ".join(map(str, architectures)) or str(root.get("model_type", "none named"))
        raise CheckpointError(f"{path}: architecture {found} is not supported; pagemill runs {ARCHITECTURE}")
    nested = root.get("text_config")
    text_values = nested if nested is not None else root
    text = _read_text(_Fields(f"{path} text_config" if nested is not None else str(path), text_values), root)
    vision = _read_vision(_Fields(f"{path} vision_config", root.get("vision_config") or {}), text.hidden_size)
    fields = _Fields(str(path), root)
    dtype = next(
        (d for v in (root, text_values) for k in ("dtype", "torch_dtype") if isinstance(d := v.get(k), str)),
        "bfloat16",
    )
    return ModelConfig(
        text=text,
        vision=vision,
        image_token_id=fields.integer("image_token_id", 151655, low=0),
        eos_token_ids=_eos_token_ids(folder, root, text_values),
        dtype=dtype.removeprefix("torch."),
    )


def _read_text(f: _Fields, root: dict[str, Any]) -> TextConfig:
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = f.values.get(key)
        if isinstance(value, dict):
            rope.update(value)
    if f.values.get("use_sliding_window"):
        raise CheckpointError(
            f"{f.where}: use_sliding_window is set, and sliding-window attention is not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"{f.where}: rope type {kind!r} is not supported, only default (M-RoPE)")
    theta = _Fields(f"{f.where} rope", {"rope_theta": rope.get("rope_theta", f.values.get("rope_theta"))})
    section = _Fields(f"{f.where} rope", rope).integers("mrope_section", [16, 24, 24])
    config = TextConfig(
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", high=1024),
        num_heads=f.integer("num_attention_heads", high=4096),
        num_kv_heads=f.integer("num_key_value_heads", f.values.get("num_attention_heads"), high=4096),
        vocab_size=f.integer("vocab_size"),
        max_position_embeddings=f.integer("max_position_embeddings", 32768),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=theta.number("rope_theta", 1e6),
        mrope_section=(section[0], section[1], section[2]) if len(section) == 3 else (0, 0, 0),
        tie_word_embeddings=bool(
            f.values.get("tie_word_embeddings") or root.get("tie_word_embeddings") or False
        ),
    )
    if config.hidden_size % config.num_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{f.where}: hidden_size {config.hidden_size} does not divide into {config.num_heads} heads of even width"
        )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{f.where}: {config.num_heads} query heads do not share {config.num_kv_heads} key/value heads evenly"
        )
    if sum(config.mrope_section) * 2 != config.head_dim:
        raise CheckpointError(
            f"{f.where}: mrope_section {section} should be three numbers that add up to half of head_dim {config.head_dim}"
        )
    return config


def _read_vision(f: _Fields, text_hidden_size: int) -> VisionConfig:
    depth = f.integer("depth", 32, high=1024)
    rope = f.values.get("rope_parameters")
    config = VisionConfig(
        depth=depth,
        hidden_size=f.integer("hidden_size", 1280),
        intermediate_size=f.integer("intermediate_size", 3420),
        num_heads=f.integer("num_heads", 16, high=4096),
        in_channels=f.integer("in_channels", f.values.get("in_chans") or 3, high=16),
        patch_size=f.integer("patch_size", 14, high=256),
        spatial_merge_size=f.integer("spatial_merge_size", 2, high=16),
        temporal_patch_size=f.integer("temporal_patch_size", 2, high=16),
        window_size=f.integer("window_size", 112, high=1 << 16),
        full_attention_blocks=frozenset(f.integers("fullatt_block_indexes", [7, 15, 23, 31])),
        out_hidden_size=f.integer("out_hidden_size", text_hidden_size),
        rope_theta=_Fields(f.where, rope if isinstance(rope, dict) else {}).number("rope_theta", 10000.0),
    )
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise CheckpointError(
            f"{f.where}: hidden_size {config.hidden_size} does not divide into {config.num_heads} heads "
            "of a width that 2-D rotary embedding can use (a multiple of 4)"
        )
    if config.window_cells < 1:
        raise CheckpointError(f"{f.where}: window_size {config.window_size} is smaller than one merged cell")
    if config.out_hidden_size != text_hidden_size:
        raise CheckpointError(
            f"{f.where}: out_hidden_size {config.out_hidden_size} differs from the decoder's {text_hidden_size}"
        )
    return config


def _eos_token_ids(folder: Path, root: dict[str, Any], text: dict[str, Any]) -> frozenset[int]:
    """End tokens: generation_config.json wins (it may name several), else config.json."""
    found: Any = None
    if (path := folder / "generation_config.json").exists():
        found = read_json(path).get("eos_token_id")
    for values in (root, text):
        if found is None:
            found = values.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(
            f"{folder}: no usable eos_token_id in generation_config.json or config.json: {found!r}"
        )
    return frozenset(ids)
