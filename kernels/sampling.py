"""Choosing a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["greedy_native", "greedy_reference"]


def _check(logits: Tensor) -> None:
    expect_tensor("logits", logits, torch.float32, (None, None))
    expect(logits.shape[1] > 0, "logits", "at least one column", logits.shape[1])


def greedy_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best token of each row of `logits [S, V]` (float32), and its log-probability.

    Returns token int64 `[S]` (the lowest index among equals) and logprob float32 `[S]` (natural log of the
    softmax).
    """
    _check(logits)
    if not logits.shape[0]:
        return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0)
    token = logits.argmax(-1)
    best = logits.gather(-1, token[:, None])[:, 0]
    return token, best - logits.logsumexp(-1)


def greedy_native(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`greedy_reference` in C++ (`csrc/body_elementwise.h`)."""
    _check(logits)
    token = torch.empty(logits.shape[0], dtype=torch.int64)
    logprob = torch.empty(logits.shape[0])
    _native.greedy(dl(logits), dl(token), dl(logprob))
    return token, logprob
