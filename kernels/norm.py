"""RMSNorm (Zhang & Sennrich, 2019). The residual before it is added by the product that it is added to (`linear`).

`x [M, H]`, `weight [H]`, both float32 or both bfloat16. The mean square and the scaling are float32; the
scaled row is rounded to x's dtype before it is multiplied by the weight, as in Hugging Face's Qwen2RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["Norm", "rms_norm_native", "rms_norm_reference"]

Norm = tuple[Tensor, float]
"""The weight and eps of an RMSNorm that a linear layer takes x through first."""

_DTYPES = (torch.float32, torch.bfloat16)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    expect_tensor("x", x, _DTYPES, (None, None))
    expect_tensor("weight", weight, x.dtype, (x.shape[1],))
    expect(eps >= 0, "eps", "a number >= 0", eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` row by row: `[M, H]`."""
    _check(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` in C++ (`csrc/body_elementwise.h`)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native.rms_norm(dl(x), dl(weight), eps, dl(out))
    return out
