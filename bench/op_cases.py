"""What the benchmarks of single ops share: shapes, the limits of a machine, and ops with what they compute and move.

`bench/kernels` times every op on every implementation, `cpu_limits.py` those that have an aim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pagemill.kernels import QUANTISED_KV, Kernels, PackedLinear, Scheme, kv_scale_shape
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint

_BLOCK = 16
_PATCH = 2 * 3 * 14 * 14  # values of two frames, three channels
_STREAM_BYTES = 1 << 28


@dataclass(frozen=True)
class Shape:
    """The sizes of one model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    vision: int
    vision_intermediate: int
    vision_heads: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def vision_head_dim(self) -> int:
        return self.vision // self.vision_heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Output and input features of the linear layers that take the most time."""
        return {
            "qkv": (self.qkv, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "vision_qkv": (3 * self.vision, self.vision),
            "vision_gate_up": (2 * self.vision_intermediate, self.vision),
            "vision_down": (self.vision, self.vision_intermediate),
            "head": (self.vocabulary, self.hidden),
        }

    def small_matrices(self) -> dict[str, tuple[int, int]]:
        """Of the other linear layers; the merger joins four patches."""
        return {
            "out": (self.hidden, self.heads * self.head_dim),
            "vision_patch": (self.vision, _PATCH),
            "vision_proj": (self.vision, self.vision),
            "vision_merger_in": (4 * self.vision, 4 * self.vision),
            "vision_merger_out": (self.hidden, 4 * self.vision),
        }


def _tiny() -> Shape:
    config = read_config(find_checkpoint("pagemill-tiny"))
    t, v = config.text, config.vision
    return Shape(
        *(t.hidden_size, t.intermediate_size, t.num_heads, t.num_kv_heads, t.head_dim, t.vocab_size),
        *(v.hidden_size, v.intermediate_size, v.num_heads),
    )


SHAPES = {
    "tiny": _tiny(),
    "3b": Shape(2048, 11008, 16, 2, 128, 151936, 1280, 3420, 16),
    "7b": Shape(3584, 18944, 28, 4, 128, 152064, 1280, 3420, 16),
}


# The limits of this machine.


def best_seconds(
    run: Callable[[], object], clock: Callable[[], float] = time.perf_counter, rounds: int = 3
) -> float:
    """The fastest of some rounds, as other programs only ever add time."""
    seconds = []
    for _ in range(rounds):
        started = clock()
        run()
        seconds.append(clock() - started)
    return min(seconds)


@lru_cache
def _square(dtype: torch.dtype, n: int) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (n, n), dtype=dtype)
    return torch.randn(n, n).to(dtype)


def peak(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, *, size: int = 1024) -> float:
    """Operations a second of this processor in torch's matrix product just now (oneDNN), two a multiply-add; int8 sums in int32.

    The matrices are `size` square: 1024 is quick; 2048 shows 2 % more in bfloat16 and 6 % more in int8.
    """
    a = _square(dtype, size)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * size**3 / best_seconds(lambda: product(a, a), clock)


def bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second of a sum over memory that no cache holds, just now, on torch's number of threads."""
    return _STREAM_BYTES / best_seconds(_streaming_sum(torch.get_num_threads()), clock)


@lru_cache
def _streaming_sum(threads: int) -> Callable[[], object]:
    # On one thread NumPy's sum of integers reads faster than any of torch's.
    parts = np.array_split(np.ones(_STREAM_BYTES // 8, np.int64), threads)
    if threads == 1:
        return parts[0].sum
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.sum, parts))


# The ops.


@dataclass(frozen=True)
class Work:
    """One op on inputs of its own."""

    call: Callable[[], object]
    flops: float
    """Operations of one call, two a multiply-add."""
    moved: float
    """Bytes that one call has to move."""


@dataclass(eq=False)
class Ops:
    """Kernels, and where and in what dtype they compute."""

    kernels: Kernels
    dtype: torch.dtype
    device: str = "cpu"

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def pack(
        self, shape: Shape, layer: str, *, scheme: Scheme | Literal["fp8"] = "plain", bias: bool = False
    ) -> PackedLinear:
        """Random weights of a linear layer, as the model packs them: gate and up for `linear_swiglu`."""
        n, k = (shape.matrices() | shape.small_matrices())[layer]
        added, gated = self.tensor(n) if bias else None, layer.endswith("gate_up")
        weight = torch.empty(n, k, dtype=self.dtype, device=self.device).normal_()
        if scheme == "fp8":  # not rounded by the engine: only checkpoints have it
            scales = weight.abs().amax(1).float() / torch.finfo(torch.float8_e4m3fn).max
            q = (weight / scales[:, None]).to(torch.float8_e4m3fn)
            return self.kernels.pack_quantized(q, scales, None, added, gated=gated)
        if gated:
            return self.kernels.pack_swiglu(*weight.chunk(2), added, scheme=scheme)
        return self.kernels.pack_linear(weight, added, scheme=scheme)

    def linear(
        self,
        packed: Sequence[PackedLinear],
        rows: int,
        *,
        weight_bytes: float | None = None,
        out_float32: bool = False,
    ) -> Work:
        """A linear layer; calls take turns with copies of its weight, so that no cache holds it."""
        n, k, size = packed[0].out_features, packed[0].in_features, self.dtype.itemsize
        features = 2 * n if packed[0].gated else n
        x, turns = self.tensor(rows, k), cycle(packed)
        moved = features * k * size if weight_bytes is None else weight_bytes
        moved += rows * (k * size + n * (4 if out_float32 else size))
        if packed[0].gated:
            call: Callable[[], object] = lambda: self.kernels.linear_swiglu(x, next(turns))  # noqa: E731
        else:
            call = lambda: self.kernels.linear(x, next(turns), out_float32=out_float32)  # noqa: E731
        return Work(call, 2 * rows * features * k, moved)

    def cache(self, shape: Shape, sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the tables of sequences whose blocks lie scattered."""
        each = -(-context // _BLOCK)
        k, v = self.kernels.kv_cache_shapes(sequences * each, shape.kv_heads, shape.head_dim, _BLOCK)
        tables = self.ints(torch.randperm(sequences * each).view(sequences, each))
        return self.tensor(*k), self.tensor(*v), tables

    def slots(self, tables: Tensor, tokens: int) -> Tensor:
        """Where the first tokens of sequence 0 lie."""
        position = torch.arange(tokens, device=self.device)
        return tables[0].long()[position // _BLOCK] * _BLOCK + position % _BLOCK

    def paged_attention(
        self,
        shape: Shape,
        sequences: int,
        rows: int,
        context: int,
        *,
        copies: int = 1,
        kept: torch.dtype | None = None,
    ) -> Work:
        """The last `rows` tokens of every sequence; calls take turns with `copies` of the batch's cache, quantised to `kept`."""
        k, v, tables = self.cache(shape, sequences * copies, context)
        scales: list[Tensor] = []
        size = self.dtype.itemsize * shape.head_dim
        if kept is not None:
            largest = QUANTISED_KV[kept]
            k, v = (t.mul(largest / 6).round().clamp(-largest, largest).to(kept) for t in (k, v))
            size_of_scales = kv_scale_shape(len(k), shape.kv_heads, _BLOCK)
            scales = [torch.full(size_of_scales, 6 / largest, device=self.device) for _ in range(2)]
            size = shape.head_dim + 4
        turns = cycle(tables.view(copies, sequences, -1).unbind())
        q = self.tensor(sequences * rows, shape.heads, shape.head_dim)
        starts = self.ints(np.arange(sequences + 1) * rows)
        lens = self.ints([context] * sequences)
        pairs = sequences * sum(range(context - rows + 1, context + 1))
        moved = 2 * sequences * context * shape.kv_heads * size + 2 * q.numel() * self.dtype.itemsize
        scale = shape.head_dim**-0.5
        return Work(
            lambda: self.kernels.paged_attention(q, k, v, next(turns), starts, lens, scale, *scales),
            4 * pairs * shape.heads * shape.head_dim,
            moved,
        )

    def varlen_attention(self, shape: Shape, segments: int, length: int) -> Work:
        """Vision attention: every patch of a segment to every other."""
        rows, head_dim = segments * length, shape.vision_head_dim
        q, k, v = self.tensor(rows, 3, shape.vision_heads, head_dim).unbind(1)
        starts = self.ints(np.arange(segments + 1) * length)
        return Work(
            lambda: self.kernels.varlen_attention(q, k, v, starts, head_dim**-0.5),
            4 * segments * length**2 * shape.vision,
            4 * rows * shape.vision * self.dtype.itemsize,
        )
