"""Angles of M-RoPE (Qwen2-VL, arXiv 2409.12191) looked up in tables by position."""

from __future__ import annotations

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["mrope_angles_native", "mrope_angles_reference"]


def mrope_angles_reference(
    positions: Tensor, axis: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Row `positions[axis[f], t]` of column f of the tables, for every token t: two tensors, float32 `[T, F]`.

    `positions` int64 `[3, T]`, `axis` int64 `[F]` (which of the three turns a frequency), `cos` and `sin` float32 `[P, F]`.
    ValueError for a position outside the tables, or an axis that is none.
    """
    expect_tensor("positions", positions, torch.int64, (3, None))
    expect_tensor("axis", axis, torch.int64, (None,))
    expect_tensor("cos", cos, torch.float32, (None, axis.shape[0]))
    expect_tensor("sin", sin, torch.float32, tuple(cos.shape))
    for name, tensor, limit in (("positions", positions, cos.shape[0]), ("axis", axis, 3)):
        if tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            expect(low >= 0 and high < limit, name, f"0..{limit - 1}", f"{low}..{high}")
    rows, frequency = positions[axis].T.contiguous(), torch.arange(len(axis), device=axis.device)
    return cos[rows, frequency], sin[rows, frequency]


def mrope_angles_native(positions: Tensor, axis: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`mrope_angles_reference` in C++; every tensor contiguous."""
    tokens, frequencies = positions.shape[-1], axis.shape[0]
    found = torch.empty(tokens, frequencies), torch.empty(tokens, frequencies)
    _native.mrope_angles(dl(positions), dl(axis), dl(cos), dl(sin), dl(found[0]), dl(found[1]))
    return found
