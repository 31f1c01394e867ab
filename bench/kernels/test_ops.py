"""Microbenchmarks of every op on every CPU implementation, as fractions of what this machine can do; a GPU's: `test_gpu.py`.

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
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import SHAPES, Ops, Shape, Work, bandwidth, peak

import pagemill._native as _native
from pagemill import kernels
from pagemill.kernels import select
from pagemill.kernels.patchify import patchify

_ROUND_S = 2e-3
"""Least seconds of one timed round, of as many calls as it takes, and the seconds that a benchmark may use."""
_BUDGET_S = 0.2
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_IMPLEMENTATIONS = ["reference", *(f"native-{isa}" for isa in _native.isas())]
_ROWS = (1, 16, 256)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if count := os.environ.get("PAGEMILL_BENCH_THREADS"):
        kernels.set_num_threads(int(count))


class Timer(Ops):
    """Times one op and notes its share of the limit."""

    def __init__(self, benchmark: Any, implementation: str, dtype: torch.dtype) -> None:
        kind, _, isa = implementation.partition("-")
        if kind == "native":
            _native.set_isa(isa)
        super().__init__(select(kind, torch.device("cpu"), dtype), dtype)
        self.benchmark = benchmark

    def time(self, work: Work) -> None:
        self.run(work.call, flops=work.flops, moved=work.moved)

    def run(self, op: Callable[[], object], *, flops: float = 0.0, moved: float) -> None:
        """Time `op`, which does `flops` operations and has to move `moved` bytes."""

        if self.benchmark.disabled:  # only to see that it runs
            self.benchmark(op)
            return
        before = peak(self.dtype), bandwidth()
        op()
        started = time.perf_counter()
        op()
        once = max(time.perf_counter() - started, 1e-7)
        calls = max(1, round(_ROUND_S / once))
        rounds = int(min(max(_BUDGET_S / (calls * once), _LEAST_ROUNDS), _MOST_ROUNDS))
        self.benchmark.pedantic(op, rounds=rounds, iterations=calls)
        after = peak(self.dtype), bandwidth()
        self.benchmark.extra_info.update(
            flops=flops,
            bytes=moved,
            arithmetic=f"{self.dtype} on cpu",
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


@pytest.fixture(params=["tiny", "3b"])
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


# The ops.


@pytest.mark.parametrize("rows", _ROWS)
@pytest.mark.parametrize("layer", [name for name in SHAPES["tiny"].matrices() if name != "head"])
def test_linear(timer: Timer, shape: Shape, layer: str, rows: int) -> None:
    timer.time(timer.linear([timer.pack(shape, layer, bias=True)], rows))


@pytest.mark.parametrize("rows", [1, 16])
def test_head(timer: Timer, shape: Shape, rows: int) -> None:
    timer.time(timer.linear([timer.pack(shape, "head")], rows, out_float32=True))


@pytest.mark.parametrize("rows", [16])
def test_embed(timer: Timer, shape: Shape, rows: int) -> None:
    vocabulary = min(shape.vocabulary, 16384)  # so that packing a head is not most of the run
    packed = timer.kernels.pack_linear(timer.tensor(vocabulary, shape.hidden), None)
    ids = timer.ints(torch.randint(vocabulary, (rows,)), torch.int64)
    timer.run(lambda: timer.kernels.embed(ids, packed), moved=2 * rows * shape.hidden * timer.dtype.itemsize)


@pytest.mark.parametrize("rows", [16, 256])
def test_norm(timer: Timer, shape: Shape, rows: int) -> None:
    x, weight = timer.tensor(rows, shape.hidden), timer.tensor(shape.hidden)
    timer.run(
        lambda: timer.kernels.rms_norm(x, weight, 1e-6), moved=2 * rows * shape.hidden * timer.dtype.itemsize
    )


@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("op", ["swiglu", "gelu"])
def test_activation(timer: Timer, shape: Shape, op: str, rows: int) -> None:
    x = timer.tensor(rows, 2 * shape.intermediate)
    moved = rows * shape.intermediate * timer.dtype.itemsize * (3 if op == "swiglu" else 4)
    timer.run(lambda: getattr(timer.kernels, op)(x), moved=moved)


@pytest.mark.parametrize("rows", [256])
def test_rotary(timer: Timer, shape: Shape, rows: int) -> None:
    head_dim = shape.vision_head_dim
    x = timer.tensor(rows, shape.vision_heads, head_dim)
    cos, sin = (timer.tensor(rows, head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2))
    moved = 2 * x.numel() * timer.dtype.itemsize + 4 * (cos.numel() + sin.numel())
    timer.run(lambda: timer.kernels.rotary(x, cos, sin), moved=moved)


@pytest.mark.parametrize("rows", [16, 256])
def test_rotary_cache(timer: Timer, shape: Shape, rows: int) -> None:
    k, v, tables = timer.cache(shape, 1, rows)
    qkv = timer.tensor(rows, shape.qkv)
    cos, sin = (timer.tensor(rows, shape.head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2))
    slots = timer.slots(tables, rows)
    moved = 2 * qkv.numel() * timer.dtype.itemsize + 4 * (cos.numel() + sin.numel())
    ops = timer.kernels
    timer.run(lambda: ops.rotary_cache(qkv, cos, sin, slots, k, v, shape.heads, shape.kv_heads), moved=moved)


@pytest.mark.parametrize(
    ("sequences", "rows", "context"),
    [(1, 1, 1024), (16, 1, 1024), (16, 1, 4096), (1, 256, 256), (1, 256, 1024)],
    ids=["decode-1x1024", "decode-16x1024", "decode-16x4096", "prefill-256", "prefill-256-of-1024"],
)
def test_paged_attention(timer: Timer, shape: Shape, sequences: int, rows: int, context: int) -> None:
    timer.time(timer.paged_attention(shape, sequences, rows, context))


@pytest.mark.parametrize(("segments", "length"), [(24, 64), (1, 1536)], ids=["windows", "whole-page"])
def test_varlen_attention(timer: Timer, shape: Shape, segments: int, length: int) -> None:
    timer.time(timer.varlen_attention(shape, segments, length))


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
