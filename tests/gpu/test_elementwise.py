import math

import pytest
import torch

from pagemill.kernels import activation as cpu_activation
from pagemill.kernels import norm as cpu_norm
from pagemill.kernels import rotary as cpu_rotary
from pagemill.kernels import sampling as cpu_sampling
from pagemill.kernels.attention import QUANTISED_KV
from pagemill.kernels.gpu import activation, embed, norm, rotary, sampling
from tests.gpu.conftest import KEPT


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-6, atol=2e-6)


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float32  # the interpreter cuts bfloat16 off instead of rounding it


@pytest.mark.parametrize(("m", "h"), [(1, 1), (5, 100), (3, 256), (0, 8)])
def test_norms(m: int, h: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, 2, h, dtype=dtype)[:, 0]
    weight = torch.randn(h, dtype=dtype)
    found = norm.rms_norm(x, weight, 1e-6)
    close(found, cpu_norm.rms_norm_reference(x, weight, 1e-6))
    codes, scale = norm.rms_norm_quantized(x, weight, 1e-6, torch.int8)
    assert codes.shape == (m, -(-h // 64) * 64)
    assert not codes[:, h:].any()
    torch.testing.assert_close(
        codes[:, :h] * scale[:, None], found.float(), rtol=0, atol=0.51 * max([*scale.tolist(), 0])
    )


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 80), (4, 6, 64), (0, 2, 8)])
def test_rotary(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, heads, head_dim, dtype=dtype)
    cos, sin = torch.randn(2, tokens, head_dim // 2).unbind(0)
    ours, theirs = x.clone(), x.clone()
    rotary.rotary(ours, cos, sin)
    cpu_rotary.rotary_reference(theirs, cos, sin)
    close(ours, theirs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block"), [(4, 2, 32, 16), (7, 1, 128, 4), (2, 2, 16, 1)]
)
def test_rotary_with_the_cache(
    heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype
) -> None:
    slots = torch.tensor([5, -1, 0, 3])
    qkv = torch.randn(len(slots), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = torch.randn(2, len(slots), head_dim // 2).unbind(0)
    shape = (6, kv_heads, block, head_dim)
    k, v = (torch.full(shape, 7.0, dtype=dtype) for _ in range(2))
    k_cpu, v_cpu = k.transpose(2, 3).contiguous(), v.clone()
    q = rotary.rotary_cache(qkv.clone(), cos, sin, slots, k, v, heads, kv_heads)
    close(q, cpu_rotary.rotary_cache_reference(qkv.clone(), cos, sin, slots, k_cpu, v_cpu, heads, kv_heads))
    close(k, k_cpu.transpose(2, 3))
    assert torch.equal(v, v_cpu)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block"), [(4, 2, 32, 16), (7, 1, 128, 4), (2, 2, 16, 1)]
)
def test_rotary_with_a_quantised_cache(
    heads: int, kv_heads: int, head_dim: int, block: int, kept: torch.dtype, dtype: torch.dtype
) -> None:
    slots = torch.tensor([5, -1, 0, 3])
    qkv = torch.randn(len(slots), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
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
        scale, whole, found = scale[written][:, None].double(), whole[written], code[written].double()
        torch.testing.assert_close(scale, whole.abs().amax(-1, keepdim=True) / QUANTISED_KV[kept])
        # int8: half a code; fp8: half of the last of its four bits, at least of the smallest number's
        half = 0.5 if kept == torch.int8 else (found.abs() / 16).clamp_min(2.0**-10)
        assert ((found - whole / scale).abs() <= half * 1.001).all()
        assert not code.float()[~written].any()


def test_activations(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * 1030, dtype=dtype) * 3
    close(activation.swiglu(x), cpu_activation.swiglu_reference(x))
    wanted = 0.5 * x.double() * (1 + torch.erf(x.double() / math.sqrt(2)))
    torch.testing.assert_close(activation.gelu(x).double(), wanted, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 100, 5000])
def test_greedy(vocabulary: int) -> None:
    logits = torch.randn(5, vocabulary)
    logits[1, -1] = logits[1, 0] = logits[1].max() + 1  # equals: the first
    logits[3, vocabulary // 2] = math.nan
    logits[4, : vocabulary // 2] = -math.inf
    mask = torch.randint(-(2**31), 2**31 - 1, (5, -(-vocabulary // 32)), dtype=torch.int32)
    mask[2] = 0
    for allowed in (None, mask):
        token, logprob = sampling.greedy(logits, allowed)
        wanted_token, wanted_logprob = cpu_sampling.greedy_reference(logits, allowed)
        assert torch.equal(token, wanted_token)
        torch.testing.assert_close(logprob, wanted_logprob, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_embedding_with_images(dtype: torch.dtype) -> None:
    weight, images = torch.randn(50, 1100, dtype=dtype), torch.randn(3, 1100, dtype=dtype)
    ids, index = torch.tensor([3, 49, 0, 7]), torch.tensor([-1, 2, -1, 0], dtype=torch.int32)
    assert torch.equal(embed.embed(ids, weight, 1100), weight[ids])
    merged = weight[ids]
    merged[[1, 3]] = images[[2, 0]]
    assert torch.equal(embed.embed(ids, weight, 1100, index, images), merged)
