"""Memory as PTX sees it, strict where a GPU is lenient: what was not passed, not written, or not waited for is not readable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.emulator.formats import Array

__all__ = ["POISON", "SHARED_BASE", "GlobalMemory", "PtxError", "SharedMemory", "Unsupported", "Window"]

POISON = np.array([0xAD, 0xDE, 0xFF, 0xFF], np.uint8)
"""Little-endian 0xFFFFDEAD, a NaN in float32 and, in its upper half, in bfloat16 and float16."""
SHARED_BASE = 1024
"""Address of a block's first byte of shared memory."""


class PtxError(RuntimeError):
    """The program did what it must not do."""


class Unsupported(RuntimeError):
    """The emulator cannot do what the program asks of it, right or wrong."""


class _Bytes:
    """Memory at an address, for numpy."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def _check_aligned(addresses: Array, size: int, text: str) -> None:
    if (addresses & addresses.dtype.type(size - 1)).any():
        raise PtxError(f"misaligned access of {size} bytes: {text}")


class GlobalMemory:
    """The tensors that were passed, and nothing else: (address, bytes) each."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.ranges = sorted({r for r in ranges if r[1]})
        self.low = np.array([a for a, _ in self.ranges], np.uint64)
        self.high = np.array([a + n for a, n in self.ranges], np.uint64)
        self.views: list[Array] = [np.asarray(_Bytes(a, n)) for a, n in self.ranges]

    def _locate(self, addresses: Array, size: int, text: str) -> Array:
        if not self.ranges:
            raise PtxError(f"no tensor was passed: {text}")
        _check_aligned(addresses, size, text)
        which = np.searchsorted(self.low, addresses, "right").astype(np.int64) - 1
        outside = (which < 0) | (addresses + np.uint64(size) > self.high[np.maximum(which, 0)])
        if outside.any():
            at = int(addresses[outside][0])
            start, length = min(self.ranges, key=lambda r: min(abs(at - r[0]), abs(at - r[0] - r[1])))
            raise PtxError(
                f"out of bounds: {size} bytes at {at - start:+d} of a tensor of {length} bytes: {text}"
            )
        return which

    def load(self, addresses: Array, size: int, text: str) -> Array:
        """Bytes `[lanes, size]`."""
        which = self._locate(addresses, size, text)
        out = np.empty((len(addresses), size), np.uint8)
        for i in set(which.tolist()):
            of = which == i
            offset = (addresses[of] - self.low[i]).astype(np.int64)
            out[of] = self.views[i][offset[:, None] + np.arange(size)]
        return out

    def store(self, addresses: Array, data: Array, text: str) -> None:
        which = self._locate(addresses, data.shape[1], text)
        for i in set(which.tolist()):
            of = which == i
            offset = (addresses[of] - self.low[i]).astype(np.int64)
            self.views[i][offset[:, None] + np.arange(data.shape[1])] = data[of]


class Window:
    """A block's shared memory, or the local memory of its threads; poisoned at first."""

    def __init__(self, size: int, base: int = 0) -> None:
        self.base = base
        self.bytes = np.resize(POISON, max(size, 16))

    def _index(self, addresses: Array, size: int, text: str) -> Array:
        offset = addresses.astype(np.int64) - self.base
        _check_aligned(offset, size, text)
        if len(offset) and (offset.min() < 0 or offset.max() + size > len(self.bytes)):
            raise PtxError(
                f"out of bounds: {offset.min()} to {offset.max()} of {len(self.bytes)} bytes: {text}"
            )
        return offset[:, None] + np.arange(size)

    def load(self, addresses: Array, size: int, text: str) -> Array:
        """Bytes `[lanes, size]`."""
        found: Array = self.bytes[self._index(addresses, size, text)]
        return found

    def store(self, addresses: Array, data: Array, text: str) -> None:
        self.bytes[self._index(addresses, data.shape[1], text)] = data


class SharedMemory(Window):
    """Shared memory that knows who touched each byte since the last barrier.

    With `watched`, for warps that run one at a time, whatever their order: an access to a byte that another warp wrote since the
    last barrier is a race, and so is a write to one that another warp read.
    """

    def __init__(self, size: int, watched: bool) -> None:
        super().__init__(size, SHARED_BASE)
        self.watched = watched
        self.warp = 0
        self.readers = np.zeros(len(self.bytes), np.uint64)
        self.writer = np.full(len(self.bytes), -1, np.int64)

    def barrier(self) -> None:
        """Every warp has arrived."""
        self.readers[:] = 0
        self.writer[:] = -1

    def load(self, addresses: Array, size: int, text: str) -> Array:
        at = self._index(addresses, size, text)
        if self.watched:
            self._fail_on(self.writer[at], "reads what another warp wrote", text)
            self.readers[at] |= np.uint64(1 << self.warp)
        found: Array = self.bytes[at]
        return found

    def store(self, addresses: Array, data: Array, text: str) -> None:
        at = self._index(addresses, data.shape[1], text)
        if self.watched:
            changed = self.bytes[at] != data  # several warps may write one value
            self._fail_on(np.where(changed, self.writer[at], -1), "writes what another warp wrote", text)
            if (self.readers[at][changed] & ~np.uint64(1 << self.warp)).any():
                raise PtxError(
                    f"race: warp {self.warp} writes what another warp read, with no barrier between: {text}"
                )
            self.writer[at] = self.warp
        self.bytes[at] = data

    def poison(self, addresses: Array, size: int, text: str) -> None:
        """The destination of a copy in flight holds nothing, neither old nor new."""
        self.store(addresses, np.broadcast_to(np.resize(POISON, size), (len(addresses), size)), text)

    def _fail_on(self, writers: Array, what: str, text: str) -> None:
        others: Any = (writers >= 0) & (writers != self.warp)
        if others.any():
            raise PtxError(f"race: warp {self.warp} {what}, with no barrier between: {text}")
