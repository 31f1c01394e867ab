"""Norms, rotary, activations, embeddings and the greedy choice, compiled and executed, warps one at a time in two orders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagemill.kernels.angles import mrope_angles_reference
from pagemill.kernels.gpu import activation, angles, embed, norm, pixels, rotary, sampling
from pagemill.kernels.pixels import pixel_values_reference
from tests.emulator.conftest import BF16, F32, among_nan, assert_within
from tests.emulator.launch import emulated

FP8 = torch.float8_e4m3fn
ORDERS = [dict(one_by_one=True, seed=seed) for seed in range(2)]
LARGEST = {torch.int8: 127.0, FP8: 448.0}


def assert_rounded(codes: Tensor, scale: Tensor, wanted: Tensor, wanted_bound: Tensor) -> None:
    """`codes [M, K]` times `scale [M]` are `wanted`, rounded to the nearest; each scale is what its row's largest needs."""
    largest = LARGEST[codes.dtype]
    assert_within(
        scale * largest, wanted.abs().amax(-1), wanted_bound.amax(-1) + 1e-6 * wanted.abs().amax(-1)
    )
    steps = scale.double()[:, None]
    # Of float8 3 bits are stored, down to 2^-9.
    step = 0.5 if codes.dtype == torch.int8 else (wanted.abs() / steps / 16).clamp_min(2**-10)
    assert_within(codes.double() * steps, wanted, 1.001 * step * steps + wanted_bound)


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("h", [1, 64, 100, 1280, 2049])
def test_norm(h: int, how: dict[str, int]) -> None:
    """bfloat16; the normed row is rounded before it meets the weight."""
    x, weight = among_nan(torch.randn(2, h).bfloat16()), torch.randn(h).bfloat16()
    with emulated(**how):
        found = norm.rms_norm(x, weight, 1e-6)
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert_within(found, wanted, (2.01 * BF16 + 8 * F32) * wanted.abs())


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("h", [1, 100, 1280])
def test_quantized_norm(h: int, kind: torch.dtype, how: dict[str, int]) -> None:
    x, weight = among_nan(torch.randn(2, h).bfloat16()), torch.randn(h).bfloat16()
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    with emulated(89 if kind == FP8 else 80, **how):
        codes, scale = norm.rms_norm_quantized(x, weight, 1e-6, kind)
    assert codes.shape == (2, -(-h // 64) * 64)
    assert not codes[:, h:].float().any()
    assert_rounded(codes[:, :h], scale, wanted, 2.01 * BF16 * wanted.abs())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`x [T, H, D]` rotated in float64, and the size of what was added up."""
    first, second = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    size = torch.cat([(first * c).abs() + (second * s).abs(), (second * c).abs() + (first * s).abs()], -1)
    return torch.cat([first * c - second * s, second * c + first * s], -1), size


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 80), (16, 80), (2, 128)])
def test_rotary(heads: int, head_dim: int, how: dict[str, int]) -> None:
    rows = torch.full((3, heads + 1, head_dim), torch.nan, dtype=torch.bfloat16)
    x = rows[:, :heads].copy_(torch.randn(3, heads, head_dim))
    cos, sin = torch.randn(2, 3, head_dim // 2).unbind(0)
    wanted, size = turned(x, cos, sin)
    with emulated(**how):
        rotary.rotary(x, cos, sin)
    assert_within(x, wanted, BF16 * wanted.abs() + 2 * F32 * size)
    assert rows[:, heads:].isnan().all()


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 2, 128), (28, 4, 128), (7, 1, 32)])
def test_rotary_with_the_cache(
    heads: int, kv_heads: int, head_dim: int, kind: torch.dtype, how: dict[str, int]
) -> None:
    slots, block = torch.tensor([21, -1, 0]), 4
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim).bfloat16()
    cos, sin = torch.randn(2, 3, head_dim // 2).unbind(0)
    q, k, v = qkv.view(3, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    wanted, size = turned(torch.cat([q, k], 1), cos, sin)
    values = v.double()
    caches = [torch.full((6, kv_heads, block, head_dim), 7).to(kind) for _ in range(2)]
    scales = [torch.full((6, kv_heads, block), -1.0) for _ in range(2)] if kind in LARGEST else []
    with emulated(89 if kind == FP8 else 80, **how):
        found = rotary.rotary_cache(among_nan(qkv, 16), cos, sin, slots, *caches, heads, kv_heads, *scales)
    bound = BF16 * wanted.abs() + 2 * F32 * size
    assert_within(found, wanted[:, :heads], bound[:, :heads])
    at, offset = slots[[0, 2]] // block, slots[[0, 2]] % block
    untouched = torch.ones(6, block, dtype=torch.bool)
    untouched[at, offset] = False
    for i, (cache, of, off) in enumerate(
        zip(caches, (wanted[:, heads:], values), (bound[:, heads:], torch.zeros_like(values)), strict=True)
    ):
        assert (cache.float().transpose(1, 2)[untouched] == 7).all()
        kept = cache[at, :, offset]
        if scales:
            assert (scales[i].transpose(1, 2)[untouched] == -1).all()
            assert_rounded(
                kept.flatten(0, 1),
                scales[i][at, :, offset].flatten(),
                of[[0, 2]].flatten(0, 1),
                off[[0, 2]].flatten(0, 1),
            )
        else:
            assert_within(kept, of[[0, 2]], off[[0, 2]])


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("width", [1, 1024, 1025])
def test_activations(width: int, how: dict[str, int]) -> None:
    x = torch.randn(2, 2 * width).mul(3).bfloat16()
    with emulated(**how):
        gated, bell = activation.swiglu(x), activation.gelu(x)
    gate, up = x.double().chunk(2, -1)
    wanted = F.silu(gate) * up
    assert_within(gated, wanted, (BF16 + 64 * F32) * wanted.abs())
    wanted = x.double() * (1 + torch.erf(x.double() / math.sqrt(2))) / 2
    assert_within(bell, wanted, BF16 * wanted.abs() + 4 * F32 * x.double().abs())


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 100, 4097])
def test_greedy(vocabulary: int, how: dict[str, int]) -> None:
    """A row of its own for: a tie (the first wins), nothing allowed, a NaN, half of it -inf, all of it forbidden but one."""
    logits = torch.randn(6, vocabulary)
    logits[1, -1] = logits[1, 0] = logits[1].max() + 1
    logits[3, vocabulary // 2] = math.nan
    logits[4, : vocabulary // 2] = -math.inf
    mask = torch.randint(-(2**31), 2**31 - 1, (6, -(-vocabulary // 32)), dtype=torch.int32)
    mask[1], mask[2], mask[5] = -1, 0, 0
    mask[5, -1] = 1 << (vocabulary - 1) % 32 if vocabulary % 32 else -(2**31)
    allowed = mask.long()[:, torch.arange(vocabulary) // 32] >> torch.arange(vocabulary) % 32 & 1 != 0
    for masked in (False, True):
        with emulated(**how):
            token, logprob = sampling.greedy(among_nan(logits), mask if masked else None)
        possible = logits.double().masked_fill(~allowed, -math.inf) if masked else logits.double()
        wanted = possible.argmax(-1)
        wanted[3] = vocabulary // 2
        lse = logits.double().logsumexp(-1)
        wanted_logprob = possible.gather(-1, wanted[:, None])[:, 0] - lse
        nothing = torch.isneginf(possible).all(-1)
        assert token.tolist() == wanted.masked_fill(nothing, -1).tolist()
        real = torch.arange(6) != 3
        assert logprob[3].isnan()
        assert torch.isneginf(logprob[nothing]).all()
        real &= ~nothing
        assert_within(logprob[real], wanted_logprob[real], 32 * F32 * (1 + lse[real].abs()))


@pytest.mark.parametrize("how", ORDERS, ids=str)
def test_embedding(how: dict[str, int]) -> None:
    weight, images = among_nan(torch.randn(50, 1100).bfloat16(), 4), torch.randn(3, 1100).bfloat16()
    ids, index = torch.tensor([3, 49, 0, 7]), torch.tensor([-1, 2, -1, 0], dtype=torch.int32)
    codes, scales = torch.randint(-127, 128, (50, 1100), dtype=torch.int8), torch.rand(50)
    with emulated(**how):
        plain = embed.embed(ids, weight, 1100)
        merged = embed.embed(ids, weight, 1100, index, images)
        scaled = embed.embed(ids, codes, 1100, scales=scales, dtype=torch.bfloat16)
    assert torch.equal(plain, weight[ids])
    wanted = weight[ids]
    wanted[[1, 3]] = images[[2, 0]]
    assert torch.equal(merged, wanted)
    assert torch.equal(scaled, (codes[ids].float() * scales[ids, None]).bfloat16())


@pytest.mark.parametrize("how", ORDERS, ids=str)
def test_angles_and_pixels(how: dict[str, int]) -> None:
    positions, axis = torch.randint(0, 30, (3, 7)), torch.randint(0, 3, (20,))
    tables = torch.randn(2, 30, 20).unbind(0)
    patches = torch.randint(0, 256, (9, 3 * 400), dtype=torch.uint8)
    order, levels = torch.randperm(9)[:5], torch.randn(3, 256).bfloat16()
    ours, theirs = torch.full((2, 5, 2 * 3 * 400), torch.nan, dtype=torch.bfloat16).unbind(0)
    with emulated(**how):
        found = angles.mrope_angles(positions, axis, *tables)
        pixels.pixel_values(patches, order, levels, 2, ours)
    for one, wanted in zip(found, mrope_angles_reference(positions, axis, *tables), strict=True):
        assert torch.equal(one, wanted)
    pixel_values_reference(patches, order, levels, 2, theirs)
    assert torch.equal(ours, theirs)
