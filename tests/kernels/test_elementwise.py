import math

import numpy
import pytest
import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.kernels import Kernels
from tests.kernels.conftest import assert_close

WIDTHS = [1, 2, 7, 15, 16, 17, 31, 33, 64, 80, 1280, 2049]


@pytest.mark.parametrize("h", WIDTHS)
def test_rms_norm(kernels: Kernels, dtype: torch.dtype, h: int) -> None:
    x, weight = torch.randn(5, h, dtype=dtype) * 3, torch.randn(h, dtype=dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    found = kernels.rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    assert_close(found, wanted, roundings=2)


def test_rms_norm_of_strided_and_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 3, 40, dtype=dtype), torch.randn(40, dtype=dtype)
    assert torch.equal(
        kernels.rms_norm(x[:, 1], weight, 0.0), kernels.rms_norm(x[:, 1].contiguous(), weight, 0.0)
    )
    assert kernels.rms_norm(x[:0, 1], weight, 0.0).shape == (0, 40)
    assert torch.equal(
        kernels.rms_norm(torch.zeros_like(x[:, 0]), weight, 1e-6), torch.zeros(5, 40, dtype=dtype)
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    gate_up = torch.randn(3, 2 * width, dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(kernels.swiglu(gate_up), gate / (1 + (-gate).exp()) * up)


def test_swiglu_of_extremes(kernels: Kernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e4, -90.0, -87.0, 0.0, 87.0, 90.0, 1e4, math.nan]], dtype=dtype)
    found = kernels.swiglu(torch.cat([gate, torch.ones_like(gate)], dim=1))[0].float()
    assert (found[:3].abs() < 1e-30).all()
    assert found[3] == 0
    assert torch.equal(found[4:7], gate[0, 4:7].float())
    assert found[7].isnan()


@pytest.mark.parametrize("width", WIDTHS)
def test_gelu(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, width, dtype=dtype) * 3
    wide = x.double()
    wanted = wide * 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    found = kernels.gelu(x)
    assert found.dtype == dtype
    assert_close(found, wanted, size=6)


def test_native_gelu_keeps_the_left_tail(native: Kernels, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 0, 1001, dtype=dtype)[None]
    wanted = x.double() * 0.5 * torch.special.erfc(-x.double() / math.sqrt(2))
    rtol = 1.5e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(native.gelu(x).double(), wanted, rtol=rtol, atol=0)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By complex multiplication, in float64."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("head_dim", [2, 8, 16, 30, 64, 80, 128, 256])
def test_rotary_on_a_strided_view(kernels: Kernels, dtype: torch.dtype, head_dim: int) -> None:
    qkv = torch.randn(7, 3, 2, head_dim, dtype=dtype)
    angle = torch.randn(7, head_dim // 2)
    kept, wanted = qkv.clone(), _rotated(qkv[:, 1], angle.cos(), angle.sin())
    assert kernels.rotary(qkv[:, 1], angle.cos(), angle.sin()) is None
    assert_close(qkv[:, 1], wanted)
    assert torch.equal(qkv[:, 0], kept[:, 0])
    assert torch.equal(qkv[:, 2], kept[:, 2])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 1), (7, 1), (3, 3)])
@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
def test_rotary_cache(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, block_size: int
) -> None:
    tokens, head_dim, blocks = 9, 16, 20
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = qkv.clone().view(tokens, heads + 2 * kv_heads, head_dim)
    angle = torch.randn(tokens, head_dim // 2)
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[4] = -1
    k_cache = torch.full((blocks, kv_heads, head_dim, block_size), torch.nan, dtype=dtype)
    v_cache = torch.full((blocks, kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    q = kernels.rotary_cache(qkv, angle.cos(), angle.sin(), slots, k_cache, v_cache, heads, kv_heads)
    turned = _rotated(parts, angle.cos(), angle.sin())
    assert_close(q, turned[:, :heads])
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        assert_close(k_cache[block, :, :, offset], turned[t, heads : heads + kv_heads])
        assert torch.equal(v_cache[block, :, offset], parts[t, heads + kv_heads :])
    assert (
        int((~k_cache.isnan()).sum()) == int((~v_cache.isnan()).sum()) == (tokens - 1) * kv_heads * head_dim
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [(7, 1, 80, 1), (4, 2, 18, 16)])
def test_rotary_cache_int8(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    tokens, blocks = 9, 20
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = qkv.view(tokens, heads + 2 * kv_heads, head_dim)
    parts[1, heads:] = 0
    parts[2, -1] *= 1000
    parts[3, heads + kv_heads :] = parts[3, heads + kv_heads :].abs() * -1e-3
    values = parts[:, heads + kv_heads :].clone()
    turned = _rotated(parts.clone(), (angle := torch.randn(tokens, head_dim // 2)).cos(), angle.sin())
    keys = turned[:, heads : heads + kv_heads]
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[4] = -1
    k_cache = torch.full((blocks, kv_heads, head_dim, block_size), -128, dtype=torch.int8)
    v_cache = torch.full((blocks, kv_heads, block_size, head_dim), -128, dtype=torch.int8)
    k_scale, v_scale = torch.full((2, blocks, kv_heads, block_size), torch.nan).unbind(0)
    args = angle.cos(), angle.sin(), slots, k_cache, v_cache, heads, kv_heads, k_scale, v_scale
    q = kernels.rotary_cache(qkv, *args)
    assert_close(q, turned[:, :heads])
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        for wanted, codes, scale in (
            (keys[t], k_cache[block, :, :, offset], k_scale[block, :, offset]),
            (values[t], v_cache[block, :, offset], v_scale[block, :, offset]),
        ):
            most = wanted.double().abs().amax(-1)
            # Keys were rounded to dtype when they were rotated.
            torch.testing.assert_close(scale.double(), most / 127, rtol=2**-8, atol=0)
            assert codes.min() >= -127
            error = (codes.double() * scale.double()[:, None] - wanted.double()).abs()
            assert (error <= most[:, None] * (0.501 / 127 + 2**-8)).all()
        exact = values[t].double().abs().amax(-1) / 127
        torch.testing.assert_close(v_scale[block, :, offset].double(), exact, rtol=1e-6, atol=0)
    written = (tokens - 1) * kv_heads
    assert int((~k_scale.isnan()).sum()) == int((~v_scale.isnan()).sum()) == written
    assert int((k_cache != -128).sum()) == int((v_cache != -128).sum()) == written * head_dim


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 17, 2048, 2051])
def test_greedy(kernels: Kernels, vocabulary: int) -> None:
    logits = torch.randn(6, vocabulary) * 8
    logits[1] = 2.5  # all equal
    logits[2, vocabulary // 2 :] = logits[2].max() + 1  # a tie
    logits[3, : vocabulary - 1] = -math.inf
    token, logprob = kernels.greedy(logits)
    assert token.dtype == torch.int64
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]
    wanted = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), wanted, rtol=1e-5, atol=2e-6)


def packed(allowed: Tensor) -> Tensor:
    """Bits of bool `[S, V]` as int32 words, what lies past V set: nobody may read it."""
    bits = numpy.pad(allowed.numpy(), ((0, 0), (0, -allowed.shape[1] % 32)), constant_values=True)
    return torch.from_numpy(numpy.packbits(bits, axis=1, bitorder="little").view(numpy.int32))


@pytest.mark.parametrize("vocabulary", [1, 5, 31, 32, 33, 100, 2048, 2051])
def test_greedy_takes_the_best_token_that_the_mask_allows(kernels: Kernels, vocabulary: int) -> None:
    logits = torch.randn(8, vocabulary) * 8
    logits[2, vocabulary // 2 :] = logits[2].max() + 1
    logits[3, : vocabulary - 1] = -math.inf
    allowed = torch.rand(8, vocabulary) < 0.3
    allowed[torch.arange(8), torch.randint(vocabulary, (8,))] = True
    allowed[3] = True
    allowed[4] = False
    allowed[4, vocabulary - 1] = True
    allowed[5] = False
    wide = torch.zeros(8, -(-vocabulary // 32) + 3, dtype=torch.int32)  # rows that are not next to each other
    mask = wide[:, 1:-2]
    mask[:] = packed(allowed)
    token, logprob = kernels.greedy(logits, mask)
    softmax = logits.double().log_softmax(-1)
    for row in range(8):
        if row == 5:
            assert (token[row], logprob[row]) == (-1, -math.inf)
            continue
        best = max(v for v, ok in zip(logits[row].tolist(), allowed[row].tolist(), strict=True) if ok)
        first = next(i for i, v in enumerate(logits[row].tolist()) if v == best and allowed[row, i])
        assert token[row] == first
        torch.testing.assert_close(logprob[row].double(), softmax[row, first], rtol=1e-5, atol=4e-6)
    everything = torch.full_like(mask, -1)
    for masked, free in zip(kernels.greedy(logits, everything), kernels.greedy(logits), strict=True):
        assert torch.equal(masked, free)


def test_greedy_shows_a_nan_under_a_mask(kernels: Kernels) -> None:
    logits = torch.zeros(1, 40)
    logits[0, 33] = math.nan
    token, logprob = kernels.greedy(logits, torch.tensor([[1, 0]], dtype=torch.int32))
    assert token.tolist() == [33]
    assert logprob.isnan().all()


def test_greedy_shows_a_nan(kernels: Kernels) -> None:
    logits = torch.zeros(1, 40)
    logits[0, 33] = math.nan
    token, logprob = kernels.greedy(logits)
    assert token.tolist() == [33]
    assert logprob.isnan().all()


def test_greedy_of_no_rows(kernels: Kernels) -> None:
    token, logprob = kernels.greedy(torch.empty(0, 9))
    assert token.shape == logprob.shape == (0,)


def test_rows_do_not_depend_on_the_batch_nor_on_threads(native: Kernels, dtype: torch.dtype) -> None:
    x, weight = torch.randn(301, 330, dtype=dtype), torch.randn(330, dtype=dtype)
    angle, logits = torch.randn(301, 33), torch.randn(301, 333)

    def rotated(r: slice) -> Tensor:
        heads = x[r].clone().view(-1, 5, 66)
        native.rotary(heads, angle[r].cos(), angle[r].sin())
        return heads

    ops = [
        rotated,
        lambda r: native.rms_norm(x[r], weight, 1e-6),
        lambda r: native.swiglu(x[r]),
        lambda r: native.gelu(x[r]),
        lambda r: native.greedy(logits[r])[1],
    ]
    for op in ops:
        whole = op(slice(None))
        assert torch.equal(torch.cat([op(slice(i, i + 7)) for i in range(0, 301, 7)]), whole)
        _native.set_num_threads(1)
        assert torch.equal(op(slice(None)), whole)
        _native.set_num_threads(2)


def test_bad_arguments_raise(kernels: Kernels, dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    x, weight = torch.zeros(2, 8, dtype=dtype), torch.zeros(8, dtype=dtype)
    for call in (
        lambda: kernels.rms_norm(x, weight[:7], 1e-6),
        lambda: kernels.rms_norm(x, weight.to(other), 1e-6),
        lambda: kernels.rms_norm(x, weight, -1.0),
        lambda: kernels.swiglu(x[:, :7]),
        lambda: kernels.swiglu(x.half()),
        lambda: kernels.gelu(x.half()),
        lambda: kernels.rotary(x[:, None, :7], torch.zeros(2, 3), torch.zeros(2, 3)),
        lambda: kernels.rotary(x[:, None], torch.zeros(1, 4), torch.zeros(2, 4)),
        lambda: kernels.rotary(x[:, None], torch.zeros(2, 4).double(), torch.zeros(2, 4)),
        lambda: kernels.greedy(torch.zeros(2, 8).half()),
        lambda: kernels.greedy(torch.zeros(2, 0)),
        lambda: kernels.greedy(torch.zeros(2, 33), torch.zeros(2, 1, dtype=torch.int32)),
        lambda: kernels.greedy(torch.zeros(2, 33), torch.zeros(2, 2)),
    ):
        with pytest.raises(ValueError, match=r"\w+: expected .*, found"):
            call()


@pytest.mark.parametrize("slot", [-2, 6, 2**62])
def test_slots_out_of_range_raise(kernels: Kernels, dtype: torch.dtype, slot: int) -> None:
    qkv, angle = torch.zeros(1, 12, dtype=dtype), torch.zeros(1, 2)
    k_cache, v_cache = torch.zeros(3, 1, 4, 2, dtype=dtype), torch.zeros(3, 1, 2, 4, dtype=dtype)
    with pytest.raises(ValueError, match=r"slots: expected -1\.\.5"):
        kernels.rotary_cache(qkv, angle, angle, torch.tensor([slot]), k_cache, v_cache, 1, 1)


@pytest.mark.parametrize(("channels", "area", "moments"), [(3, 196, 2), (1, 1, 1), (2, 17, 3)])
def test_pixel_values(kernels: Kernels, dtype: torch.dtype, channels: int, area: int, moments: int) -> None:
    patches = torch.randint(0, 256, (9, channels * area), dtype=torch.uint8)
    levels = torch.randn(channels, 256).to(dtype)
    order = torch.tensor([8, 0, 3, 3, 7])
    out = torch.full((5, channels * moments * area), torch.nan, dtype=dtype)
    kernels.pixel_values(patches, order, levels, moments, out)
    for i, at in enumerate(order.tolist()):
        for c in range(channels):
            pixels = patches[at, c * area : (c + 1) * area]
            wanted = torch.stack([levels[c, byte] for byte in pixels.tolist()])
            for t in range(moments):
                first = (c * moments + t) * area
                assert torch.equal(out[i, first : first + area], wanted)
    kernels.pixel_values(patches, order[:0], levels, moments, out[:0])


def test_pixel_values_refuses_what_it_cannot_take(kernels: Kernels, dtype: torch.dtype) -> None:
    good = dict(
        patches=torch.zeros(4, 12, dtype=torch.uint8),
        order=torch.tensor([0, 3]),
        levels=torch.zeros(3, 256, dtype=dtype),
        moments=2,
        out=torch.zeros(2, 24, dtype=dtype),
    )
    for argument, bad in (
        ("patches", torch.zeros(4, 12, dtype=torch.int32)),
        ("patches", torch.zeros(4, 13, dtype=torch.uint8)),
        ("order", torch.tensor([0, 4])),
        ("order", torch.tensor([-1, 0])),
        ("levels", torch.zeros(3, 255, dtype=dtype)),
        ("levels", torch.zeros(0, 256, dtype=dtype)),
        ("moments", 0),
        ("out", torch.zeros(2, 25, dtype=dtype)),
        ("out", torch.zeros(2, 24, dtype=torch.float64)),
    ):
        with pytest.raises(
            ValueError, match="patches" if argument == "levels" and len(bad) == 0 else argument
        ):
            kernels.pixel_values(*(good | {argument: bad}).values())


def test_mrope_angles(kernels: Kernels) -> None:
    positions = torch.tensor([[4, 0, 6, 1], [5, 3, 6, 2], [0, 1, 2, 6]])
    axis = torch.tensor([0, 2, 1, 1, 0])
    cos, sin = torch.randn(7, 5), torch.randn(7, 5)
    found = kernels.mrope_angles(positions, axis, cos, sin)
    for table, angles in zip((cos, sin), found, strict=True):
        assert angles.is_contiguous()
        for t in range(4):
            for f in range(5):
                assert angles[t, f] == table[positions[axis[f], t], f]
    assert kernels.mrope_angles(positions[:, :0].contiguous(), axis, cos, sin)[0].shape == (0, 5)
    good = dict(positions=positions, axis=axis, cos=cos, sin=sin)
    for argument, bad in (
        ("positions", positions + 1),
        ("positions", positions - 1),
        ("positions", positions[:2]),
        ("axis", axis + 1),
        ("cos", cos[:, :4]),
        ("sin", sin[:6].contiguous()),
    ):
        with pytest.raises(ValueError, match=argument):
            kernels.mrope_angles(*(good | {argument: bad}).values())
