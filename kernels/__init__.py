"""Kernels: one op, one file, one contract; the implementation of each is chosen once, by `select`.

Every op takes torch tensors of one compute dtype (float32 or bfloat16) on one device and accumulates in
float32. A malformed argument raises ValueError naming it; nothing is converted or rerouted silently. What a
native op writes shares memory with no other argument. No other thread may write to an argument meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.errors import KernelUnavailable
from pagemill.kernels import activation, angles, attention, linear, norm, pixels, rotary, sampling
from pagemill.kernels.attention import QUANTISED_KV, LayerCache, Shape4, kv_cache_shapes, kv_scale_shape
from pagemill.kernels.linear import PackedLinear, Scheme
from pagemill.kernels.norm import Norm

__all__ = [
    "QUANTISED_KV",
    "Kernels",
    "LayerCache",
    "Norm",
    "PackedLinear",
    "Scheme",
    "kv_cache_shapes",
    "kv_scale_shape",
    "select",
    "set_num_threads",
]


class PackLinearOp(Protocol):
    """`pack_linear(weight, bias, scheme="plain", group=128)`."""

    def __call__(
        self,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
        *,
        scheme: Scheme = "plain",
        group: int = 128,
    ) -> PackedLinear: ...


class PackSwigluOp(Protocol):
    """`pack_swiglu(gate, up, bias, scheme="plain", group=128)`."""

    def __call__(
        self, gate: Tensor, up: Tensor, bias: Tensor | None, *, scheme: Scheme = "plain", group: int = 128
    ) -> PackedLinear: ...


class PackQuantizedOp(Protocol):
    """`pack_quantized(q, scales, zeros, bias, group=128, gated=False, order=None)`; int8 `q` takes None for `zeros`, and so does
    float8_e4m3fn where `Kernels.fp8_weights` says so."""

    def __call__(
        self,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        *,
        group: int = 128,
        gated: bool = False,
        order: Tensor | None = None,
    ) -> PackedLinear: ...


class LinearOp(Protocol):
    """`linear(x, packed, out_float32=False, residual=None, norm=None)`."""

    def __call__(
        self,
        x: Tensor,
        packed: PackedLinear,
        *,
        out_float32: bool = False,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor: ...


class LinearSwigluOp(Protocol):
    """`linear_swiglu(x, packed, norm=None)`."""

    def __call__(self, x: Tensor, packed: PackedLinear, *, norm: Norm | None = None) -> Tensor: ...


class EmbedOp(Protocol):
    """`embed(ids, packed, image_index=None, images=None)`."""

    def __call__(
        self,
        ids: Tensor,
        packed: PackedLinear,
        image_index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor: ...


class GreedyOp(Protocol):
    """`greedy(logits, mask=None)`."""

    def __call__(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class RotaryCacheOp(Protocol):
    """`rotary_cache(qkv, cos, sin, slots, k_cache, v_cache, heads, kv_heads, k_scale=None, v_scale=None)`."""

    def __call__(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        num_heads: int,
        num_kv_heads: int,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor: ...


class PagedAttentionOp(Protocol):
    """`paged_attention(q, k_cache, v_cache, tables, starts, lens, scale, k_scale=None, v_scale=None)`."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every op; the contracts stand in the module of the same name."""

    pack_linear: PackLinearOp
    pack_swiglu: PackSwigluOp
    pack_quantized: PackQuantizedOp
    linear: LinearOp
    linear_swiglu: LinearSwigluOp
    embed: EmbedOp
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    mrope_angles: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor], None]
    rotary_cache: RotaryCacheOp
    paged_attention: PagedAttentionOp
    varlen_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    pixel_values: Callable[[Tensor, Tensor, Tensor, int, Tensor], None]
    greedy: GreedyOp
    kv_cache_shapes: Callable[[int, int, int, int], tuple[Shape4, Shape4]]
    quantised_kv: tuple[torch.dtype, ...]
    """What the KV cache may be stored in besides the compute dtype."""
    fp8_weights: bool = field(default=False, kw_only=True)
    """Whether `pack_quantized` takes float8_e4m3fn `[N, K]` with a scale a row; x is rounded likewise (W8A8)."""
    implementations: Mapping[str, str]
    capturable: bool = False
    """Whether a CUDA graph can record the ops: none of them looks at a value, which would wait for the device."""

    def describe(self) -> dict[str, str]:
        """Op name to what runs it, e.g. `{"linear": "native (avx512)", ...}`."""
        return dict(self.implementations)


_OPS = (
    "linear",
    "linear_swiglu",
    "embed",
    "rms_norm",
    "swiglu",
    "gelu",
    "mrope_angles",
    "rotary",
    "rotary_cache",
    "paged_attention",
    "varlen_attention",
    "pixel_values",
    "greedy",
)


def _reference(dtype: torch.dtype) -> Kernels:
    return Kernels(
        pack_linear=partial(linear.pack_reference, dtype=dtype),
        pack_swiglu=partial(linear.pack_swiglu_reference, dtype=dtype),
        pack_quantized=partial(linear.pack_quantized_reference, dtype=dtype),
        linear=linear.linear_reference,
        linear_swiglu=linear.linear_swiglu_reference,
        embed=linear.embed_reference,
        rms_norm=norm.rms_norm_reference,
        swiglu=activation.swiglu_reference,
        gelu=activation.gelu_reference,
        mrope_angles=angles.mrope_angles_reference,
        rotary=rotary.rotary_reference,
        rotary_cache=rotary.rotary_cache_reference,
        paged_attention=attention.paged_attention_reference,
        varlen_attention=attention.varlen_attention_reference,
        pixel_values=pixels.pixel_values_reference,
        greedy=sampling.greedy_reference,
        kv_cache_shapes=kv_cache_shapes,
        quantised_kv=tuple(QUANTISED_KV),
        implementations=dict.fromkeys(_OPS, "reference (torch)"),
    )


def _native_over(reference: Kernels, dtype: torch.dtype) -> Kernels:
    native = f"native ({_native.isa()})"
    return replace(
        reference,
        pack_linear=partial(linear.pack_native, dtype=dtype),
        pack_swiglu=partial(linear.pack_swiglu_native, dtype=dtype),
        pack_quantized=partial(linear.pack_quantized_native, dtype=dtype),
        linear=linear.linear_native,
        linear_swiglu=linear.linear_swiglu_native,
        embed=linear.embed_native,
        rms_norm=norm.rms_norm_native,
        swiglu=activation.swiglu_native,
        gelu=activation.gelu_native,
        mrope_angles=angles.mrope_angles_native,
        rotary=rotary.rotary_native,
        rotary_cache=rotary.rotary_cache_native,
        paged_attention=attention.paged_attention_native,
        varlen_attention=attention.varlen_attention_native,
        pixel_values=pixels.pixel_values_native,
        greedy=sampling.greedy_native,
        quantised_kv=(torch.int8,),
        implementations=dict.fromkeys(_OPS, native),
    )


_OLDEST = (8, 0)  # compute capability: the first with bfloat16 and asynchronous copies
_OLDEST_FP8 = (8, 9)  # the first that converts float8_e4m3fn; for older ones Triton refuses to compile it


def _triton_over(reference: Kernels, device: torch.device, dtype: torch.dtype) -> Kernels:
    try:
        import triton  # heavy, and only on Linux
    except ImportError:
        raise KernelUnavailable('triton is not installed; install it, or use kernels="reference"') from None
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu" and not interpreted:
        raise KernelUnavailable(
            'kernels="triton" runs on a GPU, not on the CPU (but with TRITON_INTERPRET=1, slowly); use "auto"'
        )
    if interpreted and dtype != torch.float32:
        raise KernelUnavailable(f"Triton's interpreter computes {dtype} wrongly; use float32")
    # AMD's float8 is another one (fnuz), converted in software.
    quantised_kv = tuple(QUANTISED_KV) if torch.version.hip is None else (torch.int8,)
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < _OLDEST:
            raise KernelUnavailable(
                f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; the Triton kernels need "
                f'{_OLDEST[0]}.{_OLDEST[1]} or newer: use kernels="reference"'
            )
        if found < _OLDEST_FP8:
            quantised_kv = (torch.int8,)
    from pagemill.kernels.gpu.ops import ops

    how = "triton (interpreted)" if interpreted else "triton"
    fields: dict[str, Any] = dict(ops(dtype))
    fields |= {"quantised_kv": quantised_kv, "fp8_weights": torch.float8_e4m3fn in quantised_kv}
    fields |= {"implementations": dict.fromkeys(_OPS, how), "capturable": True}
    return replace(reference, **fields)


def set_num_threads(count: int) -> None:
    """Let the CPU kernels, native and torch's, use `count` threads; this holds for the whole process."""
    _native.set_num_threads(count)
    torch.set_num_threads(count)


def select(kind: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for tensors of `dtype` on `device`.

    `kind`: "auto" (the fastest that exists), "reference" (torch), "native" (C++, CPU only; ops without a
    native form for this dtype stay with the reference, as `describe` says) or "triton" (an NVIDIA or AMD GPU; with
    TRITON_INTERPRET=1 in the environment, the CPU, in float32 and for tests). Raises KernelUnavailable for what cannot
    run, and for an instruction set in PAGEMILL_ISA that the machine lacks.
    """
    if kind not in ("auto", "reference", "native", "triton"):
        raise KernelUnavailable(f'kernels={kind!r} is unknown; use "auto", "reference", "native" or "triton"')
    if dtype not in (torch.float32, torch.bfloat16):
        raise KernelUnavailable(f"no kernels compute in {dtype}; use torch.float32 or torch.bfloat16")
    if kind == "native" and device.type != "cpu":
        raise KernelUnavailable(f'kernels="native" runs on the CPU, not on {device}; use "auto"')
    try:
        _native.isa()  # also for the reference: pages are prepared in C++ all the same
    except ValueError as error:
        raise KernelUnavailable(str(error)) from None
    reference = _reference(dtype)
    if kind == "triton" or (kind == "auto" and device.type == "cuda"):
        return _triton_over(reference, device, dtype)
    if kind == "reference" or device.type != "cpu":
        return reference
    return _native_over(reference, dtype)
