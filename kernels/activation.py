"""Activations: SwiGLU (Shazeer, 2020) of fused gate and up projections, and the exact (erf) GELU.

float32 or bfloat16 in and out; computed in float32, rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["gelu_native", "gelu_reference", "swiglu_native", "swiglu_reference"]

_DTYPES = (torch.float32, torch.bfloat16)


def _check_pairs(gate_up: Tensor) -> None:
    expect_tensor("gate_up", gate_up, _DTYPES, (None, None))
    expect(gate_up.shape[1] % 2 == 0, "gate_up", "an even number of columns", gate_up.shape[1])


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate_up [M, 2 I]`, the gate in the first half of each row: `[M, I]`."""
    _check_pairs(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_reference(x: Tensor) -> Tensor:
    """`x * Phi(x)` elementwise, with the error function and not its tanh approximation; x is `[M, H]`."""
    expect_tensor("x", x, _DTYPES, (None, None))
    return F.gelu(x.float()).to(x.dtype)


def swiglu_native(gate_up: Tensor) -> Tensor:
    """`swiglu_reference` in C++ (`csrc/body_elementwise.h`)."""
    _check_pairs(gate_up)
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
    _native.swiglu(dl(gate_up), dl(out))
    return out


def gelu_native(x: Tensor) -> Tensor:
    """`gelu_reference` in C++; x must be contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native.gelu(dl(x), dl(out))
    return out
