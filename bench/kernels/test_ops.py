"""Microbenchmarks of every op on every implementation at hand, as fractions of what this machine can do.

    pytest bench/kernels --benchmark-json=bench/results/kernels.json
    python bench/compare_kernels.py bench/results/kernels.json        # the table
    python bench/compare_kernels.py OLD.json NEW.json                 # what got slower

Shapes are those of Qwen2.5-VL-3B and of pagemill-tiny, at one decoding sequence, a batch of 16, and a prefill chunk. An op's
limit is the longer of its arithmetic at the peak of torch's matrix product (of its dtype) and its bytes, each moved once, at the
bandwidth of a streaming sum. Both are measured before and after every op; the best of the whole run is the limit, and how far the
two stayed behind it around an op tells how disturbed that op was. The fraction is the limit over the fastest round: above 1 an op
works out of the caches. `-k` picks (`-k "linear and 3b"`, `-k native-avx512`), PAGEMILL_BENCH_THREADS sets the threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill import kernels
from pagemill.kernels import Kernels, kv_cache_shapes, select
from pagemill.kernels.patchify import patchify
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint

_ROUND_S = 2e-3
"""Least seconds of one timed round, of as many calls as it takes, and the seconds that a benchmark may use."""
_BUDGET_S = 0.2
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_IMPLEMENTATIONS = ["reference", *(f"native-{isa}" for isa in _native.isas())]
if torch.cuda.is_available():
    _IMPLEMENTATIONS.append("reference-cuda")
_BLOCK = 16


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

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Output and input features of the linear layers."""
        return {
            "qkv": (self.qkv, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "vision_qkv": (3 * self.vision, self.vision),
            "vision_down": (self.vision, self.vision_intermediate),
        }


def _tiny() -> Shape:
    config = read_config(find_checkpoint("pagemill-tiny"))
    t, v = config.text, config.vision
    return Shape(
        *(t.hidden_size, t.intermediate_size, t.num_heads, t.num_kv_heads, t.head_dim, t.vocab_size),
        *(v.hidden_size, v.intermediate_size, v.num_heads),
    )


SHAPES = {"tiny": _tiny(), "3b": Shape(2048, 11008, 16, 2, 128, 151936, 1280, 3420, 16)}
_ROWS = (1, 16, 256)


# The limits of this machine.


def _best(run: Callable[[], object], device: str, rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@lru_cache
def _square(dtype: torch.dtype, device: str) -> Tensor:
    n = 1024 if device == "cpu" else 8192
    return torch.randn(n, n).to(device, dtype)


@lru_cache
def _stream(device: str) -> Tensor:
    return torch.ones(1 << 26, device=device)


def peak(dtype: torch.dtype, device: str) -> float:
    """Operations a second of torch's matrix product just now, two a multiply-add."""
    a = _square(dtype, device)
    return 2 * len(a) ** 3 / _best(lambda: a @ a, device)


def bandwidth(device: str) -> float:
    """Bytes a second of a sum over memory that no cache holds, just now."""
    x = _stream(device)
    return x.numel() * x.itemsize / _best(lambda: x.sum(), device)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if count := os.environ.get("PAGEMILL_BENCH_THREADS"):
        kernels.set_num_threads(int(count))


class Timer:
    """Times one op and notes its share of the limit."""

    def __init__(self, benchmark: Any, implementation: str, dtype: torch.dtype) -> None:
        kind, _, isa = implementation.partition("-")
        self.device = "cuda" if isa == "cuda" else "cpu"
        if kind == "native":
            _native.set_isa(isa)
        self.benchmark, self.dtype = benchmark, dtype
        self.kernels: Kernels = select(kind, torch.device(self.device), dtype)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(self.device, dtype or self.dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def run(self, op: Callable[[], object], *, flops: float = 0.0, moved: float) -> None:
        """Time `op`, which does `flops` operations and has to move `moved` bytes."""

        def call() -> None:
            op()
            _wait(self.device)

        if self.benchmark.disabled:  # only to see that it runs
            self.benchmark(call)
            return
        before = peak(self.dtype, self.device), bandwidth(self.device)
        call()
        started = time.perf_counter()
        call()
        once = max(time.perf_counter() - started, 1e-7)
        calls = max(1, round(_ROUND_S / once))
        rounds = int(min(max(_BUDGET_S / (calls * once), _LEAST_ROUNDS), _MOST_ROUNDS))
        self.benchmark.pedantic(call, rounds=rounds, iterations=calls)
        after = peak(self.dtype, self.device), bandwidth(self.device)
        self.benchmark.extra_info.update(
            flops=flops,
            bytes=moved,
            arithmetic=f"{self.dtype} on {self.device}",
            peak_flops=max(before[0], after[0]),
            bandwidth=max(before[1], after[1]),
            threads=_native.num_threads(),
        )


_EVERY = [(name, dtype) for name in _IMPLEMENTATIONS for dtype in _DTYPES]
_EVERY = [pair for pair in _EVERY if pair != ("native-avx512bf16", "f32")]  # that is native-avx512's


@pytest.fixture(params=_EVERY, ids="-".join)
def timer(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    torch.manual_seed(0)
    isa = _native.isa()
    name, dtype = request.param
    with torch.inference_mode():
        yield Timer(benchmark, name, _DTYPES[dtype])
    _native.set_isa(isa)


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


# The ops.


@pytest.mark.parametrize("rows", _ROWS)
@pytest.mark.parametrize("layer", list(SHAPES["tiny"].matrices()))
def test_linear(timer: Timer, shape: Shape, layer: str, rows: int) -> None:
    n, k = shape.matrices()[layer]
    packed = timer.kernels.pack_linear(timer.tensor(n, k), timer.tensor(n))
    x = timer.tensor(rows, k)
    moved = (n * k + rows * (n + k)) * timer.dtype.itemsize
    timer.run(lambda: timer.kernels.linear(x, packed), flops=2 * rows * n * k, moved=moved)


@pytest.mark.parametrize("rows", [1, 16])
def test_head(timer: Timer, shape: Shape, rows: int) -> None:
    n, k = shape.vocabulary, shape.hidden
    packed = timer.kernels.pack_linear(timer.tensor(n, k), None)
    x = timer.tensor(rows, k)
    moved = (n * k + rows * k) * timer.dtype.itemsize + 4 * rows * n
    timer.run(lambda: timer.kernels.linear(x, packed, out_float32=True), flops=2 * rows * n * k, moved=moved)


@pytest.mark.parametrize("rows", [16])
def test_embed(timer: Timer, shape: Shape, rows: int) -> None:
    vocabulary = min(shape.vocabulary, 16384)  # so that packing a head is not most of the run
    packed = timer.kernels.pack_linear(timer.tensor(vocabulary, shape.hidden), None)
    ids = timer.ints(torch.randint(vocabulary, (rows,)), torch.int64)
    timer.run(lambda: timer.kernels.embed(ids, packed), moved=2 * rows * shape.hidden * timer.dtype.itemsize)


@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_norm(timer: Timer, shape: Shape, op: str, rows: int) -> None:
    x, residual, weight = (timer.tensor(*s) for s in ((rows, shape.hidden),) * 2 + ((shape.hidden,),))
    size = rows * shape.hidden * timer.dtype.itemsize
    if op == "rms_norm":
        timer.run(lambda: timer.kernels.rms_norm(x, weight, 1e-6), moved=2 * size)
    else:
        x *= 0  # the residual is added to again and again
        timer.run(lambda: timer.kernels.add_rms_norm(x, residual, weight, 1e-6), moved=4 * size)


@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("op", ["swiglu", "gelu"])
def test_activation(timer: Timer, shape: Shape, op: str, rows: int) -> None:
    x = timer.tensor(rows, 2 * shape.intermediate)
    moved = rows * shape.intermediate * timer.dtype.itemsize * (3 if op == "swiglu" else 4)
    timer.run(lambda: getattr(timer.kernels, op)(x), moved=moved)


@pytest.mark.parametrize("rows", [256])
def test_rotary(timer: Timer, shape: Shape, rows: int) -> None:
    head_dim = shape.vision // shape.vision_heads
    x = timer.tensor(rows, shape.vision_heads, head_dim)
    cos, sin = (timer.tensor(rows, head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2))
    moved = 2 * x.numel() * timer.dtype.itemsize + 4 * (cos.numel() + sin.numel())
    timer.run(lambda: timer.kernels.rotary(x, cos, sin), moved=moved)


def _cache(timer: Timer, shape: Shape, sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the tables of sequences whose blocks lie scattered."""
    each = -(-context // _BLOCK)
    k, v = kv_cache_shapes(sequences * each, shape.kv_heads, shape.head_dim, _BLOCK)
    tables = timer.ints(torch.randperm(sequences * each).view(sequences, each))
    return timer.tensor(*k), timer.tensor(*v), tables


@pytest.mark.parametrize("rows", [16, 256])
def test_rotary_cache(timer: Timer, shape: Shape, rows: int) -> None:
    k, v, tables = _cache(timer, shape, 1, rows)
    qkv = timer.tensor(rows, shape.qkv)
    cos, sin = (timer.tensor(rows, shape.head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2))
    position = torch.arange(rows, device=timer.device)
    slots = tables[0].long()[position // _BLOCK] * _BLOCK + position % _BLOCK
    moved = 2 * qkv.numel() * timer.dtype.itemsize + 4 * (cos.numel() + sin.numel())
    ops = timer.kernels
    timer.run(lambda: ops.rotary_cache(qkv, cos, sin, slots, k, v, shape.heads, shape.kv_heads), moved=moved)


@pytest.mark.parametrize(
    ("sequences", "rows", "context"),
    [(1, 1, 1024), (16, 1, 1024), (16, 1, 4096), (1, 256, 256), (1, 256, 1024)],
    ids=["decode-1x1024", "decode-16x1024", "decode-16x4096", "prefill-256", "prefill-256-of-1024"],
)
def test_paged_attention(timer: Timer, shape: Shape, sequences: int, rows: int, context: int) -> None:
    k, v, tables = _cache(timer, shape, sequences, context)
    q = timer.tensor(sequences * rows, shape.heads, shape.head_dim)
    starts = timer.ints(np.arange(sequences + 1) * rows)
    lens = timer.ints([context] * sequences)
    pairs = sequences * sum(range(context - rows + 1, context + 1))
    moved = (2 * sequences * context * shape.kv_heads * shape.head_dim + 2 * q.numel()) * timer.dtype.itemsize
    timer.run(
        lambda: timer.kernels.paged_attention(q, k, v, tables, starts, lens, shape.head_dim**-0.5),
        flops=4 * pairs * shape.heads * shape.head_dim,
        moved=moved,
    )


@pytest.mark.parametrize(("segments", "length"), [(24, 64), (1, 1536)], ids=["windows", "whole-page"])
def test_varlen_attention(timer: Timer, shape: Shape, segments: int, length: int) -> None:
    head_dim = shape.vision // shape.vision_heads
    rows = segments * length
    q, k, v = timer.tensor(rows, 3, shape.vision_heads, head_dim).unbind(1)
    starts = timer.ints(np.arange(segments + 1) * length)
    timer.run(
        lambda: timer.kernels.varlen_attention(q, k, v, starts, head_dim**-0.5),
        flops=4 * segments * length**2 * shape.vision,
        moved=4 * rows * shape.vision * timer.dtype.itemsize,
    )


@pytest.fixture(params=_IMPLEMENTATIONS)
def float_timer(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    torch.manual_seed(0)
    isa = _native.isa()
    with torch.inference_mode():
        yield Timer(benchmark, request.param, torch.float32)
    _native.set_isa(isa)


@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("rows", [1, 16])
def test_greedy(float_timer: Timer, shape: Shape, rows: int, masked: bool) -> None:
    timer = float_timer
    logits = timer.tensor(rows, shape.vocabulary)
    words = -(-shape.vocabulary // 32)
    mask = timer.ints(torch.randint(-(2**31), 2**31 - 1, (rows, words))) if masked else None
    moved = 4 * logits.numel() + (4 * rows * words if masked else 0)
    timer.run(lambda: timer.kernels.greedy(logits, mask), moved=moved)


@pytest.mark.parametrize("kernel", ["reference", "native"])
@pytest.mark.parametrize(("height", "width"), [(672, 448), (1540, 1092)], ids=["small", "a4-130dpi"])
def test_patchify(benchmark: Any, kernel: str, height: int, width: int) -> None:
    """A page scaled down by 0.7, on one core, as page preparation runs."""
    timer = Timer(benchmark, "reference", torch.float32)
    rgb = np.random.default_rng(0).integers(0, 256, (round(height / 0.7), round(width / 0.7), 3), np.uint8)
    moved = rgb.nbytes + 3 * height * width
    timer.run(
        lambda: patchify(rgb, height, width, kernel=kernel),  # type: ignore[arg-type]
        moved=moved,
    )
