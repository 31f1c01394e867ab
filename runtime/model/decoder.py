"""The decoder of Qwen2.5-VL: tokens and image embeddings to logits, plain arithmetic over the kernels.

Grouped-query attention over a paged KV cache, M-RoPE, RMSNorm, SwiGLU. One call takes one ragged batch: prefill chunks
and single decode tokens side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagemill.kernels import Kernels, LayerCache, PackedLinear, Scheme
from pagemill.model.config import TextConfig
from pagemill.model.packed import PackedWeights
from pagemill.model.rope import MRope
from pagemill.model.unpack import packed_linear


@dataclass
class RaggedBatch:
    """One step's tokens, flattened over sequences. T tokens, S sequences, L rows that need logits."""

    token_ids: Tensor
    """int64 `[T]`"""
    positions: Tensor
    """int64 `[3, T]`, M-RoPE positions"""
    max_position: int
    slots: Tensor
    """int64 `[T]`, where each token's key and value go: block * block_size + offset"""
    query_start: Tensor
    """int32 `[S + 1]`, first row of each sequence"""
    context_lens: Tensor
    """int32 `[S]`, tokens in the cache after this step"""
    block_tables: Tensor
    """int32 `[S, blocks]`"""
    logit_rows: Tensor
    """int64 `[L]`, rows whose next token is wanted, increasing"""
    image_index: Tensor | None = None
    """int32 `[T]`, rows of `image_embeds` that stand for image placeholders, -1 for other tokens"""
    image_embeds: Tensor | None = None
    """`[I, hidden]`"""


@dataclass
class Layer:
    """Weights of one layer."""

    attention_norm: Tensor
    qkv: PackedLinear
    out: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


def run_layer(
    k: Kernels,
    c: TextConfig,
    layer: Layer,
    residual: Tensor,
    angles: tuple[Tensor, Tensor],
    batch: RaggedBatch,
    cache: LayerCache,
) -> None:
    """One layer: adds the outputs of its attention and of its MLP to `residual [T, hidden]`, in place."""
    keys, values, *scales = cache
    qkv = k.linear(residual, layer.qkv, norm=(layer.attention_norm, c.rms_norm_eps))
    heads = c.num_heads, c.num_kv_heads
    q = k.rotary_cache(qkv, *angles, batch.slots, keys, values, *heads, *scales)
    where = batch.block_tables, batch.query_start, batch.context_lens
    y = k.paged_attention(q, keys, values, *where, c.head_dim**-0.5, *scales)
    k.linear(y.reshape(len(y), c.hidden_size), layer.out, residual=residual)
    y = k.linear_swiglu(residual, layer.gate_up, norm=(layer.mlp_norm, c.rms_norm_eps))
    k.linear(y, layer.down, residual=residual)


class Decoder:
    """Weights and forward pass of the decoder."""

    def __init__(
        self,
        config: TextConfig,
        weights: PackedWeights,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        scheme: Scheme = "plain",
        vocabulary_scheme: Scheme = "plain",
    ) -> None:
        self.config, self.kernels = config, kernels

        def vector(name: str) -> Tensor:
            name = f"text.{name}"
            return weights.packed(name, lambda: weights.read(name).to(device, dtype, copy=True))

        def linear(layer: int, *names: str, bias: bool = False) -> PackedLinear:
            return pack(*(f"text.layers.{layer}.{n}_proj" for n in names), bias=bias)

        def pack(*names: str, bias: bool = False, scheme: Scheme = scheme) -> PackedLinear:
            return packed_linear(weights, names, bias, kernels, device, dtype, scheme)

        def gate_up(layer: int) -> PackedLinear:
            names = [f"text.layers.{layer}.mlp.{n}_proj" for n in ("gate", "up")]
            return packed_linear(weights, names, False, kernels, device, dtype, scheme, gated=True)

        self.embed_tokens = pack("text.embed_tokens", scheme=vocabulary_scheme)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = pack("lm_head", scheme=vocabulary_scheme)
        self.layers = [
            Layer(
                attention_norm=vector(f"layers.{i}.input_layernorm.weight"),
                qkv=linear(i, "self_attn.q", "self_attn.k", "self_attn.v", bias=True),
                out=linear(i, "self_attn.o"),
                mlp_norm=vector(f"layers.{i}.post_attention_layernorm.weight"),
                gate_up=gate_up(i),
                down=linear(i, "mlp.down"),
            )
            for i in range(config.num_layers)
        ]
        self.norm = vector("norm.weight")
        self.rope = MRope(config.head_dim, config.rope_theta, config.mrope_section, device)

    @torch.inference_mode()
    def __call__(self, batch: RaggedBatch, kv_cache: list[LayerCache]) -> Tensor:
        """Run one ragged batch, writing keys and values into `kv_cache` (one a layer).

        Returns logits, float32 `[L, vocab]`, for `batch.logit_rows`.
        """
        k, c = self.kernels, self.config
        residual = k.embed(batch.token_ids, self.embed_tokens, batch.image_index, batch.image_embeds)
        angles = k.mrope_angles(batch.positions, *self.rope.tables(batch.max_position))
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            run_layer(k, c, layer, residual, angles, batch, cache)
        if len(batch.logit_rows) < len(residual):  # else every row is wanted, as in a step that only decodes
            residual = residual[batch.logit_rows]
        return k.linear(residual, self.lm_head, out_float32=True, norm=(self.norm, c.rms_norm_eps))
