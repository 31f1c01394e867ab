"""What the Triton kernels are measured on: the ops of a shape, of the language model and the vision tower, and how a GPU's
time is taken.

The aims of single kernels are shares of what the device does in the same run: torch's matrix product (bfloat16, int8, fp8) and a
copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from op_cases import Ops, Shape, Work
from torch import Tensor

from pagemill.decode.sampler import SamplingParams, SamplingState, Want, choose
from pagemill.kernels import Scheme

FORMS: dict[str, tuple[Scheme | Literal["fp8"], torch.dtype, float, float]] = {
    "bf16": ("plain", torch.bfloat16, 2, 0),
    "int8": ("int8", torch.int8, 1, 4),
    "fp8": ("fp8", torch.float8_e4m3fn, 1, 4),
    # W4A16; a float32 scale and a byte of zero for 128 weights
    "int4": ("int4", torch.bfloat16, 0.5 + 5 / 128, 0),
}
"""Scheme of a weight, arithmetic of its product, bytes of one weight, and of the scale of an output feature."""
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DECODE_ROWS, PREFILL_ROWS, VISION_ROWS = (1, 16, 64), (1024, 4096, 32768), (4096, 16384)
BATCHES = [
    *((1, 1, 4096), (16, 1, 2048), (64, 1, 2048), (1, 1, 32768)),
    *((1, 4096, 4096), (8, 512, 4096), (1, 32768, 32768)),
]
"""Sequences, rows of each, and their context."""
SEGMENTS = [(256, 64), (1, 4096), (4, 4096)]
"""Windows, or pages, of the vision tower, and the patches of each."""
_VISION = ("linear-vision", "varlen", "rotary-", "pixel_values", "gelu")


@dataclass(frozen=True)
class Case:
    """One op on inputs of its own; `make` allocates them."""

    name: str
    arithmetic: torch.dtype
    """Which peak its operations are held against."""
    make: Callable[[Ops], Work]
    only_triton: bool = False
    """Whether it is an op of the Triton kernels alone, which stands in no contract."""


def cases(shape: Shape, *, vision: bool = True) -> list[Case]:
    """Every case of one shape: of the language model, and of the vision tower where it is asked for."""
    every = [*_linears(shape), *_attentions(shape), *_elementwise(shape)]
    return every if vision else [case for case in every if not case.name.startswith(_VISION)]


def _rows(layer: str) -> tuple[int, ...]:
    if layer.startswith("vision_merger"):
        return tuple(rows // 4 for rows in VISION_ROWS)
    if layer.startswith("vision"):
        return VISION_ROWS
    return DECODE_ROWS if layer == "head" else DECODE_ROWS + PREFILL_ROWS


def _linears(shape: Shape) -> Iterator[Case]:
    for form, (scheme, arithmetic, weight, scale) in FORMS.items():
        for layer, (n, k) in (shape.matrices() | shape.small_matrices()).items():
            if (layer == "head" and form in ("int4", "fp8")) or (layer == "vision_patch" and form != "bf16"):
                continue  # the one stays in int8 or bfloat16, the other in bfloat16
            size = n * (k * weight + scale)
            for rows in _rows(layer):

                def make(
                    ops: Ops,
                    layer: str = layer,
                    scheme: Scheme | Literal["fp8"] = scheme,
                    rows: int = rows,
                    size: float = size,
                ) -> Work:
                    packed = ops.pack(shape, layer, scheme=scheme, bias="qkv" in layer)
                    return ops.linear([packed], rows, weight_bytes=size, out_float32=layer == "head")

                yield Case(f"linear-{layer}-{form}-{rows}", arithmetic, make)


def _attentions(shape: Shape) -> Iterator[Case]:
    kinds = {"bf16": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for kind, kept in kinds.items():
        for sequences, rows, context in BATCHES:

            def make(
                ops: Ops,
                sequences: int = sequences,
                rows: int = rows,
                context: int = context,
                kept: Any = kept,
            ) -> Work:
                return ops.paged_attention(shape, sequences, rows, context, kept=kept)

            yield Case(f"paged-{kind}-{sequences}x{rows}-of-{context}", torch.bfloat16, make)
    for segments, length in SEGMENTS:
        yield Case(
            f"varlen-{segments}x{length}",
            torch.bfloat16,
            lambda ops, s=segments, n=length: ops.varlen_attention(shape, s, n),  # type: ignore[misc]
        )


def _elementwise(shape: Shape) -> Iterator[Case]:
    for rows in (64, 4096):
        yield Case(f"rms_norm-{rows}", torch.bfloat16, lambda ops, r=rows: _rms_norm(ops, shape, r))  # type: ignore[misc]
        yield Case(f"rotary_cache-{rows}", torch.bfloat16, lambda ops, r=rows: _rotary_cache(ops, shape, r))  # type: ignore[misc]
        yield Case(f"embed-{rows}", torch.bfloat16, lambda ops, r=rows: _embed(ops, shape, r))  # type: ignore[misc]
        yield Case(f"mrope_angles-{rows}", torch.bfloat16, lambda ops, r=rows: _angles(ops, shape, r))  # type: ignore[misc]
    yield Case("rotary-4096", torch.bfloat16, lambda ops: _rotary(ops, shape, 4096))
    yield Case("pixel_values-4096", torch.bfloat16, lambda ops: _pixels(ops, 4096))
    yield Case("gelu-1024", torch.bfloat16, lambda ops: _gelu(ops, shape, 1024))
    yield Case("swiglu-4096", torch.bfloat16, lambda ops: _swiglu(ops, shape, 4096))
    for rows in (1, 64):
        yield Case(f"greedy-{rows}", torch.bfloat16, lambda ops, r=rows: _greedy(ops, shape, r))  # type: ignore[misc]
        yield Case(f"sampled-{rows}", torch.bfloat16, lambda ops, r=rows: _sampled(ops, shape, r))  # type: ignore[misc]
    for code in _CODES:
        for rows in (64, 4096):
            yield Case(
                f"rms_norm-{code}-{rows}",
                torch.bfloat16,
                lambda ops, r=rows, c=code: _rms_norm_quantized(ops, shape, r, _CODES[c]),  # type: ignore[misc]
                only_triton=True,
            )
            yield Case(
                f"quantize-{code}-{rows}",
                torch.bfloat16,
                lambda ops, r=rows, c=code: _quantize(ops, shape, r, _CODES[c]),  # type: ignore[misc]
                only_triton=True,
            )
    for layer in ("gate_up", "down"):
        yield Case(
            f"unpack-int4-{layer}",
            torch.bfloat16,
            lambda ops, which=layer: _unpack(ops, shape, which),  # type: ignore[misc]
            only_triton=True,
        )


def _rms_norm(ops: Ops, shape: Shape, rows: int) -> Work:
    x, weight = ops.tensor(rows, shape.hidden), ops.tensor(shape.hidden)
    return Work(lambda: ops.kernels.rms_norm(x, weight, 1e-6), 0, 2 * x.nbytes)


def _rotary_cache(ops: Ops, shape: Shape, rows: int) -> Work:
    k, v, tables = ops.cache(shape, 1, rows)
    qkv, slots = ops.tensor(rows, shape.qkv), ops.slots(tables, rows)
    cos, sin = (ops.tensor(rows, shape.head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2))
    heads = shape.heads, shape.kv_heads
    moved = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
    return Work(lambda: ops.kernels.rotary_cache(qkv, cos, sin, slots, k, v, *heads), 0, moved)


def _embed(ops: Ops, shape: Shape, rows: int) -> Work:
    packed = ops.pack(shape, "head")
    ids = ops.ints(torch.randint(shape.vocabulary, (rows,)), torch.int64)
    return Work(lambda: ops.kernels.embed(ids, packed), 0, 2 * rows * shape.hidden * ops.dtype.itemsize)


def _angles(ops: Ops, shape: Shape, rows: int) -> Work:
    frequencies, positions = shape.head_dim // 2, 4096
    tables = [ops.tensor(positions, frequencies, dtype=torch.float32) for _ in range(2)]
    at = ops.ints(torch.randint(positions, (3, rows)), torch.int64)
    axis = ops.ints(torch.randint(3, (frequencies,)), torch.int64)
    return Work(
        lambda: ops.kernels.mrope_angles(at, axis, *tables), 0, at.nbytes + 4 * 4 * rows * frequencies
    )


def _rotary(ops: Ops, shape: Shape, rows: int) -> Work:
    x = ops.tensor(rows, 2 * shape.vision_heads, shape.vision_head_dim)
    cos, sin = (
        ops.tensor(rows, shape.vision_head_dim // 2, dtype=torch.float32).clamp(-1, 1) for _ in range(2)
    )
    return Work(lambda: ops.kernels.rotary(x, cos, sin), 0, 2 * x.nbytes + cos.nbytes + sin.nbytes)


def _pixels(ops: Ops, rows: int) -> Work:
    width, moments = 3 * 14 * 14, 2
    patches = ops.ints(torch.randint(256, (rows, width)), torch.uint8)
    order = ops.ints(torch.randperm(rows), torch.int64)
    levels, out = ops.tensor(3, 256), ops.tensor(rows, moments * width)
    return Work(
        lambda: ops.kernels.pixel_values(patches, order, levels, moments, out), 0, patches.nbytes + out.nbytes
    )


def _swiglu(ops: Ops, shape: Shape, rows: int) -> Work:
    x = ops.tensor(rows, 2 * shape.intermediate)
    return Work(lambda: ops.kernels.swiglu(x), 0, x.nbytes * 3 // 2)


def _gelu(ops: Ops, shape: Shape, rows: int) -> Work:
    x = ops.tensor(rows, 4 * shape.vision)
    return Work(lambda: ops.kernels.gelu(x), 0, 2 * x.nbytes)


def _greedy(ops: Ops, shape: Shape, rows: int) -> Work:
    logits = ops.tensor(rows, shape.vocabulary, dtype=torch.float32)
    mask = ops.ints(torch.randint(-(2**31), 2**31 - 1, (rows, -(-shape.vocabulary // 32))))
    return Work(lambda: ops.kernels.greedy(logits, mask), 0, logits.nbytes + mask.nbytes)


def _sampled(ops: Ops, shape: Shape, rows: int) -> Work:
    """Temperature and top-p: op by op, a row after the other, so that the host's launching is in its time."""
    logits = ops.tensor(rows, shape.vocabulary, dtype=torch.float32)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=0)
    wants = [Want(SamplingState(params, row), ()) for row in range(rows)]
    return Work(lambda: choose(logits, wants, ops.kernels.greedy), 0, logits.nbytes)


def _rms_norm_quantized(ops: Ops, shape: Shape, rows: int, code: torch.dtype) -> Work:
    from pagemill.kernels.gpu.norm import rms_norm_quantized  # triton is heavy, and only on Linux

    x, weight = ops.tensor(rows, shape.hidden), ops.tensor(shape.hidden)
    moved = x.nbytes + rows * (shape.hidden + 4)
    return Work(lambda: rms_norm_quantized(x, weight, 1e-6, code), 0, moved)


def _quantize(ops: Ops, shape: Shape, rows: int, code: torch.dtype) -> Work:
    from pagemill.kernels.gpu.linear import quantize

    x = ops.tensor(rows, shape.intermediate)
    return Work(lambda: quantize(x, code), 0, x.nbytes + rows * (shape.intermediate + 4))


def _unpack(ops: Ops, shape: Shape, layer: str) -> Work:
    from pagemill.kernels.gpu.linear import unpack_int4

    packed, (n, k) = ops.pack(shape, layer, scheme="int4"), shape.matrices()[layer]
    moved = n * k * (FORMS["int4"][2] + ops.dtype.itemsize)
    return Work(lambda: unpack_int4(packed, ops.dtype), 0, moved)


class DeviceSeconds:
    """A clock, for pytest-benchmark, that only goes on while `run` has a device work: between an event before and one after.

    Before that `evict` fills the device's caches with something else. It should take longer than the host needs to hand the
    work over, so that no launch is waited for.
    """

    __name__ = "DeviceSeconds"

    def __init__(self, event: Callable[[], Any], evict: Callable[[], object]) -> None:
        self._event, self._evict, self._total = event, evict, 0.0

    def __call__(self) -> float:
        return self._total

    def run(self, call: Callable[[], object]) -> float:
        """Seconds of one call, with cold caches."""
        first, last = self._event(), self._event()
        self._evict()
        first.record()
        call()
        last.record()
        last.synchronize()
        seconds = float(first.elapsed_time(last)) / 1e3
        self._total += seconds
        return seconds

    def best(self, call: Callable[[], object], rounds: int = 5) -> float:
        """The fastest of some calls after one that is not counted."""
        self.run(call)
        return min(self.run(call) for _ in range(rounds))


def eviction_bytes(cache: int) -> int:
    """Bytes to read to empty a cache of so many: four times as many, and 1 GiB at least, which takes a device 0.1 ms and more."""
    return max(4 * cache, 1 << 30)


def cuda_seconds() -> DeviceSeconds:
    """The clock of the current CUDA device. What evicts is read, not written, so that an op's time has nobody's writing back."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    filler = torch.zeros(eviction_bytes(cache) // 4, device="cuda")
    return DeviceSeconds(lambda: torch.cuda.Event(enable_timing=True), filler.sum)


def peak(clock: DeviceSeconds, dtype: torch.dtype, device: str, n: int = 8192) -> float:
    """Operations a second of torch's product of square matrices, two a multiply-add; int8 sums in int32, fp8 as is fastest.

    The second matrix lies by rows or by columns, whichever is faster: for int8 that is columns, and fp8 has no other.
    """
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm
    if dtype == torch.int8:
        product, a = torch._int_mm, torch.randint(-127, 128, (n, n), dtype=dtype, device=device)
    else:
        a = torch.randn(n, n, device=device).to(dtype)
    by_columns = a.t()
    second = [a, by_columns]
    if dtype == torch.float8_e4m3fn:
        one, out = torch.ones((), device=device), torch.bfloat16
        product = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=out, use_fast_accum=True)
        second = [by_columns]
    return 2 * n**3 / min(clock.best(partial(product, a, b)) for b in second)


def copy_bandwidth(clock: DeviceSeconds, device: str, size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / clock.best(lambda: target.copy_(source))
