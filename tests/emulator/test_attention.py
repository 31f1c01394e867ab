"""Attention in the launch configurations of `pagemill.kernels.gpu.configs`, compiled and executed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from pagemill.kernels.gpu import attention, ops
from tests.attend import attend
from tests.emulator.conftest import BF16, assert_within
from tests.emulator.launch import Launch, emulated
from tests.gpu.reference import Batch

FP8 = torch.float8_e4m3fn
CACHES = [torch.bfloat16, torch.int8, FP8]


def check(
    contexts: list[int], counts: list[int], heads: int, kv_heads: int, head_dim: int = 128, cache: torch.dtype = torch.bfloat16,
    columns: int = 0, module: Any = attention, **how: Any,
) -> list[Launch]:  # fmt: skip
    batch = Batch(contexts, counts, heads, kv_heads, head_dim, 16, torch.bfloat16, columns)
    if cache != torch.bfloat16:
        batch.quantize(cache)
    scale = head_dim**-0.5
    arguments = (
        batch.q,
        batch.k,
        batch.v,
        batch.tables,
        batch.starts,
        batch.lens,
        scale,
        *batch.scales.values(),
    )
    with emulated(89 if cache == FP8 else 80, **how) as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attention", module)
        found = ops._paged_attention(*arguments)
    wanted = batch.expected(scale)
    # A weight is rounded to bfloat16 before it meets its value, and so is the result; scores are off by little.
    assert_within(found, wanted, 1.01 * BF16 * (batch.expected(scale, size=True) + wanted.abs()))
    return launches


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4)])
def test_decode(heads: int, kv_heads: int, cache: torch.dtype) -> None:
    launches = check([1, 63, 64, 65, 130], [1] * 5, heads, kv_heads, cache=cache)
    assert launches[0].count("mma") > 0


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_decode_in_ranges(cache: torch.dtype) -> None:
    """The table has room for contexts of 1000 tokens, so that keys are split; some ranges hold none."""
    launches = check([1, 70, 449], [1] * 3, 16, 2, cache=cache, columns=63)
    assert [launch.kernel.metadata.name for launch in launches] == ["paged_kernel", "merge_kernel"]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_prefill(cache: torch.dtype) -> None:
    """Chunks and single tokens mixed, one sequence with none and one of nothing."""
    check([1, 81, 17, 33, 0, 64, 40], [1, 5, 17, 33, 0, 1, 0], 8, 1, cache=cache)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (2, 2, 64)])
def test_prefill_of_groups(heads: int, kv_heads: int, head_dim: int) -> None:
    check([70, 19], [19, 18], heads, kv_heads, head_dim)


def test_prefill_in_ranges() -> None:
    launches = check([300, 5], [20, 5], 8, 1, columns=63)
    assert launches[0].count("cp.async.wait_group") > 0
    assert launches[1].kernel.metadata.name == "merge_kernel"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_warps_in_any_order(cache: torch.dtype, seed: int) -> None:
    """Long enough for every stage of the pipeline to be used again."""
    if seed:
        check([200], [1], 16, 2, cache=cache, one_by_one=True, seed=seed)
    else:
        check([220], [9], 8, 1, cache=cache, one_by_one=True, seed=seed)


def check_varlen(
    lengths: list[int], heads: int, head_dim: int, module: Any = attention, **how: Any
) -> list[Launch]:
    rows = torch.full((sum(lengths), 3, heads + 1, head_dim), torch.nan, dtype=torch.bfloat16)
    q, k, v = rows[:, :, :heads].copy_(torch.randn(sum(lengths), 3, heads, head_dim)).unbind(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    scale = head_dim**-0.5
    with emulated(**how) as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attention", module)
        found = ops._varlen_attention(q, k, v, offsets, scale)
    parts = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    wanted = torch.cat([attend(q[p], k[p], v[p], scale, False) for p in parts])
    size = torch.cat([attend(q[p], k[p], v[p].abs(), scale, False) for p in parts])
    assert_within(found, wanted, 1.01 * BF16 * (size + wanted.abs()))
    return launches


@pytest.mark.parametrize("head_dim", [80, 128])
def test_segments(head_dim: int) -> None:
    launches = check_varlen([1, 63, 64, 0, 65, 130, 0], 2, head_dim)
    assert launches[0].count("mma") > 0


@pytest.mark.parametrize("seed", range(2))
def test_segments_with_warps_in_any_order(seed: int) -> None:
    check_varlen([260] if seed else [70, 3], 2, 80, one_by_one=True, seed=seed)
