"""Softmax attention in Triton: ragged over the paged KV cache, and over packed segments for the vision tower.

The contracts are those of `pagemill.kernels.attention`, but for the cache: keys lie like values, `[num_blocks, Hk,
block_size, D]`, so that a block of one head is one run of memory with head_dim innermost, as the tensor cores' loads
want it. Keys and values may be int8 or float8_e4m3fn, with a float32 scale a token and kv head `[num_blocks, Hk, block_size]`
that its key's scores and its value's weight are multiplied by. Online softmax (Milakov & Gimelshein, 2018) over tiles
(FlashAttention-2: Dao, 2023), exponentials to base 2, everything but the products' inputs in float32.

Paged: a program takes `tokens` query tokens of one sequence and one kv head, with the query heads of its group as
rows of the same tile (Ainslie et al., 2023), so that decoding fills the tensor cores' 16 rows and reads every key
once; a group that is no power of two (7 of the 7B) has rows of no head beside it. The grid is known without looking at the
lengths: sequence s begins at tile `query_start[s] // tokens + s`.
Split-KV (Flash-Decoding: Dao et al., 2023): the third grid axis cuts each sequence's own keys into as many ranges, whose partial
results `merge_kernel` joins by their log-sum-exp. The number of ranges is the launch's, their size is found on the device.

Packed: head_dim 80, which is no power of two, is computed as 64 + 16 columns; padding it to 128 would waste more than
a third of the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagemill.kernels.check import expect
from pagemill.kernels.gpu.configs import AttentionTile

__all__ = ["paged_attention", "varlen_attention"]

_LOG2E = 1.4426950408889634


@triton.jit
def _find(starts, num: tl.int32, tile: tl.int32, TOKENS: tl.constexpr):
    """The last sequence s with `starts[s] // TOKENS + s <= tile`."""
    low, high = 0, num
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts + middle) // TOKENS + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle)
    return low


@triton.jit
def _soften(score, scale, maximum, total, MASKED: tl.constexpr):
    """One tile of scores to weights; returns them, the new maximum (scaled, base 2) and sum, and the old ones' factor."""
    highest = tl.maximum(maximum, tl.max(score, 1) * scale)
    # A row that has seen no key yet has -inf - -inf.
    shift = tl.where(highest == -float("inf"), 0.0, highest) if MASKED else highest
    weight = tl.exp2(score * scale - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    return weight, highest, total * rescale + tl.sum(weight, 1), rescale


@triton.jit
def _place(n, lane, BLOCK: tl.constexpr, TILE_N: tl.constexpr):
    """Of keys `n + lane`: the column of the block table, and the token in the block; n is a multiple of TILE_N."""
    if TILE_N % BLOCK == 0:  # the tokens do not change from tile to tile
        column, token = n // BLOCK + lane // BLOCK, lane % BLOCK
    else:
        column, token = (n + lane) // BLOCK, (n + lane) % BLOCK
    return column, token


@triton.jit
def _paged_tiles(
    q, acc, maximum, total, k_cache, v_cache, k_scale, v_scale, table, head, visible, first, last, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE_N: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `first` up to `last` of one sequence, for one tile of rows that see `visible` keys each."""
    d = tl.arange(0, D)
    lane = tl.arange(0, TILE_N)
    # The next tile's blocks are looked up here, not by the copies that need them: Triton would give each of the two its own
    # stage of the pipeline, and with three no tile of keys would be on its way while another is computed.
    column, _ = _place(first, lane, BLOCK, TILE_N)
    block = tl.load(table + column, mask=first + lane < last, other=0)
    for n in tl.range(first, last, TILE_N):
        key = n + lane
        inside = (key < last) if MASKED else (key == key)
        _, token = _place(n, lane, BLOCK, TILE_N)
        place = head * BLOCK + token
        row = block.to(tl.int64) * (KV_HEADS * BLOCK)
        at = row[:, None] * D
        k_at = k_cache + (place[:, None] * D + d[None, :])
        v_at = v_cache + (place[:, None] * D + d[None, :])
        k = tl.load(k_at + at, mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SCALED:
            score *= tl.load(k_scale + row + place, mask=inside, other=0.0)[None, :]
        if MASKED:
            score = tl.where(key[None, :] < visible[:, None], score, -float("inf"))
        weight, maximum, total, rescale = _soften(score, scale, maximum, total, MASKED)
        if SCALED:
            weight *= tl.load(v_scale + row + place, mask=inside, other=0.0)[None, :]
        v = tl.load(v_at + at, mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
        column, _ = _place(n + TILE_N, lane, BLOCK, TILE_N)
        block = tl.load(table + column, mask=key + TILE_N < last, other=0)
    return acc, maximum, total


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_row"])
def paged_kernel(
    q, k_cache, v_cache, k_scale, v_scale, out, partial, partial_lse, block_tables, query_start, context_lens,
    scale, num_seqs, num_tokens, q_token, q_head, out_token, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `paged_attention`. `scale` includes log2(e); a token has PADDED rows of a tile, the first GROUP of them with a head."""
    TOKENS: tl.constexpr = TILE_M // PADDED
    tile, head = tl.program_id(0), tl.program_id(1)
    seq = _find(query_start, num_seqs, tile, TOKENS)
    begin = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - begin
    first_token = (tile - begin // TOKENS - seq) * TOKENS
    if first_token >= count:
        return
    context = tl.load(context_lens + seq)
    # Rows of the tile in 32 bits beside one address of the tile: they stay in registers to the end.
    row = tl.arange(0, TILE_M)
    token, member = row // PADDED, row % PADDED
    mine = token < tl.minimum(count - first_token, TOKENS)
    if PADDED > GROUP:
        mine &= member < GROUP
    d = tl.arange(0, D)
    q += (begin + first_token).to(tl.int64) * q_token + head * GROUP * q_head
    tile_q = tl.load(
        q + (token * q_token + member * q_head)[:, None] + d[None, :], mask=mine[:, None], other=0.0
    )
    # Row r sees the context up to its own token; rows of no token see what the first one does, and are not stored.
    visible = context - count + first_token + 1 + tl.where(mine, token, 0)
    seen_by_all = context - count + first_token + 1
    last = tl.minimum(context, seen_by_all + TOKENS - 1)
    first = 0
    if SPLIT:
        keys_per_split = tl.cdiv(tl.cdiv(context, tl.num_programs(2)), TILE_N) * TILE_N
        first = tl.program_id(2) * keys_per_split
        last = tl.minimum(last, first + keys_per_split)
    full = tl.maximum(first, tl.minimum(last, seen_by_all) // TILE_N * TILE_N)

    acc = tl.zeros((TILE_M, D), tl.float32)
    maximum = tl.full((TILE_M,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    table = block_tables + seq.to(tl.int64) * table_row
    acc, maximum, total = _paged_tiles(
        tile_q, acc, maximum, total, k_cache, v_cache, k_scale, v_scale, table, head, visible, first, full,
        scale, KV_HEADS, D, BLOCK, TILE_N, SCALED, False, PRECISION,
    )  # fmt: skip
    acc, maximum, total = _paged_tiles(
        tile_q, acc, maximum, total, k_cache, v_cache, k_scale, v_scale, table, head, visible, full, last,
        scale, KV_HEADS, D, BLOCK, TILE_N, SCALED, True, PRECISION,
    )  # fmt: skip

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        heads: tl.constexpr = KV_HEADS * GROUP
        at = (tl.program_id(2) * num_tokens + begin + first_token).to(tl.int64) * heads + head * GROUP
        at = at + token * heads + member
        tl.store(partial + at[:, None] * D + d[None, :], acc, mask=mine[:, None])
        # -inf where the range holds no visible key
        tl.store(partial_lse + at, maximum + tl.log2(total), mask=mine)
    else:
        out += (begin + first_token).to(tl.int64) * out_token + head * GROUP * D
        at = token * out_token + member * D
        tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_kernel(
    partial, partial_lse, out, num_rows, num_splits, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the ranges of one (token, head) row by their log-sum-exp, in base 2; SPLITS >= num_splits, a power of two."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    there = split < num_splits
    lse = tl.load(partial_lse + split * num_rows + row, mask=there, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight /= tl.sum(weight, 0)
    at = (split * num_rows + row) * D
    part = tl.load(partial + at[:, None] + d[None, :], mask=there[:, None], other=0.0)
    tl.store(out + row * D + d, tl.sum(part * weight[:, None], 0).to(out.dtype.element_ty))


@triton.jit
def _packed_tiles(
    q_main, q_tail, acc_main, acc_tail, maximum, total, k, v, k_row, v_row, first, last, end, scale,
    MAIN: tl.constexpr, TAIL: tl.constexpr, TILE_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at rows `first` up to `last` (masked: only those before `end` are there)."""
    lane = tl.arange(0, TILE_N)
    d = tl.arange(0, MAIN)
    # Addresses of a tile are one number for all its threads beside what stays the same.
    k_at = k + (lane[:, None] * k_row + d[None, :])
    v_at = v + (lane[:, None] * v_row + d[None, :])
    if TAIL > 0:
        t = MAIN + tl.arange(0, TAIL)
        k_tail_at = k + (lane[:, None] * k_row + t[None, :])
        v_tail_at = v + (lane[:, None] * v_row + t[None, :])
    for n in tl.range(first, last, TILE_N):
        key = n + lane
        inside = (key < end) if MASKED else (key == key)
        n_wide = tl.full((), n, tl.int64)
        k_from, v_from = n_wide * k_row, n_wide * v_row
        keys = tl.load(k_at + k_from, mask=inside[:, None], other=0.0)
        score = tl.dot(q_main, tl.trans(keys), input_precision=PRECISION)
        if TAIL > 0:
            keys = tl.load(k_tail_at + k_from, mask=inside[:, None], other=0.0)
            score = tl.dot(q_tail, tl.trans(keys), score, input_precision=PRECISION)
        if MASKED:
            score = tl.where(inside[None, :], score, -float("inf"))
        weight, maximum, total, rescale = _soften(score, scale, maximum, total, MASKED)
        weight = weight.to(q_main.dtype)
        values = tl.load(v_at + v_from, mask=inside[:, None], other=0.0)
        acc_main = tl.dot(weight, values, acc_main * rescale[:, None], input_precision=PRECISION)
        if TAIL > 0:
            values = tl.load(v_tail_at + v_from, mask=inside[:, None], other=0.0)
            acc_tail = tl.dot(weight, values, acc_tail * rescale[:, None], input_precision=PRECISION)
    return acc_main, acc_tail, maximum, total


@triton.jit(do_not_specialize=["num_segments"])
def varlen_kernel(
    q, k, v, out, cu_seqlens, scale, num_segments, q_row, q_head, k_row, k_head, v_row, v_head, out_row,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See `varlen_attention`. `scale` includes log2(e); D = MAIN + TAIL, powers of two, or MAIN alone."""
    tile, head = tl.program_id(0), tl.program_id(1)
    segment = _find(cu_seqlens, num_segments, tile, TILE_M)
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    first_row = begin + (tile - begin // TILE_M - segment) * TILE_M
    if first_row >= end:
        return
    row = (first_row + tl.arange(0, TILE_M)).to(tl.int64)
    mine = row < end
    d = tl.arange(0, MAIN)
    at = q + row * q_row + head * q_head
    q_main = tl.load(at[:, None] + d[None, :], mask=mine[:, None], other=0.0)
    q_tail = q_main
    acc_main = tl.zeros((TILE_M, MAIN), tl.float32)
    acc_tail = acc_main
    if TAIL > 0:
        t = MAIN + tl.arange(0, TAIL)
        q_tail = tl.load(at[:, None] + t[None, :], mask=mine[:, None], other=0.0)
        acc_tail = tl.zeros((TILE_M, TAIL), tl.float32)
    maximum = tl.full((TILE_M,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    full = begin + (end - begin) // TILE_N * TILE_N
    acc_main, acc_tail, maximum, total = _packed_tiles(
        q_main, q_tail, acc_main, acc_tail, maximum, total, k + head * k_head, v + head * v_head, k_row, v_row,
        begin, full, end, scale, MAIN, TAIL, TILE_N, False, PRECISION,
    )  # fmt: skip
    acc_main, acc_tail, maximum, total = _packed_tiles(
        q_main, q_tail, acc_main, acc_tail, maximum, total, k + head * k_head, v + head * v_head, k_row, v_row,
        full, end, end, scale, MAIN, TAIL, TILE_N, True, PRECISION,
    )  # fmt: skip
    at = out + row * out_row + head * D
    tl.store(
        at[:, None] + d[None, :], (acc_main / total[:, None]).to(out.dtype.element_ty), mask=mine[:, None]
    )
    if TAIL > 0:
        t = MAIN + tl.arange(0, TAIL)
        tail = (acc_tail / total[:, None]).to(out.dtype.element_ty)
        tl.store(at[:, None] + t[None, :], tail, mask=mine[:, None])


def _precision(dtype: torch.dtype) -> str:
    """Float32 is not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tile: AttentionTile,
    num_splits: int = 1,
) -> Tensor:
    """`pagemill.kernels.attention.paged_attention_reference` for head_dim 16, 32, 64, 128 or 256; lengths are not checked.

    `num_splits` > 1 cuts every context into at most so many ranges of equal size: for batches too small to fill the GPU
    (`configs.splits_for`). ValueError where `scale` is not above zero: a tile's largest score is found before it is scaled.
    """
    expect(scale > 0, "scale", "a number above 0", scale)
    tokens, heads, d = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequences = context_lens.shape[0]
    if not out.numel():
        return out
    padded = triton.next_power_of_2(group)  # of 7, row // 7 and row % 7 would be kept in registers to the end
    per_tile = tile.rows // padded
    partial = lse = out
    num_splits = min(num_splits, max(1, triton.cdiv(block_tables.shape[1] * block_size, tile.keys)))
    if num_splits > 1:
        partial = torch.empty(num_splits, tokens, heads, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_splits, tokens, heads, dtype=torch.float32, device=q.device)
    split = num_splits > 1
    paged_kernel[(tokens // per_tile + sequences, kv_heads, num_splits)](
        q, k_cache, v_cache, k_scale if k_scale is not None else out, v_scale if v_scale is not None else out,
        out, partial, lse, block_tables, query_start, context_lens,
        scale * _LOG2E, sequences, tokens, q.stride(0), q.stride(1), out.stride(0), block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, PADDED=padded, D=d, BLOCK=block_size, TILE_M=tile.rows, TILE_N=tile.keys,
        SPLIT=split, SCALED=k_scale is not None, PRECISION=_precision(q.dtype), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if split:
        rows = tokens * heads
        merge_kernel[(rows,)](
            partial, lse, out, rows, num_splits, D=d, SPLITS=triton.next_power_of_2(num_splits)
        )
    return out


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, *, tile: AttentionTile
) -> Tensor:
    """`pagemill.kernels.attention.varlen_attention_reference` for a head_dim that is a sum of at most two powers of two >= 16.

    ValueError where `scale` is not above zero.
    """
    expect(scale > 0, "scale", "a number above 0", scale)
    rows, heads, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    segments = cu_seqlens.shape[0] - 1
    if not out.numel():
        return out
    main = 1 << (d.bit_length() - 1)
    varlen_kernel[(rows // tile.rows + segments, heads)](
        q, k, v, out, cu_seqlens, scale * _LOG2E, segments,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0),
        D=d, MAIN=main, TAIL=d - main, TILE_M=tile.rows, TILE_N=tile.keys, PRECISION=_precision(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
