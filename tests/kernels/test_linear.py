import pytest
import torch

import pagemill._native as _native
from pagemill.kernels import Kernels, Scheme
from tests.kernels.conftest import LINEAR_ISAS, assert_close, open_kernels

SHAPES = [
    (1, 1, 1), (1, 32, 256), (2, 33, 257), (3, 31, 100), (4, 64, 512), (5, 96, 513), (6, 40, 255),
    (7, 257, 64), (11, 32, 1), (12, 128, 96), (13, 97, 300), (24, 65, 70), (25, 32, 33), (95, 64, 48),
    (96, 64, 48), (97, 160, 300), (193, 1000, 80), (16, 96, 700), (17, 70, 331), (225, 40, 640), (520, 33, 32),
]  # fmt: skip


@pytest.fixture(params=["reference", *LINEAR_ISAS])
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    return open_kernels(request.param, dtype)


@pytest.fixture(params=LINEAR_ISAS)
def native(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    return open_kernels(request.param, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_float64(
    kernels: Kernels, dtype: torch.dtype, m: int, n: int, k: int, with_bias: bool
) -> None:
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    bias = torch.randn(n, dtype=dtype) if with_bias else None
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    packed = kernels.pack_linear(weight, bias)
    found = kernels.linear(x, packed)
    assert found.dtype == dtype
    assert_close(found, wanted, size=10 * k**0.5)
    wide = kernels.linear(x, packed, out_float32=True)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), found)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_packs_any_stored_dtype(kernels: Kernels, dtype: torch.dtype, stored: torch.dtype) -> None:
    weight, bias = torch.randn(70, 40).to(stored), torch.randn(70).to(stored)
    x = torch.randn(3, 40, dtype=dtype)
    wanted = x.double() @ weight.to(dtype).double().T + bias.to(dtype).double()
    assert_close(kernels.linear(x, kernels.pack_linear(weight, bias)), wanted, size=60)


def test_packs_a_weight_larger_than_a_piece(native: Kernels, dtype: torch.dtype) -> None:
    weight, x = torch.randn(3000, 700, dtype=dtype), torch.randn(2, 700, dtype=dtype)
    packed = native.pack_linear(weight, None)
    assert_close(native.linear(x, packed), x.double() @ weight.double().T, size=10 * 700**0.5)


def test_strided_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 3, 40, dtype=dtype)[:, 1], torch.randn(70, 40, dtype=dtype)
    wanted = x.double() @ weight.double().T
    assert_close(kernels.linear(x, kernels.pack_linear(weight, None)), wanted, size=60)


def test_embedding_shares_the_packed_weight(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = torch.randn(101, 37, dtype=dtype)
    packed = kernels.pack_linear(weight, None)
    ids = torch.tensor([0, 31, 32, 100, 100, 7])
    assert torch.equal(kernels.embed(ids, packed), weight[ids])
    assert kernels.embed(ids[:0], packed).shape == (0, 37)


@pytest.mark.parametrize("scheme", ["plain", "int8"])
def test_image_embeddings_stand_among_the_tokens(
    kernels: Kernels, dtype: torch.dtype, scheme: Scheme
) -> None:
    packed = kernels.pack_linear(torch.randn(101, 37), None, scheme=scheme)
    ids, index = torch.tensor([0, 100, 100, 7, 100]), torch.tensor([-1, 2, 0, -1, 2], dtype=torch.int32)
    images = torch.full((3, 50), float("nan"), dtype=dtype)[:, :37]
    images[[0, 2]] = torch.randn(2, 37, dtype=dtype)
    wanted = kernels.embed(ids, packed)
    wanted[[1, 2, 4]] = images[[2, 0, 2]]
    assert torch.equal(kernels.embed(ids, packed, index, images), wanted)
    none = torch.full_like(index, -1)
    assert torch.equal(kernels.embed(ids, packed, none, images[:0]), kernels.embed(ids, packed))
    for bad in (-2, 3):
        with pytest.raises(ValueError, match=r"image_index: expected -1\.\.2"):
            kernels.embed(ids, packed, torch.full_like(index, bad), images)
    for wrong in ((index, None), (None, images)):
        with pytest.raises(ValueError, match="images: expected an image_index beside it, or neither"):
            kernels.embed(ids, packed, *wrong)
    for wrong in (
        (index[1:], images),
        (index.long(), images),
        (index, images[:, 1:]),
        (index, images.double()),
    ):
        with pytest.raises(ValueError, match=r"(image_index|images): expected"):
            kernels.embed(ids, packed, *wrong)


def test_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    packed = kernels.pack_linear(torch.randn(8, 4), None)
    assert kernels.linear(torch.empty(0, 4, dtype=dtype), packed).shape == (0, 8)


def test_rows_do_not_depend_on_the_batch_nor_on_threads(native: Kernels, dtype: torch.dtype) -> None:
    for n, k in [(256, 768), (97, 401), (1000, 40)]:
        packed = native.pack_linear(torch.randn(n, k), torch.randn(n))
        x = torch.randn(200, k, dtype=dtype)
        whole = native.linear(x, packed)
        for size in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 24, 32, 33, 96, 97):
            assert torch.equal(native.linear(x[100 : 100 + size], packed), whole[100 : 100 + size]), (
                n,
                k,
                size,
            )
        _native.set_num_threads(1)
        assert torch.equal(native.linear(x, packed), whole)
        _native.set_num_threads(3)
        assert torch.equal(native.linear(x, packed), whole)


def test_bad_arguments_raise(kernels: Kernels, dtype: torch.dtype) -> None:
    packed = kernels.pack_linear(torch.randn(40, 16), None)
    for x in (
        torch.zeros(2, 15, dtype=dtype),
        torch.zeros(2, 16, dtype=torch.float16),
        torch.zeros(16, dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"x: expected .*16.* found"):
            kernels.linear(x, packed)
    with pytest.raises(ValueError, match="x: expected"):
        kernels.linear(torch.zeros(16, 2, dtype=dtype).T, packed)
    for bad in (-1, 40, 2**62):
        with pytest.raises(ValueError, match=r"ids: expected 0\.\.39"):
            kernels.embed(torch.tensor([0, bad]), packed)
    with pytest.raises(ValueError, match="ids: expected int64"):
        kernels.embed(torch.tensor([0], dtype=torch.int32), packed)
    with pytest.raises(ValueError, match=r"bias: expected .*40"):
        kernels.pack_linear(torch.randn(40, 16), torch.randn(41))
    with pytest.raises(ValueError, match="weight: expected"):
        kernels.pack_linear(torch.zeros(40, 16, dtype=torch.int64), None)


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
def test_swiglu_fused_with_its_projections(kernels: Kernels, dtype: torch.dtype, scheme: Scheme) -> None:
    unit = 3e-6 if dtype == torch.float32 else 2.0**-7  # torch rounds gate and up too
    for m, n, k in [(1, 1, 5), (2, 16, 40), (3, 17, 300), (7, 150, 64), (30, 47, 132)]:
        x = torch.randn(m, k, dtype=dtype)
        gate, up = torch.randn(2, n, k, dtype=dtype) / k**0.5
        bias = torch.randn(2 * n, dtype=dtype) if n % 2 else None
        apart = kernels.pack_linear([gate, up], bias, scheme=scheme)
        a, b = kernels.linear(x, apart, out_float32=True).double().chunk(2, 1)
        packed = kernels.pack_swiglu(gate, up, bias, scheme=scheme)
        assert (packed.out_features, packed.in_features) == (n, k)
        found = kernels.linear_swiglu(x, packed)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), a * a.sigmoid() * b, rtol=2 * unit, atol=unit)
        with pytest.raises(ValueError, match="packed: expected"):
            kernels.linear(x, packed)
        with pytest.raises(ValueError, match="packed: expected"):
            kernels.linear_swiglu(x, apart)
        with pytest.raises(ValueError, match="up: expected"):
            kernels.pack_swiglu(gate, torch.cat([up, up]), None)


def test_swiglu_packs_pairs_larger_than_a_piece(native: Kernels, dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 1700, 700, dtype=dtype) / 700**0.5
    x = torch.randn(2, 700, dtype=dtype)
    a, b = x.double() @ gate.double().T, x.double() @ up.double().T
    found = native.linear_swiglu(x, native.pack_swiglu(gate, up, None))
    assert_close(found, a * a.sigmoid() * b, size=20)


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
def test_adds_to_a_residual(kernels: Kernels, dtype: torch.dtype, scheme: Scheme) -> None:
    for m, n, k in [(1, 1, 5), (3, 50, 300), (30, 97, 64)]:
        x, around = torch.randn(m, k, dtype=dtype), torch.randn(m, n + 3, dtype=dtype)
        before, residual = around.clone(), around[:, :n]
        packed = kernels.pack_linear(torch.randn(n, k), torch.randn(n), scheme=scheme)
        y = kernels.linear(x, packed, out_float32=True)
        assert kernels.linear(x, packed, residual=residual) is residual
        assert torch.equal(around[:, n:], before[:, n:])
        assert torch.equal(residual, (before[:, :n].float() + y).to(dtype))
    for bad in (residual[:, 1:], residual[1:], residual.to(torch.float64)):
        with pytest.raises(ValueError, match="residual: expected"):
            kernels.linear(x, packed, residual=bad)


@pytest.mark.parametrize("scheme", ["plain", "int8"])
def test_fused_rows_do_not_depend_on_the_batch(native: Kernels, dtype: torch.dtype, scheme: Scheme) -> None:
    gate, up = torch.randn(2, 75, 300)
    packed = native.pack_swiglu(gate, up, torch.randn(150), scheme=scheme)
    x = torch.randn(110, 300, dtype=dtype)
    whole = native.linear_swiglu(x, packed)
    for first, size in [(0, 1), (5, 3), (11, 12), (3, 97)]:
        assert torch.equal(native.linear_swiglu(x[first : first + size], packed), whole[first : first + size])


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
def test_rows_are_normed_first(kernels: Kernels, dtype: torch.dtype, scheme: Scheme) -> None:
    """The same bits as the two ops, and x stays as it is."""
    for m, n, k in [(0, 4, 8), (1, 1, 5), (30, 98, 64)]:
        x, weight, norm = (
            torch.randn(m, k, dtype=dtype),
            torch.randn(n, k),
            (torch.randn(k, dtype=dtype), 1e-6),
        )
        before, residual = x.clone(), torch.randn(m, n, dtype=dtype)
        packed, y = kernels.pack_linear(weight, None, scheme=scheme), kernels.rms_norm(x, *norm)
        wanted = kernels.linear(y, packed, residual=residual.clone())
        assert torch.equal(kernels.linear(x, packed, residual=residual, norm=norm), wanted)
        pair = kernels.pack_swiglu(weight, weight, None, scheme=scheme)
        assert torch.equal(kernels.linear_swiglu(x, pair, norm=norm), kernels.linear_swiglu(y, pair))
        assert torch.equal(x, before)
    with pytest.raises(ValueError, match="weight: expected"):
        kernels.linear(x, packed, norm=(norm[0][1:], 1e-6))
