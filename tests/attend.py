"""Softmax attention in float64: what every kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax attention, head by head: q `[Q, Hq, D]` are the last tokens of k, v `[K, Hk, D]`."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    position = torch.arange(len(k))
    for h in range(q.shape[1]):
        score = q[:, h].double() @ k[:, h // group].double().T * scale
        if causal:
            score[position > position[len(k) - len(q) :, None]] = -torch.inf
        out[:, h] = score.softmax(-1) @ v[:, h // group].double()
    return out
