"""Matrix products in Triton: y = x W^T in bfloat16, int8, float8 or with 4-bit weights, with what follows fused.

x `[M, K]`, W `[N, K]`. Forms of W, each a `PackedLinear` made once by `pack_*`; Kp is K rounded up to 64 (int4: or a group):

- plain: `[N, Kp]` in the compute dtype; gated: the rows of gate, then those of up.
- int8, fp8 (float8_e4m3fn): `[N, Kp]` with float32 `scales [N]`; x is quantised a token at a time (`quantize`).
- int4: groups of 32, 64 or 128 inputs, w = (q - zero) * scale (as AWQ and GPTQ): uint8 `[N, Kp / 2]`,
  `scales` and uint8 `zeros [Kp / group, N]`; x keeps its dtype (W4A16). Byte j of a group
  holds input j in its low nibble and input group / 2 + j in its high one, so that a run of 16 bytes is one load and
  its nibbles are columns of two products. A nibble becomes a bfloat16 by putting it into the mantissa of 128 (after Kim et
  al., 2022, arXiv 2211.10017), and the scale is applied to each group's sum, not to the weights, which stay exact.
  For very many rows `unpack_int4` makes a plain weight of it first (`configs.PLAIN_ROWS`).

Rows of W are padded with zeros to whole 16-byte runs, K to a multiple of 64, so that every load is 16 bytes wide. On sm_90 and
later the tensor memory accelerator loads the operands of many rows (`configs.LOADS`).
One compiled kernel serves every number of rows (`do_not_specialize`): pages do not wait for compilers.
For few rows the inputs are cut among programs too (split-K); partial sums are added in a fixed order by `_finish`, not
atomically, so that a result does not change from run to run.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pagemill.kernels.gpu import configs
from pagemill.kernels.gpu.codes import largest_code, to_codes
from pagemill.kernels.gpu.configs import MatmulTile
from pagemill.kernels.gpu.norm import rms_norm, rms_norm_quantized
from pagemill.kernels.linear import PackedLinear
from pagemill.kernels.norm import Norm

__all__ = ["linear", "pack_int4", "pack_plain", "pack_scaled", "quantize", "unpack_int4"]

_ALIGN = 64


@triton.jit
def _aligned(n, DIVISOR: tl.constexpr):
    """n, which DIVISOR divides. Of an argument Triton knows only whether 16 does; 8 is enough for loads of 16 bytes."""
    return n // DIVISOR * DIVISOR


@triton.jit
def _place(M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """Row and column of this program's tile: bands of BAND tile rows, so that what they read stays in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    tile = tl.program_id(0)
    band = tile // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = tile % (BAND * tiles_n)
    return band * BAND + inside % height, inside // height


@triton.jit
def _finish_tile(
    acc, up, x_scale, w_scale, bias, residual, out, m, n, M, N, out_row,
    GATED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scales, bias, SwiGLU and residual of sums `[TILE_M, TILE_N]`, and the store."""
    there = n < N
    y = acc.to(tl.float32)
    if SCALED:
        row_scale = tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
        y *= row_scale * tl.load(w_scale + n, mask=there, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        u = up.to(tl.float32)
        if SCALED:
            u *= row_scale * tl.load(w_scale + N + n, mask=there, other=0.0)[None, :]
        if BIAS:
            u += tl.load(bias + N + n, mask=there, other=0.0).to(tl.float32)[None, :]
        y = y / (1 + tl.exp(-y)) * u
    at = m.to(tl.int64)[:, None] * out_row + n[None, :]
    mask = (m[:, None] < M) & there[None, :]
    if RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _halves(sums, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(sums, (TILE_M, 2, TILE_N // 2)), (0, 2, 1)))


@triton.jit
def _finish_pieces(
    acc, up, x_scale, w_scale, bias, residual, out, m, first, M, N, out_row,
    GATED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`_finish_tile` of columns from `first` on, at most PIECE of them at a time."""
    if TILE_N <= PIECE:
        n = first + tl.arange(0, TILE_N)
        _finish_tile(
            acc, up, x_scale, w_scale, bias, residual, out, m, n, M, N, out_row, GATED, SCALED, BIAS, RESIDUAL,
        )  # fmt: skip
    else:
        left, right = _halves(acc, TILE_M, TILE_N)
        up_left, up_right = _halves(up, TILE_M, TILE_N)
        _finish_pieces(
            left, up_left, x_scale, w_scale, bias, residual, out, m, first, M, N, out_row, GATED, SCALED, BIAS,
            RESIDUAL, TILE_M, TILE_N // 2, PIECE,
        )  # fmt: skip
        _finish_pieces(
            right, up_right, x_scale, w_scale, bias, residual, out, m, first + TILE_N // 2, M, N, out_row, GATED, SCALED,
            BIAS, RESIDUAL, TILE_M, TILE_N // 2, PIECE,
        )  # fmt: skip


@triton.jit
def _keep_partial(acc, up, partial, split, m, n, M, N, GATED: tl.constexpr):
    """Sums of one range of K: `partial [splits, 1 or 2, M, N]`."""
    parts: tl.constexpr = 2 if GATED else 1
    at = (split * parts * M + m[:, None]) * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(partial + at, acc, mask=mask)
    if GATED:
        tl.store(partial + at + M * N, up, mask=mask)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x, w, x_scale, w_scale, bias, residual, out, partial, M, N, K, x_row, w_row, out_row, k_per_split,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr, BAND: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    INTEGER: tl.constexpr, TAIL: tl.constexpr, X_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """plain, int8 and fp8. TAIL: K is no multiple of TILE_K; the last tile masks x, the padding of w is zero.

    DESCRIBED: x and w are tensor descriptors of blocks `[TILE_M, TILE_K]` and `[TILE_N, TILE_K]`, which read zeros beyond the
    tensor's end; TAIL and PARTS mean nothing then. SPECIALISED: a warp of its own copies, another multiplies.
    """
    x_row, N, K = _aligned(x_row, X_ALIGN), _aligned(N, N_ALIGN), _aligned(K, K_ALIGN)
    tile_m, tile_n = _place(M, N, TILE_M, TILE_N, BAND)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((TILE_M, TILE_N), kind)
    up = acc
    if GATED:
        up = tl.zeros((TILE_M, TILE_N), kind)
    first, last = 0, K
    if SPLIT:
        first = tl.program_id(1) * k_per_split
        last = tl.minimum(K, first + k_per_split)
    if DESCRIBED:
        row, feature = tile_m * TILE_M, tile_n * TILE_N
        for at in tl.range(first, last, TILE_K, warp_specialize=SPECIALISED):
            a = x.load([row, at])
            acc = tl.dot(a, w.load([feature, at]).T, acc, input_precision=PRECISION, out_dtype=kind)
            if GATED:
                up = tl.dot(a, w.load([N + feature, at]).T, up, input_precision=PRECISION, out_dtype=kind)
    else:
        PART: tl.constexpr = TILE_K // PARTS
        k = tl.arange(0, PART)
        x_at = x + (m.to(tl.int64) * x_row)[:, None] + k[None, :]
        w_at = w + (n.to(tl.int64) * w_row)[None, :] + k[:, None]
        up_at = w_at + N.to(tl.int64) * w_row
        rows, features = (m < M)[:, None], (n < N)[None, :]
        whole = last // TILE_K * TILE_K if TAIL else last
        for at in tl.range(first, whole, TILE_K):
            for part in tl.static_range(PARTS):
                here = at + part * PART
                a = tl.load(x_at + here, mask=rows, other=0.0)
                b = tl.load(w_at + here, mask=features, other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=kind)
                if GATED:
                    b = tl.load(up_at + here, mask=features, other=0.0)
                    up = tl.dot(a, b, up, input_precision=PRECISION, out_dtype=kind)
        if TAIL:  # noqa: SIM102 - known when compiled; the other is not
            if whole < last:
                for part in tl.static_range(PARTS):
                    here = whole + part * PART
                    a = tl.load(x_at + here, mask=rows & (here + k < K)[None, :], other=0.0)
                    there = features & (here + k < w_row)[:, None]
                    b = tl.load(w_at + here, mask=there, other=0.0)
                    acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=kind)
                    if GATED:
                        b = tl.load(up_at + here, mask=there, other=0.0)
                        up = tl.dot(a, b, up, input_precision=PRECISION, out_dtype=kind)
    if SPLIT:
        _keep_partial(acc, up, partial, tl.program_id(1), m, n, M, N, GATED)
    else:
        # Half of the columns at a time: with a residual beside them, all of them do not fit the registers. A quarter where
        # the warps that copy and multiply have registers, too.
        LARGEST: tl.constexpr = 8192 if SPECIALISED else 16384
        _finish_pieces(
            acc, up, x_scale, w_scale, bias, residual, out, m, tile_n * TILE_N, M, N, out_row, GATED, SCALED, BIAS,
            RESIDUAL, TILE_M, TILE_N, LARGEST // (2 if GATED else 1) // TILE_M,
        )  # fmt: skip


@triton.jit
def _nibbles(packed, minus_zero, ASSEMBLY: tl.constexpr):
    """Bytes `[TILE_N, group / 2]` to the bfloat16 (q - zero) of their low and high nibbles, exactly.

    `minus_zero` is -(128 + zero). Four bytes at a time: prmt puts each nibble under the high byte of 128.0.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 l, h, a, b, c, d, one;
            mov.b32 one, 0x3f803f80;
            and.b32 l, $4, 0x0f0f0f0f;
            shr.u32 h, $4, 4;
            and.b32 h, h, 0x0f0f0f0f;
            prmt.b32 a, l, 0x43434343, 0x4140;
            prmt.b32 b, l, 0x43434343, 0x4342;
            prmt.b32 c, h, 0x43434343, 0x4140;
            prmt.b32 d, h, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, a, one, $5;
            fma.rn.bf16x2 $1, b, one, $6;
            fma.rn.bf16x2 $2, c, one, $5;
            fma.rn.bf16x2 $3, d, one, $6;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [packed, minus_zero],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 15).to(minus_zero.dtype) + 128.0 + minus_zero
        high = (packed >> 4).to(minus_zero.dtype) + 128.0 + minus_zero
    return low, high


@triton.jit(do_not_specialize=["M"])
def int4_kernel(
    x, w, scales, zeros, bias, residual, out, partial, M, N, K, x_row, w_row, out_row, k_per_split,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr, X_ALIGN: tl.constexpr,
    N_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """4-bit weights. The products are W x^T, so that the weights' registers feed the tensor cores directly."""
    x_row, N, K = _aligned(x_row, X_ALIGN), _aligned(N, N_ALIGN), _aligned(K, K_ALIGN)
    HALF: tl.constexpr = GROUP // 2
    tile_m, tile_n = _place(M, N, TILE_M, TILE_N, BAND)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, HALF)
    features: tl.constexpr = 2 if GATED else 1
    x_at = x + (m.to(tl.int64) * x_row)[None, :] + k[:, None]
    rows = (m < M)[None, :]
    feature = tl.minimum(n, N - 1)  # what is read for features beyond the last is not stored
    w_at = w + (feature.to(tl.int64) * w_row)[:, None] + k[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    up = acc
    if GATED:
        up = tl.zeros((TILE_N, TILE_M), tl.float32)
    first, last = 0, K
    if SPLIT:
        first = tl.program_id(1) * k_per_split
        last = tl.minimum(K, first + k_per_split)
    for at in tl.range(first, last, GROUP):
        if TAIL:
            a = tl.load(x_at + at, mask=rows & (at + k < K)[:, None], other=0.0)
            b = tl.load(x_at + at + HALF, mask=rows & (at + HALF + k < K)[:, None], other=0.0)
        else:
            a = tl.load(x_at + at, mask=rows, other=0.0)
            b = tl.load(x_at + at + HALF, mask=rows, other=0.0)
        of_group = at // GROUP * (N * features) + feature
        byte = tl.multiple_of(at // 2, 16)  # a group is 16 bytes or more; split-K's ranges begin with one
        packed = tl.load(w_at + byte)
        zero = tl.load(zeros + of_group).to(x.dtype.element_ty)
        minus_zero = (-128.0 - zero)[:, None].to(x.dtype.element_ty)
        low, high = _nibbles(packed, minus_zero, ASSEMBLY)
        part = tl.dot(low, a, input_precision=PRECISION)
        part = tl.dot(high, b, part, input_precision=PRECISION)
        acc += part * tl.load(scales + of_group).to(tl.float32)[:, None]
        if GATED:
            packed = tl.load(w_at + N.to(tl.int64) * w_row + byte)
            zero = tl.load(zeros + of_group + N).to(x.dtype.element_ty)
            minus_zero = (-128.0 - zero)[:, None].to(x.dtype.element_ty)
            low, high = _nibbles(packed, minus_zero, ASSEMBLY)
            part = tl.dot(low, a, input_precision=PRECISION)
            part = tl.dot(high, b, part, input_precision=PRECISION)
            up += part * tl.load(scales + of_group + N).to(tl.float32)[:, None]
    acc, up = tl.trans(acc), tl.trans(up)
    if SPLIT:
        _keep_partial(acc, up, partial, tl.program_id(1), m, n, M, N, GATED)
    else:
        _finish_tile(
            acc, up, bias, bias, bias, residual, out, m, n, M, N, out_row, GATED, False, BIAS, RESIDUAL,
        )  # fmt: skip


@triton.jit
def unpack_kernel(
    w, scales, zeros, out, N, K, w_row, out_row,
    TILE_N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """4-bit weights as numbers, (q - zero) * scale in float32 and rounded once: TILE_N rows and GROUPS groups a program."""
    HALF: tl.constexpr = GROUP // 2
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    j = tl.arange(0, HALF)
    there = n < N
    kind = out.dtype.element_ty
    for g in tl.static_range(GROUPS):
        group = tl.program_id(1) * GROUPS + g
        byte = tl.multiple_of(group * HALF, 16)
        w_at = w + (n.to(tl.int64) * w_row)[:, None] + byte + j[None, :]
        packed = tl.load(w_at, mask=there[:, None], other=0)
        zero = tl.load(zeros + group * N + n, mask=there, other=0).to(kind)
        scale = tl.load(scales + group * N + n, mask=there, other=0.0).to(tl.float32)[:, None]
        low, high = _nibbles(packed, (-128.0 - zero)[:, None].to(kind), ASSEMBLY)
        k = tl.multiple_of(group * GROUP, 32) + j
        at = out + (n.to(tl.int64) * out_row)[:, None] + k[None, :]
        low = tl.where((k < K)[None, :], low.to(tl.float32) * scale, 0.0)
        high = tl.where((k + HALF < K)[None, :], high.to(tl.float32) * scale, 0.0)
        tl.store(at, low.to(kind), mask=there[:, None])
        tl.store(at + HALF, high.to(kind), mask=there[:, None])


@triton.jit(do_not_specialize=["M", "splits"])
def finish_kernel(
    partial, x_scale, w_scale, bias, residual, out, M, N, out_row, splits, TILE_N: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Add the ranges of K in order and finish: one row and TILE_N features a program."""
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    parts: tl.constexpr = 2 if GATED else 1
    acc = tl.zeros((1, TILE_N), partial.dtype.element_ty)
    up = tl.zeros((1, TILE_N), partial.dtype.element_ty)
    there = (n < N)[None, :]
    for split in range(splits):
        at = partial + (split * parts * M + m[:, None]) * N + n[None, :]
        acc += tl.load(at, mask=there, other=0)
        if GATED:
            up += tl.load(at + M * N, mask=there, other=0)
    _finish_tile(
        acc, up, x_scale, w_scale, bias, residual, out, m, n, M, N, out_row, GATED, SCALED, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def quantize_kernel(x, out, scale, K, x_row, out_row, LARGEST: tl.constexpr, TILE: tl.constexpr):
    """One row of x: out = x / scale in int8 or float8, scale = max |x| / LARGEST."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((TILE,), tl.float32)
    for k in range(0, K, TILE):
        at = k + tl.arange(0, TILE)
        largest = tl.maximum(
            largest, tl.abs(tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32))
        )
    step = tl.maximum(tl.max(largest, 0) / LARGEST, 1e-30)
    tl.store(scale + row, step)
    for k in range(0, out_row, TILE):
        at = k + tl.arange(0, TILE)
        y = tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32) / step
        tl.store(out + row * out_row + at, to_codes(y, out), mask=at < out_row)


def _pad_columns(weight: Tensor, columns: int) -> Tensor:
    """Copy with zeros up to `columns`."""
    padded = weight.new_zeros(weight.shape[0], columns)
    padded[:, : weight.shape[1]] = weight
    return padded


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack_plain(weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> PackedLinear:
    """`weight [N, K]` in the compute dtype; gated: the rows of the gate, then those of the up projection."""
    n, k = weight.shape
    rows = n // 2 if gated else n
    padded = _pad_columns(weight, _round_up(k, _ALIGN))
    return PackedLinear(padded, bias, rows, k, gated=gated)


def pack_scaled(
    q: Tensor, scales: Tensor, bias: Tensor | None = None, *, gated: bool = False
) -> PackedLinear:
    """`q [N, K]` int8 or float8_e4m3fn with `scales [N]` float32: W = q * scales."""
    n, k = q.shape
    scheme = "int8" if q.dtype == torch.int8 else "fp8"
    padded, rows = _pad_columns(q, _round_up(k, _ALIGN)), n // 2 if gated else n
    return PackedLinear(padded, bias, rows, k, scheme, scales, gated=gated)


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None, *, gated: bool = False
) -> PackedLinear:
    """`q [N, K]` uint8 in 0..15, `scales` and `zeros [N, ceil(K / group)]`: W = (q - zeros) * scales, group by group."""
    n, k = q.shape
    group = 1 << max(5, (-(-k // scales.shape[1]) - 1).bit_length())
    columns = _round_up(k, max(_ALIGN, group))
    groups = _pad_columns(q, columns).view(n, columns // group, 2, group // 2)
    weight = (groups[:, :, 0] | groups[:, :, 1] << 4).reshape(n, columns // 2).contiguous()
    count = columns // group
    scales = _pad_columns(scales, count).T.contiguous()
    zeros = _pad_columns(zeros.to(torch.uint8), count).T.contiguous()
    return PackedLinear(weight, bias, n // 2 if gated else n, k, "int4", scales, zeros, group, gated)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of `x [M, K]` as int8 or float8_e4m3fn `[M, Kp]`, zero from K on, and their float32 scales `[M]`."""
    m, k = x.shape
    out = torch.empty(m, _round_up(k, _ALIGN), dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        quantize_kernel[(m,)](
            x, out, scale, k, x.stride(0), out.stride(0), LARGEST=largest_code(dtype), TILE=1024, num_warps=4
        )
    return out, scale


def unpack_int4(packed: PackedLinear, dtype: torch.dtype) -> PackedLinear:
    """A weight of `pack_int4` as one of `pack_plain` in `dtype`, new memory of 4 times the size. What `int4_kernel` keeps exact,
    scaling sums in float32, is rounded here."""
    weight, scales, zeros = packed.weight, packed.scales, packed.zeros
    if packed.scheme != "int4" or scales is None or zeros is None:
        raise ValueError(f"packed should be an int4 weight, and is {packed.scheme}")
    n, columns = len(weight), 2 * weight.shape[1]
    out = torch.empty(n, columns, dtype=dtype, device=weight.device)
    groups = max(1, _ALIGN // packed.group)
    grid = triton.cdiv(n, 32), columns // (groups * packed.group)
    unpack_kernel[grid](
        weight, scales, zeros, out, n, packed.in_features, weight.stride(0), out.stride(0), TILE_N=32,
        GROUP=packed.group, GROUPS=groups, ASSEMBLY=_has_assembly(out), num_warps=4,
    )  # fmt: skip
    return replace(packed, weight=out, scheme="plain", scales=None, zeros=None, group=0)


def _has_assembly(x: Tensor) -> bool:
    """Whether `_nibbles` is four instructions of PTX for this dtype and device."""
    return x.dtype == torch.bfloat16 and configs.card_of(x.device).arch != configs.AMD


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read the rows of x: they begin at multiples of 16 bytes, and do not overlap."""
    row = x.stride(0)
    return (
        x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0 and row >= x.shape[1] and x.stride(1) == 1
    )


def _blocks(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x for a kernel that reads blocks of it. The descriptor holds x's address and sizes and is an argument passed by value: a
    CUDA graph keeps it as it keeps any other, and replays it on the memory that the graph was recorded with."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def linear(
    x: Tensor,
    weight: PackedLinear,
    *,
    tile: MatmulTile,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    in_place: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`x [M, K]` times the weight, plus bias: `[M, N]`; gated: silu(gate) * up. `residual [M, N]`, dense, is added; with
    `in_place` the sum takes its place. `norm`: x goes through an RMSNorm first, which quantises its rows where the weight is int8
    or fp8."""
    m, n, k = x.shape[0], weight.out_features, weight.in_features
    if residual is not None and in_place:
        out = residual
    else:
        # The next product reads the rows of a gated one 16 bytes at a time.
        row = _round_up(n, 16) if weight.gated and residual is None else n
        out = torch.empty(m, row, dtype=out_dtype or x.dtype, device=x.device)[:, :n]
    if not out.numel():
        return out
    scaled = weight.scheme in ("int8", "fp8")
    x_scale = w_scale = weight.scales if scaled else out
    if scaled:
        kind = weight.weight.dtype
        x, x_scale = quantize(x, kind) if norm is None else rms_norm_quantized(x, *norm, kind)
        k = x.shape[1]
    elif norm is not None:
        x = rms_norm(x, *norm)
    step, warps = tile.inputs, tile.warps
    if weight.scheme == "int4":
        step = weight.group
        # A step is one group. Of one of 64 there are 16 bytes for each thread of fewer warps; of one of 32, 8.
        warps = min(warps, max(1, tile.features * max(weight.group, 64) // 1024))
    splits, per_split = 1, 0
    if tile.splits > 1:
        per_split = _round_up(-(-k // tile.splits), step)
        splits = -(-k // per_split)
    split = splits > 1
    partial = out
    if split:
        kind = torch.int32 if weight.scheme == "int8" else torch.float32
        partial = torch.empty(splits, 1 + weight.gated, m, n, dtype=kind, device=x.device)
    bias, added = weight.bias is not None, residual is not None
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.features), splits)
    common = dict(
        TILE_M=tile.rows, TILE_N=tile.features, BAND=8, GATED=weight.gated, BIAS=bias, RESIDUAL=added, SPLIT=split,
        TAIL=k % step != 0, X_ALIGN=math.gcd(x.stride(0), 16), N_ALIGN=math.gcd(n, 16), K_ALIGN=math.gcd(k, 16),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=tile.stages,
    )  # fmt: skip
    bias_at, residual_at = weight.bias if bias else out, residual if added else out
    if weight.scheme == "int4":
        int4_kernel[grid](
            x, weight.weight, weight.scales, weight.zeros, bias_at, residual_at, out, partial, m, n, k, x.stride(0),
            weight.weight.stride(0), out.stride(0), per_split, GROUP=weight.group,
            ASSEMBLY=_has_assembly(x), **common,
        )  # fmt: skip
    else:
        described = tile.loads != "pointers" and _describable(x) and _describable(weight.weight)
        matmul_kernel[grid](
            *(_blocks(x, tile.rows, tile.inputs), _blocks(weight.weight, tile.features, tile.inputs)) if described
            else (x, weight.weight), x_scale, w_scale, bias_at, residual_at, out, partial, m, n, k, x.stride(0),
            weight.weight.stride(0), out.stride(0), per_split, TILE_K=tile.inputs, PARTS=tile.parts, SCALED=scaled,
            INTEGER=weight.scheme == "int8", DESCRIBED=described, SPECIALISED=described and tile.loads == "specialised",
            **common,
        )  # fmt: skip
    if split:
        finish_kernel[(m, triton.cdiv(n, 256))](
            partial, x_scale, w_scale, bias_at, residual_at, out, m, n, out.stride(0), splits,
            TILE_N=256, GATED=weight.gated, SCALED=scaled, BIAS=bias, RESIDUAL=added,
        )  # fmt: skip
    return out
