"""A kernel that does not write its result is noticed: results begin as NaN."""

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from pagemill.kernels.gpu import activation, angles, attention, embed, linear, norm, sampling
from pagemill.kernels.gpu.configs import AttentionTile, MatmulTile
from tests.gpu.conftest import bound, error
from tests.gpu.reference import Batch, product

KEYS = AttentionTile(16, 16, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_are_nan(dtype: torch.dtype) -> None:
    x = torch.empty(2, 40, dtype=dtype)
    assert x.float().isnan().all()
    assert torch.empty_like(x).float().isnan().all()
    assert x.new_empty(3).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_are_the_largest(dtype: torch.dtype) -> None:
    assert (torch.empty(2, 40, dtype=dtype) == torch.iinfo(dtype).max).all()


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape)


def _product(splits: int, form: str = "plain") -> Tensor:
    weight = linear.pack_plain(_rows(40, 64))
    if form == "int8":
        weight = linear.pack_scaled(*linear.quantize(_rows(40, 64), torch.int8))
    return linear.linear(_rows(3, 64), weight, tile=MatmulTile(16, 32, 16, splits, 4, 2))


def _paged(splits: int) -> Tensor:
    return Batch([5, 33], [1, 2], 2, 1, 16, 16, torch.float32).attend(0.25, KEYS, splits)


def _unpacked() -> Tensor:
    codes, zeros = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.uint8)
    return linear.unpack_int4(linear.pack_int4(codes, _rows(8, 2), zeros), torch.float32).weight


RESULTS: dict[str, Callable[[], Tensor]] = {
    "norm": lambda: norm.rms_norm(_rows(2, 9), _rows(9), 1e-6),
    "norm's scales": lambda: norm.rms_norm_quantized(_rows(2, 9), _rows(9), 1e-6, torch.int8)[1],
    "norm's codes": lambda: norm.rms_norm_quantized(_rows(2, 9), _rows(9), 1e-6, torch.float8_e4m3fn)[0].float(),
    "scales": lambda: linear.quantize(_rows(2, 9), torch.int8)[1],
    "codes": lambda: linear.quantize(_rows(2, 9), torch.float8_e4m3fn)[0].float(),
    "swiglu": lambda: activation.swiglu(_rows(2, 10)),
    "gelu": lambda: activation.gelu(_rows(2, 10)),
    "embed": lambda: embed.embed(torch.tensor([0, 1]), _rows(2, 10), 10),
    "log-probability": lambda: sampling.greedy(_rows(2, 10))[1],
    "angles": lambda: torch.cat(
        angles.mrope_angles(torch.zeros(3, 2).long(), torch.zeros(8).long(), _rows(4, 8), _rows(4, 8))
    ),
    "product": lambda: _product(1),
    "product of ranges": lambda: _product(2),
    "product in int8": lambda: _product(1, "int8"),
    "int4 made plain": _unpacked,
    "paged": lambda: _paged(1),
    "paged of ranges": lambda: _paged(3),
    "varlen": lambda: attention.varlen_attention(
        *_rows(3, 5, 1, 16), torch.tensor([0, 5], dtype=torch.int32), 0.25, tile=KEYS
    ),
}  # fmt: skip


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_what_no_kernel_writes_is_nan(result: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (interpreter.InterpretedFunction, triton.runtime.jit.JITFunction):
        monkeypatch.setattr(kind, "run", lambda *args, **kwargs: None)
    found = result()
    assert found.numel()
    assert found.isnan().all()


@pytest.mark.parametrize("kernel", ["matmul_kernel", "finish_kernel"])
def test_a_column_that_a_product_leaves_out_is_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched for a tile of features fewer than there are."""
    launched = getattr(linear, kernel)

    class Fewer:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return launched[(grid[0] - 1, grid[1]) if kernel == "matmul_kernel" else (grid[0], grid[1] - 1)]

    x, weight = _rows(3, 64), _rows(300, 64)
    shape = MatmulTile(16, 32, 16, 2 if kernel == "finish_kernel" else 1, 4, 2)
    wanted = product(x, weight, None, None, False)
    assert error(linear.linear(x, linear.pack_plain(weight), tile=shape), wanted) < bound(torch.float32)
    monkeypatch.setattr(linear, kernel, Fewer())
    assert not error(linear.linear(x, linear.pack_plain(weight), tile=shape), wanted) < bound(torch.float32)
