"""The best token of each row in Triton, under a grammar's mask, with its log-probability: one pass, no sort.

The contract is that of `pagemill.kernels.sampling`. Log-sum-exp is kept online (Milakov & Gimelshein, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["greedy"]


@triton.jit
def greedy_kernel(
    logits, mask, token, logprob, V, row_stride, words, MASKED: tl.constexpr, TILE: tl.constexpr
):
    """One row: the largest allowed logit's lowest index, and its log-probability over the whole row."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * row_stride
    inf = float("inf")
    highest = tl.full((TILE,), -inf, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    best = tl.full((TILE,), -inf, tl.float32)
    where = tl.full((TILE,), 2147483647, tl.int32)
    nan_at = tl.full((TILE,), 2147483647, tl.int32)
    for first in range(0, V, TILE):
        v = first + tl.arange(0, TILE)
        x = tl.load(at + v, mask=v < V, other=-inf)
        nan_at = tl.where(x != x, tl.minimum(nan_at, v), nan_at)
        larger = tl.maximum(highest, x)
        shift = tl.where(larger == -inf, 0.0, larger)
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = larger
        if MASKED:
            word = tl.load(mask + row * words + v // 32, mask=v < V, other=0)
            x = tl.where((word >> (v % 32)) & 1 != 0, x, -inf)
        where = tl.where((x > best) & (v < V), v, where)
        best = tl.maximum(best, x)
    top = tl.max(highest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    choice = tl.max(best, 0)
    index = tl.min(tl.where(best == choice, where, 2147483647), 0)
    nan = tl.min(nan_at, 0)
    found = index < 2147483647
    tl.store(token + row, tl.where(nan < 2147483647, nan, tl.where(found, index, -1)).to(tl.int64))
    value = tl.where(found, choice - lse, -inf)
    tl.store(logprob + row, tl.where(nan < 2147483647, float("nan"), value))


def greedy(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`greedy_reference` for logits float32 `[S, V]`, dense rows."""
    rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        words = 0 if mask is None else mask.stride(0)
        greedy_kernel[(rows,)](
            logits, logits if mask is None else mask, token, logprob, vocabulary, logits.stride(0), words,
            MASKED=mask is not None, TILE=min(4096, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return token, logprob
