"""Matrix products in the launch configurations of `pagemill.kernels.gpu.configs`, compiled and executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagemill.kernels.gpu import configs, linear
from pagemill.kernels.linear import PackedLinear
from tests.emulator.conftest import BF16, F32, among_nan, assert_within
from tests.emulator.launch import Launch, emulated
from tests.gpu.reference import product

FP8 = torch.float8_e4m3fn
ARCH = {"fp8": 89}
"""Compute capability that a scheme needs, if not 80."""
CASES = {
    "one row": (1, 70, 100, False, False),
    "one row of a gate": (1, 30, 200, True, False),
    "a full tile, cut in many": (16, 64, 1024, False, True),
    "a row more, odd inputs": (17, 33, 855, True, True),
    "wide, a feature more": (65, 129, 192, False, True),
    "wide, a gate": (130, 40, 72, True, False),
}
"""M, N, K, gated, and with bias and residual."""


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in int8 or float8 with the largest number at its end, by float32 arithmetic; and their scales."""
    scale = x.float().abs().amax(1) / (127 if dtype == torch.int8 else 448)
    codes = x.float() / scale[:, None]
    return (codes.round() if dtype == torch.int8 else codes.to(dtype).float()), scale


def weights(
    scheme: str, n: int, k: int, group: int
) -> tuple[Tensor, Callable[[Any, Tensor | None, bool], PackedLinear]]:
    """W `[n, k]` in float64, and what packs it."""
    if scheme == "int4":
        groups = -(-k // group)
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8)
        scales = torch.rand(n, groups) * 0.05 + 0.01
        column = torch.arange(k) // group
        weight = (q.double() - zeros.double()[:, column]) * scales.double()[:, column]
        return weight, lambda module, bias, gated: module.pack_int4(q, scales, zeros, bias, gated=gated)
    if scheme == "plain":
        plain = torch.randn(n, k).mul(0.3).bfloat16()
        return plain.double(), lambda module, bias, gated: module.pack_plain(plain, bias, gated=gated)
    kind = torch.int8 if scheme == "int8" else FP8
    codes, scale = rounded(torch.randn(n, k), kind)
    weight = codes.double() * scale.double()[:, None]
    return weight, lambda module, bias, gated: module.pack_scaled(codes.to(kind), scale, bias, gated=gated)


def check(
    scheme: str, m: int, n: int, k: int, gated: bool, extras: bool, group: int = 128, out_dtype: torch.dtype = torch.float32,
    module: Any = linear, tile: configs.MatmulTile | None = None, **how: Any,
) -> list[Launch]:  # fmt: skip
    """One product against float64, in a tile, the table's if none is given; every element within what rounding may add up to."""
    x = among_nan(torch.randn(m, k).bfloat16())
    weight, pack = weights(scheme, 2 * n if gated else n, k, group)
    bias = torch.randn(len(weight)).bfloat16() if extras else None
    residual = torch.randn(m, n).bfloat16() if extras else None
    packed = pack(module, bias, gated)
    # On one multiprocessor the largest tile that has rows for it; on as many as an A100 has, K is cut.
    card = configs.Card("", ARCH.get(scheme, 80), 1 if m > 64 else 108)
    tile = tile or configs.matmul(card, scheme, gated, m, n, k)
    quantize, rows = module.quantize, []

    def remembered(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows.append(quantize(x, dtype))
        return rows[-1]

    with emulated(ARCH.get(scheme, 80), **how) as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quantize", remembered)
        found = module.linear(x, packed, tile=tile, residual=residual, out_dtype=out_dtype)
    exact = x.double()
    if scheme in ("int8", "fp8"):
        [(codes, scale)] = (
            rows  # `test_quantize` checks them; a tie may go either way, by the scale's last bit
        )
        exact = codes[:, :k].double() * scale.double()[:, None]
    wanted = product(exact, weight, bias, residual, gated)
    # Sums in float32 of K / 16 terms, each rounded once, the epilogue's few more.
    size = product(exact.abs(), weight.abs(), None if bias is None else bias.abs(), None, False)
    bound = (k / 16 + 12) * F32 * size
    if gated:
        gate, up = product(exact, weight, bias, None, False).chunk(2, -1)
        gate_bound, up_bound = bound.chunk(2, -1)
        bound = (
            1.2 * gate_bound * up.abs() + F.silu(gate).abs() * up_bound + 4 * F32 * (F.silu(gate) * up).abs()
        )
    if residual is not None:
        bound = bound + F32 * wanted.abs()
    if out_dtype == torch.bfloat16:
        bound = bound + BF16 * wanted.abs()
    assert found.dtype == out_dtype
    assert_within(found, wanted, bound)
    return launches


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("wide")])
@pytest.mark.parametrize("scheme", ["plain", "int8", "fp8", "int4"])
def test_matches_float64(scheme: str, case: str) -> None:
    launches = check(scheme, *CASES[case])
    names = [launch.kernel.metadata.name for launch in launches]
    matmul = launches[("quantize_kernel" in names)]
    assert matmul.count("mma") > 0
    if case == "a full tile, cut in many":
        assert names[-1] == "finish_kernel"


TILES = {
    f"{scheme}{' gated' * gated} {tile.rows} x {tile.features} x {tile.inputs}": (scheme, gated, tile)
    for scheme in ("plain", "int8", "fp8", "int4")
    for gated in (False, True)
    for tile in configs.MATMUL[ARCH.get(scheme, 80)][scheme, gated]
}


@pytest.mark.parametrize("name", TILES)
def test_every_tile_of_the_table(name: str) -> None:
    """A whole tile, deep enough for every stage of the pipeline to be used again, each warp by itself; then a row and some inputs
    more, and some features fewer."""
    scheme, gated, tile = TILES[name]
    step = 128 if scheme == "int4" else tile.inputs  # a group
    k = (tile.stages + 1) * step
    check(scheme, tile.rows, tile.features, k, gated, False, tile=tile, one_by_one=True, seed=0)
    more = tile.rows + 1, tile.features - 16, 2 * step + 8
    launches = check(scheme, *more, gated, True, out_dtype=torch.bfloat16, tile=tile)
    assert launches[-1].kernel.metadata.num_warps == tile.warps
    assert launches[-1].count("mma") > 0


def test_a_tile_that_is_finished_in_halves() -> None:
    """Of a gate, as on sm_90 and later, whose tensor cores nothing here executes."""
    check("int8", 100, 150, 72, True, True, tile=configs.MatmulTile(128, 128, 64, 1, 8, 2))


@pytest.mark.parametrize(("scheme", "case"), [("plain", "wide, a gate"), ("fp8", "wide, a feature more")])
def test_descriptors(scheme: str, case: str) -> None:
    """Before sm_90 they are addresses and masks: what the kernel asks of them, not how it is copied."""
    tile = configs.MatmulTile(32, 32, 64, 1, 4, 3, loads="descriptors")
    launches = check(scheme, *CASES[case], tile=tile)
    assert any("tensordesc" in kind for kind in launches[-1].kernel.src.signature.values())


@pytest.mark.parametrize(("n", "k", "group"), [(33, 100, 32), (40, 200, 128)])
def test_int4_becomes_plain(n: int, k: int, group: int) -> None:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zeros, scales = (
        torch.randint(1, 16, (n, -(-k // group)), dtype=torch.uint8),
        torch.rand(n, -(-k // group)),
    )
    column = torch.arange(k) // group
    wanted = (q.float() - zeros.float()[:, column]) * scales[:, column]
    with emulated():
        found = linear.unpack_int4(linear.pack_int4(q, scales, zeros), torch.bfloat16).weight
    assert torch.equal(found[:, :k], wanted.bfloat16())
    assert not found[:, k:].any()


@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("k", [1, 63, 64, 1025])
def test_quantize(k: int, kind: torch.dtype) -> None:
    """A row, one of tiny numbers, one of zeros."""
    x = among_nan((torch.randn(3, k) * torch.tensor([[1.0], [1e-30], [0.0]])).bfloat16())
    with emulated(89 if kind == FP8 else 80):
        codes, scale = linear.quantize(x, kind)
    assert codes.shape == (3, -(-k // 64) * 64)
    assert not codes[:, k:].float().any()
    assert not codes[2].float().any()
    assert (scale > 0).all()
    largest = 127 if kind == torch.int8 else 448
    assert_within(scale[:2], x[:2].double().abs().amax(1) / largest, 1e-6 * scale[:2].double() + 1e-30)
    step = 0.5 if kind == torch.int8 else (x.double().abs() / scale.double()[:, None] / 16).clamp_min(2**-10)
    assert_within(
        codes[:, :k].double() * scale.double()[:, None], x.double(), 1.0001 * step * scale.double()[:, None]
    )


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("case", ["one row of a gate", "a row more, odd inputs", "wide, a feature more"])
def test_int4_groups(group: int, case: str) -> None:
    check("int4", *CASES[case], group=group)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scheme", ["plain", "int8", "fp8", "int4"])
def test_warps_in_any_order(scheme: str, seed: int) -> None:
    """Deep enough for every stage of the pipeline to be used again."""
    shape = [(16, 32, 640), (33, 40, 448)][seed]
    check(scheme, *shape, seed == 1, True, group=64, one_by_one=True, seed=seed)
