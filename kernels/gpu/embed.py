"""Token embeddings merged with image embeddings in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embed"]


@triton.jit
def embed_kernel(
    ids, image_index, weight, images, out, H, weight_row, IMAGES: tl.constexpr, TILE: tl.constexpr
):
    """One token's row, TILE columns: of the image embeddings where its index is >= 0, else of the weight."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = h < H
    row = weight + tl.load(ids + token) * weight_row
    if IMAGES:
        index = tl.load(image_index + token).to(tl.int64)
        row = tl.where(index >= 0, images + index * H, row)
    tl.store(out + token * H + h, tl.load(row + h, mask=mask, other=0.0), mask=mask)


def embed(
    ids: Tensor, weight: Tensor, hidden: int, image_index: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    """Rows `ids [T]` (int64, not checked) of `weight [V, >= hidden]`: `[T, hidden]`; but row `image_index[t]` (int32, -1: none)
    of `images [I, hidden]` where it is given."""
    tokens = ids.shape[0]
    out = torch.empty(tokens, hidden, dtype=weight.dtype, device=weight.device)
    if tokens:
        given = image_index is not None
        embed_kernel[(tokens, triton.cdiv(hidden, 1024))](
            ids, image_index if given else ids, weight, images if given else weight, out, hidden, weight.stride(0),
            IMAGES=given, TILE=1024,
        )  # fmt: skip
    return out
