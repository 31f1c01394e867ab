"""Every production configuration of the Triton kernels, compiled for GPUs that need not be there, and what came out.

    python bench/codegen.py                     # all targets: bench/results/codegen.json and codegen.md
    python bench/codegen.py sm_90 --only int4   # to standard output
    python bench/codegen.py --sweep             # every launch of both models' sizes: only what has a fault, and counts

A case is an op at a size; what its launcher would start on a card of each target is compiled (`machine_code.py`) and read. Beside
it stand the limits of cards with that instruction set: the longer of the case's arithmetic at the peak and its bytes, each moved
once, at the bandwidth of the data sheet. `faults` is the gate that `tests/compiled` holds in CI for the cases marked `gate`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
import tutorial_kernels
from machine_code import TARGETS, Figures, Launch, Target, build, capture
from torch import Tensor

from pagemill.cost.devices import Device, find_device
from pagemill.kernels.gpu import linear, norm, ops
from pagemill.kernels.linear import PackedLinear

RESULTS = Path(__file__).parent / "results"
_META = torch.device("meta")
_BF16 = torch.bfloat16
_MULTIPLY = (
    "matmul_kernel",
    "int4_kernel",
    "paged_kernel",
    "varlen_kernel",
    "tutorial_matmul",
    "tutorial_attention",
)


@dataclass(frozen=True)
class Case:
    """An op at a size."""

    name: str
    call: Callable[[], object]
    flops: float
    bytes: float
    arithmetic: str = "bfloat16"
    gate: bool = False
    """One of the few that CI compiles."""
    targets: tuple[str, ...] = tuple(TARGETS)
    narrow: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By target, matrix instructions beside which loads of weights, or of keys and values, of 8 bytes are taken; the report says
    why."""


def faults(figures: Figures, target: Target, case: Case) -> list[str]:
    """What is wrong with a compiled kernel; nothing for a good one."""
    found = []
    if figures.spills:
        found.append(f"{figures.spills} spills")
    if figures.shared > target.shared:
        found.append(f"{figures.shared} bytes of shared memory, of {target.shared}")
    if figures.kernel in _MULTIPLY:
        if figures.matrix == "none":
            found.append("no tensor-core instruction")
        least = 8 if figures.matrix in case.narrow.get(target.name, ()) else 16
        if figures.narrowest is None:
            found.append("no load of weights was found")
        elif figures.narrowest < least:
            found.append(f"loads of weights of {figures.narrowest} bytes")
        if figures.stages > 2 and figures.in_flight == 0:
            found.append(f"{figures.stages} stages, and nothing is copied while a tile is computed")
    return found


def limit_us(case: Case, device: Device) -> float | None:
    """Microseconds that the case takes at least on a device, None where that lacks the arithmetic."""
    if case.arithmetic not in device.flops:
        return None
    return 1e6 * max(case.flops / device.rate(case.arithmetic), case.bytes / device.bandwidth)


# The cases, of Qwen2.5-VL-3B's shapes; the sweep has the 7B's, too.


@dataclass(frozen=True)
class Layer:
    """A linear layer: features (of each of gate and up), inputs, and what `product` is told besides."""

    name: str
    n: int
    k: int
    options: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What the launches of a model depend on; head_dim is 128."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def decoder(self) -> tuple[Layer, ...]:
        h, i, width = self.hidden, self.intermediate, 128 * (self.heads + 2 * self.kv_heads)
        return (
            Layer("qkv", width, h, {"bias": True}),
            Layer("out", h, h, {"residual": True}),
            Layer("gate_up", i, h, {"gated": True}),
            Layer("down", h, i, {"residual": True}),
        )

    @property
    def head(self) -> Layer:
        return Layer("head", self.vocabulary, self.hidden, {"float32": True})

    @property
    def vision(self) -> tuple[Layer, ...]:
        return (
            Layer("patch", 1280, 1176),
            Layer("vision qkv", 3840, 1280, {"bias": True}),
            Layer("vision out", 1280, 1280, {"bias": True, "residual": True}),
            Layer("vision gate_up", 3420, 1280, {"gated": True, "bias": True}),
            Layer("vision down", 1280, 3420, {"bias": True, "residual": True}),
            Layer("merger", 5120, 5120, {"bias": True}),
            Layer("merger out", self.hidden, 5120, {"bias": True}),
        )


_3B = Model("3B", 2048, 11008, 16, 2, 151936)
_7B = Model("7B", 3584, 18944, 28, 4, 152064)


def _empty(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=_META)


_GROUPS = {"int4": 128, "int4g64": 64, "int4g32": 32}
"""Forms of 4-bit weights, and inputs of a group."""


def packed(form: str, n: int, k: int, *, gated: bool = False, bias: bool = False) -> PackedLinear:
    """A weight without memory, laid out as the pack functions do."""
    rows = 2 * n if gated else n
    b = _empty(rows) if bias else None
    if form == "plain":
        weight = linear.pack_plain(_empty(rows, k), b, gated=gated)
    elif form in _GROUPS:
        groups = -(-k // _GROUPS[form])
        weight = linear.pack_int4(
            _empty(rows, k, dtype=torch.uint8), _empty(rows, groups, dtype=torch.float32),
            _empty(rows, groups, dtype=torch.uint8), b, gated=gated,
        )  # fmt: skip
    else:
        codes = _empty(rows, k, dtype=torch.int8 if form == "int8" else torch.float8_e4m3fn)
        weight = linear.pack_scaled(codes, _empty(rows, dtype=torch.float32), b, gated=gated)
    return replace(weight, compute="bfloat16")


_ARITHMETIC = {"plain": "bfloat16", **dict.fromkeys(_GROUPS, "bfloat16"), "int8": "int8", "fp8": "fp8"}
_FORMS = ("plain", "int4", "int8", "fp8")
_WITH_FP8 = tuple(name for name in TARGETS if name not in ("sm_80", "gfx942"))
"""sm_80 has no fp8 arithmetic, and gfx942's float8_e4m3 is another one (fnuz)."""
_NARROW: Mapping[str, tuple[str, ...]] = dict.fromkeys(TARGETS, ("mma", "wgmma", "tcgen05", "mfma"))
_NARROW_ROWS: Mapping[str, tuple[str, ...]] = {"sm_90": ("wgmma",)}


def _targets(form: str) -> tuple[str, ...]:
    return _WITH_FP8 if form == "fp8" else tuple(TARGETS)


def product(
    name: str, form: str, m: int, n: int, k: int, *, gated: bool = False, bias: bool = False, residual: bool = False,
    float32: bool = False, gate: bool = False,
) -> Case:  # fmt: skip
    """A linear layer; `float32`: its result is not rounded, as logits are not."""
    weight = packed(form, n, k, gated=gated, bias=bias)

    def call() -> object:
        x = _empty(m, -(-k // 16) * 16 if k % 8 else k)[:, :k]  # as a gated product leaves its rows
        if gated:
            return ops._linear_swiglu(x, weight)
        return ops._linear(x, weight, out_float32=float32, residual=_empty(m, n) if residual else None)

    moved = sum(t.nbytes for t in (weight.weight, weight.scales, weight.zeros) if t is not None)
    narrow = _NARROW if form == "int4g32" else _NARROW_ROWS if form in _GROUPS and m > 32 else {}
    return Case(
        f"{name} {form} M={m}", call, 2.0 * m * n * k * (1 + gated),
        moved + 2.0 * m * (k + n * (1 + residual + float32)), _ARITHMETIC[form], gate, _targets(form), narrow,
    )  # fmt: skip


def paged(
    name: str, sequences: int, tokens: int, context: int, dtype: torch.dtype, *, model: Model = _3B, gate: bool = False,
) -> Case:  # fmt: skip
    """Attention over the cache: `tokens` of each sequence, the last of `context`."""
    heads, kv_heads, d, block = model.heads, model.kv_heads, 128, 16
    rows, blocks = sequences * tokens, -(-context // block)
    scaled = dtype != _BF16

    def call() -> object:
        qkv = _empty(rows, (heads + 2 * kv_heads) * d)
        q = qkv[:, : heads * d].view(rows, heads, d)
        cache = [_empty(sequences * blocks, kv_heads, block, d, dtype=dtype) for _ in range(2)]
        scales = [_empty(sequences * blocks, kv_heads, block, dtype=torch.float32) for _ in range(2 * scaled)]
        tables = _empty(sequences, blocks, dtype=torch.int32)
        starts, lens = _empty(sequences + 1, dtype=torch.int32), _empty(sequences, dtype=torch.int32)
        return ops._paged_attention(q, *cache, tables, starts, lens, d**-0.5, *scales)

    seen = sequences * tokens * (context - (tokens - 1) / 2)
    moved = sequences * context * kv_heads * 2 * (d * dtype.itemsize + 4 * scaled) + 4.0 * rows * heads * d
    fp8 = dtype == torch.float8_e4m3fn
    return Case(
        name, call, 4.0 * seen * heads * d, moved, gate=gate, targets=_WITH_FP8 if fp8 else tuple(TARGETS),
        narrow=_NARROW if scaled else {},
    )  # fmt: skip


def segments(name: str, rows: int, length: int, d: int = 80, *, gate: bool = False) -> Case:
    """The vision tower's attention: 16 heads, segments of equal length."""
    heads = 16

    def call() -> object:
        q, k, v = _empty(rows, 3, heads, d).unbind(1)
        return ops._varlen_attention(q, k, v, _empty(rows // length + 1, dtype=torch.int32), d**-0.5)

    return Case(name, call, 4.0 * rows * length * heads * d, 8.0 * rows * heads * d, gate=gate)


def corners() -> Iterator[Case]:
    """Launches between the other cases' sizes that the sweep found at fault once, on the targets where they were."""
    for target, form, model, layer, m in (
        ("sm_100", "plain", _3B, _3B.decoder[1], 300),
        ("sm_100", "int8", _3B, _3B.decoder[0], 17),
        ("sm_90", "int4", _3B, _3B.decoder[0], 100),
        ("sm_90", "int4", _7B, _7B.decoder[2], 48),
        ("sm_90", "int4g64", _3B, _3B.decoder[0], 33),
        ("sm_90", "int4g32", _3B, _3B.decoder[0], 16),
    ):
        case = product(f"{model.name} {layer.name}", form, m, layer.n, layer.k, gate=True, **layer.options)
        yield replace(case, targets=(target,))


def _moving(name: str, moved: float, call: Callable[[], object], **options: Any) -> Case:
    return Case(name, call, 0.0, moved, **options)


_GATED_IN_CI = {
    ("out", "plain", 16), ("gate_up", "plain", 4096), ("vision down", "plain", 4096), ("gate_up", "int8", 256),
    ("vision qkv", "int8", 4096), ("down", "int4", 16), ("gate_up", "int4", 64), ("gate_up", "fp8", 256),
    ("head", "plain", 16),
}  # fmt: skip


def products() -> Iterator[Case]:
    """The linear layers of the decoder, its output layer, and those of the vision tower."""
    for form in _FORMS:
        for layers, sizes in (
            (_3B.decoder, (16, 32, 64, 256, 4096)),
            ((_3B.head,) if form != "int4" else (), (16, 64, 256)),
            (_3B.vision if form != "int4" else (), (4096,)),
        ):
            for m in sizes:
                for layer in layers:
                    gate = (layer.name, form, m) in _GATED_IN_CI
                    yield product(layer.name, form, m, layer.n, layer.k, gate=gate, **layer.options)


_KEYS = {"bf16": _BF16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def attentions() -> Iterator[Case]:
    """The decoder's and the vision tower's attention."""
    for kind, dtype in _KEYS.items():
        plain = dtype == _BF16
        yield paged(f"decode {kind} 4 x 4096", 4, 1, 4096, dtype, gate=kind != "fp8")
        yield paged(f"decode {kind} 256 x 2048", 256, 1, 2048, dtype)
        yield paged(f"prefill {kind} 1 x 4096", 1, 4096, 4096, dtype, gate=plain)
    yield segments("vision windows", 4096, 64, gate=True)
    yield segments("vision images", 4096, 4096, gate=True)


def others() -> Iterator[Case]:
    """The ops without a product, at a prefill chunk."""
    m, h = 4096, 2048
    x, weight = _empty(m, h), _empty(h)
    cos = _empty(m, 64, dtype=torch.float32)
    caches = [_empty(256, 2, 16, 128) for _ in range(2)]
    codes = [_empty(256, 2, 16, 128, dtype=torch.int8) for _ in range(2)]
    scales = [_empty(256, 2, 16, dtype=torch.float32) for _ in range(2)]
    longs = _empty(m, dtype=torch.int64)
    qkv, heads = _empty(m, 2560), _empty(m, 16, 80)
    logits, mask = _empty(256, 151936, dtype=torch.float32), _empty(256, 4748, dtype=torch.int32)
    table, axis = _empty(32768, 64, dtype=torch.float32), _empty(64, dtype=torch.int64)
    pixels = _empty(m, 588, dtype=torch.uint8), longs, _empty(3, 256), 2, _empty(m, 1176)
    kernels = ops.ops(_BF16)
    yield _moving("rms_norm", 4.0 * m * h, lambda: norm.rms_norm(x, weight, 1e-6))
    yield _moving(
        "rms_norm to int8", 3.0 * m * h, lambda: norm.rms_norm_quantized(x, weight, 1e-6, torch.int8)
    )
    yield _moving("quantize to int8", 3.0 * m * h, lambda: linear.quantize(x, torch.int8))
    yield _moving(
        "unpack int4", 2.5 * 2048 * 11008, lambda: linear.unpack_int4(packed("int4", 2048, 11008), _BF16)
    )
    yield _moving("swiglu", 6.0 * m * 3420, lambda: kernels["swiglu"](_empty(m, 6840)))
    yield _moving("gelu", 4.0 * m * h, lambda: kernels["gelu"](x))
    angles = _empty(m, 40, dtype=torch.float32)
    yield _moving("rotary", 4.0 * m * 1280, lambda: kernels["rotary"](heads, angles, angles))
    qkv_of = (qkv, cos, cos, longs)
    yield _moving("rotary_cache", 4.0 * m * 2560, lambda: kernels["rotary_cache"](*qkv_of, *caches, 16, 2))
    yield _moving(
        "rotary_cache int8", 3.8 * m * 2560, lambda: kernels["rotary_cache"](*qkv_of, *codes, 16, 2, *scales)
    )
    index = longs.int()
    yield _moving(
        "embed and images", 4.0 * m * h, lambda: kernels["embed"](longs, packed("plain", 151936, h), index, x)
    )
    yield _moving("embed int8", 3.0 * m * h, lambda: kernels["embed"](longs, packed("int8", 151936, h)))
    positions = _empty(3, m, dtype=torch.int64)
    yield _moving(
        "mrope_angles", 16.0 * m * 64, lambda: kernels["mrope_angles"](positions, axis, table, table)
    )
    yield _moving("pixel_values", m * (588 + 2 * 1176.0), lambda: kernels["pixel_values"](*pixels))
    yield _moving("greedy", 4.0 * 256 * 151936, lambda: kernels["greedy"](logits, mask))


def tutorial() -> Iterator[Case]:
    """The textbook kernels at the sizes of cases above."""
    for m, n, k, tile, warps, stages in (
        (4096, 2048, 2048, (128, 256, 64), 8, 3),
        (4096, 2048, 2048, (128, 128, 64), 4, 3),
        (16, 2048, 2048, (16, 64, 64), 4, 4),
    ):
        moved = 2.0 * (n * k + m * (n + k))
        yield Case(
            f"tutorial matmul M={m} {'x'.join(map(str, tile))} warps {warps}",
            lambda m=m, n=n, k=k, tile=tile, warps=warps, stages=stages: tutorial_kernels.matmul(
                _empty(m, k), _empty(n, k), tile=tile, warps=warps, stages=stages
            ),
            2.0 * m * n * k,
            moved,
        )
    codes = [_empty(n, 2048, dtype=torch.int8) for n in (4096, 2048)]
    yield Case(
        "tutorial matmul int8 M=4096 128x128x128 warps 8",
        lambda: tutorial_kernels.matmul(*codes, tile=(128, 128, 128), warps=8, stages=3),
        2.0 * 4096 * 2048 * 2048,
        2048.0 * (2048 + 4096 + 2 * 4096),
        "int8",
    )
    for d, causal, tile, warps in ((128, True, (128, 64), 8), (128, True, (128, 64), 4), (128, False, (64, 64), 4)):  # fmt: skip
        yield Case(
            f"tutorial attention {'causal ' * causal}D={d} {tile[0]}x{tile[1]} warps {warps}",
            lambda d=d, causal=causal, tile=tile, warps=warps: tutorial_kernels.attention(
                *(_empty(16, 4096, d) for _ in range(3)), causal=causal, tile=tile, warps=warps, stages=3
            ),
            4.0 * 4096 * 4096 * 16 * d / (1 + causal),
            8.0 * 4096 * 16 * d,
        )


def cases() -> list[Case]:
    """All of them."""
    return [*products(), *corners(), *attentions(), *others(), *tutorial()]


# The sweep.

_ROWS = (1, 16, 17, 33, 48, 64, 65, 100, 128, 160, 256, 300, 512, 1024, 2048, 4096, 32768)
_STEPS = (
    (1, 1, 4096),
    (4, 1, 4096),
    (64, 1, 2048),
    (256, 1, 2048),
    (1, 300, 1000),
    (1, 4096, 4096),
    (32, 64, 2048),
)
"""Sequences, tokens of each, keys of each: with and without split-KV, decoding and not."""


def sweep_cases() -> Iterator[tuple[str, Case]]:
    """Both models' layers in every form, and attention, at sizes between which another tile is chosen; by form and model."""
    for model in (_3B, _7B):
        for form in _ARITHMETIC:
            layers = model.decoder if form in _GROUPS else (*model.decoder, model.head, *model.vision)
            for layer in layers:
                for m in _ROWS:
                    case = product(f"{model.name} {layer.name}", form, m, layer.n, layer.k, **layer.options)
                    yield f"{form} {model.name}", case
        for kind, dtype in _KEYS.items():
            for sequences, tokens, context in _STEPS:
                name = f"{model.name} attention {kind} {sequences}x{tokens} of {context}"
                case = paged(name, sequences, tokens, context, dtype, model=model)
                yield f"attention {kind} {model.name}", case
    for length in (64, 1024):
        yield "attention vision", segments(f"vision segments of {length}", 4096, length)


def sweep(target: Target, only: str = "") -> str:
    """Compile the different launches of the sweep's cases: how many there are, and each one that has a fault, in Markdown."""
    built: dict[str, Figures] = {}
    launches: dict[str, set[str]] = defaultdict(set)
    wrong: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    bad: dict[str, set[str]] = defaultdict(set)
    for group, case in sweep_cases():
        if target.name not in case.targets or only not in case.name:
            continue
        for launch, figures in compiled(case, target, built):
            launches[group].add(launch.key)
            if found := faults(figures, target, case):
                bad[group].add(launch.key)
                wrong[figures.kernel, launch_name(launch), "; ".join(found)].append(case.name)
    counts = [[group, str(len(keys)), str(len(bad[group]))] for group, keys in launches.items()]
    lines = [
        f"## {target.name}: {len(built)} different kernels, {len(set().union(*bad.values()))} with a fault"
    ]
    lines.append(_markdown(["form and model", "kernels", "with a fault"], counts))
    if wrong:
        rows = [[*key, ", ".join(names[:3]), str(len(names))] for key, names in wrong.items()]
        lines.append(_markdown(["kernel", "tile", "faults", "of", "cases"], rows))
    return "\n\n".join(lines)


# The run.


@dataclass(frozen=True)
class Row:
    """One kernel of a case, compiled for a target."""

    case: str
    target: str
    launch: str
    """The tile and what else was chosen for it."""
    figures: Figures
    faults: tuple[str, ...]
    limits_us: dict[str, float | None]


_WORDS = ("BIAS", "RESIDUAL", "SPLIT", "SCALED", "TAIL", "GATED", "DESCRIBED", "SPECIALISED")


def launch_name(launch: Launch) -> str:
    """The sizes that a kernel was compiled with."""
    values = launch.values
    sizes = "x".join(str(values[n]) for n in ("TILE_M", "TILE_N", "TILE_K", "GROUP") if n in values)
    stages = (
        f"{launch.options['num_stages']} stages, " if launch.kernel.rpartition(".")[2] in _MULTIPLY else ""
    )
    words = [name.lower() for name in _WORDS if values.get(name) is True]
    return f"{sizes or values.get('TILE', '')} ({stages}{launch.options['num_warps']} warps{''.join(', ' + w for w in words)})"


def compiled(case: Case, target: Target, built: dict[str, Figures]) -> Iterator[tuple[Launch, Figures]]:
    """What a case would launch, compiled; `built` holds what was compiled for this target before, by the launch's key."""
    with capture(target) as launches:
        case.call()
    for launch in launches:
        if launch.key not in built:
            built[launch.key] = build(launch, target)
        yield launch, built[launch.key]


def run(case: Case, target: Target, built: dict[str, Figures]) -> list[Row]:
    """Compile what a case would launch and read it."""
    devices = [find_device(id) for id in target.devices]
    limits = {device.id: limit_us(case, device) for device in devices}
    return [
        Row(
            case.name, target.name, launch_name(launch), figures, tuple(faults(figures, target, case)), limits
        )
        for launch, figures in compiled(case, target, built)
    ]


def _sizes(widths: dict[int, int] | None) -> str:
    return " ".join(f"{count}x{size}" for size, count in sorted((widths or {}).items(), reverse=True)) or "-"


_SHORT = {
    "matrix": "mma", "global load": "ldg", "shared and tensor memory": "smem", "float": "float", "convert": "cvt",
    "integer and address": "int", "control": "ctl", "global store": "stg", "spill": "spill",
}  # fmt: skip
_CODE = (
    "regs", "spills", "shared KiB", "occupancy", "matrix", "weights: loads x bytes", "in flight", "per matrix op", "per mma",
)  # fmt: skip
_SMALL = ("finish_kernel", "merge_kernel", "quantize_kernel")


def _code(f: Figures) -> list[str]:
    multiply = f.kernel in _MULTIPLY
    return [
        str(f.registers), str(f.spills), f"{f.shared / 1024:.0f}", f"{100 * f.occupancy:.0f} %",
        f.matrix if multiply else "", _sizes(f.widths.get("weights")) if multiply else "",
        "" if f.in_flight is None else str(f.in_flight),
        f"{f.per_matrix:.1f}" if f.per_matrix else "", f"{f.per_mma:.2f}" if f.per_mma else "",
    ]  # fmt: skip


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def table(rows: list[Row], target: Target) -> str:
    """The rows of one target in Markdown."""
    lines = []
    for row in rows:
        f = row.figures
        counts = sorted(f.loop.items(), key=lambda item: -item[1])
        limits = [
            "-" if value is None or f.kernel in _SMALL else f"{value:.3g}" for value in row.limits_us.values()
        ]
        lines.append([
            row.case, f.kernel.removesuffix("_kernel"), row.launch, *_code(f), _sizes(f.widths.get("other")),
            str(f.asynchronous), ", ".join(f"{_SHORT[kind]} {count}" for kind, count in counts), *limits,
            "; ".join(row.faults),
        ])  # fmt: skip
    devices = [f"{device} us" for device in target.devices]
    return _markdown(
        ["case", "kernel", "tile", *_CODE, "others", "async", "inner loop", *devices, "faults"], lines
    )


_PAIRS = {
    "out plain M=4096": "tutorial matmul M=4096",
    "out plain M=16": "tutorial matmul M=16",
    "out int8 M=4096": "tutorial matmul int8",
    "prefill bf16 1 x 4096": "tutorial attention causal",
    "vision images": "tutorial attention D=128 64x64",
}
"""Cases, and how the names of textbook kernels for the same begin."""


def comparison(rows: list[Row]) -> str:
    """The project's kernels beside the textbook's, target by target."""
    lines = []
    for target in TARGETS:
        for ours, theirs in _PAIRS.items():
            for row in rows:
                same = row.case == ours or row.case.startswith(theirs)
                if row.target == target and row.figures.kernel in _MULTIPLY and same:
                    lines.append([target, row.case, row.launch, *_code(row.figures)])
    return _markdown(["target", "case", "tile", *_CODE], lines)


def report(rows: list[Row]) -> str:
    """The whole result in Markdown."""
    parts = [_INTRODUCTION.format(triton=triton.__version__)]
    bad = [row for row in rows if row.faults and not row.case.startswith("tutorial")]
    kernels = len({(row.target, row.figures.kernel, row.launch) for row in rows})
    parts.append(
        f"{len(rows)} launches, {kernels} different ones by name and tile, {len(bad)} with a fault (last column)."
    )
    if beside := [row for row in rows if row.case.startswith(("tutorial", *_PAIRS))]:
        parts += ["## Beside textbook kernels", _COMPARISON, comparison(beside)]
    for target in TARGETS.values():
        if found := [row for row in rows if row.target == target.name]:
            parts += [f"## {target.name} ({target.card.name})", table(found, target)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Compiled code of the Triton kernels

Written by `python bench/codegen.py` with Triton {triton}; no GPU was used, and nothing here is a measured time. Every op at the
sizes of Qwen2.5-VL-3B, as its launcher would start it on a card of the target (`kernels/gpu/configs.py` chooses the tile).

- **spills**: bytes of local memory and stack, plus instructions that move registers there or back. **shared**: of a program.
  **occupancy**: warps that fit on a multiprocessor at once, by registers, shared memory and programs.
- **matrix**: the instruction of the tensor cores. **weights** are loads of weights, or of keys and values, in the whole kernel
  with its prologue: how many in a thread, by bytes of one. **async**: copies from global to shared memory without registers.
- **in flight**: groups of asynchronous copies that may be on their way while the inner loop waits for the oldest. 0: a tile's
  copies are waited for before anything else is done, and only other programs of the multiprocessor hide them.
- **per matrix op**: other instructions of the inner loop for each one of the tensor cores. One `wgmma` or `tcgen05` does the work
  of 16 to 64 `mma`, so that this compares rows of one instruction only. **per mma**: the same of all warps of the loop for each
  2,048 multiply-adds of a tile, the work of one `mma` of 16 x 8 x 16, for any instruction, tile and number of warps. On sm_80 in
  bfloat16 both are one number, or the same products are computed twice. **described**: by tensor
  descriptors; one thread copies a block. **specialised**: the loop of the warp that multiplies; another copies.
- The last columns are limits of cards with this instruction set in microseconds: the longer of operations at the data sheet's
  peak and bytes at its bandwidth. `-`: the card lacks the arithmetic, or the kernel is a small part of its case.
- **faults**: what the gate refuses: spills, too much shared memory, no tensor-core instruction, narrow loads of weights,
  three stages or more and nothing in flight.

Loads of 8 bytes are taken in three places. int8 and fp8 keys: Triton lays such an operand out 8 elements wide before it is
converted. int4 weights with more than 32 rows beside wgmma, for the same reason; there arithmetic bounds them and not memory.
int4 weights in groups of 32, of which a step has 16 bytes a feature.
gfx942 has sm_80's tiles with fewer stages, and none chosen for it: it is shown, and not gated."""

_COMPARISON = """A matrix product and a dense fused attention in plain textbook form (`bench/tutorial_kernels.py`), compiled in
the same run. The project's own do more: packed rows, scales, bias and residual, a ragged batch over a block table; and 64 + 16
columns of head_dim 80, which the textbook's cannot do (it stands here with 128; padded to that it would do 1.6 times the
products, so that of its instructions 1.6 times as many fall on the work of one `mma` that counts)."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels and read their code.")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument(
        "--only", default="", help="cases whose name holds this; nothing is written to a file"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="every launch of both models; to standard output"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of codegen.json and codegen.md")
    arguments = parser.parse_args()
    if arguments.sweep:
        for name in arguments.targets:
            print(sweep(TARGETS[name], arguments.only), flush=True)
        return
    rows: list[Row] = []
    for name in arguments.targets:
        target, built = TARGETS[name], dict[str, Figures]()
        for case in cases():
            if name in case.targets and arguments.only in case.name:
                rows += run(case, target, built)
        print(f"{name}: {len(built)} kernels compiled", file=sys.stderr, flush=True)
    if arguments.only or set(arguments.targets) != set(TARGETS):
        print(report(rows))
        return
    data = {
        "schema": "pagemill-codegen/1",
        "triton": triton.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (arguments.output / "codegen.json").write_text(json.dumps(data, separators=(",", ":")) + "\n")
    (arguments.output / "codegen.md").write_text(report(rows))


if __name__ == "__main__":
    main()
