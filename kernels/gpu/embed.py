"""Token embeddings merged with image embeddings in one pass; rows of int8 and fp8 weights are multiplied by their scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embed"]


@triton.jit
def embed_kernel(
    ids, image_index, weight, scales, images, out, H, weight_row, IMAGES: tl.constexpr, SCALED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One token's row, TILE columns: of the image embeddings where its index is >= 0, else of the weight."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = H
    if IMAGES:
        index = tl.load(image_index + token).to(tl.int64)
        columns = tl.where(index >= 0, 0, H)
        mask = h < H - columns
        tl.store(out + token * H + h, tl.load(images + index * H + h, mask=mask, other=0.0), mask=mask)
    row = tl.load(ids + token)
    mask = h < columns
    value = tl.load(weight + row * weight_row + h, mask=mask, other=0.0)
    if SCALED:
        value = value.to(tl.float32) * tl.load(scales + row)
    tl.store(out + token * H + h, value.to(out.dtype.element_ty), mask=mask)


def embed(
    ids: Tensor,
    weight: Tensor,
    hidden: int,
    image_index: Tensor | None = None,
    images: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows `ids [T]` (int64, not checked) of `weight [V, >= hidden]`: `[T, hidden]`; but row `image_index[t]` (int32, -1: none)
    of `images [I, hidden]` where it is given. int8 and fp8 weights have float32 `scales [V]`, and then the result's `dtype`."""
    tokens = ids.shape[0]
    out = torch.empty(tokens, hidden, dtype=dtype or weight.dtype, device=weight.device)
    if tokens:
        given, scaled = image_index is not None, scales is not None
        embed_kernel[(tokens, triton.cdiv(hidden, 1024))](
            ids, image_index if given else ids, weight, scales if scaled else out, images if given else out, out, hidden,
            weight.stride(0), IMAGES=given, SCALED=scaled, TILE=1024,
        )  # fmt: skip
    return out
