"""Engine options: one frozen dataclass, checked when it is made, never changed afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pagemill.errors import ConfigError

KernelChoice = Literal["auto", "reference", "native", "triton"]
Quantize = Literal["none", "int8", "int4"]
WeightCache = Literal["auto", "on", "off"]
KvCacheDType = Literal["auto", "int8", "fp8"]


def default_fraction(device: str) -> float:
    """The part of the free memory of a device ("cpu", "cuda:0") that keys and values take: a GPU is there for nothing else."""
    return 0.3 if device == "cpu" else 0.9


def default_stall_seconds(device: str) -> float:
    """Seconds that no step of a device ("cpu", "cuda:0") takes unless it hangs; on a CPU a large step may take minutes."""
    return 3600.0 if device == "cpu" else 300.0


@dataclass(frozen=True)
class EngineConfig:
    """Everything about an engine but its model."""

    device: str = "cpu"
    dtype: str = "auto"
    """float32, bfloat16, or auto: the checkpoint's own (bfloat16 for one stored in float16)."""
    kernels: KernelChoice = "auto"
    """Which kernel implementations to use; `Engine.describe` tells what was chosen."""
    quantize: Quantize = "none"
    """Round the weights to fewer bits while loading: int8 (weights and activations, everywhere), or int4 (the decoder's
    weights in groups; the vision tower, the embedding and the output layer in int8). Of a checkpoint that is quantised
    already, none is as it is stored, and the others concern what it left plain or holds in fp8."""
    weight_cache: WeightCache = "auto"
    """Keep the packed weights in the user's cache folder (PAGEMILL_CACHE_DIR), to be mapped by later starts: auto does for
    checkpoints of 1 GB or more that run on the CPU. `Engine.describe` tells whether they came from there."""
    max_num_seqs: int = 32
    """Most pages in the batch at once (concurrency)."""
    max_step_tokens: int = 2048
    """Most tokens computed in one step, decoding and prefill chunks together."""
    max_step_image_tokens: int = 4096
    """Most image tokens encoded in one step; one larger image is let in alone."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt included; None takes the model's own limit, at most 32768."""
    block_size: int = 16
    """Tokens in one KV block."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values, never exceeded; None takes `kv_cache_fraction` of what is free, at most what
    `max_num_seqs` sequences of full length need."""
    kv_cache_fraction: float | None = None
    """Of what is free once the model is loaded, on a GPU also beside what the largest step takes; None takes
    `default_fraction`."""
    kv_cache_dtype: KvCacheDType = "auto"
    """What keys and values are stored in: auto is `dtype`; int8 and fp8 (e4m3) hold about twice the tokens, each key and value
    scaled by itself. fp8 needs the Triton kernels and a GPU of compute capability 8.9 or newer."""
    cuda_graphs: bool = True
    """On a GPU: record the steps that only decode when the engine starts, so that each is one call."""
    overlap: bool = True
    """On a GPU: plan and launch a step while it computes the one before, and encode images of waiting pages beside steps that
    decode. Steps with drafts are planned when the tokens before are known."""
    prefix_sharing: bool = True
    """Share the KV blocks of equal prompt beginnings."""
    prepare_threads: int = min(4, os.cpu_count() or 1)
    """Threads that decode and patch pages while the model works."""
    num_threads: int | None = None
    """Threads of the CPU kernels, for the whole process; None takes every core this process may use."""

    def __post_init__(self) -> None:
        def refuse(name: str, should: str) -> None:
            raise ConfigError(f"{name} should be {should}, got {getattr(self, name)!r}")

        if self.dtype not in ("auto", "float32", "bfloat16"):
            refuse("dtype", "auto, float32 or bfloat16")
        if self.kernels not in ("auto", "reference", "native", "triton"):
            refuse("kernels", "auto, reference, native or triton")
        if self.quantize not in ("none", "int8", "int4"):
            refuse("quantize", "none, int8 or int4")
        if self.weight_cache not in ("auto", "on", "off"):
            refuse("weight_cache", "auto, on or off")
        for name in (
            "max_num_seqs",
            "max_step_tokens",
            "max_step_image_tokens",
            "block_size",
            "prepare_threads",
        ):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("max_model_len", "kv_cache_bytes", "num_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                refuse(name, "at least 1")
        if self.kv_cache_dtype not in ("auto", "int8", "fp8"):
            refuse("kv_cache_dtype", "auto, int8 or fp8")
        if self.max_num_seqs > 1 << 16:
            refuse("max_num_seqs", f"at most {1 << 16}")
        if self.kv_cache_fraction is not None and not 0 < self.kv_cache_fraction <= 1:
            refuse("kv_cache_fraction", "above 0 and at most 1")
