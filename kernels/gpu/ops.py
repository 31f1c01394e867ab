"""The Triton kernels under the contracts of `pagemill.kernels`, for `select`.

What differs from the CPU: int4 layers keep activations in the compute dtype (W4A16), and for very many rows round their weights
to it; keys lie in the cache like values; ids, slots, positions and lengths are not checked, which would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagemill.kernels.attention import Shape4
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.gpu import (
    activation,
    angles,
    attention,
    configs,
    embed,
    linear,
    pixels,
    rotary,
    sampling,
    tuned,
)
from pagemill.kernels.gpu.norm import rms_norm
from pagemill.kernels.linear import (
    PackedLinear,
    Scheme,
    check_quantized,
    chosen_form,
    round_int4,
    round_int8,
)
from pagemill.kernels.norm import Norm

__all__ = ["kv_cache_shapes", "ops"]


def kv_cache_shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[Shape4, Shape4]:
    """Shapes of `k_cache` and `v_cache` of one layer: both `[num_blocks, Hk, block_size, D]`, contiguous."""
    shape = num_blocks, num_kv_heads, block_size, head_dim
    return shape, shape


def _product(
    x: Tensor,
    packed: PackedLinear,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    norm: Norm | None = None,
) -> Tensor:
    card = configs.card_of(x.device)
    if norm is not None and any(
        form is not None and form.order is not None for form in (packed, packed.wide)
    ):
        x, norm = rms_norm(x, *norm), None  # columns are gathered after it
    x, packed = chosen_form(x, packed, tuned.wide_rows(card))
    if packed.scheme == "int4" and packed.wide is None and len(x) >= tuned.plain_rows(card):
        packed = linear.unpack_int4(packed, x.dtype)
    n, k = packed.out_features, packed.in_features
    tile = tuned.matmul(card, packed.scheme, packed.gated, len(x), n, k)
    return linear.linear(
        x, packed, tile=tile, residual=residual, out_dtype=out_dtype, in_place=True, norm=norm
    )


def pack_linear(
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
    gated: bool = False,
) -> PackedLinear:
    """`pack_reference`, or with `gated` (two matrices of one shape) `pack_swiglu_reference`."""
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    bias = None if bias is None else bias.to(dtype)
    k = parts[0].shape[1]
    if scheme == "plain":
        packed = linear.pack_plain(torch.cat([part.to(dtype) for part in parts]), bias, gated=gated)
    elif scheme == "int8":
        q, scales = (torch.cat(each) for each in zip(*map(round_int8, parts), strict=True))
        packed = linear.pack_scaled(q.to(torch.int8), scales.flatten(), bias, gated=gated)
    else:
        groups = -(-k // group)
        padded = [
            F.pad(part.float(), (0, groups * group - k)).view(len(part), groups, group) for part in parts
        ]
        q, scales, zeros = (torch.cat(each) for each in zip(*map(round_int4, padded), strict=True))
        packed = linear.pack_int4(q.flatten(1)[:, :k], scales, zeros, bias, gated=gated)
    return replace(packed, compute=str(dtype).removeprefix("torch."))


def pack_swiglu(
    gate: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
) -> PackedLinear:
    """`pack_swiglu_reference`."""
    return pack_linear([gate, up], bias, dtype, scheme=scheme, group=group, gated=True)


def pack_quantized(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    group: int = 128,
    gated: bool = False,
    order: Tensor | None = None,
) -> PackedLinear:
    """`pack_quantized_reference`; also of float8_e4m3fn `q` with a scale a row, and x rounded likewise."""
    if q.dtype == torch.float8_e4m3fn:
        expect_tensor("q", q, q.dtype, (None, None))
        expect_tensor("scales", scales, torch.float32, (len(q),))
        expect(zeros is None and order is None, "zeros and order", "None beside float8", "a tensor")
    else:
        check_quantized(q, scales, zeros, bias, group, gated, order)
    bias, scales = None if bias is None else bias.to(dtype), scales.float()
    if zeros is None:
        packed = linear.pack_scaled(q, scales, bias, gated=gated)
    else:
        packed = linear.pack_int4(q, scales, zeros, bias, gated=gated)
    return replace(packed, compute=str(dtype).removeprefix("torch."), order=order)


def _linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    out_float32: bool = False,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    expect(not packed.gated, "packed", "a matrix of pack_linear", "a gated pair")
    return _product(x, packed, residual, torch.float32 if out_float32 else None, norm)


def _linear_swiglu(x: Tensor, packed: PackedLinear, *, norm: Norm | None = None) -> Tensor:
    expect(packed.gated, "packed", "gate and up of pack_swiglu", "a matrix")
    return _product(x, packed, norm=norm)


def _embed(
    ids: Tensor, packed: PackedLinear, image_index: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    expect(packed.scheme in ("plain", "int8", "fp8"), "packed", "a plain, int8 or fp8 matrix", packed.scheme)
    return embed.embed(
        ids, packed.weight, packed.in_features, image_index, images, scales=packed.scales, dtype=packed.dtype
    )


def _paged_attention(
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
    card = configs.card_of(q.device)
    kv_heads, block_size = k_cache.shape[1:3]
    group, quantised = q.shape[1] // kv_heads, k_scale is not None
    tile = tuned.paged(card, decoding=len(q) == len(context_lens), quantised=quantised)
    tile = configs.fit(card, tile, q.shape[2] * q.element_size(), group=group, quantised=quantised)
    programs = (len(q) * group // tile.rows + len(context_lens)) * kv_heads
    splits = configs.splits_for(card, programs, block_tables.shape[1] * block_size, tile.keys)
    return attention.paged_attention(
        q, k_cache, v_cache, block_tables, query_start, context_lens, scale, k_scale=k_scale, v_scale=v_scale,
        tile=tile, num_splits=splits,
    )  # fmt: skip


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    card = configs.card_of(q.device)
    tile = configs.fit(card, tuned.varlen(card, len(q), len(cu_seqlens) - 1), q.shape[2] * q.element_size())
    return attention.varlen_attention(q, k, v, cu_seqlens, scale, tile=tile)


def ops(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The field of `pagemill.kernels.Kernels` and the op, for every op that Triton has."""
    return {
        "pack_linear": partial(pack_linear, dtype=dtype),
        "pack_swiglu": partial(pack_swiglu, dtype=dtype),
        "pack_quantized": partial(pack_quantized, dtype=dtype),
        "linear": _linear,
        "linear_swiglu": _linear_swiglu,
        "embed": _embed,
        "rms_norm": rms_norm,
        "swiglu": activation.swiglu,
        "gelu": activation.gelu,
        "mrope_angles": angles.mrope_angles,
        "rotary": rotary.rotary,
        "rotary_cache": rotary.rotary_cache,
        "paged_attention": _paged_attention,
        "varlen_attention": _varlen_attention,
        "pixel_values": pixels.pixel_values,
        "greedy": sampling.greedy,
        "kv_cache_shapes": kv_cache_shapes,
    }
