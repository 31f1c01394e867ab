import pytest
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels import Kernels
from tests.attend import attend
from tests.kernels.conftest import Cache, assert_close, fill_int8, quantised, starts


def _batch(
    contexts: list[int], counts: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    q = torch.randn(sum(counts), heads, head_dim, dtype=dtype)
    keys = [torch.randn(n, kv_heads, head_dim, dtype=dtype) for n in contexts]
    values = [torch.randn(n, kv_heads, head_dim, dtype=dtype) for n in contexts]
    return q, keys, values


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [
        (8, 1, 80, 32),
        (2, 2, 64, 16),
        (7, 1, 128, 1),
        (4, 2, 24, 3),
        (1, 1, 256, 128),
        (4, 2, 64, 32),
        (2, 1, 128, 64),
    ],
)
def test_paged_matches_float64(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    contexts = [1, 5, 64, 65, 96, 130, 200, 17, 33]
    counts = [1, 5, 1, 65, 2, 13, 150, 0, 1]
    q, keys, values = _batch(contexts, counts, heads, kv_heads, head_dim, dtype)
    cache, at = Cache.fill(keys, values, block_size), starts(counts)
    scale = head_dim**-0.5
    found = kernels.paged_attention(q, cache.k, cache.v, cache.tables, at, cache.lens, scale)
    assert found.dtype == dtype
    rows = q.split(counts)
    wanted = [attend(*args, scale, True) for args in zip(rows, keys, values, strict=True)]
    assert_close(found, torch.cat(wanted), size=5, roundings=3)


def test_paged_takes_a_view_of_qkv_and_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    qkv, keys, values = _batch([40], [3], 6, 2, 16, dtype)
    cache = Cache.fill(keys, values, 16)
    q = qkv[:, :4]
    found = kernels.paged_attention(q, cache.k, cache.v, cache.tables, starts([3]), cache.lens, 0.25)
    assert_close(found, attend(q, keys[0], values[0], 0.25, True), size=5, roundings=3)
    nothing = kernels.paged_attention(q[:0], cache.k, cache.v, cache.tables, starts([0]), cache.lens, 0.25)
    assert nothing.shape == (0, 4, 16)


def test_paged_large_scores_do_not_overflow(kernels: Kernels, dtype: torch.dtype) -> None:
    q, keys, values = _batch([150], [20], 2, 1, 32, dtype)
    q *= 100
    cache = Cache.fill(keys, values, 32)
    found = kernels.paged_attention(q, cache.k, cache.v, cache.tables, starts([20]), cache.lens, 1.0)
    wanted = attend(q, keys[0], values[0], 1.0, True)
    assert found.isfinite().all()
    # Scores of ~500 carry an absolute error of ~1e-4, and the reference rounds what it accumulates.
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=5e-3)


def test_paged_rows_do_not_depend_on_batch_chunks_blocks_nor_threads(
    native: Kernels, dtype: torch.dtype
) -> None:
    contexts, heads, kv_heads, head_dim = [200, 64, 131], 4, 2, 40
    q, keys, values = _batch(contexts, contexts, heads, kv_heads, head_dim, dtype)
    cache, at = Cache.fill(keys, values, 32), starts(contexts)
    whole = native.paged_attention(q, cache.k, cache.v, cache.tables, at, cache.lens, 0.2)
    rows, wanted = q.split(contexts), whole.split(contexts)

    for block_size in (1, 3, 16, 64, 100):
        other = Cache.fill(keys, values, block_size, seed=block_size)
        again = native.paged_attention(q, other.k, other.v, other.tables, at, other.lens, 0.2)
        assert torch.equal(again, whole), block_size
    for threads in (1, 3):
        _native.set_num_threads(threads)
        assert torch.equal(
            native.paged_attention(q, cache.k, cache.v, cache.tables, at, cache.lens, 0.2), whole
        )
    for s, context in enumerate(contexts):
        for chunk in (1, 7, 64):
            pieces = []
            for end in [*range(chunk, context, chunk), context]:
                begin = (end - 1) // chunk * chunk
                lens = torch.tensor([end], dtype=torch.int32)
                piece = rows[s][begin:end]
                table = cache.tables[s : s + 1]
                pieces.append(
                    native.paged_attention(piece, cache.k, cache.v, table, starts([len(piece)]), lens, 0.2)
                )
            assert torch.equal(torch.cat(pieces), wanted[s]), (s, chunk)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [(8, 1, 128, 16), (7, 1, 80, 24)])
def test_paged_over_ranges_of_keys_matches_float64(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    contexts, counts = [1024, 1025, 2051, 3], [1, 1, 4, 0]
    q, keys, values = _batch(contexts, counts, heads, kv_heads, head_dim, dtype)
    keys[2][:1024] *= 3  # each range has a maximum of its own
    cache, scale = Cache.fill(keys, values, block_size), head_dim**-0.5
    found = kernels.paged_attention(q, cache.k, cache.v, cache.tables, starts(counts), cache.lens, scale)
    wanted = [attend(*args, scale, True) for args in zip(q.split(counts), keys, values, strict=True)]
    assert_close(found, torch.cat(wanted), size=5, roundings=3)


def test_paged_rows_do_not_depend_on_how_ranges_are_shared_out(native: Kernels, dtype: torch.dtype) -> None:
    """Alone, a sequence's ranges are joined from parts; in company, its rows see them one after another."""
    contexts, counts = [2100, 1030, *([40] * 20)], [5, 12, *([1] * 20)]
    q, keys, values = _batch(contexts, counts, 4, 2, 64, dtype)
    cache = Cache.fill(keys, values, 16)
    _native.set_num_threads(1)
    whole = native.paged_attention(q, cache.k, cache.v, cache.tables, starts(counts), cache.lens, 0.2)
    for threads in (1, 3):
        _native.set_num_threads(threads)
        for s in (0, 1):
            rows = slice(sum(counts[:s]), sum(counts[: s + 1]))
            lens, tables = cache.lens[s : s + 1], cache.tables[s : s + 1]
            alone = native.paged_attention(q[rows], cache.k, cache.v, tables, starts([counts[s]]), lens, 0.2)
            assert torch.equal(alone, whole[rows]), (threads, s)
            last = q[rows][-1:]
            alone = native.paged_attention(last, cache.k, cache.v, tables, starts([1]), lens, 0.2)
            assert torch.equal(alone, whole[rows][-1:]), (threads, s)


def _restored(x: Tensor) -> Tensor:
    codes, scale = quantised(x)
    return codes.double() * scale.double()[..., None]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(8, 1, 128, 16), (7, 1, 80, 24), (4, 2, 64, 64), (2, 2, 24, 1), (4, 2, 64, 16)],
)
def test_paged_int8_matches_float64(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    contexts, counts = [1, 64, 65, 130, 200, 17, 1040, 33], [1, 1, 65, 13, 150, 0, 4, 1]
    q, keys, values = _batch(contexts, counts, heads, kv_heads, head_dim, dtype)
    values[3] *= torch.logspace(-2, 1, 130)[:, None, None].to(dtype)  # every token has a scale of its own
    keys[3] *= torch.logspace(-2, 0.3, 130)[:, None, None].to(dtype)
    cache, at = fill_int8(keys, values, block_size), starts(counts)
    scale = head_dim**-0.5
    args = q, cache.k, cache.v, cache.tables, at, cache.lens, scale, cache.k_scale, cache.v_scale
    found = kernels.paged_attention(*args)
    rows = zip(q.split(counts), keys, values, strict=True)
    wanted = [attend(r, _restored(k), _restored(v), scale, True) for r, k, v in rows]
    assert found.dtype == dtype
    assert_close(found, torch.cat(wanted), size=8, roundings=3)


def test_paged_int8_rows_do_not_depend_on_batch_chunks_blocks_nor_threads(
    native: Kernels, dtype: torch.dtype
) -> None:
    contexts, heads, kv_heads, head_dim = [200, 1100], 4, 2, 64
    counts = [200, 40]
    q, keys, values = _batch(contexts, counts, heads, kv_heads, head_dim, dtype)

    def attend(cache: Cache, q: Tensor, sequences: slice, counts: list[int], lens: Tensor) -> Tensor:
        table = cache.tables[sequences]
        scales = cache.k_scale, cache.v_scale
        return native.paged_attention(q, cache.k, cache.v, table, starts(counts), lens, 0.2, *scales)

    cache = fill_int8(keys, values, 16)
    whole = attend(cache, q, slice(None), counts, cache.lens)
    for block_size in (1, 24, 64):
        other = fill_int8(keys, values, block_size)
        assert torch.equal(attend(other, q, slice(None), counts, other.lens), whole), block_size
    _native.set_num_threads(3)
    for s, chunk in ((0, 7), (1, 1), (1, 8)):
        rows, context = q.split(counts)[s], contexts[s]
        pieces = []
        for begin in range(context - counts[s], context, chunk):
            end = min(begin + chunk, context)
            piece = rows[begin - context + counts[s] :][: end - begin]
            lens = torch.tensor([end], dtype=torch.int32)
            pieces.append(attend(cache, piece, slice(s, s + 1), [len(piece)], lens))
        assert torch.equal(torch.cat(pieces), whole.split(counts)[s]), (s, chunk)


@pytest.mark.parametrize("head_dim", [80, 64, 17])
def test_varlen_matches_float64(kernels: Kernels, dtype: torch.dtype, head_dim: int) -> None:
    counts = [64, 64, 16, 0, 1, 64, 300, 97, 15]
    qkv = torch.randn(sum(counts), 3, 2, head_dim, dtype=dtype)
    q, k, v = qkv.unbind(1)
    found = kernels.varlen_attention(q, k, v, starts(counts), head_dim**-0.5)
    parts = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
    wanted = torch.cat([attend(*args, head_dim**-0.5, False) for args in parts])
    assert found.dtype == dtype
    assert_close(found, wanted, size=5, roundings=3)


def test_varlen_of_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    q = torch.empty(0, 2, 8, dtype=dtype)
    assert kernels.varlen_attention(q, q, q, starts([]), 1.0).shape == (0, 2, 8)
    assert kernels.varlen_attention(q, q, q, starts([0, 0]), 1.0).shape == (0, 2, 8)


def test_varlen_rows_do_not_depend_on_the_batch_nor_on_threads(native: Kernels, dtype: torch.dtype) -> None:
    counts = [64, 30, 257]
    q, k, v = torch.randn(3, sum(counts), 2, 80, dtype=dtype).unbind(0)
    whole = native.varlen_attention(q, k, v, starts(counts), 0.1)
    first = 0
    for count in counts:
        rows = slice(first, first + count)
        assert torch.equal(
            native.varlen_attention(q[rows], k[rows], v[rows], starts([count]), 0.1), whole[rows]
        )
        first += count
    _native.set_num_threads(1)
    assert torch.equal(native.varlen_attention(q, k, v, starts(counts), 0.1), whole)


def test_bad_arguments_raise(kernels: Kernels, dtype: torch.dtype) -> None:
    q, keys, values = _batch([40], [3], 4, 2, 16, dtype)
    cache, at = Cache.fill(keys, values, 16), starts([3])
    good = {"q": q, "k_cache": cache.k, "v_cache": cache.v, "block_tables": cache.tables, "query_start": at,
            "context_lens": cache.lens, "scale": 0.25}  # fmt: skip

    def broken(tables: Tensor, value: int) -> Tensor:
        tables = tables.clone()
        tables[0, 1] = value
        return tables

    for name, value in (
        ("q", q[:, :3]), ("q", q[..., :15]), ("q", q.double()), ("q", q[:, 0]),
        ("k_cache", cache.k.double()), ("v_cache", cache.v[:-1]), ("v_cache", cache.v.transpose(2, 3)),
        ("block_tables", broken(cache.tables, -1)), ("block_tables", broken(cache.tables, len(cache.k))),
        ("block_tables", cache.tables[:, :2]), ("block_tables", cache.tables.long()),
        ("block_tables", cache.tables[:0]),
        ("query_start", starts([4])), ("query_start", starts([2])), ("query_start", starts([3, 0])),
        ("query_start", torch.tensor([3, 3], dtype=torch.int32)), ("query_start", at.long()),
        ("context_lens", torch.tensor([2], dtype=torch.int32)), ("context_lens", cache.lens.long()),
        ("context_lens", torch.tensor([2**31 - 1], dtype=torch.int32)),
        ("context_lens", torch.tensor([-5], dtype=torch.int32)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w+(\[0\])?: expected .*, found"):
            kernels.paged_attention(**(good | {name: value}))

    codes = fill_int8(keys, values, 16)
    good |= {"k_cache": codes.k, "v_cache": codes.v, "k_scale": codes.k_scale, "v_scale": codes.v_scale}
    assert kernels.paged_attention(**good).shape == q.shape
    for name, value in (
        ("k_scale", None), ("v_scale", None), ("k_scale", codes.k_scale[:-1]), ("v_scale", codes.v_scale.double()),
        ("k_cache", cache.k), ("v_cache", cache.v), ("v_scale", codes.v_scale[:, :1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w+: expected .*, found"):
            kernels.paged_attention(**(good | {name: value}))

    for wrong in ([0, 2], [0, 4], [0, 5, 3], [], [-1, 3]):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected .*, found"):
            kernels.varlen_attention(q, q, q, torch.tensor(wrong, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="cu_seqlens: expected int32"):
        kernels.varlen_attention(q, q, q, starts([3]).long(), 1.0)
    with pytest.raises(ValueError, match="k: expected"):
        kernels.varlen_attention(q, q[:2], q, at, 1.0)
