"""Rotary position embedding (Su et al., 2021), alone and fused with the KV-cache write.

The pair of dimension i is i + D/2 (rotate-half, the NeoX and Hugging Face convention). Angles come as `cos`
and `sin` `[T, D/2]` in float32, so that the caller decides what a position is (1-D, 2-D, M-RoPE). The cache
has the layout of `pagemill.kernels.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.attention import QUANTISED_KV, expect_cache
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl

__all__ = ["rotary_cache_native", "rotary_cache_reference", "rotary_native", "rotary_reference"]

_DTYPES = (torch.float32, torch.bfloat16)


def _check_angles(cos: Tensor, sin: Tensor, tokens: int, head_dim: int) -> None:
    expect(head_dim % 2 == 0, "head_dim", "an even number", head_dim)
    expect_tensor("cos", cos, torch.float32, (tokens, head_dim // 2))
    expect_tensor("sin", sin, torch.float32, (tokens, head_dim // 2))


def _check_cache(
    qkv: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    expect_tensor("qkv", qkv, _DTYPES, (None, None))
    expect(
        (k_scale is None) == (v_scale is None), "v_scale", "one with k_scale, or neither", "one of the two"
    )
    expect_cache("k", k_cache, k_scale, qkv.dtype, (None, num_kv_heads, None, None))
    blocks, _, head_dim, block_size = k_cache.shape
    expect(v_cache.dtype == k_cache.dtype, "v_cache", f"{k_cache.dtype} as k_cache", v_cache.dtype)
    expect_cache("v", v_cache, v_scale, qkv.dtype, (blocks, num_kv_heads, block_size, head_dim))
    expect_tensor("qkv", qkv, qkv.dtype, (None, (num_heads + 2 * num_kv_heads) * head_dim))
    expect_tensor("slots", slots, torch.int64, (qkv.shape[0],))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos[:, None], sin[:, None]
    # Both halves before either is overwritten: in float32 they are views.
    rotated = first * cos - second * sin
    x[..., half:] = (second * cos + first * sin).to(x.dtype)
    x[..., :half] = rotated.to(x.dtype)


def _quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `x [..., D]` in int8 or float8_e4m3fn and their float32 scales `[...]`; a vector below 1e-30 is zero."""
    largest = QUANTISED_KV[dtype]
    most = x.float().abs().amax(-1)
    seen = most > 1e-30
    codes = x.float() * torch.where(seen, largest / most, 0.0)[..., None]
    codes = codes.round() if dtype == torch.int8 else codes  # fp8 is rounded by its conversion
    return codes.to(dtype), torch.where(seen, most / largest, 0.0)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `x [T, H, D]` (float32 or bfloat16, any strides with dense rows) in place."""
    expect_tensor("x", x, _DTYPES, (None, None, None))
    _check_angles(cos, sin, x.shape[0], x.shape[2])
    _rotate(x, cos, sin)


def rotary_cache_reference(
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
    """Rotate q and k of `qkv [T, (Hq + 2 Hk) D]`, write k and v into the cache, return q `[T, Hq, D]`.

    Token t goes to the flat slot `slots[t] = block * block_size + offset` (int64 `[T]`); -1 writes nothing, and
    no other slot comes twice. With `k_scale` and `v_scale` the caches are int8 or float8_e4m3fn and every key and
    value is quantised by itself, symmetrically: scale = max |x| / 127 (fp8: / 448), codes rounded to nearest even. The result is
    a view of `qkv`; what the rest of `qkv` holds afterwards is unspecified. ValueError for a slot out of range.
    """
    _check_cache(qkv, slots, k_cache, v_cache, num_heads, num_kv_heads, k_scale, v_scale)
    blocks, _, head_dim, block_size = k_cache.shape
    _check_angles(cos, sin, qkv.shape[0], head_dim)
    if slots.numel():
        low, high = int(slots.min()), int(slots.max())
        expect(
            low >= -1 and high < blocks * block_size,
            "slots",
            f"-1..{blocks * block_size - 1}",
            f"{low}..{high}",
        )
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    _rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
    kept = slots >= 0
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    keys, values = k[kept], v[kept]
    if k_scale is not None and v_scale is not None:
        keys, k_scale[block, :, offset] = _quantise(keys, k_cache.dtype)
        values, v_scale[block, :, offset] = _quantise(values, v_cache.dtype)
    k_cache[block, :, :, offset] = keys
    v_cache[block, :, offset, :] = values
    return q


def rotary_native(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotary_reference` in C++ (`csrc/body_elementwise.h`)."""
    _native.rotary(dl(x), dl(cos), dl(sin))


def rotary_cache_native(
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
    """`rotary_cache_reference` in C++; the caches must be contiguous."""
    caches = dl(k_cache), dl(v_cache)
    scales = None if k_scale is None else dl(k_scale), None if v_scale is None else dl(v_scale)
    _native.rotary_cache(dl(qkv), dl(cos), dl(sin), dl(slots), *caches, num_heads, num_kv_heads, *scales)
    head_dim = k_cache.shape[2]
    return qkv[:, : num_heads * head_dim].view(qkv.shape[0], num_heads, head_dim)
