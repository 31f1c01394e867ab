"""Launch configurations: which form of a weight and which tile for a card and a problem's size.

A small curated table per architecture, nothing measured at the first request. Measurements of the card at hand, which
`pagemill tune` makes, go before the table (`pagemill.kernels.gpu.tune`).

The tiles were chosen by their compiled code (`bench/codegen.py`): no spilled register, tensor-core instructions of the
architecture, shared memory for the pipeline's stages. **No GPU has timed them.**
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

__all__ = [
    "AttentionTile",
    "Card",
    "MatmulTile",
    "card_of",
    "fit",
    "matmul",
    "paged",
    "plain_rows",
    "splits_for",
    "varlen",
    "wide_rows",
]


Loads = Literal["pointers", "descriptors", "specialised"]
"""How the operands of a plain, int8 or fp8 product come into shared memory: each thread copies from addresses of its own; the
tensor memory accelerator copies blocks by tensor descriptors; and that with a warp that does nothing but copy, and another that
does nothing but multiply."""
LOADS: Mapping[int, tuple[Loads, ...]] = {
    90: ("pointers", "descriptors"),
    100: ("pointers", "descriptors", "specialised"),
}
"""By architecture: what there is. Others have pointers. Of sm_90, Triton 3.9 does not compile the third for 128 rows in four
warps, and compiles the second instead for eight."""


@dataclass(frozen=True)
class MatmulTile:
    """How a product is launched. Rows of x, features and inputs of a tile, split-K, warps, pipeline stages."""

    rows: int
    features: int
    inputs: int
    splits: int
    warps: int
    stages: int
    parts: int = 1
    """Products that the inputs of a tile are cut into."""
    loads: Loads = "pointers"
    """Of x, too, where its rows begin at multiples of 16 bytes; pointers where they do not."""


@dataclass(frozen=True)
class AttentionTile:
    """How attention is launched: rows of queries (a power of two >= 16), keys of a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Card:
    """What a launch depends on: the card's name, its architecture in the tables below, its multiprocessors."""

    name: str
    arch: int
    processors: int


INTERPRETER = Card("interpreter", 0, 1)
_ARCH = {80: 80, 86: 89, 87: 80, 89: 89, 90: 90, 100: 100, 103: 100}
"""Compute capability to the row of the tables that suits it: 86 has the 100 KB of shared memory of 89, 87 the 164 KB of 80.
Others (120 and 121, with 100 KB and without tcgen05) are taken for 89, which asks least of a multiprocessor."""
AMD = 942


@lru_cache
def card_of(device: torch.device) -> Card:
    """The card of a tensor's device; the interpreter for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    arch = AMD if torch.version.hip else _ARCH.get(10 * found.major + found.minor, 89)
    return Card(found.name, arch, found.multi_processor_count)


def _tiles(*rows: tuple[int, int, int, int, int], loads: Loads = "pointers") -> tuple[MatmulTile, ...]:
    """From small to large: rows, features, inputs, warps, stages."""
    return tuple(MatmulTile(m, n, k, 1, warps, stages, loads=loads) for m, n, k, warps, stages in rows)


# Two products at once (gate and up) have twice the sums to hold: their tiles are half as wide. On sm_80 and sm_89 a tile of 128 x
# 128 of them spills registers.
_PLAIN = _tiles(
    (16, 64, 64, 4, 4), (32, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 8, 4), (128, 128, 64, 8, 3)
)
_PLAIN_GATED = _tiles((16, 64, 64, 4, 4), (32, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3))
_BYTE = _tiles(
    (16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 8, 4), (128, 128, 128, 8, 3)
)  # fmt: skip
_BYTE_GATED = _tiles((16, 64, 128, 4, 4), (32, 64, 128, 4, 3), (64, 64, 128, 4, 3), (128, 64, 128, 8, 3))
# With one product in the loop, Triton keeps the next one's operands in registers from step to step on sm_80 and sm_89, and packs
# and unpacks their bytes every time: eight instructions for one of the tensor cores. With two it does not.
_TWO_BYTE = tuple(replace(tile, parts=2) for tile in _BYTE)
# The int4 product has its features as the tensor cores' rows, 16 a warp: with more warps than that, two would compute the same.
_INT4 = _tiles((16, 64, 64, 4, 4), (32, 64, 64, 4, 4), (64, 64, 64, 4, 3), (64, 128, 64, 8, 3))
_INT4_GATED = _tiles((16, 64, 64, 4, 4), (32, 64, 64, 4, 4), (64, 32, 64, 4, 4))
# Of 64 features or more and four warps, wgmma: it waits for the conversion of every group, and Triton copies such weights 8 bytes
# at a time. Few rows are bound by memory, and mma does them.
_HOPPER_INT4 = _tiles(
    (16, 64, 64, 2, 4),
    (32, 32, 64, 2, 4),
    (64, 32, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
)
_HOPPER_INT4_GATED = _tiles((16, 32, 64, 2, 4), (32, 32, 64, 2, 4), (64, 32, 64, 4, 4), (64, 128, 64, 8, 3))
# Descriptors where memory does not bound the product and the code is shorter with them: a pair of 128 x 64 in bfloat16 has 12.6
# other instructions for each wgmma with pointers, and 14.4 with descriptors.
_HOPPER_PLAIN = (
    *_PLAIN[:-1],
    *_tiles((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), loads="descriptors"),
)
_HOPPER_PLAIN_GATED = (
    *_PLAIN_GATED[:-1],
    *_tiles((128, 64, 64, 8, 4)),
    *_tiles((128, 128, 64, 8, 3), loads="descriptors"),
)
_HOPPER_BYTE = (
    *_BYTE[:-1],
    *_tiles((128, 128, 128, 8, 4), (128, 256, 128, 8, 3), loads="descriptors"),
)
# 32 rows of fp8 are converted for mma: of 64 features, they spill.
_HOPPER_FP8 = (_HOPPER_BYTE[0], *_tiles((32, 32, 128, 4, 4)), *_HOPPER_BYTE[2:])
_HOPPER_BYTE_GATED = (
    *_BYTE_GATED[:-1],
    *_tiles((128, 64, 128, 8, 4), (128, 128, 128, 8, 3), loads="descriptors"),
)

_AMPERE = {
    ("plain", False): (*_PLAIN, *_tiles((128, 256, 64, 8, 3))), ("plain", True): _PLAIN_GATED,
    ("int8", False): _TWO_BYTE, ("int8", True): _BYTE_GATED,
    ("fp8", False): _TWO_BYTE, ("fp8", True): _BYTE_GATED,
    ("int4", False): _INT4, ("int4", True): _INT4_GATED,
}  # fmt: skip
_HOPPER = _AMPERE | {
    ("plain", False): _HOPPER_PLAIN, ("plain", True): _HOPPER_PLAIN_GATED,
    ("int8", False): _HOPPER_BYTE, ("int8", True): _HOPPER_BYTE_GATED,
    ("fp8", False): _HOPPER_FP8, ("fp8", True): _HOPPER_BYTE_GATED,
    ("int4", False): _HOPPER_INT4, ("int4", True): _HOPPER_INT4_GATED,
}  # fmt: skip
_BLACKWELL = {
    (form, gated): tuple(
        replace(tile, loads="specialised") if tile.rows >= 128 and form != "int4" else tile for tile in tiles
    )
    for (form, gated), tiles in _HOPPER.items()
}
# By pointers these spill, one with a residual and one with split-K; with descriptors their loops are a quarter shorter.
for _form, _rows in (("plain", 64), ("int8", 32)):
    _BLACKWELL[_form, False] = tuple(
        replace(tile, loads="descriptors") if (tile.rows, tile.features) == (_rows, 64) else tile
        for tile in _BLACKWELL[_form, False]
    )
_CDNA = _AMPERE | {("plain", False): _PLAIN}  # 64 KB of shared memory: no tile of 128 x 256
_INTERPRETED = _tiles(
    (16, 256, 256, 4, 1), (64, 256, 256, 4, 1)
)  # a program at a time: few of them, whatever their size

MATMUL: Mapping[int, Mapping[tuple[str, bool], tuple[MatmulTile, ...]]] = {
    0: dict.fromkeys(_AMPERE, _INTERPRETED),
    80: _AMPERE,
    89: _AMPERE,
    90: _HOPPER,
    100: _BLACKWELL,
    AMD: {key: tuple(replace(tile, stages=2, parts=1) for tile in tiles) for key, tiles in _CDNA.items()},
}
"""By architecture, then by form and whether gate and up are multiplied at once: tiles from small to large."""

_MMA, _WGMMA = (80, 89), (90, 100)
PAGED: Mapping[int, tuple[AttentionTile, AttentionTile]] = {
    0: (AttentionTile(16, 64, 4, 1), AttentionTile(128, 64, 4, 1)),
    **dict.fromkeys(_MMA, (AttentionTile(16, 64, 4, 2), AttentionTile(128, 64, 8, 3))),
    **dict.fromkeys(_WGMMA, (AttentionTile(16, 64, 4, 3), AttentionTile(128, 128, 8, 3))),
    AMD: (AttentionTile(16, 64, 4, 2), AttentionTile(128, 64, 8, 2)),
}
"""By architecture: where every sequence has one token, and where some have more."""
PAGED_QUANTISED: Mapping[int, tuple[AttentionTile, AttentionTile]] = {
    **PAGED,
    **dict.fromkeys(_MMA, (AttentionTile(16, 64, 4, 3), AttentionTile(128, 32, 4, 3))),
    **dict.fromkeys(_WGMMA, (AttentionTile(16, 64, 4, 3), AttentionTile(128, 64, 8, 3))),
}
"""The same over int8 and fp8, whose conversion takes registers. With mma every warp converts all keys for its own rows: four
warps of 32 rows convert half of what eight of 16 do."""

VARLEN: Mapping[int, tuple[AttentionTile, AttentionTile]] = {
    0: (AttentionTile(64, 64, 4, 1), AttentionTile(64, 64, 4, 1)),
    80: (AttentionTile(64, 64, 4, 3), AttentionTile(64, 64, 4, 3)),
    89: (AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
    **dict.fromkeys(_WGMMA, (AttentionTile(64, 64, 4, 3), AttentionTile(128, 128, 8, 3))),
    AMD: (AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
}
"""By architecture: windows (segments of 64 rows or fewer on average), and whole images. The shared memory of 89 has room for one
program of three stages and for two of two."""

WIDE_ROWS: Mapping[int, int] = {0: 64, 80: 48, 89: 128, 90: 80, 100: 80, AMD: 64}
"""By architecture: rows of x from which on a layer that is packed twice, int4 and int8, takes int8. Modelled: int8 moves
twice the bytes, int4 multiplies in bfloat16 at about 0.6 of its peak, beside the conversion. They take equal time where
2 M N K / (0.6 peak) is N K bytes over the bandwidth, at M = 0.3 peak / bandwidth: 46 on A100, 126 on L40S, 89 on H100, 84 on
B200."""

PLAIN_ROWS: Mapping[int, int] = {0: 1 << 30, 80: 1024, 89: 8192, 90: 1536, 100: 768, AMD: 256}
"""By architecture: rows of x from which on an int4 weight without an int8 twin becomes a plain one for the call. Modelled: that
moves 2.5 N K bytes at 0.85 of the bandwidth, after which the product runs at 0.75 of the peak. The int4 product issues its
conversions beside the tensor cores' work: by its loop's instructions (`bench/codegen.py`) at about 0.6 of the peak on sm_80 and
sm_90, 0.68 on sm_89, whose tensor cores take twice as long, 0.46 on sm_100, and below 0.2 on gfx942. They take equal time at
M = 1.25 (peak / bandwidth) / 0.85 / (1 / e - 1 / 0.75): 675 on A100, 4,490 on L40S, 1,300 on H100, 490 on B200, 100 on MI300X;
the table asks for more, for the weight is rounded on the way and takes memory."""

_BYTES = {"plain": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
_MOST_SPLITS = 8


def wide_rows(card: Card) -> int:
    """Rows of x from which on the int8 form of a layer that is packed twice is taken."""
    return WIDE_ROWS[card.arch]


def plain_rows(card: Card) -> int:
    """Rows of x from which on an int4 weight becomes a plain one for the call."""
    return PLAIN_ROWS[card.arch]


@lru_cache(4096)
def matmul(card: Card, form: str, gated: bool, m: int, n: int, k: int) -> MatmulTile:
    """The tile, with its split-K, of `m` rows times `n` features (of each of gate and up) of `k` inputs.

    The largest tile that gives every multiprocessor a program; where none does, the smallest with min(64, m) rows, and K is cut
    so that there are two programs for each, but the partial sums, which are written and read, stay fewer bytes than the weights.
    """
    least = min(64, max(16, 1 << (m - 1).bit_length()))
    tiles = [tile for tile in MATMUL[card.arch][form, gated] if tile.rows >= least]
    tiles = [tile for tile in tiles if tile.rows <= max(m, tiles[0].rows)]

    def programs(tile: MatmulTile) -> int:
        return -(-m // tile.rows) * -(-n // tile.features)

    if full := [tile for tile in tiles if programs(tile) >= card.processors]:
        return full[-1]
    tile = tiles[0]
    products = 2 if gated else 1
    affordable = int(k * _BYTES[form]) // (8 * m * products) if m else 1
    splits = min(
        2 * card.processors // max(1, programs(tile)), affordable, k // (4 * tile.inputs), _MOST_SPLITS
    )
    return replace(tile, splits=max(1, splits))


def paged(card: Card, *, decoding: bool, quantised: bool = False) -> AttentionTile:
    """The tile of attention over the cache; `decoding`: every sequence has one token."""
    return (PAGED_QUANTISED if quantised else PAGED)[card.arch][0 if decoding else 1]


def varlen(card: Card, rows: int, segments: int) -> AttentionTile:
    """The tile of attention over `segments` with `rows` in all."""
    return VARLEN[card.arch][0 if rows <= 64 * segments else 1]


def fit(
    card: Card, tile: AttentionTile, row_bytes: int, *, group: int = 1, quantised: bool = False
) -> AttentionTile:
    """`tile` for heads of `row_bytes`: above 256 (float32 of 128, head_dim 256) one that every card's shared memory holds. On
    sm_89, where keys are converted and the query heads of a group are no power of two, one of fewer rows: more spill registers.
    """
    if not card.arch:
        return tile
    if row_bytes > 256:
        return AttentionTile(min(tile.rows, 64), 32, 4, 2)
    if card.arch == 89 and quantised and group & (group - 1):
        return replace(tile, rows=min(tile.rows, 64))
    return tile


def splits_for(card: Card, programs: int, longest: int, keys: int) -> int:
    """Ranges of keys for a launch of `programs` without them: enough for two programs on each of the GPU's multiprocessors, but
    with at least four tiles of `keys` in a range of the `longest` context, and at most 32."""
    wanted = 2 * card.processors // max(programs, 1)
    return max(1, min(wanted, longest // (4 * keys), 32))
