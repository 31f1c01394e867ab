"""Elementwise activations in Triton; the contract is that of `pagemill.kernels.activation`.

SwiGLU stands in the epilogue of `pagemill.kernels.gpu.linear`; alone it is here for weights that are not packed gated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gelu", "swiglu"]

_TILE = 1024


@triton.jit
def swiglu_kernel(gate_up, out, width, row_stride, TILE: tl.constexpr):
    """TILE columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = i < width
    gate = tl.load(gate_up + row * row_stride + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_kernel(x, out, n, TILE: tl.constexpr):
    """x Phi(x), exact."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    y = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    tl.store(out + i, y.to(out.dtype.element_ty), mask=i < n)


def swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu_reference`: `[M, 2 I]` to `[M, I]`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        swiglu_kernel[(rows, triton.cdiv(width, _TILE))](gate_up, out, width, gate_up.stride(0), TILE=_TILE)
    return out


def gelu(x: Tensor) -> Tensor:
    """`gelu_reference`; x must be contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        gelu_kernel[(triton.cdiv(x.numel(), _TILE),)](x, out, x.numel(), TILE=_TILE)
    return out
