from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pagemill.kernels.gpu import configs
from pagemill.kernels.gpu import linear as module
from pagemill.kernels.gpu.configs import MatmulTile
from pagemill.kernels.gpu.linear import linear, pack_int4, pack_plain, pack_scaled, quantize, unpack_int4
from pagemill.kernels.linear import PackedLinear
from tests.gpu.conftest import DEVICE, ON_GPU, bound, error, needs_fp8
from tests.gpu.reference import product

SHAPES = [(1, 64, 128, 1), (5, 70, 100, 1), (33, 130, 200, 3), (17, 33, 855, 4), (16, 32, 64, 2)]
"""M, N, K and split-K."""


@contextmanager
def counted() -> Iterator[list[TensorDescriptor]]:
    """The tensor descriptors that are made within."""
    made: list[TensorDescriptor] = []

    def make(*arguments: Any) -> TensorDescriptor:
        made.append(TensorDescriptor(*arguments))
        return made[-1]

    with mock.patch.object(module, "TensorDescriptor", make):
        yield made


def tile(rows: int, splits: int) -> MatmulTile:
    return MatmulTile(16 if rows <= 16 else 32, 32, 32, splits, 4, 3)


def inputs(m: int, n: int, k: int, dtype: torch.dtype, gated: bool, extras: bool) -> tuple[Tensor, ...]:
    x = torch.randn(m, 2, k).to(dtype)[:, 1]  # strided rows
    rows = 2 * n if gated else n
    weight = torch.randn(rows, k).mul(0.3).to(dtype)
    bias = torch.randn(rows).to(dtype) if extras else None
    residual = torch.randn(m, n).to(dtype) if extras else None
    return x, weight, bias, residual


@pytest.mark.parametrize(("gated", "extras"), [(False, False), (True, True)])
@pytest.mark.parametrize(("m", "n", "k", "splits"), SHAPES)
def test_plain(m: int, n: int, k: int, splits: int, dtype: torch.dtype, gated: bool, extras: bool) -> None:
    x, weight, bias, residual = inputs(m, n, k, dtype, gated, extras)
    found = linear(x, pack_plain(weight, bias, gated=gated), tile=tile(m, splits), residual=residual)
    assert error(found, product(x, weight, bias, residual, gated)) < bound(dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "splits"), SHAPES)
def test_int8(m: int, n: int, k: int, splits: int, dtype: torch.dtype, gated: bool) -> None:
    x, weight, bias, residual = inputs(m, n, k, dtype, gated, True)
    scale = weight.float().abs().amax(1) / 127
    q = (weight.float() / scale[:, None]).round().to(torch.int8)
    step = x.float().abs().amax(1, keepdim=True) / 127
    rounded = (x.float() / step).round() * step
    found = linear(x, pack_scaled(q, scale, bias, gated=gated), tile=tile(m, splits), residual=residual)
    assert error(
        found, product(rounded, q.double() * scale.double()[:, None], bias, residual, gated)
    ) < bound(dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "splits", "group"),
    [(*shape, group) for shape in SHAPES for group in (32, 128)]
    + [(5, 70, 100, 1, 64), (17, 33, 855, 4, 64), (1, 64, 128, 1, 64)],
)
def test_int4(m: int, n: int, k: int, splits: int, group: int, dtype: torch.dtype, gated: bool) -> None:
    x, _, bias, residual = inputs(m, n, k, dtype, gated, True)
    rows, groups = 2 * n if gated else n, -(-k // group)
    q = torch.randint(0, 16, (rows, k), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    scales = torch.rand(rows, groups).mul(0.05).to(dtype)
    of_column = torch.arange(k) // group
    weight = (q.double() - zeros.double()[:, of_column]) * scales.double()[:, of_column]
    found = linear(x, pack_int4(q, scales, zeros, bias, gated=gated), tile=tile(m, splits), residual=residual)
    assert error(found, product(x, weight, bias, residual, gated)) < bound(dtype)


def among_nan(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """`[m, k]` with rows that begin at multiples of 16 bytes, NaN between them and around."""
    x = torch.full((m + 2, 2, -(-k // 16) * 16 + 16), float("nan"), dtype=dtype)[1:-1, 1, :k]
    return x.copy_(torch.randn(m, k))


FORMS = ["plain", "int8", pytest.param("fp8", marks=needs_fp8)]


def pack(
    form: str, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool
) -> tuple[PackedLinear, tuple[Tensor, Tensor]]:
    """The weight in a form; and x and the weight as numbers that the product multiplies."""
    if form == "plain":
        return pack_plain(weight, bias, gated=gated), (x, weight)
    k = weight.shape[1]
    kind = torch.int8 if form == "int8" else torch.float8_e4m3fn
    rows, codes = quantize(x, kind), quantize(weight, kind)
    x, weight = ((q.double() * scale.double()[:, None])[:, :k] for q, scale in (rows, codes))
    return pack_scaled(codes[0][:, :k], codes[1], bias, gated=gated), (x, weight)


def check(form: str, m: int, n: int, k: int, gated: bool, dtype: torch.dtype, shape: MatmulTile) -> None:
    """A product in a tile, of rows among NaN, with bias and residual."""
    _, weight, bias, residual = inputs(m, n, k, dtype, gated, True)
    x = among_nan(m, k, dtype)
    packed, exact = pack(form, x, weight, bias, gated)
    found = linear(x, packed, tile=shape, residual=residual)
    assert error(found, product(*exact, bias, residual, gated)) < bound(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "n", "k", "splits", "gated"),
    [(1, 64, 128, 1, False), (5, 70, 100, 1, True), (17, 33, 855, 4, True), (33, 130, 200, 3, False)],
)
def test_descriptors(m: int, n: int, k: int, splits: int, gated: bool, form: str) -> None:
    """Zeros beyond the last row, feature and input, and no row that is not its own."""
    with counted() as blocks:
        shape = replace(tile(m, splits), inputs=64, loads="descriptors")
        check(form, m, n, k, gated, torch.float32, shape)
    assert len(blocks) == 2


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has a table of its own")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_tile_of_the_table(form: str, gated: bool) -> None:
    """As this card launches them: a row and a feature more than a tile has, inputs that end within a step."""
    for shape in configs.MATMUL[configs.card_of(DEVICE).arch][form, gated]:
        m, n, k = shape.rows + 1, shape.features + 1, 5 * shape.inputs + 8
        check(form, m, n, k, gated, torch.bfloat16, shape)


SIZES = [1e4, 1e-4, 0.0, 1.0]
"""Of rows of x and of W that stand beside each other."""


def spread(rows: int, columns: int) -> Tensor:
    """`[rows, columns]` of rows of these sizes, too far apart for float16."""
    return torch.randn(rows, columns) * torch.tensor(SIZES)[torch.arange(rows) % 4, None]


def assert_each(
    found: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gated: bool, tolerance: float
) -> None:
    """Every element alone: within `tolerance` of the size of what is added up for it, which no larger row beside it hides."""
    wanted = product(x, weight, bias, residual, gated)
    sums, sizes = (
        product(a, w, b, None, False) for a, w, b in ((x, weight, bias), (x.abs(), weight.abs(), bias.abs()))
    )
    if gated:  # silu changes by at most 1.1 times what its argument does
        gate, up = sums.chunk(2, 1)
        gate_size, up_size = sizes.chunk(2, 1)
        sizes = 1.1 * gate_size * up.abs() + (F.silu(gate).abs() + tolerance * gate_size) * up_size
    off = (found.double() - wanted).abs() / (sizes + residual.abs().double() + 1e-30)
    assert off.max() < tolerance  # a NaN is below nothing


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_very_different_sizes(form: str, splits: int, gated: bool) -> None:
    """Rows of x and of W of 1e4, 1e-4 and zeros beside each other; a row of zeros gives the bias, exactly."""
    m, n, k = 6, 35, 100
    x, weight = spread(m, k), spread(n * (1 + gated), k)
    bias, residual = torch.randn(len(weight)), torch.randn(m, n)
    packed, exact = pack(form, x, weight, bias, gated)
    if form != "plain":
        assert not exact[0][2].any()
    found = linear(x, packed, tile=tile(m, splits), residual=residual)
    assert_each(found, *exact, bias, residual, gated, bound(torch.float32))
    if not gated:
        assert torch.equal(found[2], bias + residual[2])
        assert torch.equal(found[:, 2], bias[2] + residual[:, 2])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups_of_very_different_scales(group: int, gated: bool) -> None:
    """1e4, 1e-4, 0 and 1 in one row of W and in one column of groups, and inputs for which the small ones count, too."""
    m, n, k = 6, 35, 4 * group - 8
    rows, of_column = n * (1 + gated), torch.arange(k) // group
    scales = torch.tensor(SIZES)[(torch.arange(rows)[:, None] // 3 + torch.arange(4)) % 4]
    scales[::3, 1:], scales[1::3] = scales[::3, :1], 0.0  # rows of one scale, and rows of zeros
    q = torch.randint(0, 16, (rows, k), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, 4), dtype=torch.uint8)
    weight = (q.double() - zeros.double()[:, of_column]) * scales.double()[:, of_column]
    x = spread(m, k) * torch.tensor([1e-4, 1e4, 1.0, 1e-3])[of_column]
    bias, residual = torch.randn(rows), torch.randn(m, n)
    found = linear(x, pack_int4(q, scales, zeros, bias, gated=gated), tile=tile(m, 2), residual=residual)
    assert_each(found, x, weight, bias, residual, gated, bound(torch.float32))


@pytest.mark.parametrize("odd", ["address", "row", "repeated"])
def test_rows_that_a_descriptor_cannot_have_are_read_by_pointers(odd: str) -> None:
    x = torch.randn(6, 104)
    if odd == "repeated":
        x = x[:1, :100].expand(5, 100)
    else:
        x = x[:, 1:101] if odd == "address" else x.flatten()[: 5 * 101].view(5, 101)[:, :100]
    weight = torch.randn(70, 100)
    shape = replace(tile(5, 1), loads="descriptors")
    with counted() as blocks:
        found = linear(x, pack_plain(weight), tile=shape)
    assert error(found, product(x, weight, None, None, False)) < bound(torch.float32)
    assert not blocks


@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 32), (33, 100, 32), (70, 855, 64), (32, 256, 128)])
def test_int4_becomes_plain(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    """(q - zero) * scale, rounded once; zero beyond K, whatever the zero point of a group that K cuts."""
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zeros = torch.randint(1, 16, (n, groups), dtype=torch.uint8)
    scales = torch.rand(n, groups) * 0.05
    bias = torch.randn(n).to(dtype)
    of_column = torch.arange(k) // group
    wanted = (q.float() - zeros.float()[:, of_column]) * scales[:, of_column]
    found = unpack_int4(pack_int4(q, scales, zeros, bias), dtype)
    assert (found.scheme, found.in_features, found.bias is bias) == ("plain", k, True)
    assert torch.equal(found.weight[:, :k], wanted.to(dtype))
    assert not found.weight[:, k:].any()
    with pytest.raises(ValueError, match="packed should be an int4 weight, and is plain"):
        unpack_int4(found, dtype)


def test_quantize() -> None:
    x = torch.randn(3, 70) * torch.tensor([[1.0], [1e-6], [0.0]])
    codes, scale = quantize(x, torch.int8)
    assert codes.shape == (3, 128)
    assert not codes[:, 70:].any()
    assert not codes[2].any()
    torch.testing.assert_close(scale[:2], x[:2].abs().amax(1) / 127)
    torch.testing.assert_close(codes[:2, :70].float(), (x[:2] / scale[:2, None]).round())


@needs_fp8
def test_rows_of_fp8_of_other_sizes() -> None:
    """A row of zeros has codes of zero and a scale that is none."""
    x = torch.randn(4, 70) * torch.tensor([[1.0], [1e-6], [0.0], [1e4]])
    codes, scale = quantize(x, torch.float8_e4m3fn)
    assert not codes[2].float().any()
    assert 0 < scale[2] < 1e-20
    assert not codes[:, 70:].float().any()
    whole = codes[:, :70].double() * scale.double()[:, None]
    step = (codes[:, :70].double().abs() / 16).clamp_min(2.0**-10) * scale.double()[:, None]
    assert ((whole - x.double()).abs() <= 1.001 * step).all()
    torch.testing.assert_close(scale[[0, 1, 3]], x[[0, 1, 3]].abs().amax(1) / 448)


@needs_fp8
def test_quantize_to_fp8() -> None:
    """A row whose largest is 448 keeps its scale of 1: its codes are those of torch's conversion, to nearest, ties to even."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:] + every[:-1]) / 2
    x = torch.cat(
        [every, between, between.nextafter(every[1:]), torch.randn(400) * 100, torch.randn(400) / 100]
    )
    x = x.clamp(-448, 448)[None]
    codes, scale = quantize(x, torch.float8_e4m3fn)
    assert scale.item() == 1
    wanted = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes[:, : x.shape[1]].float(), wanted.float())
    assert not codes[:, x.shape[1] :].float().any()


def test_no_rows() -> None:
    weight = torch.randn(8, 16)
    assert linear(torch.randn(0, 16), pack_plain(weight), tile=tile(1, 1)).shape == (0, 8)
