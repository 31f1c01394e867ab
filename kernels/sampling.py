"""Choosing a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["greedy_native", "greedy_reference"]


def _check(logits: Tensor, mask: Tensor | None) -> None:
    expect_tensor("logits", logits, torch.float32, (None, None))
    expect(logits.shape[1] > 0, "logits", "at least one column", logits.shape[1])
    if mask is not None:
        expect_tensor("mask", mask, torch.int32, (logits.shape[0], -(-logits.shape[1] // 32)))


def greedy_reference(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best token of each row of `logits [S, V]` (float32), and its log-probability.

    `mask` int32 `[S, ceil(V / 32)]` allows token t where bit t % 32 of word t // 32 is set (the layout of llguidance
    and xgrammar); None allows all. Returns token int64 `[S]` (the lowest index among equals) and logprob float32 `[S]`: natural
    log of the softmax over the whole row, what the mask forbids included. A row whose mask allows nothing gives token -1 and
    -inf; a row with a NaN gives its index and NaN.
    """
    _check(logits, mask)
    if not logits.shape[0]:
        return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0)
    if mask is None:
        token = logits.argmax(-1)
        return token, logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    allowed = (mask[:, vocabulary // 32] >> (vocabulary % 32).to(torch.int32)) & 1 != 0
    possible = logits.masked_fill(~(allowed | logits.isnan()), float("-inf"))
    token = possible.argmax(-1)
    logprob = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
    none = ~allowed.any(-1) & ~logits.isnan().any(-1)
    return token.masked_fill(none, -1), logprob.masked_fill(none, float("-inf"))


def greedy_native(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`greedy_reference` in C++ (`csrc/body_elementwise.h`)."""
    _check(logits, mask)
    token = torch.empty(logits.shape[0], dtype=torch.int64)
    logprob = torch.empty(logits.shape[0])
    _native.greedy(dl(logits), None if mask is None else dl(mask), dl(token), dl(logprob))
    return token, logprob
