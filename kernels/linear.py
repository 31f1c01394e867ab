"""Linear layers: y = x W^T + b, and the rows of W (a tied embedding) from the same packed copy.

Shapes: x `[M, K]`, W `[N, K]`, b `[N]`, y `[M, N]`; x, W, b and y have the compute dtype (float32 or
bfloat16), sums are float32. W is packed once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = [
    "PackedLinear",
    "embed_native",
    "embed_reference",
    "linear_native",
    "linear_reference",
    "pack_native",
    "pack_reference",
]

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_PANEL = 32  # output features of a panel, as in csrc/isa.h


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout of one implementation; opaque to its users.

    `weight`, in the compute dtype, is `[N, K]` for the reference. For the native form it is zero-padded
    panels: `[ceil(N / 32), K, 32]` in float32, `[ceil(N / 32), ceil(K / 2), 32, 2]` in bfloat16; its `bias`
    is float32 and padded alike.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weight.dtype


def _parts(weight: Tensor | Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    expect(bool(parts), "weight", "at least one matrix", "none")
    for part in parts:
        expect_tensor("weight", part, _WEIGHTS, (None, parts[0].shape[-1]))
    if bias is not None:
        expect_tensor("bias", bias, _WEIGHTS, (sum(len(part) for part in parts),))
    return parts


def _check_ids(ids: Tensor) -> None:
    expect_tensor("ids", ids, torch.int64, (None,))


def pack_reference(
    weight: Tensor | Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> PackedLinear:
    """Copy `weight` into `dtype`: `[N, K]` float32, bfloat16 or float16, or several such, stacked by rows."""
    parts = _parts(weight, bias)
    rows = torch.cat([part.to(dtype) for part in parts])
    bias = None if bias is None else bias.to(dtype).contiguous()
    return PackedLinear(rows, bias, *rows.shape)


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


def pack_native(weight: Tensor | Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """Pack into panels of 32 output features; beyond them it needs a small piece of the weight at a time."""
    parts = _parts(weight, bias)
    if any(len(part) % _PANEL for part in parts[:-1]):
        parts = [torch.cat(parts)]  # heads narrower than a panel: only tiny models have them
    n, k = sum(len(part) for part in parts), parts[0].shape[1]
    count = -(-n // _PANEL)
    shape = (count, k, _PANEL) if dtype == torch.float32 else (count, -(-k // 2), _PANEL, 2)
    panels = torch.empty(shape, dtype=dtype)
    step = max(1, (1 << 20) // max(1, _PANEL * k)) * _PANEL
    done = 0
    for part in parts:
        for first in range(0, len(part), step):
            piece = part[first : first + step].to(dtype)
            _native.pack_panels(dl(piece), done + first, dl(panels))
        done += len(part)
    padded = None
    if bias is not None:
        padded = torch.zeros(count * _PANEL)
        padded[:n] = bias.to(dtype)
    return PackedLinear(panels, padded, n, k)


def linear_native(x: Tensor, packed: PackedLinear, *, out_float32: bool = False) -> Tensor:
    """`linear_reference` in C++ (`csrc/body_gemm.h`); every row of the result is the same bits for any M."""
    dtype = torch.float32 if out_float32 else packed.dtype
    out = torch.empty(x.shape[0], packed.out_features, dtype=dtype)
    bias = None if packed.bias is None else dl(packed.bias)
    _native.linear(dl(x), packed.in_features, dl(packed.weight), bias, dl(out))
    return out


def embed_native(ids: Tensor, packed: PackedLinear) -> Tensor:
    """`embed_reference` from panels."""
    _check_ids(ids)
    out = torch.empty(ids.shape[0], packed.in_features, dtype=packed.dtype)
    _native.embed(dl(ids), dl(packed.weight), packed.out_features, dl(out))
    return out
