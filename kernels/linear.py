"""Linear layers: y = x W^T + b, and the rows of W (a tied embedding) from the same packed copy.

Shapes: x `[M, K]`, W `[N, K]`, b `[N]`, y `[M, N]`; x, W, b and y have the compute dtype (float32 or
bfloat16), sums are float32. W is packed once, when the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pagemill.kernels.check import expect, expect_tensor
from torch import Tensor

__all__ = ["PackedLinear", "embed_reference", "linear_reference", "pack_reference"]

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout of one implementation; opaque to its users.

    `weight` is `[N, K]` for the reference; `bias` is `[N]` or None. Both have the compute dtype.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weight.dtype


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    expect_tensor("weight", weight, _WEIGHTS, (None, None))
    if bias is not None:
        expect_tensor("bias", bias, _WEIGHTS, (weight.shape[0],))


def _check_ids(ids: Tensor) -> None:
    expect_tensor("ids", ids, torch.int64, (None,))


def pack_reference(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """Keep `weight` `[N, K]` (float32, bfloat16 or float16) as it is, in `dtype`; no copy where it already
    is.
    """
    _check_weight(weight, bias)
    n, k = weight.shape
    bias = None if bias is None else bias.to(dtype).contiguous()
    return PackedLinear(weight.to(dtype).contiguous(), bias, n, k)


def linear_reference(x: Tensor, packed: PackedLinear, *, out_float32: bool = False) -> Tensor:
    """`x [M, K]` times the packed weight, plus the bias: `[M, N]`, in x's dtype or float32."""
    expect_tensor("x", x, packed.dtype, (None, packed.in_features))
    y = F.linear(x, packed.weight, packed.bias)
    return y.float() if out_float32 else y


def embed_reference(ids: Tensor, packed: PackedLinear) -> Tensor:
    """Rows `ids [T]` (int64, in 0..N-1) of the packed weight: `[T, K]`; ValueError for an id out of range."""
    _check_ids(ids)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        expect(
            low >= 0 and high < packed.out_features, "ids", f"0..{packed.out_features - 1}", f"{low}..{high}"
        )
    return F.embedding(ids, packed.weight)
