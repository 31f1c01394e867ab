from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels import Kernels, kv_cache_shapes, select

CPU = torch.device("cpu")
IMPLEMENTATIONS = ["reference", *(f"native-{isa}" for isa in _native.isas())]
# Emulated instruction sets differ from the others in linear layers alone.
LINEAR_ISAS = [f"native-{isa}" for isa in (*_native.isas(), *_native.emulated_isas())]


def open_kernels(implementation: str, dtype: torch.dtype) -> Kernels:
    kind, _, isa = implementation.partition("-")
    if isa:
        _native.set_isa(isa)
    return select(kind, CPU, dtype)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    torch.manual_seed(0)
    isa, threads, torch_threads = _native.isa(), _native.num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)  # its threads wait for each other at every small op
    yield
    torch.set_num_threads(torch_threads)
    _native.set_isa(isa)
    _native.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    return open_kernels(request.param, dtype)


@pytest.fixture(params=_native.isas())
def native(request: pytest.FixtureRequest, dtype: torch.dtype) -> Kernels:
    """The C++ kernels of every instruction set: those whose rows must not depend on their neighbours."""
    return open_kernels(f"native-{request.param}", dtype)


def assert_close(found: Tensor, wanted: Tensor, *, size: float = 1.0, roundings: float = 1.0) -> None:
    """`wanted` is float64, `size` that of the terms summed; a rounding is 2e-6, or half a bfloat16 unit."""
    unit = 2e-6 if found.dtype == torch.float32 else 2.0**-8
    assert found.shape == wanted.shape
    torch.testing.assert_close(
        found.double(), wanted, rtol=roundings * unit * 1.02, atol=roundings * unit * size * 0.1
    )


@dataclass
class Cache:
    """Sequences laid out in a paged cache whose every unused slot and block is NaN."""

    k: Tensor
    v: Tensor
    tables: Tensor
    lens: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def fill(keys: list[Tensor], values: list[Tensor], block_size: int, *, seed: int = 0) -> "Cache":
        """`keys[s]`, `values[s]` are `[context, Hk, D]`; blocks are dealt out in random order."""
        kv_heads, head_dim = keys[0].shape[1:]
        used = [-(-len(k) // block_size) for k in keys]
        num_blocks = sum(used) + 3
        k_shape, v_shape = kv_cache_shapes(num_blocks, kv_heads, head_dim, block_size)
        k_cache = torch.full(k_shape, torch.nan, dtype=keys[0].dtype)
        v_cache = torch.full(v_shape, torch.nan, dtype=keys[0].dtype)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        garbage = torch.tensor([-1, num_blocks, 2**31 - 1, -(2**31)], dtype=torch.int32)
        tables = garbage[torch.arange(len(keys) * (max(used) + 2)) % 4].view(len(keys), -1).clone()
        for s, (key, value) in enumerate(zip(keys, values, strict=True)):
            for i in range(used[s]):
                block = order.pop()
                tables[s, i] = block
                piece = slice(i * block_size, (i + 1) * block_size)
                count = len(key[piece])
                k_cache[block, :, :, :count] = key[piece].permute(1, 2, 0)
                v_cache[block, :, :count] = value[piece].permute(1, 0, 2)
        return Cache(k_cache, v_cache, tables, torch.tensor([len(k) for k in keys], dtype=torch.int32))


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `x [..., D]` and float32 scales `[...]`, by the contract's words."""
    scale = x.double().abs().amax(-1) / 127
    return (x.double() / scale[..., None]).round().to(torch.int8), scale.float()


def fill_int8(keys: list[Tensor], values: list[Tensor], block_size: int) -> Cache:
    """As `Cache.fill`, for int8 codes of what is given; unused codes are -128, their scales NaN."""
    k, v = [quantised(x) for x in keys], [quantised(x) for x in values]
    codes = Cache.fill([c.float() for c, _ in k], [c.float() for c, _ in v], block_size)
    scales = Cache.fill([s[..., None] for _, s in k], [s[..., None] for _, s in v], block_size)
    assert torch.equal(codes.tables, scales.tables)
    k_codes, v_codes = (torch.nan_to_num(x, nan=-128).to(torch.int8) for x in (codes.k, codes.v))
    return Cache(k_codes, v_codes, codes.tables, codes.lens, scales.k[:, :, 0], scales.v[..., 0])


def starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
