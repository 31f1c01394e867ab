"""Softmax attention: over a paged KV cache for the decoder, over packed segments for the vision tower.

The KV cache of one layer is two tensors in blocks of `block_size` tokens: `k_cache [num_blocks, Hk, D,
block_size]`, keys transposed so that q k^T runs along keys, and `v_cache [num_blocks, Hk, block_size, D]`.
Grouped queries (Ainslie et al., 2023): query head h reads kv head `h // (Hq // Hk)`. Everything is float32 or
bfloat16; scores and sums are float32. A quantised cache, int8 or float8_e4m3fn, has beside each of its two tensors float32 scales
`[num_blocks, Hk, block_size]`, one per token and kv head: a key is its codes times its scale (symmetric, dynamic: its largest
magnitude over the largest code, 127 or 448). `Kernels.quantised_kv` says which of them an implementation takes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = [
    "QUANTISED_KV",
    "LayerCache",
    "kv_cache_shapes",
    "kv_scale_shape",
    "paged_attention_native",
    "paged_attention_reference",
    "varlen_attention_native",
    "varlen_attention_reference",
]

_DTYPES = (torch.float32, torch.bfloat16)
QUANTISED_KV = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What keys and values may be quantised to, and its largest code."""
Shape4 = tuple[int, int, int, int]


def kv_cache_shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[Shape4, Shape4]:
    """Shapes of `k_cache` and `v_cache` of one layer; both are contiguous."""
    return (num_blocks, num_kv_heads, head_dim, block_size), (num_blocks, num_kv_heads, block_size, head_dim)


def kv_scale_shape(num_blocks: int, num_kv_heads: int, block_size: int) -> tuple[int, int, int]:
    """Shape of the scales of a quantised `k_cache`, and of those of its `v_cache`; contiguous."""
    return num_blocks, num_kv_heads, block_size


class LayerCache(NamedTuple):
    """The KV cache of one layer; scales only where it is quantised."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def expect_cache(
    argument: str,
    cache: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
) -> None:
    """Check a cache tensor of the compute `dtype`, or of a quantised one with a scale beside it."""
    expect_tensor(f"{argument}_cache", cache, dtype if scale is None else tuple(QUANTISED_KV), shape)
    if scale is not None:
        blocks, kv_heads, block_size = (
            cache.shape[0],
            cache.shape[1],
            cache.shape[3 if argument == "k" else 2],
        )
        wanted = kv_scale_shape(blocks, kv_heads, block_size)
        expect_tensor(f"{argument}_scale", scale, torch.float32, wanted)


def _check_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    expect_tensor("q", q, _DTYPES, (None, None, None))
    expect(
        (k_scale is None) == (v_scale is None), "v_scale", "one with k_scale, or neither", "one of the two"
    )
    expect_cache("k", k_cache, k_scale, q.dtype, (None, None, q.shape[2], None))
    blocks, kv_heads, head_dim, block_size = k_cache.shape
    expect_cache("v", v_cache, v_scale, q.dtype, (blocks, kv_heads, block_size, head_dim))
    divides = kv_heads > 0 and q.shape[1] % kv_heads == 0
    expect(divides, "q", f"a number of heads that is a multiple of {kv_heads}", q.shape[1])
    expect_tensor("context_lens", context_lens, torch.int32, (None,))
    expect_tensor("block_tables", block_tables, torch.int32, (context_lens.shape[0], None))
    expect_tensor("query_start", query_start, torch.int32, (context_lens.shape[0] + 1,))


def _check_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    expect_tensor("q", q, _DTYPES, (None, None, None))
    expect_tensor("k", k, q.dtype, tuple(q.shape))
    expect_tensor("v", v, q.dtype, tuple(q.shape))
    expect_tensor("cu_seqlens", cu_seqlens, torch.int32, (None,))
    expect(cu_seqlens.shape[0] > 0, "cu_seqlens", "at least one entry", 0)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch, prefill chunks and single decode tokens alike: `[T, Hq, D]`.

    Sequence s owns the rows `query_start[s]:query_start[s + 1]` of `q [T, Hq, D]` (int32 `[S + 1]`, from 0 to
    T). They are the last tokens of its context of `context_lens[s]` tokens (int32 `[S]`), whose token p lies
    at offset `p % block_size` of block `block_tables[s, p // block_size]` (int32 `[S, max_blocks]`). Table
    entries and slots past the context are never read. With `k_scale` and `v_scale` the caches are quantised. ValueError
    for a chunk longer than its context, or a block out of range.
    """
    _check_paged(q, k_cache, v_cache, block_tables, query_start, context_lens, k_scale, v_scale)
    num_blocks, kv_heads, head_dim, block_size = k_cache.shape
    starts, lens = query_start.tolist(), context_lens.tolist()
    monotone = all(a <= b for a, b in pairwise(starts))
    expect(
        monotone and starts[0] == 0 and starts[-1] == q.shape[0],
        "query_start",
        f"0 up to {q.shape[0]}",
        starts,
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for s, context in enumerate(lens):
        rows = slice(starts[s], starts[s + 1])
        count = rows.stop - rows.start
        if not count:
            continue
        expect(context >= count, f"context_lens[{s}]", f"at least the chunk's {count} tokens", context)
        used = -(-context // block_size)
        expect(
            used <= block_tables.shape[1], "block_tables", f"at least {used} columns", block_tables.shape[1]
        )
        blocks = block_tables[s, :used].long()
        low, high = int(blocks.min()), int(blocks.max())
        expect(low >= 0 and high < num_blocks, f"block_tables[{s}]", f"0..{num_blocks - 1}", f"{low}..{high}")
        k_blocks, v_blocks = k_cache[blocks], v_cache[blocks]
        if k_scale is not None and v_scale is not None:
            k_blocks = k_blocks.float() * k_scale[blocks][:, :, None, :]
            v_blocks = v_blocks.float() * v_scale[blocks][:, :, :, None]
        k = k_blocks.permute(1, 0, 3, 2).reshape(kv_heads, used * block_size, head_dim)[:, :context]
        v = v_blocks.permute(1, 0, 2, 3).reshape(kv_heads, used * block_size, head_dim)[:, :context]
        mask = None
        if count > 1:
            position = torch.arange(context, device=q.device)
            mask = position <= position[context - count :, None]
        attended = F.scaled_dot_product_attention(
            q[rows].to(k.dtype).transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out[rows] = attended[0].transpose(0, 1)
    return out


def varlen_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Full attention inside each segment `cu_seqlens[s]:cu_seqlens[s + 1]` of packed rows: `[T, H, D]`.

    `q`, `k`, `v` are `[T, H, D]` (strided views are fine, rows dense); `cu_seqlens` int32 `[S + 1]` rises
    from 0 to T.
    """
    _check_varlen(q, k, v, cu_seqlens)
    lengths = cu_seqlens.diff()
    rises = bool((lengths >= 0).all()) and int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == q.shape[0]
    expect(rises, "cu_seqlens", f"values rising from 0 to {q.shape[0]}", cu_seqlens.tolist())
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Segments of one length go through one batched call: a page has hundreds of equal windows.
    for length in sorted(set(lengths.tolist())):
        if not length:
            continue
        starts = cu_seqlens[:-1][lengths == length].long()
        rows = starts[:, None] + torch.arange(length, device=q.device)
        qs, ks, vs = (x[rows].transpose(1, 2) for x in (q, k, v))
        out[rows] = F.scaled_dot_product_attention(qs, ks, vs, scale=scale).transpose(1, 2)
    return out


def paged_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`paged_attention_reference` in C++ (`csrc/body_attention.h`), for head_dim up to 256.

    The rows of a token are the same bits whatever else is in the batch, however its sequence is
    chunked, and for any block size, block placement and number of threads.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    batch = dl(block_tables), dl(query_start), dl(context_lens)
    scales = None if k_scale is None else dl(k_scale), None if v_scale is None else dl(v_scale)
    _native.paged_attention(dl(q), dl(k_cache), dl(v_cache), *batch, scale, *scales, dl(out))
    return out


def varlen_attention_native(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`varlen_attention_reference` in C++, for head_dim up to 256; the same bits for any batch."""
    out = torch.empty(q.shape, dtype=q.dtype)
    _native.varlen_attention(dl(q), dl(k), dl(v), dl(cu_seqlens), scale, dl(out))
    return out
