"""Linear layers: y = x W^T + b, and the rows of W (a tied embedding) from the same packed copy.

Shapes: x `[M, K]`, W `[N, K]`, b `[N]`, y `[M, N]`; x, b and y have the compute dtype (float32 or bfloat16), sums are
float32. W is packed once, when the model is loaded, by one of the schemes

- plain: W in the compute dtype.
- int8: W8A8. Each row of W is rounded to int8 with one scale, its largest magnitude over 127; so is each row of x, when
  it is multiplied.
- int4: W4A8. Each group of k's (128, or 64 or 32; the last may be short) of each row of W is `(q - zero) * scale`, q and
  zero in 0..15, as in AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323); the same group of each row of x is int8 with
  a scale of its own.

The quantised product is `sum over groups of (x_scale * w_scale) * float(sum over the group of x_q * (w_q - zero))`, the
inner sum in integers, the outer one in order in float32 and multiplied and added apart: every implementation computes
the same bits. A NaN or an infinity in a row (int8) or group (int4) of x makes its results NaN.

Fused forms: the layer's gate and up projections with SwiGLU, a product that is added to a residual, and one of rows that go
through an RMSNorm first (`norm`), the same bits as the ops one after the other.

A weight whose columns were sorted by group (GPTQ's `desc_act`) keeps their order, in which x's columns are gathered first.
One that is packed twice is multiplied in its wide form from `WIDE_ROWS` rows of x on, where arithmetic costs and not reading
weights: its rows are the same bits in every batch on either side of that number, and not across it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels.check import expect, expect_tensor
from pagemill.kernels.dlpack import dl
from pagemill.kernels.norm import Norm, rms_norm_native, rms_norm_reference

__all__ = [
    "WIDE_ROWS",
    "PackedLinear",
    "Scheme",
    "check_wide",
    "dequantize_reference",
    "embed_native",
    "embed_reference",
    "linear_native",
    "linear_reference",
    "linear_swiglu_native",
    "linear_swiglu_reference",
    "pack_native",
    "pack_quantized_native",
    "pack_quantized_reference",
    "pack_reference",
    "pack_swiglu_native",
    "pack_swiglu_reference",
]

Scheme = Literal["plain", "int8", "int4"]

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_PANEL = 32  # output features of a panel, as in csrc/isa.h
_GROUPS = (32, 64, 128)
_MOST_K = 1 << 16  # of int8: int32 holds the sums
WIDE_ROWS = 64
"""Rows of x from which on a weight's `wide` form is used. To be measured: where int8 begins to take less time than int4."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout of one implementation; opaque to its users.

    Reference: `weight` is `[N, K]`, in the compute dtype or uint8 (int8: plus 128), `scales` float32 `[N, G]`, `zeros` uint8
    `[N, G]`. Native: zero-padded panels of 32 output features; float32 `[ceil(N / 32), K, 32]`, bfloat16 `[ceil(N / 32),
    ceil(K / 2), 32, 2]`, int8 `[ceil(N / 32), ceil(K / 4), 32, 4]` plus 128, int4 `[ceil(N / 32), ceil(K / 8), 32, 4]` with
    the first four of eight k's in the low nibbles; `scales` and `zeros` `[ceil(N / 32), G, 32]`; `bias` float32, padded alike.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int
    """Of the result: half the rows of a gated pair."""
    in_features: int
    scheme: str = "plain"
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0
    """k's of a group; 0 where there are none."""
    gated: bool = False
    """Gate and up projections, for `linear_swiglu`; native: 16 gates and their 16 ups make a panel."""
    compute: str = "float32"
    """The compute dtype's name."""
    order: Tensor | None = None
    """int64 `[K]`: column k of the packed weight multiplies column `order[k]` of x; None where that is k."""
    wide: PackedLinear | None = None
    """The same weight in int8, for `WIDE_ROWS` rows of x and more."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return torch.bfloat16 if self.compute == "bfloat16" else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_scheme(scheme: str, group: int, k: int) -> None:
    expect(scheme in ("plain", "int8", "int4"), "scheme", "plain, int8 or int4", repr(scheme))
    expect(group in _GROUPS, "group", "32, 64 or 128", group)
    expect(scheme == "plain" or 1 <= k <= _MOST_K, "weight", f"1..{_MOST_K} columns", k)


def _parts(weight: Tensor | Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    expect(bool(parts), "weight", "at least one matrix", "none")
    for part in parts:
        expect_tensor("weight", part, _WEIGHTS, (None, parts[0].shape[-1]))
    if bias is not None:
        expect_tensor("bias", bias, _WEIGHTS, (sum(len(part) for part in parts),))
    return parts


def _pair(gate: Tensor, up: Tensor, bias: Tensor | None) -> list[Tensor]:
    parts = _parts([gate, up], bias)
    expect(len(gate) == len(up), "up", f"{len(gate)} rows as in gate", len(up))
    return parts


def _check_ids(ids: Tensor) -> None:
    expect_tensor("ids", ids, torch.int64, (None,))


def _check_plain(packed: PackedLinear, gated: bool) -> None:
    wanted = "gate and up of pack_swiglu" if gated else "a matrix of pack_linear"
    expect(packed.gated == gated, "packed", wanted, "the other")


def check_quantized(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
    gated: bool,
    order: Tensor | None,
) -> None:
    expect_tensor("q", q, (torch.uint8, torch.int8), (None, None))
    n, k = q.shape
    if q.dtype == torch.int8:
        _check_scheme("int8", 128, k)
        expect_tensor("scales", scales, _WEIGHTS, (n,))
        expect(zeros is None, "zeros", "None beside int8", "a tensor")
    else:
        _check_scheme("int4", group, k)
        groups = -(-k // group)
        expect_tensor("scales", scales, _WEIGHTS, (n, groups))
        expect(zeros is not None, "zeros", "a tensor beside uint8", "None")
        assert zeros is not None
        expect_tensor("zeros", zeros, torch.uint8, (n, groups))
        for name, values in (("q", q), ("zeros", zeros)):
            highest = int(values.max()) if values.numel() else 0
            expect(highest < 16, name, "0..15", highest)
    expect(not gated or n % 2 == 0, "q", "as many rows of up as of gate", f"{n} rows")
    if bias is not None:
        expect_tensor("bias", bias, _WEIGHTS, (n,))
    if order is not None:
        expect_tensor("order", order, torch.int64, (k,))
        whole = torch.equal(order.sort().values, torch.arange(k, device=order.device))
        expect(whole, "order", f"every column of 0..{k - 1} once", "another list")


def check_wide(narrow: PackedLinear, wide: PackedLinear) -> None:
    """Raise ValueError unless `wide` can stand for `narrow`: int8, as large, not wide itself, with a bias where that has one."""

    def what(packed: PackedLinear) -> tuple[int, int, bool, str, bool]:
        shape = packed.out_features, packed.in_features
        return *shape, packed.gated, packed.compute, packed.bias is None

    expect(wide.scheme == "int8" and wide.wide is None, "wide", "an int8 weight", wide.scheme)
    expect(what(wide) == what(narrow), "wide", f"the shape and kind of {what(narrow)}", what(wide))


# Rounding


def round_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (as float32) and scales `[..., 1]` of the last dimension, symmetric; see `csrc/body_qlinear.h`."""
    x = x.float()
    highest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    usable = highest.isfinite() & (highest >= 1e-30)
    most = torch.full_like(
        highest, 127.0
    )  # a scalar over a tensor is not divided but multiplied by the reciprocal
    inverse = torch.where(usable, most / highest, 0.0)
    scale = torch.where(usable, highest / most, torch.where(highest < 1e-30, 0.0, torch.nan))
    return torch.round(torch.nan_to_num(x * inverse, nan=0.0)), scale


_CUTS, _CUT_STEP = 9, 0.035  # as in csrc/body_qlinear.h


def round_int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 0..15, scales and zeros (`[N, G]`) of groups `[N, G, group]` of weights.

    The zero point is that of the whole range; the scale is the one of some, each for a range cut a little more, with the
    least squared error.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    step = (high - low) / 15.0
    usable = step > 1e-30
    zero = torch.where(usable, torch.round(-low / step), 0.0)

    def rounded(scale: Tensor) -> Tensor:
        inverse = torch.where(usable & ~scale.isnan(), 1.0 / scale, 0.0)
        q = torch.round(w * inverse[..., None]) + zero[..., None]
        return q.clamp(0, 15)

    best = torch.full_like(step, torch.inf)
    scale = torch.full_like(step, torch.nan)
    for cut in range(_CUTS):
        factor = torch.tensor(1.0) - torch.tensor(_CUT_STEP) * cut
        s = step * factor
        off = w - (rounded(s) - zero[..., None]) * s[..., None]
        off = off * off
        error = torch.zeros_like(step)
        for i in range(w.shape[-1]):  # in order, as the C++ lanes do
            error = error + off[..., i]
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    q = rounded(scale).nan_to_num(nan=0.0).to(torch.uint8)
    scale = torch.where(usable | scale.isnan(), scale, 0.0)
    return q, scale, zero.nan_to_num(nan=0.0).to(torch.uint8)


# Reference


def pack_reference(
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
) -> PackedLinear:
    """Pack `weight`: `[N, K]` float32, bfloat16 or float16, or several such, stacked by rows.

    Raises ValueError for anything else, and for a `group` (of int4) other than 32, 64 and 128.
    """
    parts = _parts(weight, bias)
    n, k = sum(len(part) for part in parts), parts[0].shape[1]
    _check_scheme(scheme, group, k)
    bias = None if bias is None else bias.to(dtype).contiguous()
    if scheme == "plain":
        rows = torch.cat([part.to(dtype) for part in parts])
        return PackedLinear(rows, bias, n, k, compute=_name(dtype))
    if scheme == "int8":
        pairs = [round_int8(part) for part in parts]
        weight = torch.cat([(q + 128).to(torch.uint8) for q, _ in pairs])
        scales = torch.cat([scale for _, scale in pairs])
        return PackedLinear(weight, bias, n, k, "int8", scales, None, 0, compute=_name(dtype))
    groups = -(-k // group)
    grouped = [F.pad(part.float(), (0, groups * group - k)).view(len(part), groups, group) for part in parts]
    q, scales, zeros = (torch.cat(each) for each in zip(*map(round_int4, grouped), strict=True))
    q = q.flatten(1)[:, :k].contiguous()
    return PackedLinear(q, bias, n, k, "int4", scales, zeros, group, compute=_name(dtype))


def pack_swiglu_reference(
    gate: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
) -> PackedLinear:
    """Pack the projections `gate` and `up`, `[I, K]` each, for `linear_swiglu`; `bias [2 I]`, the gate's first."""
    packed = pack_reference(_pair(gate, up, bias), bias, dtype, scheme=scheme, group=group)
    return replace(packed, out_features=len(gate), gated=True)


def pack_quantized_reference(
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
    """Pack a weight that is quantised already.

    int4: uint8 `q [N, K]` of 0..15, `scales [N, G]`, uint8 `zeros [N, G]` of 0..15. int8: int8 `q [N, K]`, `scales [N]`, None for
    `zeros`; `group` is not looked at. `gated`: the rows are those of gate, then those of up, for `linear_swiglu`. `order`, int64
    `[K]`: the column of x for each column of q. Raises ValueError for anything else.
    """
    check_quantized(q, scales, zeros, bias, group, gated, order)
    bias = None if bias is None else bias.to(dtype).contiguous()
    n, k = len(q) // 2 if gated else len(q), q.shape[1]
    scales = scales.float().contiguous()
    if zeros is None:
        weight = q.contiguous().view(torch.uint8) ^ 128
        return PackedLinear(weight, bias, n, k, "int8", scales[:, None], None, 0, gated, _name(dtype), order)
    return PackedLinear(
        q.contiguous(), bias, n, k, "int4", scales, zeros.contiguous(), group, gated, _name(dtype), order
    )


def dequantize_reference(packed: PackedLinear) -> Tensor:
    """The weight that a reference-packed matrix stands for: float32 `[N, K]`, gate's rows before up's, columns as in x."""
    if packed.scales is None:
        return packed.weight.float()
    q = packed.weight.float()
    if packed.zeros is None:
        weight = (q - 128) * packed.scales
    else:
        repeat = packed.group
        zeros = packed.zeros.float().repeat_interleave(repeat, 1)[:, : q.shape[1]]
        weight = (q - zeros) * packed.scales.repeat_interleave(repeat, 1)[:, : q.shape[1]]
    return weight if packed.order is None else weight[:, packed.order.argsort()]


_EXACT = 1024  # k's whose products of int8 sum exactly in float32


def chosen_form(x: Tensor, packed: PackedLinear, wide_rows: int = WIDE_ROWS) -> tuple[Tensor, PackedLinear]:
    """The form of the weight for this many rows of x, and x with its columns in that form's order."""
    expect_tensor("x", x, packed.dtype, (None, packed.in_features))
    if packed.wide is not None and len(x) >= wide_rows:
        packed = packed.wide
    return x if packed.order is None else x[:, packed.order], packed


def _product(x: Tensor, packed: PackedLinear) -> Tensor:
    """x times the packed weight plus bias, before it is rounded to the compute dtype."""
    x, packed = chosen_form(x, packed)
    if packed.scales is None:
        return F.linear(x, packed.weight, packed.bias)
    k, step = packed.in_features, packed.group or packed.in_features
    y = torch.zeros(len(x), len(packed.weight), device=x.device)
    for g, first in enumerate(range(0, k, step)):
        rows, scale = round_int8(x[:, first : first + step])
        total = torch.zeros_like(y, dtype=torch.int32)
        weight = packed.weight[:, first : first + step].float()
        weight = weight - (128.0 if packed.zeros is None else packed.zeros[:, g : g + 1].float())
        for i in range(0, weight.shape[1], _EXACT):
            total += (rows[:, i : i + _EXACT] @ weight[:, i : i + _EXACT].T).to(torch.int32)
        y = y + total.float() * (scale * packed.scales[:, g])
    return y if packed.bias is None else y + packed.bias.float()


def linear_reference(
    x: Tensor,
    packed: PackedLinear,
    *,
    out_float32: bool = False,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """`x [M, K]` times the packed weight, plus the bias: `[M, N]`, in x's dtype or float32.

    With a `residual [M, N]` of the compute dtype: added to it in place, rounded once, and the residual returned.
    With a `norm`: of `rms_norm(x, *norm)` instead of x.
    """
    _check_plain(packed, gated=False)
    y = _product(x if norm is None else rms_norm_reference(x, *norm), packed)
    if residual is not None:
        expect(not out_float32, "out_float32", "False beside a residual", True)
        expect_tensor("residual", residual, packed.dtype, (len(x), packed.out_features))
        residual.copy_(residual.float() + y.float())
        return residual
    return y.float() if out_float32 else y.to(packed.dtype)


def linear_swiglu_reference(x: Tensor, packed: PackedLinear, *, norm: Norm | None = None) -> Tensor:
    """`silu(gate) * up` of x `[M, K]` times a pair of `pack_swiglu`: `[M, I]` in the compute dtype, rounded once. With a `norm`:
    of `rms_norm(x, *norm)` instead of x."""
    _check_plain(packed, gated=True)
    gate, up = _product(x if norm is None else rms_norm_reference(x, *norm), packed).float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(packed.dtype)


def embed_reference(
    ids: Tensor, packed: PackedLinear, image_index: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    """Rows `ids [T]` (int64, in 0..N-1) of the packed weight, plain or int8: `[T, K]` in the compute dtype. Where
    `image_index [T]` (int32) is given and not -1, the row is that of `images [I, K]` instead.

    Raises ValueError for an id or index out of range, and for one of `image_index` and `images` without the other.
    """
    _check_ids(ids)
    _check_embedding(packed)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        expect(
            low >= 0 and high < packed.out_features, "ids", f"0..{packed.out_features - 1}", f"{low}..{high}"
        )
    rows = F.embedding(ids, packed.weight)
    if packed.scales is not None:
        rows = ((rows.float() - 128) * packed.scales[ids]).to(packed.dtype)
    expect((image_index is None) == (images is None), "images", "an image_index beside it, or neither", "one")
    if image_index is None or images is None:
        return rows
    expect_tensor("image_index", image_index, torch.int32, tuple(ids.shape))
    expect_tensor("images", images, packed.dtype, (len(images), packed.in_features))
    fits = ((image_index >= -1) & (image_index < len(images))).all()
    expect(bool(fits), "image_index", f"-1..{len(images) - 1}", "another number")
    return (
        torch.where(image_index[:, None] < 0, rows, images[image_index.clamp_min(0)]) if len(images) else rows
    )


def _check_embedding(packed: PackedLinear) -> None:
    _check_plain(packed, gated=False)
    expect(packed.scheme != "int4", "packed", "a plain or int8 matrix", "int4")
    expect(packed.order is None, "packed", "columns in their order", "sorted columns")


# Native


def _interleave(pair: Tensor) -> Tensor:
    """Rows of gate and then of up, `[2 I, ...]`, as 16 of each in turn, zero-padded: `[ceil(I / 16) * 32, ...]`."""
    gate, up = pair.chunk(2)
    half = _PANEL // 2
    blocks = -(-len(gate) // half)
    rows = pair.new_zeros(blocks, 2, half, *pair.shape[1:])
    for side, part in enumerate((gate, up)):
        full = len(part) // half
        rows[:full, side] = part[: full * half].unflatten(0, (full, half))
        if full < blocks:
            rows[full, side, : len(part) - full * half] = part[full * half :]
    return rows.flatten(0, 2)


def _pieces(parts: list[Tensor], gated: bool) -> Iterator[tuple[int, Tensor]]:
    """The rows of panels, some at a time: the first one's number (a multiple of 32) and the rows."""
    k = parts[0].shape[1]
    step = max(1, (1 << 20) // max(1, _PANEL * k)) * _PANEL
    if gated:
        gate, up = parts
        half = step // 2
        for first in range(0, len(gate), half):
            pair = torch.cat([gate[first : first + half], up[first : first + half]])
            yield 2 * first, _interleave(pair)
        return
    if any(len(part) % _PANEL for part in parts[:-1]):
        parts = [torch.cat(parts)]  # heads narrower than a panel: only tiny models have them
    done = 0
    for part in parts:
        for first in range(0, len(part), step):
            yield done + first, part[first : first + step]
        done += len(part)


def _padded_bias(bias: Tensor | None, dtype: torch.dtype, count: int, gated: bool) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.to(dtype)
    padded = torch.zeros(count * _PANEL)
    rows = _interleave(bias) if gated else bias
    padded[: len(rows)] = rows
    return padded


def _pack_native(
    parts: list[Tensor], bias: Tensor | None, dtype: torch.dtype, scheme: Scheme, group: int, gated: bool
) -> PackedLinear:
    n, k = sum(len(part) for part in parts), parts[0].shape[1]
    _check_scheme(scheme, group, k)
    if gated:
        n //= 2
    count = -(-n // (_PANEL // 2 if gated else _PANEL))
    scales = zeros = None
    if scheme == "plain":
        shape = (count, k, _PANEL) if dtype == torch.float32 else (count, -(-k // 2), _PANEL, 2)
        panels = torch.empty(shape, dtype=dtype)
    else:
        groups = 1 if scheme == "int8" else -(-k // group)
        panels = torch.empty(count, -(-k // (4 if scheme == "int8" else 8)), _PANEL, 4, dtype=torch.uint8)
        scales = torch.empty(count, groups, _PANEL)
        if scheme == "int4":
            zeros = torch.empty(count, groups, _PANEL, dtype=torch.uint8)
    for first, piece in _pieces(parts, gated):
        if scales is None:
            _native.pack_panels(dl(piece.to(dtype)), first, dl(panels))
        else:
            if piece.dtype == torch.float16:
                piece = piece.float()
            into = None if zeros is None else dl(zeros)
            _native.pack_quantized(dl(piece), first, group, dl(panels), dl(scales), into)
    bias = _padded_bias(bias, dtype, count, gated)
    group = group if scheme == "int4" else 0
    return PackedLinear(panels, bias, n, k, scheme, scales, zeros, group, gated, _name(dtype))


def pack_native(
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
) -> PackedLinear:
    """`pack_reference` into panels; beyond them it needs a small piece of the weight at a time."""
    return _pack_native(_parts(weight, bias), bias, dtype, scheme, group, gated=False)


def pack_swiglu_native(
    gate: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    scheme: Scheme = "plain",
    group: int = 128,
) -> PackedLinear:
    """`pack_swiglu_reference` into panels."""
    return _pack_native(_pair(gate, up, bias), bias, dtype, scheme, group, gated=True)


def pack_quantized_native(
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
    """`pack_quantized_reference` into panels."""
    check_quantized(q, scales, zeros, bias, group, gated, order)
    n, k = len(q) // 2 if gated else len(q), q.shape[1]
    count, per_step = -(-n // (_PANEL // 2 if gated else _PANEL)), 4 if zeros is None else 8
    steps = -(-k // per_step)
    panels = torch.empty(count, steps, _PANEL, 4, dtype=torch.uint8)
    for first, piece in _pieces(list(q.chunk(2)) if gated else [q], gated):
        rows = -(-len(piece) // _PANEL)
        piece = F.pad(piece, (0, steps * per_step - k, 0, rows * _PANEL - len(piece)))
        into = panels[first // _PANEL : first // _PANEL + rows]
        if zeros is None:
            into.copy_((piece.view(torch.uint8) ^ 128).view(rows, _PANEL, steps, 4).transpose(1, 2))
        else:
            low, high = piece.view(rows, _PANEL, steps, 2, 4).permute(3, 0, 2, 1, 4)
            torch.bitwise_or(low, high << 4, out=into)

    def in_panels(values: Tensor) -> Tensor:
        values = _interleave(values) if gated else values
        values = F.pad(values, (0, 0, 0, count * _PANEL - len(values)))
        return values.view(count, _PANEL, -1).transpose(1, 2).contiguous()

    bias = _padded_bias(bias, dtype, count, gated)
    name = _name(dtype)
    if zeros is None:
        return PackedLinear(
            panels, bias, n, k, "int8", in_panels(scales.float()[:, None]), None, 0, gated, name, order
        )
    scales, zeros = in_panels(scales.float()), in_panels(zeros)
    return PackedLinear(panels, bias, n, k, "int4", scales, zeros, group, gated, name, order)


def _run(x: Tensor, packed: PackedLinear, out: Tensor, *, add: bool = False) -> None:
    x, packed = chosen_form(x, packed)
    bias = None if packed.bias is None else dl(packed.bias)
    if packed.scales is None:
        _native.linear(dl(x), packed.in_features, dl(packed.weight), bias, dl(out), add, packed.gated)
        return
    zeros = None if packed.zeros is None else dl(packed.zeros)
    _native.qlinear(
        dl(x),
        packed.in_features,
        dl(packed.weight),
        dl(packed.scales),
        zeros,
        packed.group,
        bias,
        dl(out),
        add,
        packed.gated,
    )


def linear_native(
    x: Tensor,
    packed: PackedLinear,
    *,
    out_float32: bool = False,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """`linear_reference` in C++ (`csrc/body_linear.h`); every row of the result is the same bits for any M."""
    _check_plain(packed, gated=False)
    x = x if norm is None else rms_norm_native(x, *norm)
    if residual is not None:
        expect(not out_float32, "out_float32", "False beside a residual", True)
        expect_tensor("residual", residual, packed.dtype, (len(x), packed.out_features))
        _run(x, packed, residual, add=True)
        return residual
    dtype = torch.float32 if out_float32 else packed.dtype
    out = torch.empty(len(x), packed.out_features, dtype=dtype)
    _run(x, packed, out)
    return out


def linear_swiglu_native(x: Tensor, packed: PackedLinear, *, norm: Norm | None = None) -> Tensor:
    """`linear_swiglu_reference` in C++: the pair's sums never leave the cache."""
    _check_plain(packed, gated=True)
    x = x if norm is None else rms_norm_native(x, *norm)
    out = torch.empty(len(x), packed.out_features, dtype=packed.dtype)
    _run(x, packed, out)
    return out


def embed_native(
    ids: Tensor, packed: PackedLinear, image_index: Tensor | None = None, images: Tensor | None = None
) -> Tensor:
    """`embed_reference` from panels."""
    _check_ids(ids)
    _check_embedding(packed)
    out = torch.empty(ids.shape[0], packed.in_features, dtype=packed.dtype)
    merged = (None if image_index is None else dl(image_index), None if images is None else dl(images))
    if packed.scales is None:
        _native.embed(dl(ids), dl(packed.weight), packed.out_features, *merged, dl(out))
    else:
        _native.embed_int8(
            dl(ids), dl(packed.weight), dl(packed.scales), packed.out_features, *merged, dl(out)
        )
    return out
