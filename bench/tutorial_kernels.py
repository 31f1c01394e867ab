"""A matrix product and a fused attention in plain textbook Triton, to hold the project's kernels against.

They follow the shape of the two tutorials that come with Triton's documentation, written anew: no packing, no ragged batch, no
paged cache, no quantisation; sizes are taken to be multiples of the tiles but where a mask costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tutorial_matmul(
    a, b, c, M, N, K, a_row, b_row, c_row,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """c = a b; a `[M, K]`, b `[K, N]` with its columns in runs (a transposed weight), c `[M, N]`."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band = program // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + program % height
    tile_n = program % (BAND * tiles_n) // height
    m = (tile_m * TILE_M + tl.arange(0, TILE_M)) % M
    n = (tile_n * TILE_N + tl.arange(0, TILE_N)) % N
    k = tl.arange(0, TILE_K)
    a_at = a + m[:, None] * a_row + k[None, :]
    b_at = b + n[None, :] * b_row + k[:, None]
    kind: tl.constexpr = tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((TILE_M, TILE_N), kind)
    for step in range(0, tl.cdiv(K, TILE_K)):
        left = K - step * TILE_K
        x = tl.load(a_at, mask=k[None, :] < left, other=0.0)
        y = tl.load(b_at, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(x, y, acc, out_dtype=kind)
        a_at += TILE_K
        b_at += TILE_K
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c + m[:, None] * c_row + n[None, :], acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _keys(
    acc, total, highest, q, k_at, v_at, row, first, last, scale, D: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, TILE_N)
    for start in tl.range(first, last, TILE_N):
        keys = tl.load(k_at + start * D)
        score = tl.dot(q, keys)
        if MASKED:
            score = tl.where(row[:, None] >= start + n[None, :], score, -1.0e6)
        larger = tl.maximum(highest, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - larger[:, None])
        rescale = tl.exp2(highest - larger)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        values = tl.load(v_at + start * D)
        acc = tl.dot(weight.to(q.dtype), values, acc)
        highest = larger
    return acc, total, highest


@triton.jit
def tutorial_attention(
    q, k, v, out, scale, length,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Causal or full attention of `[heads, length, D]`, dense; `scale` includes log2(e)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    base = head.to(tl.int64) * length * D
    row = tile * TILE_M + tl.arange(0, TILE_M)
    n, d = tl.arange(0, TILE_N), tl.arange(0, D)
    query = tl.load(q + base + row[:, None] * D + d[None, :])
    k_at = k + base + n[None, :] * D + d[:, None]
    v_at = v + base + n[:, None] * D + d[None, :]
    acc = tl.zeros((TILE_M, D), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32) + 1.0
    highest = tl.zeros((TILE_M,), tl.float32) - float("inf")
    before = length
    if CAUSAL:
        before = tile * TILE_M
    acc, total, highest = _keys(
        acc, total, highest, query, k_at, v_at, row, 0, before, scale, D, TILE_M, TILE_N, False
    )
    if CAUSAL:
        acc, total, highest = _keys(
            acc, total, highest, query, k_at, v_at, row, before, before + TILE_M, scale, D, TILE_M, TILE_N, True
        )  # fmt: skip
    acc = acc / total[:, None]
    tl.store(out + base + row[:, None] * D + d[None, :], acc.to(out.dtype.element_ty))


def matmul(x: Tensor, weight: Tensor, *, tile: tuple[int, int, int], warps: int, stages: int) -> Tensor:
    """`x [M, K]` times `weight [N, K]`, transposed, in bfloat16."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    tutorial_matmul[(triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]),)](
        x, weight, out, m, n, k, x.stride(0), weight.stride(0), out.stride(0), TILE_M=tile[0], TILE_N=tile[1],
        TILE_K=tile[2], BAND=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, tile: tuple[int, int], warps: int, stages: int
) -> Tensor:
    """Attention of `[heads, length, D]`."""
    heads, length, d = q.shape
    out = torch.empty_like(q)
    tutorial_attention[(triton.cdiv(length, tile[0]), heads)](
        q, k, v, out, d**-0.5 * 1.4426950408889634, length, D=d, TILE_M=tile[0], TILE_N=tile[1], CAUSAL=causal,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
