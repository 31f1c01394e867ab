from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pagemill.kernels.gpu.attention import paged_attention, varlen_attention
from pagemill.kernels.gpu.configs import AttentionTile as Tile
from tests.gpu.conftest import bound, error

CONTEXTS = [1, 5, 31, 32, 33, 64, 65, 130, 17, 0]
COUNTS = [1, 5, 1, 32, 2, 64, 13, 1, 0, 0]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """float64 softmax attention, head by head: q `[Q, Hq, D]` are the last tokens of k, v `[K, Hk, D]`."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    position = torch.arange(len(k))
    for h in range(q.shape[1]):
        score = q[:, h].double() @ k[:, h // group].double().T * scale
        if causal:
            score[position > position[len(k) - len(q) :, None]] = -torch.inf
        out[:, h] = score.softmax(-1) @ v[:, h // group].double()
    return out


class Batch:
    """Sequences in a paged cache whose unused slots are NaN, and whose unused table entries are out of every range."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype) -> None:
        self.q = torch.randn(sum(COUNTS), 2, heads, head_dim).to(dtype)[:, 0]  # strided rows
        self.keys = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in CONTEXTS]
        self.values = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in CONTEXTS]
        used = [-(-n // block) for n in CONTEXTS]
        shape = (sum(used) + 2, kv_heads, block, head_dim)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.tables = torch.full((len(CONTEXTS), max(used) + 1), 2**31 - 1, dtype=torch.int32)
        order = torch.randperm(shape[0]).tolist()
        for s, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            for i in range(used[s]):
                self.tables[s, i] = order[-1]
                piece = slice(i * block, (i + 1) * block)
                count = len(key[piece])
                self.k[order[-1], :, :count] = key[piece].transpose(0, 1)
                self.v[order.pop(), :, :count] = value[piece].transpose(0, 1)
        self.starts = torch.tensor([0, *COUNTS]).cumsum(0).to(torch.int32)
        self.lens = torch.tensor(CONTEXTS, dtype=torch.int32)

    def expected(self, scale: float) -> Tensor:
        rows = self.q.split(COUNTS)
        return torch.cat([attend(*s, scale, True) for s in zip(rows, self.keys, self.values, strict=True)])

    def attend(self, scale: float, tile: Tile, splits: int, **scales: Tensor) -> Tensor:
        return paged_attention(
            self.q, self.k, self.v, self.tables, self.starts, self.lens, scale, tile=tile, num_splits=splits, **scales
        )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block", "rows", "keys"),
    [(8, 1, 64, 16, 16, 32), (7, 1, 128, 16, 16, 16), (4, 2, 64, 32, 32, 32), (2, 2, 16, 1, 16, 16), (16, 2, 128, 16, 64, 32)],
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
    batch = Batch(heads, kv_heads, head_dim, block, dtype)
    scale = head_dim**-0.5
    found = batch.attend(scale, Tile(rows, keys, 4, 2), splits)
    assert error(found, batch.expected(scale)) < bound(dtype)


@pytest.mark.parametrize("splits", [1, 4])
def test_paged_int8(dtype: torch.dtype, splits: int) -> None:
    batch = Batch(8, 2, 64, 16, dtype)
    scales = {}
    for name in ("k", "v"):
        cache = getattr(batch, name).float()
        scale = cache.abs().amax(-1) / 127
        codes = (cache / scale[..., None]).round()
        setattr(batch, name, codes.nan_to_num(77).to(torch.int8))
        scales[f"{name}_scale"] = scale
        rounded = codes * scale[..., None]
        for s, table in enumerate(batch.tables):
            blocks = table[: -(-CONTEXTS[s] // 16)].long()
            rows = rounded[blocks].transpose(1, 2).flatten(0, 1)[: CONTEXTS[s]]
            (batch.keys if name == "k" else batch.values)[s] = rows
    found = batch.attend(0.125, Tile(16, 32, 4, 2), splits, **scales)
    assert error(found, batch.expected(0.125)) < 2 * bound(dtype)


def test_paged_large_scores_do_not_overflow() -> None:
    batch = Batch(4, 1, 32, 16, torch.float32)
    batch.q *= 100
    found = batch.attend(1.0, Tile(16, 16, 4, 2), 2)
    assert error(found, batch.expected(1.0)) < 1e-3


def test_paged_without_rows() -> None:
    batch = Batch(2, 1, 16, 16, torch.float32)
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
