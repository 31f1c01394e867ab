"""Kernels: one op, one file, one contract; the implementation of each is chosen once, by `select`.

Every op takes torch tensors of one compute dtype (float32 or bfloat16) on one device and accumulates in
float32. A malformed argument raises ValueError naming it; nothing is converted or rerouted silently. What a
native op writes shares memory with no other argument. No other thread may write to an argument meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

import pagemill._native as _native
from pagemill.errors import KernelUnavailable
from pagemill.kernels import activation, attention, linear, norm, rotary, sampling
from pagemill.kernels.attention import kv_cache_shapes
from pagemill.kernels.linear import PackedLinear

__all__ = ["Kernels", "PackedLinear", "kv_cache_shapes", "select", "set_num_threads"]


class LinearOp(Protocol):
    """`linear(x, packed, out_float32=False)`."""

    def __call__(self, x: Tensor, packed: PackedLinear, *, out_float32: bool = False) -> Tensor: ...


class GreedyOp(Protocol):
    """`greedy(logits, mask=None)`."""

    def __call__(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every op; the contracts stand in the module of the same name."""

    pack_linear: Callable[[Tensor | Sequence[Tensor], Tensor | None], PackedLinear]
    linear: LinearOp
    embed: Callable[[Tensor, PackedLinear], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], None]
    rotary_cache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    varlen_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    greedy: GreedyOp
    implementations: Mapping[str, str]

    def describe(self) -> dict[str, str]:
        """Op name to what runs it, e.g. `{"linear": "native (avx512)", ...}`."""
        return dict(self.implementations)


_OPS = (
    "linear",
    "embed",
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "gelu",
    "rotary",
    "rotary_cache",
    "paged_attention",
    "varlen_attention",
    "greedy",
)


def _reference(dtype: torch.dtype) -> Kernels:
    return Kernels(
        pack_linear=partial(linear.pack_reference, dtype=dtype),
        linear=linear.linear_reference,
        embed=linear.embed_reference,
        rms_norm=norm.rms_norm_reference,
        add_rms_norm=norm.add_rms_norm_reference,
        swiglu=activation.swiglu_reference,
        gelu=activation.gelu_reference,
        rotary=rotary.rotary_reference,
        rotary_cache=rotary.rotary_cache_reference,
        paged_attention=attention.paged_attention_reference,
        varlen_attention=attention.varlen_attention_reference,
        greedy=sampling.greedy_reference,
        implementations=dict.fromkeys(_OPS, "reference (torch)"),
    )


def _native_over(reference: Kernels, dtype: torch.dtype) -> Kernels:
    native = f"native ({_native.isa()})"
    return replace(
        reference,
        pack_linear=partial(linear.pack_native, dtype=dtype),
        linear=linear.linear_native,
        embed=linear.embed_native,
        rms_norm=norm.rms_norm_native,
        add_rms_norm=norm.add_rms_norm_native,
        swiglu=activation.swiglu_native,
        gelu=activation.gelu_native,
        rotary=rotary.rotary_native,
        rotary_cache=rotary.rotary_cache_native,
        paged_attention=attention.paged_attention_native,
        varlen_attention=attention.varlen_attention_native,
        greedy=sampling.greedy_native,
        implementations=dict.fromkeys(_OPS, native),
    )


def _with_linear_of(donor: Kernels, kernels: Kernels) -> Kernels:
    """On machines with AMX: oneDNN, under torch, has bfloat16 matrix kernels that use it, unlike ours."""
    ops = ("linear", "embed")
    return replace(
        kernels,
        pack_linear=donor.pack_linear,
        linear=donor.linear,
        embed=donor.embed,
        implementations={**kernels.implementations, **{op: donor.implementations[op] for op in ops}},
    )


def set_num_threads(count: int) -> None:
    """Let the CPU kernels, native and torch's, use `count` threads; this holds for the whole process."""
    _native.set_num_threads(count)
    torch.set_num_threads(count)


def select(kind: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for tensors of `dtype` on `device`.

    `kind`: "auto" (the fastest that exists), "reference" (torch), "native" (C++, CPU only; ops without a
    native form for this dtype stay with the reference, as `describe` says) or "triton". Raises
    KernelUnavailable for what cannot run.
    """
    if kind not in ("auto", "reference", "native", "triton"):
        raise KernelUnavailable(f'kernels={kind!r} is unknown; use "auto", "reference", "native" or "triton"')
    if dtype not in (torch.float32, torch.bfloat16):
        raise KernelUnavailable(f"no kernels compute in {dtype}; use torch.float32 or torch.bfloat16")
    if kind == "triton":
        raise KernelUnavailable('kernels="triton" is not built into this version; use "auto" or "reference"')
    if kind == "native" and device.type != "cpu":
        raise KernelUnavailable(f'kernels="native" runs on the CPU, not on {device}; use "auto"')
    reference = _reference(dtype)
    if kind == "reference" or device.type != "cpu":
        return reference
    native = _native_over(reference, dtype)
    if kind == "auto" and dtype == torch.bfloat16 and _native.has_amx():
        return _with_linear_of(reference, native)
    return native
