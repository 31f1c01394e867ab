"""A step's arrays to the device: written into pinned memory, brought over by one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagemill.gpu import Gpu

Arrays = Mapping[str, npt.NDArray[Any]]

_ALIGN = 64  # bytes: Triton compiles one kernel for addresses that are multiples of 16, another for others
_SMALLEST = 1 << 16


class Layout:
    """Where arrays lie in one run of bytes: `shapes` gives each name's shape and dtype."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> None:
        self._places: list[tuple[str, int, int, tuple[int, ...], np.dtype[Any]]] = []
        self.num_bytes = 0
        for name, (shape, of) in shapes.items():
            dtype = np.dtype(of)
            size = prod(shape) * dtype.itemsize
            self._places.append((name, self.num_bytes, size, shape, dtype))
            self.num_bytes += -(-size // _ALIGN) * _ALIGN

    @classmethod
    def of(cls, arrays: Arrays) -> Layout:
        """The layout of these arrays, one after another."""
        return cls({name: (array.shape, array.dtype) for name, array in arrays.items()})

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of `memory`, uint8 of at least `num_bytes`."""
        return {
            name: memory[first : first + size].view(_TORCH[dtype]).view(shape)
            for name, first, size, shape, dtype in self._places
        }

    def arrays(self, memory: Tensor) -> dict[str, npt.NDArray[Any]]:
        """The same views of memory on the CPU, as NumPy's."""
        return {name: tensor.numpy() for name, tensor in self.tensors(memory).items()}


_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class Staging:
    """Two pinned buffers in turn: one is written while the copy out of the other may still run."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers = [gpu.host_memory(_SMALLEST) for _ in range(2)]
        self._passed: list[Callable[[], None]] = [lambda: None, lambda: None]
        self._turn = 0

    def memory(self, num_bytes: int) -> Tensor:
        """Pinned memory for the next `send`, uint8 `[num_bytes]`, of unspecified content; waits for the copy before the last."""
        self._turn ^= 1
        self._passed[self._turn]()
        if len(self._buffers[self._turn]) < num_bytes:
            self._buffers[self._turn] = self._gpu.host_memory(1 << (num_bytes - 1).bit_length())
        return self._buffers[self._turn][:num_bytes]

    def send(self, memory: Tensor, to: Tensor) -> None:
        """Copy what `memory` gave, once it is written, behind the calls."""
        self._passed[self._turn] = self._gpu.copy(memory, to)

    def bring(self, arrays: Arrays) -> dict[str, Tensor]:
        """The arrays (int32 and int64) on the device: views of one buffer."""
        layout = Layout.of(arrays)
        memory = self.memory(layout.num_bytes)
        for name, place in layout.arrays(memory).items():
            place[...] = arrays[name]
        found = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._gpu.device)
        self.send(memory, found)
        return layout.tensors(found)
