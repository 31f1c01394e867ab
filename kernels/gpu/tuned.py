"""The launch configuration of a call: what `pagemill tune` measured on the card, else the table (`configs.py`).

Measurements are kept in a JSON file a card, Triton version and state of the kernels, in the folder `tuned` of the user's cache. A
file that is not what `save` writes is ignored with a warning.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import triton

from pagemill.files import written_whole
from pagemill.folders import cache_folder
from pagemill.kernels.gpu import configs
from pagemill.kernels.gpu.configs import AttentionTile, Card, MatmulTile

__all__ = [
    "ATTENTION",
    "Product",
    "Tuned",
    "load",
    "matmul",
    "paged",
    "path_of",
    "plain_rows",
    "save",
    "varlen",
    "wide_rows",
]

ATTENTION = ("decode", "prefill", "decode_quantised", "prefill_quantised", "windows", "images")
"""Kinds of attention that have a tile of their own; quantised: over keys and values in int8 or fp8."""

_LARGEST = 1 << 22  # bytes of a file
_KERNELS = ("attention.py", "linear.py")
_POWERS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Product:
    """A linear layer: its form, whether it is a gated pair, features (of each of the pair) and inputs."""

    form: str
    gated: bool
    features: int
    inputs: int


@dataclass(frozen=True)
class Tuned:
    """What was fastest. Tiles of a product stand beside the most rows of x that they are for, from few to many."""

    matmul: Mapping[Product, tuple[tuple[int, MatmulTile], ...]] = field(default_factory=dict)
    attention: Mapping[str, AttentionTile] = field(default_factory=dict)
    """By kind, of `ATTENTION`."""
    wide_rows: int | None = None
    """Rows of x from which on int8 takes less time than int4; None: it was not measured."""
    plain_rows: int | None = None
    """Rows of x from which on int4 made plain takes less time than int4; None: it was not measured."""


def _measured(card: Card) -> Tuned | None:
    return load(card.name) if card.arch else None  # the interpreter has no architecture


def matmul(card: Card, form: str, gated: bool, m: int, n: int, k: int) -> MatmulTile:
    """`configs.matmul`, or what was fastest for this product and about so many rows."""
    found = _measured(card)
    if found is None or not (tiles := found.matmul.get(Product(form, gated, n, k))):
        return configs.matmul(card, form, gated, m, n, k)
    return next((tile for most, tile in tiles if m <= most), tiles[-1][1])


def paged(card: Card, *, decoding: bool, quantised: bool = False) -> AttentionTile:
    """`configs.paged`, or what was fastest: over bfloat16, and over int8."""
    found = _measured(card)
    kind = ("decode" if decoding else "prefill") + ("_quantised" if quantised else "")
    tile = found.attention.get(kind) if found else None
    return tile or configs.paged(card, decoding=decoding, quantised=quantised)


def varlen(card: Card, rows: int, segments: int) -> AttentionTile:
    """`configs.varlen`, or what was fastest."""
    found = _measured(card)
    tile = found.attention.get("windows" if rows <= 64 * segments else "images") if found else None
    return tile or configs.varlen(card, rows, segments)


def wide_rows(card: Card) -> int:
    """`configs.wide_rows`, or what was measured."""
    found = _measured(card)
    return (found and found.wide_rows) or configs.wide_rows(card)


def plain_rows(card: Card) -> int:
    """`configs.plain_rows`, or what was measured."""
    found = _measured(card)
    return (found and found.plain_rows) or configs.plain_rows(card)


@lru_cache(1)
def _kernels_digest() -> str:
    sources = (Path(__file__).with_name(name).read_bytes() for name in _KERNELS)
    return hashlib.sha256(triton.__version__.encode() + b"".join(sources)).hexdigest()[:16]


def path_of(card_name: str) -> Path:
    """The file of a card."""
    slug = re.sub(r"[^a-z0-9]+", "-", card_name.lower()).strip("-")
    return cache_folder("tuned") / f"{slug}-{_kernels_digest()}.json"


def save(card_name: str, tuned: Tuned) -> Path:
    """Write the card's file, whole or not at all; return its path. Raises OSError."""
    path = path_of(card_name)
    content = {
        "card": card_name,
        "triton": triton.__version__,
        "kernels": _kernels_digest(),
        "matmul": [
            asdict(product) | {"tiles": [{"most_rows": most, **asdict(tile)} for most, tile in tiles]}
            for product, tiles in tuned.matmul.items()
        ],
        "attention": {kind: asdict(tile) for kind, tile in tuned.attention.items()},
        "wide_rows": tuned.wide_rows,
        "plain_rows": tuned.plain_rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


@lru_cache
def load(card_name: str) -> Tuned | None:
    """What was measured on the card with these kernels, if anything was; read once in a process."""
    path = path_of(card_name)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return _parse(json.loads(path.read_text(encoding="utf-8")), card_name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(
            f"{path} is ignored, for it is not what pagemill tune writes ({error}); delete it, or run pagemill tune again",
            stacklevel=2,
        )
        return None


def _parse(content: Any, card_name: str) -> Tuned:
    if content["card"] != card_name or content["kernels"] != _kernels_digest():
        raise ValueError("it is of another card or of other kernels")
    matmul: dict[Product, tuple[tuple[int, MatmulTile], ...]] = {}
    for entry in content["matmul"]:
        tiles = [dict(tile) for tile in entry.pop("tiles")]
        pairs = [(_whole(tile.pop("most_rows"), 1, 1 << 30), _matmul_tile(tile)) for tile in tiles]
        if not pairs or [most for most, _ in pairs] != sorted({most for most, _ in pairs}):
            raise ValueError("rows of tiles should increase")
        matmul[Product(**entry)] = tuple(pairs)
    attention = {
        kind: _attention_tile(content["attention"][kind])
        for kind in ATTENTION
        if kind in content["attention"]
    }
    wide, plain = (
        None if content[name] is None else _whole(content[name], 1, 1 << 30)
        for name in ("wide_rows", "plain_rows")
    )
    return Tuned(matmul, attention, wide, plain)


def _whole(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} should be a whole number from {low} to {high}")
    return value


def _power(value: Any) -> int:
    if type(value) is not int or value not in _POWERS:
        raise ValueError(f"{value!r} should be one of {', '.join(map(str, _POWERS))}")
    return value


def _matmul_tile(tile: dict[str, Any]) -> MatmulTile:
    for name in ("rows", "features", "inputs"):
        _power(tile[name])
    for name, most in (("splits", 64), ("warps", 16), ("stages", 8), ("parts", 8)):
        _whole(tile[name], 1, most)
    if tile["loads"] not in get_args(configs.Loads):
        raise ValueError(f"{tile['loads']!r} should be one of {', '.join(get_args(configs.Loads))}")
    return MatmulTile(**tile)


def _attention_tile(tile: dict[str, Any]) -> AttentionTile:
    for name in ("rows", "keys"):
        _power(tile[name])
    for name, most in (("warps", 16), ("stages", 8)):
        _whole(tile[name], 1, most)
    return AttentionTile(**tile)
