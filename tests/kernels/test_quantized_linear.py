"""int8 and int4 linear layers: the arithmetic to the bit, on every instruction set, and how far it is from the weights."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels import Kernels, PackedLinear, Scheme
from pagemill.kernels.linear import WIDE_ROWS, check_wide, dequantize_reference
from tests.kernels.conftest import LINEAR_ISAS, open_kernels

SHAPES = [
    (1, 1, 1), (1, 33, 257), (2, 31, 100), (3, 40, 513), (4, 96, 132), (5, 161, 1029), (6, 32, 8), (7, 257, 64),
    (9, 64, 2100), (12, 128, 96), (13, 97, 300), (25, 32, 33), (97, 160, 140), (193, 40, 520),
    (14, 96, 1024), (17, 64, 1060), (300, 33, 70),
]  # fmt: skip
SCHEMES: list[tuple[Scheme, int]] = [("int8", 128), ("int4", 128), ("int4", 64), ("int4", 32)]


@pytest.fixture(params=["reference", *LINEAR_ISAS])
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    return open_kernels(request.param, dtype)


@pytest.fixture(params=LINEAR_ISAS)
def native(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    return open_kernels(request.param, dtype)


@pytest.fixture(params=SCHEMES, ids=lambda case: f"{case[0]}-{case[1]}")
def scheme(request: pytest.FixtureRequest) -> tuple[Scheme, int]:
    return request.param


def pack(kernels: Kernels, weight: Tensor, bias: Tensor | None, scheme: tuple[Scheme, int]) -> PackedLinear:
    return kernels.pack_linear(weight, bias, scheme=scheme[0], group=scheme[1])


def random_q(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return q, torch.rand(n, groups) / 8, torch.randint(0, 16, (n, groups), dtype=torch.uint8)


@cache
def cases(
    dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """x, weight, bias and what the reference makes of them."""
    reference, found = open_kernels("reference", dtype), []
    for m, n, k in SHAPES:
        x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k)
        bias = torch.randn(n, dtype=dtype) if m % 2 else None
        y = reference.linear(x, pack(reference, weight, bias, scheme), out_float32=True)
        found.append((x, weight, bias, y))
    return found


def test_every_instruction_set_computes_the_bits_of_the_reference(
    native: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> None:
    for x, weight, bias, wanted in cases(dtype, scheme):
        packed = pack(native, weight, bias, scheme)
        found = native.linear(x, packed, out_float32=True)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted), (x.shape, weight.shape)
        rounded = native.linear(x, packed)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, wanted.to(dtype)), (x.shape, weight.shape)


def test_extremes_of_every_integer_fit_the_sums(
    native: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> None:
    """All weights and activations at the ends of their ranges, with signs that add up and signs that cancel."""
    reference, k = open_kernels("reference", dtype), 1100
    pattern = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]).repeat(1, k // 2)
    x, weight = pattern.to(dtype) * 3, pattern.repeat(10, 1)
    found = native.linear(x, pack(native, weight, None, scheme), out_float32=True)
    w = dequantize_reference(pack(reference, weight, None, scheme))
    torch.testing.assert_close(found.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-2)
    if scheme[0] == "int4":
        group = scheme[1]
        groups = -(-k // group)
        for value, zero in ((15, 0), (0, 15), (15, 15)):
            q = torch.full((40, k), value, dtype=torch.uint8)
            zeros = torch.full((40, groups), zero, dtype=torch.uint8)
            packed = native.pack_quantized(q, torch.ones(40, groups), zeros, None, group=group)
            exact = x.double().sum(1, keepdim=True) * (value - zero)
            found = native.linear(x, packed, out_float32=True).double()
            torch.testing.assert_close(found, exact.expand(4, 40), rtol=1e-5, atol=1e-2)


def test_error_is_that_of_rounding_x(
    kernels: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> None:
    """Each x is off by at most half a step of its row or group: the result by that times the weights' magnitudes."""
    reference = open_kernels("reference", dtype)
    for m, n, k in [(1, 33, 257), (4, 96, 132), (13, 97, 300)]:
        x, weight, bias = torch.randn(m, k, dtype=dtype), torch.randn(n, k), torch.randn(n, dtype=dtype)
        w = dequantize_reference(pack(reference, weight, bias, scheme)).double()
        found = kernels.linear(x, pack(kernels, weight, bias, scheme), out_float32=True).double()
        size = k if scheme[0] == "int8" else scheme[1]
        bound = torch.zeros(m, n, dtype=torch.float64)
        for first in range(0, k, size):
            step = x[:, first : first + size].double().abs().amax(1, keepdim=True) / 127
            bound += 0.5 * step * w[:, first : first + size].abs().sum(1)
        wanted = x.double() @ w.T
        off = (found - bias.double() - wanted).abs()
        assert bool((off <= bound * 1.001 + 1e-4).all())
        assert off.mean() < bound.mean() / 4  # errors that cancel, not a bias


def test_packed_weights_are_close(kernels: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]) -> None:
    """What the packed form multiplies with, read back through unit vectors, against the weight."""
    n, k = 70, 300
    weight = torch.randn(n, k).to(torch.float16)
    packed = pack(kernels, weight, None, scheme)
    found = kernels.linear(torch.eye(k, dtype=dtype), packed, out_float32=True).T
    wanted = dequantize_reference(pack(open_kernels("reference", dtype), weight, None, scheme))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    off = found - weight.float()
    if scheme[0] == "int8":
        assert bool((off.abs() <= 0.501 * weight.float().abs().amax(1, keepdim=True) / 127).all())
        return
    plain = torch.zeros_like(off)  # rounding over the whole range of each group
    for first in range(0, k, scheme[1]):
        w = weight[:, first : first + scheme[1]].float()
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / 15
        zero = (-low / step).round()
        plain[:, first : first + scheme[1]] = ((w / step).round() + zero).clamp(0, 15).sub(zero).mul(step) - w
    assert off.square().sum() < 0.98 * plain.square().sum()


def test_packs_parts_larger_than_a_piece(
    native: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> None:
    parts = [torch.randn(3008, 700, dtype=torch.bfloat16), torch.randn(70, 700, dtype=torch.bfloat16)]
    x = torch.randn(2, 700, dtype=dtype)
    whole = native.linear(x, pack(native, parts, None, scheme), out_float32=True)  # type: ignore[arg-type]
    for part, found in zip(parts, whole.split([3008, 70], 1), strict=True):
        assert torch.equal(native.linear(x, pack(native, part, None, scheme), out_float32=True), found)


def test_rows_do_not_depend_on_the_batch_nor_on_threads(
    native: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]
) -> None:
    for n, k in [(256, 768), (97, 301)]:
        packed = pack(native, torch.randn(n, k), torch.randn(n), scheme)
        x = torch.randn(200, k, dtype=dtype)
        whole = native.linear(x, packed)
        for size in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 96, 97):
            assert torch.equal(native.linear(x[100 : 100 + size], packed), whole[100 : 100 + size]), (
                n,
                k,
                size,
            )
        for threads in (1, 3):
            _native.set_num_threads(threads)
            assert torch.equal(native.linear(x, packed), whole)


def test_strided_rows_among_garbage(kernels: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]) -> None:
    around = torch.full((5, 3, 300), torch.nan, dtype=dtype)
    around[:, 1, :140] = torch.randn(5, 140, dtype=dtype)
    x = around[:, 1, :140]
    packed = pack(kernels, torch.randn(70, 140), None, scheme)
    found = kernels.linear(x, packed)
    assert torch.equal(found, kernels.linear(x.clone(), packed))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantized_checkpoints(kernels: Kernels, dtype: torch.dtype, group: int, gated: bool) -> None:
    n, k = 74, 200
    q, scales, zeros = random_q(n, k, group)
    scales = scales.half()
    bias = torch.randn(n, dtype=dtype)
    packed = kernels.pack_quantized(q, scales, zeros, bias, group=group, gated=gated)
    reference = open_kernels("reference", dtype)
    wanted = reference.pack_quantized(q, scales, zeros, bias, group=group)
    each = torch.arange(k) // group
    exact = (q.double() - zeros.double()[:, each]) * scales.double()[:, each]
    torch.testing.assert_close(dequantize_reference(wanted).double(), exact, rtol=1e-6, atol=0)
    x = torch.randn(3, k, dtype=dtype)
    y = reference.linear(x, wanted, out_float32=True)
    if gated:
        gate, up = y.double().chunk(2, 1)
        unit = 2e-6 if dtype == torch.float32 else 2.0**-8
        found = kernels.linear_swiglu(x, packed)
        torch.testing.assert_close(found.double(), gate * gate.sigmoid() * up, rtol=unit, atol=1e-5)
    else:
        assert torch.equal(kernels.linear(x, packed, out_float32=True), y)


def test_zeros_and_bad_numbers(kernels: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]) -> None:
    weight = torch.randn(40, 200)
    weight[3] = 0
    weight[5, 150] = torch.nan
    weight[6, 20] = -torch.inf
    x = torch.randn(6, 200, dtype=dtype)
    x[1] = 0
    x[2] = 1e-38
    x[3, 7] = torch.nan
    x[4, 7] = torch.inf
    x[5] *= 1e30
    y = kernels.linear(x, pack(kernels, weight, None, scheme), out_float32=True)
    fine = [n for n in range(40) if n not in (5, 6)]
    assert bool(y[:, [5, 6]].isnan().all())
    assert bool((y[[0, 1, 2, 5], 3] == 0).all())
    assert bool((y[1:3, fine] == 0).all())
    assert bool(y[3:5].isnan().all())
    assert bool(y[[0, 5]][:, fine].isfinite().all())


def test_embedding_reads_the_int8_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, k in [(101, 37), (33, 64), (5, 1)]:
        weight = torch.randn(n, k)
        packed = kernels.pack_linear(weight, None, scheme="int8")
        ids = torch.tensor([0, n - 1, n // 2, n - 1])
        reference = open_kernels("reference", dtype).pack_linear(weight, None, scheme="int8")
        assert torch.equal(kernels.embed(ids, packed), dequantize_reference(reference)[ids].to(dtype))
        assert kernels.embed(ids[:0], packed).shape == (0, k)
        with pytest.raises(ValueError, match=rf"ids: expected 0\.\.{n - 1}"):
            kernels.embed(torch.tensor([n]), packed)
    with pytest.raises(ValueError, match="packed: expected a plain or int8"):
        kernels.embed(torch.tensor([0]), kernels.pack_linear(weight, None, scheme="int4"))


def test_no_rows(kernels: Kernels, dtype: torch.dtype, scheme: tuple[Scheme, int]) -> None:
    packed = pack(kernels, torch.randn(8, 4), None, scheme)
    assert kernels.linear(torch.empty(0, 4, dtype=dtype), packed).shape == (0, 8)


def test_bad_arguments_raise(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 200)
    packed = kernels.pack_linear(weight, None, scheme="int8")
    for x in (
        torch.zeros(2, 199, dtype=dtype),
        torch.zeros(2, 200, dtype=torch.float16),
        torch.zeros(200, 2).T,
    ):
        with pytest.raises(ValueError, match="x: expected"):
            kernels.linear(x, packed)
    with pytest.raises(ValueError, match="scheme: expected"):
        kernels.pack_linear(weight, None, scheme="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group: expected"):
        kernels.pack_linear(weight, None, scheme="int4", group=96)
    with pytest.raises(ValueError, match=r"weight: expected 1\.\.65536 columns"):
        kernels.pack_linear(torch.zeros(1, 65537), None, scheme="int8")
    q, scales, zeros = random_q(40, 200, 128)
    for name, bad in {
        "q": (q + 16, scales, zeros, None),
        "zeros": (q, scales, zeros + 16, None),
        "scales": (q, scales[:, :1], zeros, None),
        "bias": (q, scales, zeros, torch.zeros(41)),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            kernels.pack_quantized(*bad)
    with pytest.raises(ValueError, match="zeros: expected"):
        kernels.pack_quantized(q, scales, zeros[:39], None)


@pytest.mark.parametrize("gated", [False, True])
def test_quantized_checkpoints_in_int8(kernels: Kernels, dtype: torch.dtype, gated: bool) -> None:
    """Every int8 there is, -128 among them, against the integers in float64; and the same bits on every implementation."""
    reference = open_kernels("reference", dtype)
    for n, k in [(74, 200), (2, 1), (130, 1030)]:
        q = torch.randint(-128, 128, (n, k)).to(torch.int8)
        q[0] = -128
        scales, bias = torch.rand(n).half() / 50, torch.randn(n, dtype=dtype)
        packed = kernels.pack_quantized(q, scales, None, bias, gated=gated)
        wanted = reference.pack_quantized(q, scales, None, bias)
        exact = q.double() * scales.double()[:, None]
        torch.testing.assert_close(dequantize_reference(wanted).double(), exact, rtol=1e-6, atol=0)
        x = torch.randn(5, k, dtype=dtype)
        y = reference.linear(x, wanted, out_float32=True)
        step = x.double().abs().amax(1, keepdim=True) / 127
        bound = 0.5 * step * exact.abs().sum(1) * 1.001 + 1e-4
        assert bool(((y.double() - bias.double() - x.double() @ exact.T).abs() <= bound).all())
        if gated:
            pair = kernels.pack_quantized(q, scales, None, bias, gated=True)
            gate, up = y.double().chunk(2, 1)
            unit = 2e-6 if dtype == torch.float32 else 2.0**-8
            found = kernels.linear_swiglu(x, pair).double()
            torch.testing.assert_close(found, gate * gate.sigmoid() * up, rtol=unit, atol=1e-5)
        else:
            assert torch.equal(kernels.linear(x, packed, out_float32=True), y)


@pytest.mark.parametrize("gated", [False, True])
def test_sorted_columns_meet_their_x(kernels: Kernels, dtype: torch.dtype, gated: bool) -> None:
    """A weight with its columns in another order is the same sums: equal to gathering x by hand."""
    n, k = 66, 200
    q, scales, zeros = random_q(n, k, 64)
    order = torch.randperm(k)
    x = torch.randn(4, 2 * k, dtype=dtype)[:, k:]
    run = kernels.linear_swiglu if gated else kernels.linear
    for pack in (
        lambda order: kernels.pack_quantized(q, scales, zeros, None, group=64, gated=gated, order=order),
        lambda order: kernels.pack_quantized(
            q.view(torch.int8), scales[:, 0].contiguous(), None, None, gated=gated, order=order
        ),
    ):
        sorted_, plain = pack(order), pack(None)
        assert torch.equal(run(x, sorted_), run(x[:, order], plain))
        assert not torch.equal(run(x, sorted_), run(x, plain))
    reference = open_kernels("reference", dtype).pack_quantized(q, scales, zeros, None, group=64, order=order)
    each = torch.arange(k) // 64
    weight = (q.double() - zeros.double()[:, each]) * scales.double()[:, each]
    wanted = torch.zeros(n, k, dtype=torch.float64)
    wanted[:, order] = weight
    torch.testing.assert_close(dequantize_reference(reference).double(), wanted, rtol=1e-6, atol=0)


def test_the_wide_form_takes_over_at_its_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    n, k = 40, 96
    q, scales, zeros = random_q(n, k, 32)
    order = torch.randperm(k)
    narrow = kernels.pack_quantized(q, scales, zeros, None, group=32, order=order)
    wide = kernels.pack_quantized(torch.randint(-128, 128, (n, k)).to(torch.int8), torch.rand(n), None, None)
    check_wide(narrow, wide)
    both = replace(narrow, wide=wide)
    x = torch.randn(WIDE_ROWS, k, dtype=dtype)
    assert torch.equal(kernels.linear(x[1:], both), kernels.linear(x[1:], narrow))
    assert torch.equal(kernels.linear(x, both), kernels.linear(x, wide))
    short = kernels.pack_quantized(q.view(torch.int8)[:39], scales[:39, 0].contiguous(), None, None)
    for bad in (narrow, both, short):
        with pytest.raises(ValueError, match="wide: expected"):
            check_wide(narrow, bad)


def test_bad_quantized_arguments_raise(kernels: Kernels, dtype: torch.dtype) -> None:
    q, scales, zeros = random_q(40, 200, 128)
    signed, row = q.view(torch.int8), scales[:, 0].contiguous()
    order = torch.arange(200)
    for match, args, options in [
        ("zeros: expected None", (signed, row, zeros, None), {}),
        ("zeros: expected a tensor", (q, scales, None, None), {}),
        ("scales: expected", (signed, scales, None, None), {}),
        ("scales: expected", (signed, row[:39], None, None), {}),
        ("q: expected", (q.int(), scales, zeros, None), {}),
        ("q: expected as many rows", (signed[:39], row[:39], None, None), dict(gated=True)),
        ("order: expected", (q, scales, zeros, None), dict(order=order.int())),
        ("order: expected", (q, scales, zeros, None), dict(order=order[:199])),
        ("order: expected every column", (q, scales, zeros, None), dict(order=order.clamp(max=198))),
        ("order: expected every column", (signed, row, None, None), dict(order=order - 1)),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.pack_quantized(*args, **options)
    packed = kernels.pack_quantized(signed, row, None, None, order=order)
    with pytest.raises(ValueError, match="packed: expected columns in their order"):
        kernels.embed(torch.tensor([0]), packed)
