from itertools import pairwise

import pytest
import torch

from pagemill.kernels.gpu.attention import paged_attention, varlen_attention
from pagemill.kernels.gpu.configs import AttentionTile as Tile
from tests.attend import attend
from tests.gpu.conftest import KEPT, ON_GPU, bound, error
from tests.gpu.reference import Batch

CONTEXTS = [1, 5, 31, 32, 33, 64, 65, 130, 17, 0]
COUNTS = [1, 5, 1, 32, 2, 64, 13, 1, 0, 0]
LONG = 64 if ON_GPU else 256
"""Keys of a step over long contexts: few steps for the interpreter."""


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block", "rows", "keys"),
    [(8, 1, 64, 16, 16, 32), (7, 1, 128, 16, 16, 16), (4, 2, 64, 32, 32, 32), (2, 2, 16, 1, 16, 16), (16, 2, 128, 16, 64, 32),
     (2, 1, 16, 24, 16, 32), (2, 1, 16, 64, 16, 16)],
)  # fmt: skip
def test_paged_matches_float64(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block: int,
    rows: int,
    keys: int,
    splits: int,
) -> None:
    batch = Batch(CONTEXTS, COUNTS, heads, kv_heads, head_dim, block, dtype)
    scale = head_dim**-0.5
    found = batch.attend(scale, Tile(rows, keys, 4, 2), splits)
    assert error(found, batch.expected(scale)) < bound(dtype)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("splits", [1, 4])
def test_paged_over_a_quantised_cache(dtype: torch.dtype, splits: int, kept: torch.dtype) -> None:
    batch = Batch(CONTEXTS, COUNTS, 8, 2, 64, 16, dtype)
    batch.quantize(kept)
    found = batch.attend(0.125, Tile(16, 32, 4, 2), splits)
    assert error(found, batch.expected(0.125)) < 2 * bound(dtype)


def test_paged_large_scores_do_not_overflow() -> None:
    batch = Batch(CONTEXTS, COUNTS, 4, 1, 32, 16, torch.float32)
    batch.q *= 100
    found = batch.attend(1.0, Tile(16, 16, 4, 2), 2)
    assert error(found, batch.expected(1.0)) < 1e-3


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_scale_is_above_zero(scale: float) -> None:
    """The largest score is taken before it is scaled."""
    batch = Batch([3], [1], 2, 1, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="scale"):
        batch.attend(scale, Tile(16, 16, 4, 2), 1)
    with pytest.raises(ValueError, match="scale"):
        varlen_attention(batch.q, batch.q, batch.q, batch.starts, scale, tile=Tile(16, 16, 4, 2))


@pytest.mark.parametrize("kept", [None, KEPT[0]])
def test_decoding_at_the_end_of_a_long_context(kept: torch.dtype | None) -> None:
    """32,768 tokens in as many ranges as there may be, beside a sequence most of whose ranges hold nothing."""
    batch = Batch([32_768, 300], [1, 1], 4, 1, 16, 128, torch.float32)
    if kept is not None:
        batch.quantize(kept)
    found = batch.attend(0.5, Tile(16, LONG, 4, 2), 32)
    wanted = batch.expected(0.5)
    for sequence in range(2):
        assert error(found[sequence], wanted[sequence]) < bound(torch.float32)


def test_a_prefill_chunk_at_the_end_of_a_long_context() -> None:
    """Beside the beginning of another; the last keys stand in the middle of a block and of a tile."""
    batch = Batch([32_700, 70], [50, 70], 2, 1, 16, 128, torch.float32)
    found = batch.attend(0.5, Tile(128, LONG, 8, 2), 1)
    wanted = batch.expected(0.5)
    for rows in (slice(0, 50), slice(50, 120)):
        assert error(found[rows], wanted[rows]) < bound(torch.float32)


def test_paged_without_rows() -> None:
    batch = Batch(CONTEXTS, COUNTS, 2, 1, 16, 16, torch.float32)
    empty = torch.zeros(2, dtype=torch.int32)
    found = paged_attention(
        batch.q[:0], batch.k, batch.v, batch.tables[:1], empty, batch.lens[:1], 1.0, tile=Tile(16, 16, 4, 2)
    )
    assert found.shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("head_dim", "rows", "keys"), [(80, 32, 32), (64, 64, 64), (16, 16, 32), (48, 16, 16)]
)
def test_varlen_matches_float64(dtype: torch.dtype, head_dim: int, rows: int, keys: int) -> None:
    lengths = [1, 64, 0, 63, 65, 130, 0]
    q, k, v = torch.randn(sum(lengths), 3, 2, head_dim).to(dtype).unbind(1)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = varlen_attention(q, k, v, cu, head_dim**-0.5, tile=Tile(rows, keys, 4, 2))
    wanted = [attend(q[a:b], k[a:b], v[a:b], head_dim**-0.5, False) for a, b in pairwise(cu.tolist())]
    assert error(found, torch.cat(wanted)) < bound(dtype)
