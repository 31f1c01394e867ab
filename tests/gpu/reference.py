"""What the Triton kernels must give, in float64, and batches to ask it of; for the interpreter and the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagemill.kernels.gpu import attention
from pagemill.kernels.gpu.configs import AttentionTile as Tile
from tests.attend import attend


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool) -> Tensor:
    """x W^T and what is fused with it."""
    y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y + (0 if residual is None else residual.double())


class Batch:
    """Sequences in a paged cache whose unused slots are NaN, and whose unused table entries are out of every range.

    Sequence s has `contexts[s]` tokens, the last `counts[s]` of which ask. `q` lies in rows that go on with NaN.
    """

    def __init__(
        self, contexts: Sequence[int], counts: Sequence[int], heads: int, kv_heads: int, head_dim: int, block: int,
        dtype: torch.dtype, columns: int = 0,
    ) -> None:  # fmt: skip
        self.contexts, self.counts, self.block = contexts, counts, block
        rows = torch.full((sum(counts), heads + 2, head_dim), torch.nan, dtype=dtype)
        self.q = rows[:, :heads].copy_(torch.randn(sum(counts), heads, head_dim))
        self.keys = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in contexts]
        self.values = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in contexts]
        used = [-(-n // block) for n in contexts]
        shape = (sum(used) + 2, kv_heads, block, head_dim)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        width = max(max(used) + 1, columns)
        self.tables = torch.full((len(contexts), width), 2**31 - 1, dtype=torch.int32)
        order = torch.randperm(shape[0]).tolist()
        for s, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            for i in range(used[s]):
                self.tables[s, i] = order[-1]
                piece = slice(i * block, (i + 1) * block)
                count = len(key[piece])
                self.k[order[-1], :, :count] = key[piece].transpose(0, 1)
                self.v[order.pop(), :, :count] = value[piece].transpose(0, 1)
        self.starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        self.lens = torch.tensor(contexts, dtype=torch.int32)
        self.scales: dict[str, Tensor] = {}

    def quantize(self, dtype: torch.dtype) -> None:
        """The cache in int8 or float8 with a scale a token and head; unused slots hold junk, their scales NaN."""
        largest = 127 if dtype == torch.int8 else 448
        for name, kept in (("k", self.keys), ("v", self.values)):
            cache = getattr(self, name).float()
            scale = cache.abs().amax(-1) / largest
            codes = cache / scale[..., None]
            codes = (codes.round() if dtype == torch.int8 else codes).nan_to_num(77).to(dtype)
            setattr(self, name, codes)
            self.scales[f"{name}_scale"] = scale
            rounded = codes.float() * scale[..., None]
            for s, table in enumerate(self.tables):
                blocks = table[: -(-self.contexts[s] // self.block)].long()
                kept[s] = rounded[blocks].transpose(1, 2).flatten(0, 1)[: self.contexts[s]]

    def expected(self, scale: float, *, size: bool = False) -> Tensor:
        """The result; with `size` that of |values|, which bounds what rounding the weights changes."""
        rows = self.q.split(list(self.counts))
        values = [v.abs() for v in self.values] if size else self.values
        return torch.cat([attend(*s, scale, True) for s in zip(rows, self.keys, values, strict=True)])

    def attend(self, scale: float, tile: Tile, splits: int, module: Any = attention) -> Tensor:
        """`module`: that of the kernels, or a copy of it."""
        return module.paged_attention(
            self.q, self.k, self.v, self.tables, self.starts, self.lens, scale, tile=tile, num_splits=splits, **self.scales
        )  # fmt: skip
