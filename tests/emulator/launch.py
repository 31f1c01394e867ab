"""The kernels of `pagemill.kernels.gpu` compiled for a GPU and executed on the CPU, launched by their own Python wrappers."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import decompose_descriptor
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.emulator.memory import GlobalMemory, SharedMemory
from tests.emulator.ptx import Module
from tests.emulator.warps import Block, Warps

__all__ = ["Launch", "emulated", "execute"]


@dataclass
class Launch:
    """A kernel that ran: what was compiled, and how often each instruction (by its whole name) was executed."""

    kernel: CompiledKernel
    counts: Counter[str]

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(prefix))


def execute(
    module: Module,
    grid: Sequence[int],
    num_warps: int,
    args: Sequence[Any],
    shared: int = 0,
    *,
    one_by_one: bool = False,
    seed: int | None = None,
    limit: int = 1_000_000,
) -> Counter[str]:
    """Run a kernel over `grid` on tensors and numbers `args`; returns how often each instruction was executed.

    One by one, each warp runs from barrier to barrier alone, and races in shared memory are found; else all warps of a block
    step together. A seed shuffles blocks, and warps after each barrier. `limit`: instructions of one warp between barriers.
    """
    tensors = [(a.data_ptr(), _reachable(a)) for a in args if isinstance(a, Tensor)]
    memory = GlobalMemory([*tensors, *((c.ctypes.data, c.nbytes) for c in module.constants)])
    values = [
        *args,
        *[0] * (len(module.params) - len(args)),
    ]  # behind them Triton's scratch memory, which nothing here uses
    params = {name: _bits(value, size) for (name, size), value in zip(module.params, values, strict=True)}
    x, y, z = (*grid, 1, 1, 1)[:3]
    programs = [(i, j, k) for k, j, i in product(range(z), range(y), range(x))]
    shuffle = random.Random(seed).shuffle if seed is not None else lambda _: None
    shuffle(programs)
    for instruction in module.instructions:
        instruction.count = 0
    with np.errstate(all="ignore"):
        for program in programs:
            window = SharedMemory(max(shared, module.shared), one_by_one)
            block = Block(memory, window, params, 32 * num_warps, (x, y, z), program)
            lanes = 32 if one_by_one else 32 * num_warps
            running = [Warps(module, block, i, lanes, limit) for i in range(0, 32 * num_warps, lanes)]
            while running:
                shuffle(running)
                running = [warps for warps in running if warps.run()]
                window.barrier()
    counts: Counter[str] = Counter()
    for instruction in module.instructions:
        counts[instruction.name] += instruction.count
    return counts


def _reachable(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its storage."""
    return tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()


def _bits(value: Any, size: int) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int.from_bytes(struct.pack({4: "<f", 8: "<d"}[size], value), "little")
    return int(value) & ((1 << 8 * size) - 1)


_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


def _no_assembly(
    backend: Any = None, stages: dict[str, Any] | None = None, *args: Any
) -> tuple[str, str] | None:
    """Triton's hook into its pipeline, which then ends with PTX; without arguments it is asked for a key of the disk cache."""
    if stages is None:
        return "no assembly", "no assembly"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def _compile(
    kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], arch: int
) -> tuple[CompiledKernel, list[Any]]:
    """A kernel specialised for its arguments as a launch on a GPU would do, and those that it takes at run time."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    key = kernel, kernel.cache_key, arch, str(specialization), str(options)
    if key not in _compiled:
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.add_stages_inspection_hook = _no_assembly
            _compiled[key] = triton.compile(source, target=target, options=options.__dict__)
    compiled = _compiled[key]
    kinds = compiled.src.signature
    values = [value for name, value in bound.items() if kinds[name] != "constexpr"]
    # Before sm_90 a tensor descriptor is its address, sizes and how it is padded.
    return compiled, [
        part
        for value in values
        for part in (decompose_descriptor(value) if isinstance(value, TensorDescriptor) else (value,))
    ]


@lru_cache(maxsize=256)
def _module(ptx: str) -> Module:
    return Module(ptx)


@contextmanager
def emulated(
    arch: int = 80, *, one_by_one: bool = False, seed: int | None = None, damage: Callable[[str], str] = str
) -> Iterator[list[Launch]]:
    """Launches of Triton kernels go to `execute`, compiled for compute capability `arch`; yields what was launched.

    `damage` changes the PTX before it is executed.
    """
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
        compiled, run_args = _compile(kernel, args, kwargs, arch)
        ptx = damage(compiled.asm["ptx"])
        meta = compiled.metadata
        counts = execute(
            _module(ptx), grid, meta.num_warps, run_args, meta.shared, one_by_one=one_by_one, seed=seed
        )  # fmt: skip
        launches.append(Launch(compiled, counts))

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = before
