"""Against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagemill.kernels.attention import QUANTISED_KV
from pagemill.kernels.gpu import activation, embed, norm, rotary, sampling
from tests.gpu.conftest import KEPT, bound, error

CACHES = [(4, 2, 32, 16), (7, 1, 128, 4), (2, 2, 16, 1)]
"""Heads, kv heads, head_dim and block size."""


def spread(m: int, h: int) -> Tensor:
    """Rows of different sizes beside each other; of small ones, eps decides."""
    return torch.randn(m, h) * torch.tensor([1.0, 1e4, 1e-4, 0.0, 1e-2])[:m, None]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `x [T, H, D]`, their halves rotated against each other."""
    first, second = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], -1)


def half_a_step(codes: Tensor) -> Tensor:
    """What rounding may have changed a code by; of fp8 half of the last of four bits, at least of the smallest number's."""
    size = codes.double().abs()
    return torch.full_like(size, 0.5) if codes.dtype == torch.int8 else (size / 16).clamp_min(2.0**-10)


@pytest.mark.parametrize(("m", "h"), [(1, 1), (5, 100), (3, 256), (0, 8)])
def test_norms(m: int, h: int, dtype: torch.dtype) -> None:
    rows = torch.full((m, 2, h), torch.nan, dtype=dtype)
    x, weight = rows[:, 0].copy_(spread(m, h)), torch.randn(h).to(dtype)
    found, wanted = norm.rms_norm(x, weight, 1e-6), normed(x, weight, 1e-6)
    assert (found.shape, found.dtype) == ((m, h), dtype)
    for row in range(m):
        assert error(found[row], wanted[row]) < bound(dtype)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("m", "h"), [(1, 1), (5, 100), (3, 256), (0, 8)])
def test_quantised_norms(m: int, h: int, kept: torch.dtype, dtype: torch.dtype) -> None:
    x, weight = spread(m, h).to(dtype), torch.randn(h).to(dtype)
    codes, scale = norm.rms_norm_quantized(x, weight, 1e-6, kept)
    wanted, whole, step = normed(x, weight, 1e-6), codes[:, :h].double(), scale.double()[:, None]
    assert (codes.shape, scale.shape) == ((m, -(-h // 64) * 64), (m,))
    assert not codes[:, h:].float().any()
    largest = wanted.abs().amax(1, keepdim=True)
    torch.testing.assert_close(step * QUANTISED_KV[kept], largest, rtol=bound(dtype), atol=1e-27)
    rounding = half_a_step(codes[:, :h]) * step
    assert ((whole * step - wanted).abs() <= 1.001 * rounding + bound(dtype) * wanted.abs()).all()


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 80), (4, 6, 64), (0, 2, 8)])
def test_rotary(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    rows = torch.full((tokens, heads + 1, head_dim), torch.nan, dtype=dtype)
    x = rows[:, :heads].copy_(torch.randn(tokens, heads, head_dim))
    cos, sin = torch.randn(2, tokens, head_dim // 2).unbind(0)
    wanted = turned(x, cos, sin)
    rotary.rotary(x, cos, sin)
    assert error(x, wanted) < bound(dtype)
    assert rows[:, heads:].isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), CACHES)
def test_rotary_with_the_cache(
    heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype
) -> None:
    slots = [5, -1, 0, 3]
    qkv = torch.randn(len(slots), heads + 2 * kv_heads, head_dim).to(dtype)
    cos, sin = torch.randn(2, len(slots), head_dim // 2).unbind(0)
    k, v = (torch.full((6, kv_heads, block, head_dim), 7.0, dtype=dtype) for _ in range(2))
    k_wanted, v_wanted = k.double(), v.clone()
    rotated = turned(qkv[:, : heads + kv_heads], cos, sin)
    for token, slot in enumerate(slots):
        if slot >= 0:
            k_wanted[slot // block, :, slot % block] = rotated[token, heads:]
            v_wanted[slot // block, :, slot % block] = qkv[token, heads + kv_heads :]
    q = rotary.rotary_cache(qkv.flatten(1), cos, sin, torch.tensor(slots), k, v, heads, kv_heads)
    assert error(q, rotated[:, :heads]) < bound(dtype)
    assert error(k, k_wanted) < bound(dtype)
    assert torch.equal(k == 7, k_wanted == 7)
    assert torch.equal(v, v_wanted)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block"), CACHES)
def test_rotary_with_a_quantised_cache(
    heads: int, kv_heads: int, head_dim: int, block: int, kept: torch.dtype, dtype: torch.dtype
) -> None:
    slots = torch.tensor([5, -1, 0, 3])
    qkv = torch.randn(len(slots), (heads + 2 * kv_heads) * head_dim).to(dtype)
    cos, sin = torch.randn(2, len(slots), head_dim // 2).unbind(0)
    shape = (6, kv_heads, block, head_dim)
    k, v = (torch.full(shape, 7.0, dtype=dtype) for _ in range(2))
    rotary.rotary_cache(qkv.clone(), cos, sin, slots, k, v, heads, kv_heads)
    codes = [torch.zeros(shape, dtype=kept) for _ in range(2)]
    scales = [torch.zeros(shape[:3]) for _ in range(2)]
    rotary.rotary_cache(qkv.clone(), cos, sin, slots, *codes, heads, kv_heads, *scales)
    for code, scale, whole in zip(codes, scales, (k.double(), v.double()), strict=True):
        written = scale > 0
        assert written.sum() == 3 * kv_heads
        scale, whole, found = scale[written][:, None].double(), whole[written], code[written]
        torch.testing.assert_close(scale, whole.abs().amax(-1, keepdim=True) / QUANTISED_KV[kept])
        assert ((found.double() - whole / scale).abs() <= half_a_step(found) * 1.001).all()
        assert not code.float()[~written].any()


def test_a_token_of_zeros_is_kept_as_zeros() -> None:
    """In int8, where its scale would be 0."""
    codes, scales = torch.full((2, 1, 1, 1, 16), 5, dtype=torch.int8), torch.full((2, 1, 1, 1), torch.nan)
    angle = torch.zeros(1, 8)
    rotary.rotary_cache(torch.zeros(1, 48), angle, angle, torch.tensor([0]), *codes, 1, 1, *scales)
    assert not codes.any()
    assert (scales > 0).all()
    assert (scales < 1e-20).all()


def test_activations(dtype: torch.dtype) -> None:
    """And where exp overflows."""
    x = torch.randn(3, 2 * 1030).mul(3).to(dtype)
    x[0, :4] = torch.tensor([-1e4, 1e4, -89.0, 89.0])
    x[0, 1030:1034] = 2
    gate, up = x.double().chunk(2, 1)
    assert error(activation.swiglu(x), F.silu(gate) * up) < bound(dtype)
    assert error(activation.swiglu(x)[1:], (F.silu(gate) * up)[1:]) < bound(dtype)
    wanted = 0.5 * x.double() * (1 + torch.erf(x.double() / math.sqrt(2)))
    assert error(activation.gelu(x), wanted) < bound(dtype)
    assert error(activation.gelu(x)[1:], wanted[1:]) < bound(dtype)


@pytest.mark.parametrize("vocabulary", [1, 100, 5000])
def test_greedy(vocabulary: int) -> None:
    logits = torch.randn(6, vocabulary)
    logits[1, -1] = logits[1, 0] = logits[1].max() + 1  # equals: the first
    logits[3, vocabulary // 2] = math.nan
    logits[4, : vocabulary // 2] = -math.inf
    logits[5] *= 1e4
    words = torch.randint(-(2**31), 2**31 - 1, (6, -(-vocabulary // 32)), dtype=torch.int32)
    words[2] = 0
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten(1)[:, :vocabulary] == 1
    for mask, allowed in ((None, torch.ones_like(bits)), (words, bits)):
        tokens, logprobs = sampling.greedy(logits, mask)
        for row, some, token, logprob in zip(
            logits.double(), allowed, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            if row.isnan().any():
                assert token == vocabulary // 2
                assert math.isnan(logprob)
            elif not some.any():
                assert (token, logprob) == (-1, -math.inf)
            else:
                best = row.masked_fill(~some, -math.inf).max()
                assert token == (some & (row == best)).nonzero()[0].item()
                assert logprob == pytest.approx((best - row.logsumexp(0)).item(), rel=1e-6, abs=1e-6)


def test_embedding_with_images(dtype: torch.dtype) -> None:
    weight, images = torch.randn(50, 1100).to(dtype), torch.randn(3, 1100).to(dtype)
    ids, index = torch.tensor([3, 49, 0, 7]), torch.tensor([-1, 2, -1, 0], dtype=torch.int32)
    assert torch.equal(embed.embed(ids, weight, 1100), weight[ids])
    merged = weight[ids]
    merged[[1, 3]] = images[[2, 0]]
    assert torch.equal(embed.embed(ids, weight, 1100, index, images), merged)


@pytest.mark.parametrize("kept", KEPT)
def test_embedding_in_codes(kept: torch.dtype, dtype: torch.dtype) -> None:
    """Each row by its own scale, however far apart; the padding of a row is not read."""
    codes, scales = (torch.randn(5, 1152) * 40).to(kept), torch.tensor([1.0, 1e2, 1e-3, 0.0, 0.3])
    images, index = torch.randn(1, 1100).to(dtype), torch.tensor([-1, 0, -1, -1, -1], dtype=torch.int32)
    ids = torch.tensor([1, 1, 2, 3, 4])
    found = embed.embed(ids, codes, 1100, index, images, scales=scales, dtype=dtype)
    wanted = (codes.double() * scales.double()[:, None])[ids, :1100]
    wanted[1] = images[0].double()
    for row in range(len(ids)):
        assert error(found[row], wanted[row]) < bound(dtype)
