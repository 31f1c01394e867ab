"""Rotary embedding in Triton: of packed heads in place, and of q and k with the KV-cache write in the same pass.

The contract is that of `pagemill.kernels.rotary`, over the cache layout of `pagemill.kernels.gpu.attention`. Cosines and
sines may be shared by the caller for any position scheme (M-RoPE of the decoder, 2-D of the vision tower).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rotary", "rotary_cache"]


@triton.jit
def _rotated(x, at, cos, sin, HALF: tl.constexpr, mask):
    """Both halves of heads at pointers `at [heads, HALF]`, rotated, float32."""
    first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotary_kernel(
    x, cos, sin, heads, x_token, x_head, HALF: tl.constexpr, HALF_P: tl.constexpr, HEADS_P: tl.constexpr
):  # fmt: skip
    """One token's heads in place; HALF_P and HEADS_P are the sizes rounded up to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    i, h = tl.arange(0, HALF_P), tl.arange(0, HEADS_P)
    angle = i < HALF
    c = tl.load(cos + token * HALF + i, mask=angle, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + i, mask=angle, other=0.0)[None, :]
    mask = (h < heads)[:, None] & angle[None, :]
    at = token * x_token + h[:, None] * x_head + i[None, :]
    first, second = _rotated(x, at, c, s, HALF, mask)
    tl.store(x + at, first.to(x.dtype.element_ty), mask=mask)
    tl.store(x + at + HALF, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _keep(cache, scales, at, slot, first, second, HALF: tl.constexpr, LARGEST: tl.constexpr, mask):
    """Store one token's kv heads `[heads, HALF]` twice over; int8 and float8 with a scale a head."""
    if LARGEST > 0:
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        step = tl.maximum(largest / LARGEST, 1e-30)
        tl.store(scales + slot, step, mask=tl.max(mask.to(tl.int32), 1) > 0)
        first, second = first / step[:, None], second / step[:, None]
        if cache.dtype.element_ty == tl.int8:
            first = (first + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
            second = (second + 12582912.0) - 12582912.0
    tl.store(cache + at, first.to(cache.dtype.element_ty), mask=mask)
    tl.store(cache + at + HALF, second.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def rotary_cache_kernel(
    qkv, cos, sin, slots, k_cache, v_cache, k_scale, v_scale, qkv_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_P: tl.constexpr, KV_P: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One token: q rotated in place, k rotated into the cache, v copied into it. HALF is a power of two."""
    token = tl.program_id(0).to(tl.int64)
    D: tl.constexpr = 2 * HALF
    i, h, g = tl.arange(0, HALF), tl.arange(0, HEADS_P), tl.arange(0, KV_P)
    c = tl.load(cos + token * HALF + i)[None, :]
    s = tl.load(sin + token * HALF + i)[None, :]
    mask = (h < HEADS)[:, None] & (i >= 0)[None, :]
    at = token * qkv_token + h[:, None] * D + i[None, :]
    first, second = _rotated(qkv, at, c, s, HALF, mask)
    tl.store(qkv + at, first.to(qkv.dtype.element_ty), mask=mask)
    tl.store(qkv + at + HALF, second.to(qkv.dtype.element_ty), mask=mask)

    slot = tl.load(slots + token)
    if slot >= 0:  # its names are its own: the compiler would join them with those above, of other shapes
        row = (slot // BLOCK * KV_HEADS + g) * BLOCK + slot % BLOCK
        there = (g < KV_HEADS)[:, None] & (i >= 0)[None, :]
        k_at = token * qkv_token + (HEADS + g)[:, None] * D + i[None, :]
        k_first, k_second = _rotated(qkv, k_at, c, s, HALF, there)
        kept = row[:, None] * D + i[None, :]
        # As the unfused op would: rounded to the compute dtype before anything else happens to it.
        k_first = k_first.to(qkv.dtype.element_ty).to(tl.float32)
        k_second = k_second.to(qkv.dtype.element_ty).to(tl.float32)
        _keep(k_cache, k_scale, kept, row, k_first, k_second, HALF, LARGEST, there)
        v_at = k_at + KV_HEADS * D
        v_first = tl.load(qkv + v_at, mask=there, other=0.0).to(tl.float32)
        v_second = tl.load(qkv + v_at + HALF, mask=there, other=0.0).to(tl.float32)
        _keep(v_cache, v_scale, kept, row, v_first, v_second, HALF, LARGEST, there)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotary_reference`: rotate `x [T, H, D]` in place."""
    tokens, heads, d = x.shape
    if tokens and heads:
        half = d // 2
        rotary_kernel[(tokens,)](
            x, cos, sin, heads, x.stride(0), x.stride(1), HALF=half, HALF_P=triton.next_power_of_2(half),
            HEADS_P=triton.next_power_of_2(heads), num_warps=4,
        )  # fmt: skip


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`rotary_cache_reference` for `k_cache`, `v_cache [num_blocks, Hk, block_size, D]`; int8 and float8 ones with scales."""
    tokens, d = qkv.shape[0], k_cache.shape[3]
    if tokens:
        largest = 0.0 if k_scale is None else 127.0 if k_cache.dtype == torch.int8 else 448.0
        rotary_cache_kernel[(tokens,)](
            qkv, cos, sin, slots, k_cache, v_cache, qkv if k_scale is None else k_scale, qkv if v_scale is None else v_scale,
            qkv.stride(0), HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=d // 2,
            HEADS_P=triton.next_power_of_2(num_heads), KV_P=triton.next_power_of_2(num_kv_heads),
            BLOCK=k_cache.shape[2], LARGEST=largest, num_warps=4,
        )  # fmt: skip
    return qkv[:, : num_heads * d].view(tokens, num_heads, d)
