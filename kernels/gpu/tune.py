"""Measure launch configurations on a GPU: what `pagemill tune` does.

The candidates are the tables' own tiles, those of other architectures included, with more or fewer pipeline stages and cuts of K.
The table's choice stays unless another is clearly faster. What times a call is a parameter, so that all but the
measuring itself is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

import torch
import triton
from torch import Tensor

from pagemill.kernels.gpu import attention, configs, linear, tuned
from pagemill.kernels.gpu.configs import AttentionTile, Card, MatmulTile
from pagemill.kernels.gpu.tuned import Product, Tuned
from pagemill.kernels.linear import PackedLinear

__all__ = ["Bench", "Heads", "attention_candidates", "matmul_candidates", "products_of", "rows_of", "tune"]

ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
"""Rows of x that products are measured at: decode steps, steps with drafts, prefill chunks and images."""
_MOST_OUTPUTS = 1 << 27  # of a product: the output layer is never asked for the rows of a whole prefill
_PAGED = {"decode": (32, 1, 1500), "prefill": (2, 1024, 1024)}
"""Sequences, tokens of each, and tokens of its context."""
_SEGMENTS = {"windows": [64] * 64, "images": [4096]}
"""Patches of what attends to itself."""
_CLEARLY = 0.97
"""Share of the table's time from which on another configuration is taken: less is the spread of measurements."""

Seconds = Callable[[Product, int, MatmulTile], float]
"""Seconds of a product of so many rows in a tile; inf where it cannot run."""
AttentionSeconds = Callable[[str, AttentionTile], float]
_Tile = TypeVar("_Tile", MatmulTile, AttentionTile)


@dataclass(frozen=True)
class Heads:
    """Attention heads of the decoder and of the vision tower."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vision_heads: int
    vision_head_dim: int
    block_size: int = 16


def rows_of(product: Product) -> list[int]:
    """The rows that a product is measured at."""
    return [rows for rows in ROWS if rows * product.features <= _MOST_OUTPUTS]


def matmul_candidates(card: Card, product: Product, rows: int) -> list[MatmulTile]:
    """Tiles to try, the table's choice first."""
    chosen = configs.matmul(card, product.form, product.gated, rows, product.features, product.inputs)
    found = [chosen]
    for tables in configs.MATMUL.values():
        if tables is configs.MATMUL[configs.INTERPRETER.arch]:
            continue
        for tile in tables[product.form, product.gated]:
            if tile.rows > max(16, 2 * rows) or (tile.rows < 64 and rows > 128):
                continue
            # Descriptors pay where the tensor cores are busy; int4 has none.
            many = tile.rows >= 64 and product.form != "int4"
            found += [
                replace(tile, stages=stages, splits=splits, loads=loads)
                for loads in (configs.LOADS.get(card.arch, ("pointers",)) if many else ("pointers",))
                for stages in (tile.stages - 1, tile.stages, tile.stages + 1)
                for splits in ((1, 2, 4, 8) if rows <= 64 else (1,))
                if splits == 1 or product.inputs >= splits * 2 * tile.inputs
            ]
    return list(dict.fromkeys(found))


def _paged_kind(kind: str) -> tuple[str, bool]:
    """A kind of `ATTENTION` without its suffix, and whether it had one."""
    return kind.removesuffix("_quantised"), kind.endswith("_quantised")


def attention_candidates(card: Card, kind: str) -> list[AttentionTile]:
    """Tiles to try, the table's choice first."""
    paged, quantised = _paged_kind(kind)
    if paged in _PAGED:
        chosen = configs.paged(card, decoding=paged == "decode", quantised=quantised)
    else:
        chosen = configs.VARLEN[card.arch][kind == "images"]
    rows = (16, 32) if paged == "decode" else (64, 128)
    tiles = (
        AttentionTile(r, keys, warps, stages)
        for r in rows for keys in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)
    )  # fmt: skip
    return list(dict.fromkeys([chosen, *tiles]))


def tune(
    card: Card,
    products: Iterable[Product],
    seconds: Seconds,
    attention_seconds: AttentionSeconds,
    unpack_seconds: Callable[[Product], float],
    progress: Callable[[str], None] = lambda what: None,
) -> Tuned:
    """The fastest configurations; `progress` is told what was measured, after each product and kind of attention.

    `unpack_seconds`: of making an int4 weight a plain one, asked where both forms are measured.

    Raises ValueError where nothing runs, not even the table's choice.
    """
    matmul: dict[Product, tuple[tuple[int, MatmulTile], ...]] = {}
    best: dict[tuple[Product, int], float] = {}
    for product in dict.fromkeys(products):
        tiles = []
        for rows in rows_of(product):
            times = {tile: seconds(product, rows, tile) for tile in matmul_candidates(card, product, rows)}
            tile = _fastest(times, f"{product} with {rows} rows")
            tiles.append((rows, tile))
            best[product, rows] = times[tile]
        matmul[product] = tuple(tiles)
        progress(f"{product.form} {product.features} x {product.inputs}")
    tiles_of = {}
    for kind in tuned.ATTENTION:
        tiles_of[kind] = _fastest(
            {tile: attention_seconds(kind, tile) for tile in attention_candidates(card, kind)}, kind
        )
        progress(f"attention: {kind}")
    unpack = {
        product: unpack_seconds(product)
        for product in matmul
        if product.form == "int4" and replace(product, form="plain") in matmul
    }
    return Tuned(matmul, tiles_of, _crossover(best, "int8"), _crossover(best, "plain", unpack))


def _fastest(times: dict[_Tile, float], what: str) -> _Tile:
    """The first, unless another is clearly faster."""
    first = next(iter(times))
    quickest = min(times, key=lambda tile: times[tile])
    if times[quickest] == inf:
        raise ValueError(f"no configuration of {what} runs on this GPU")
    return quickest if times[quickest] < _CLEARLY * times[first] else first


def _crossover(
    best: dict[tuple[Product, int], float], form: str, before: Mapping[Product, float] | None = None
) -> int | None:
    """The rows from which on all products that have both forms take less time in `form` than in int4, one layer of each; with
    what an int4 product takes `before` the other."""
    both = [
        (product, replace(product, form=form))
        for product in dict.fromkeys(product for product, _ in best)
        if product.form == "int4" and (replace(product, form=form), 1) in best
    ]
    first = before or {}
    if not both:
        return None
    most = max(ROWS) * 2
    for rows in reversed(ROWS):
        measured = [pair for pair in both if (pair[0], rows) in best]
        int4 = sum(best[four, rows] for four, _ in measured)
        other = sum(best[pair, rows] + first.get(four, 0.0) for four, pair in measured)
        if measured and other >= int4:
            return most
        most = rows
    return 1


class Bench:
    """Times calls on a GPU: medians of device events, the cache between two calls cold (`triton.testing.do_bench`)."""

    def __init__(self, device: torch.device, heads: Heads, milliseconds: int = 20) -> None:
        self.device, self.heads, self.milliseconds = device, heads, milliseconds
        self._product: tuple[Product, PackedLinear] | None = None

    def matmul(self, product: Product, rows: int, tile: MatmulTile) -> float:
        """Seconds of a product in bfloat16; inf where the tile does not fit the GPU."""
        if self._product is None or self._product[0] != product:
            self._product = None
            self._product = product, self._packed(product)
        packed = self._product[1]
        x = torch.randn(rows, product.inputs, dtype=torch.bfloat16, device=self.device)
        return self._seconds(lambda: linear.linear(x, packed, tile=tile))

    def unpack(self, product: Product) -> float:
        """Seconds of making an int4 weight a plain one in bfloat16."""
        packed = self._packed(product)
        return self._seconds(lambda: linear.unpack_int4(packed, torch.bfloat16))

    def attention(self, kind: str, tile: AttentionTile) -> float:
        """Seconds of attention in bfloat16 over contexts, chunks and images of pages; inf where the tile does not fit. Quantised
        is int8, which stands for fp8 as in the table."""
        paged, quantised = _paged_kind(kind)
        if paged in _PAGED:
            return self._paged(tile, *_PAGED[paged], quantised)
        lengths = _SEGMENTS[kind]
        shape = sum(lengths), self.heads.vision_heads, self.heads.vision_head_dim
        q, k, v = (self._normal(*shape) for _ in range(3))
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
        return self._seconds(
            lambda: attention.varlen_attention(q, k, v, offsets, shape[2] ** -0.5, tile=tile)
        )

    def _paged(
        self, tile: AttentionTile, sequences: int, tokens: int, context: int, quantised: bool
    ) -> float:
        h = self.heads
        if tile.rows < h.num_heads // h.num_kv_heads:
            return inf
        blocks = -(-context // h.block_size)
        shape = sequences * blocks, h.num_kv_heads, h.block_size, h.head_dim
        scales = {}
        if quantised:
            keys, values = (self._codes(*shape) for _ in range(2))
            scales = {
                name: torch.full(shape[:3], 1 / 64, device=self.device) for name in ("k_scale", "v_scale")
            }
        else:
            keys, values = self._normal(*shape), self._normal(*shape)
        q = self._normal(sequences * tokens, h.num_heads, h.head_dim)
        order = torch.randperm(shape[0], device=self.device).to(torch.int32)
        starts = torch.arange(sequences + 1, device=self.device, dtype=torch.int32) * tokens
        lens = torch.full((sequences,), context, device=self.device, dtype=torch.int32)
        card = configs.card_of(self.device)
        programs = (len(q) * (h.num_heads // h.num_kv_heads) // tile.rows + sequences) * h.num_kv_heads
        splits = configs.splits_for(card, programs, context, tile.keys)
        return self._seconds(
            lambda: attention.paged_attention(
                q, keys, values, order.view(sequences, blocks), starts, lens, h.head_dim**-0.5, tile=tile, num_splits=splits,
                **scales,
            )
        )  # fmt: skip

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)

    def _codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)

    def _packed(self, product: Product) -> PackedLinear:
        rows, k = product.features * (1 + product.gated), product.inputs
        if product.form == "plain":
            return linear.pack_plain(self._normal(rows, k), gated=product.gated)
        if product.form == "int4":
            groups = -(-k // 128)
            q, zeros = (
                torch.randint(16, (rows, columns), dtype=torch.uint8, device=self.device)
                for columns in (k, groups)
            )
            scales = torch.rand(rows, groups, device=self.device)
            return linear.pack_int4(q, scales, zeros, gated=product.gated)
        codes = self._codes(rows, k)
        if product.form == "fp8":
            codes = codes.float().to(torch.float8_e4m3fn)
        return linear.pack_scaled(codes, torch.rand(rows, device=self.device), gated=product.gated)

    def _seconds(self, run: Callable[[], object]) -> float:
        try:
            run()
            taken: float = triton.testing.do_bench(run, warmup=5, rep=self.milliseconds, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            return inf
        return taken / 1e3


def products_of(layers: Sequence[tuple[bool, int, int]], forms: Sequence[str]) -> list[Product]:
    """Every layer `(gated, features, inputs)` in every form."""
    return [Product(form, *layer) for form in forms for layer in layers]
