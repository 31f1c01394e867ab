"""The gate: no spills, shared memory that fits, tensor cores in every product, wide loads of weights; and that it closes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import codegen
import pytest
import torch
from codegen import Case
from machine_code import (
    TARGETS,
    Code,
    Figures,
    Target,
    capture,
    in_flight,
    inner_loop,
    kind_of,
    loads,
    occupancy,
    read_gcn,
    read_sass,
)
from torch import Tensor

from pagemill.kernels.gpu import configs, linear, ops
from pagemill.kernels.gpu.configs import MatmulTile

CUDA = [target for target in TARGETS.values() if target.is_cuda]
GATE = [case for case in codegen.cases() if case.gate]
_built: dict[str, dict[str, Figures]] = {}


def faults(case: Case, target: Target) -> list[str]:
    rows = codegen.run(case, target, _built.setdefault(target.name, {}))
    assert rows
    return [fault for row in rows for fault in row.faults]


@pytest.mark.parametrize(
    ("case", "target"),
    [
        pytest.param(case, target, id=f"{case.name}-{target.name}")
        for case in GATE
        for target in CUDA
        if target.name in case.targets
    ],
)
def test_the_gate_is_passed(case: Case, target: Target) -> None:
    assert not faults(case, target)


@pytest.mark.parametrize(
    ("target", "words"), [("sm_90", ["described"]), ("sm_100", ["described", "specialised"])]
)
def test_operands_of_many_rows_come_by_descriptors(target: str, words: list[str]) -> None:
    """Rows of 3,420 inputs, too, which a product before leaves at multiples of 16 bytes; the tail then takes no code."""
    case = next(case for case in GATE if case.name == "vision down plain M=4096")
    (row,) = codegen.run(case, TARGETS[target], _built.setdefault(target, {}))
    assert [word for word in ("described", "specialised") if f", {word}" in row.launch] == words
    assert row.figures.loop.get("global load", 0) <= 2  # on sm_100 another warp copies


def test_seven_query_heads_over_fp8_keys_do_not_spill() -> None:
    """The 7B's, on sm_89: 128 rows of them do."""
    case = codegen.paged("prefill", 1, 4096, 4096, torch.float8_e4m3fn, model=codegen._7B)
    assert not faults(case, TARGETS["sm_89"])


def test_a_tile_has_one_kernel_for_every_number_of_rows() -> None:
    """Triton would make one for 1, for multiples of 16 and for all else, while pages wait."""
    target, tiles = TARGETS["sm_90"], set()
    with capture(target) as launches:
        for m in (1, 2, 15, 16, 17, 32, 33, 48, 64, 65, 100, 128, 257, 512, 1000, 1024, 2047, 2048):
            codegen.product("out", "plain", m, 2048, 2048).call()
            tile = configs.matmul(target.card, "plain", False, m, 2048, 2048)
            tiles.add(replace(tile, splits=min(tile.splits, 2)))
    names = [launch.kernel.rpartition(".")[2] for launch in launches]
    assert names.count("matmul_kernel") == len(tiles) > 4
    assert names.count("finish_kernel") == 1


def test_every_kind_of_kernel_is_in_the_gate() -> None:
    everywhere = [case.name for case in GATE if len(case.targets) > 1]
    kinds = [
        f"{layer} {form} " for layer in ("gate_up", "(?!.*gate_up).*") for form in ("plain", "int8", "int4")
    ]
    kinds += [
        "gate_up fp8 ",
        "head ",
        "decode bf16",
        "decode int8",
        "prefill bf16",
        "vision windows",
        "vision images",
    ]
    for kind in kinds:
        assert any(re.match(kind, name) for name in everywhere), kind
    for kind in ("int4g64", "int4g32"):
        assert any(f" {kind} " in case.name for case in GATE)


def test_the_sweep_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch once, with the cases that would make it."""
    good = codegen.product("good", "plain", 4096, 2048, 2048)
    same, bad = replace(good, name="same"), replace(product(unaligned), name="bad")
    monkeypatch.setattr(codegen, "sweep_cases", lambda: [("a", good), ("a", same), ("b", bad), ("b", bad)])
    text = codegen.sweep(TARGETS["sm_80"])
    assert "## sm_80: 2 different kernels, 1 with a fault" in text
    assert "| a | 1 | 0 |" in text
    assert "| b | 1 | 1 |" in text
    assert "| bad, bad | 2 |" in text
    assert "good" not in text


def test_the_sweep_has_both_models_and_every_form() -> None:
    groups = {group for group, _ in codegen.sweep_cases()}
    forms = ("plain", "int8", "fp8", "int4", "int4g64", "int4g32")
    kinds = (*forms, "attention bf16", "attention int8", "attention fp8")
    assert groups == {f"{kind} {model}" for kind in kinds for model in ("3B", "7B")} | {"attention vision"}


def product(call: Callable[[], object]) -> Case:
    return Case("a product", call, 1.0, 1.0)


def multiply(
    tile: MatmulTile, *, m: int = 4096, gated: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Case:
    def call() -> Tensor:
        weight = codegen.packed("plain", 2048, 2048, gated=gated)
        weight = replace(weight, weight=weight.weight.to(dtype))
        return linear.linear(codegen._empty(m, 2048, dtype=dtype), weight, tile=tile)

    return product(call)


def unaligned() -> Tensor:
    weight = codegen.packed("plain", 2048, 2048)
    rows = codegen._empty(2048, 2049)[:, :2048]
    return linear.linear(
        codegen._empty(16, 2048), replace(weight, weight=rows), tile=MatmulTile(16, 64, 64, 1, 4, 4)
    )


@pytest.mark.parametrize(
    ("case", "target", "fault"),
    [
        (product(unaligned), "sm_80", "loads of weights of "),
        (multiply(MatmulTile(128, 256, 64, 1, 4, 3), gated=True), "sm_80", " spills"),
        (multiply(MatmulTile(128, 128, 64, 1, 8, 5)), "sm_89", " bytes of shared memory, of 101376"),
        (multiply(MatmulTile(16, 64, 32, 1, 4, 2), m=16, dtype=torch.float32), "sm_80", "no tensor-core instruction"),
    ],
    ids=["narrow loads", "spills", "shared memory", "no tensor cores"],
)  # fmt: skip
def test_the_gate_closes(case: Case, target: str, fault: str) -> None:
    assert any(fault in found for found in faults(case, TARGETS[target]))


def test_the_gate_closes_on_a_pipeline_that_waits_at_once() -> None:
    case, target = next(case for case in GATE if case.name.startswith("prefill")), TARGETS["sm_80"]
    (row,) = codegen.run(case, target, _built.setdefault(target.name, {}))
    assert row.figures.in_flight
    (fault,) = codegen.faults(replace(row.figures, in_flight=0), target, case)
    assert "nothing is copied while" in fault
    assert not codegen.faults(replace(row.figures, in_flight=0, stages=2), target, case)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gate_up plain M=4096", "sm_80"), ("down int4 M=16", "sm_80"), ("down int4 M=64", "sm_80"),
        ("gate_up int4 M=64", "sm_80"), ("down int4 M=32", "sm_90"), ("gate_up int4 M=32", "sm_90"),
        ("prefill bf16 1 x 4096", "sm_80"), ("vision images", "sm_80"),
    ],
)  # fmt: skip
def test_there_is_one_mma_for_each_2048_multiply_adds(name: str, target: str) -> None:
    """No two warps compute the same; and what a tile is taken to multiply is what its inner loop does."""
    case = next(case for case in codegen.cases() if case.name == name)
    rows = codegen.run(case, TARGETS[target], _built.setdefault(target, {}))
    (figures,) = (row.figures for row in rows if row.figures.per_mma)
    assert figures.matrix == "mma"
    assert figures.per_mma == pytest.approx(figures.per_matrix)


def test_wide_heads_fit_the_smallest_shared_memory() -> None:
    """Of 512 bytes; no card's table is made for them."""

    def call() -> Tensor:
        q = codegen._empty(4096, 8, 256)
        cache = codegen._empty(256, 2, 16, 256)
        starts, tables = (codegen._empty(*shape, dtype=torch.int32) for shape in ((2,), (1, 256)))
        return ops._paged_attention(q, cache, cache, tables, starts, starts[:1], 1.0)

    found = [fault for target in CUDA for fault in faults(product(call), target)]
    assert not [fault for fault in found if "shared memory" in fault]


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   STL [R1], R4 ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/              @!P1 BRA 0x10 ;
        /*0070*/                   EXIT ;
"""


WAITS = """
        /*0000*/                   DEPBAR.LE SB0, 0x2 ;
        /*0010*/                   DEPBAR.LE SB1, 0x0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   LDGDEPBAR ;
"""


def test_machine_code_is_read() -> None:
    code = read_sass(SASS)
    assert code.names[2].startswith("HMMA")
    assert [kind_of(name) for name in code.names] == [
        "integer and address", "global load", "matrix", "control", "spill", "float", "control", "control",
    ]  # fmt: skip
    assert code.loops == [(2, 3), (1, 6)]
    assert list(inner_loop(code)) == list(code.names[2:4])
    assert list(inner_loop(Code(["FADD"]))) == ["FADD"]
    waits = read_sass(WAITS).names
    assert in_flight(waits) == 2
    assert in_flight(waits[:-1]) is None
    gcn = read_gcn(
        "kernel:\n\tv_mov_b32 v0, v1\n.LBB0_1:\n\tv_mfma_f32 a, b\n\ts_cbranch_scc1 .LBB0_1\n.Lfunc_end0:\n\tv_not_read x\n"
    )
    assert gcn.names == ["v_mov_b32", "v_mfma_f32", "s_cbranch_scc1"]
    assert gcn.loops == [(1, 2)]


def test_loads_are_told_apart_by_their_source_line(tmp_path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text(
        "b = tl.load(w_at, mask=there)\na = tl.load(x_at)\nacc = tl.dot(a, w.load([n, k]).T, acc)\n"
    )
    ptx = f"""
    .loc 1 1 5
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    .loc 1 2 5
    ld.global.v2.b32 {{ %r1, %r2 }}, [ %rd1 + 0 ];
    @%p1 ld.global.b16 %rs1, [ %rd1 + 0 ];
    .loc 1 3 5
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r2, %r3}}], [%r4];
    .file 1 "{tmp_path}" "kernel.py"
    """
    counts, asynchronous = loads(ptx)
    assert counts == {"weights": {16: 2}, "other": {8: 1, 2: 1}}
    assert asynchronous == 2


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "share"),
    [
        (32, 0, 4, 1.0),
        (64, 0, 4, 0.5),
        (255, 0, 8, 0.125),
        (32, 100 << 10, 4, 4 / 64),
        (32, 40 << 10, 8, 0.5),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, share: float) -> None:
    """Of an A100, by hand: 65,536 registers in steps of 256 a warp, 164 KB less 1 a program, 64 warps, 32 programs."""
    assert occupancy(TARGETS["sm_80"], registers, shared, warps) == share
