"""How much memory there is, what a step needs of it, and one sentence where it is not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pagemill.errors import ConfigError
from pagemill.gpu import Gpu


def free_memory(gpu: Gpu | None) -> int:
    """Bytes of memory that can be had now: on the GPU, or of the machine."""
    if gpu is not None:
        return gpu.memory()[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    # A container's own limit, control groups of version 2, then 1.
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not limited, or no such controller
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
    return max(free, 0)


def gigabytes(num_bytes: int) -> str:
    """As people say it: 10^9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB"


@contextmanager
def spending(gpu: Gpu | None, what: str, lower: str) -> Iterator[None]:
    """Raise `ConfigError`, one sentence, where a GPU's memory does not suffice for `what`; `lower` says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError:
        if gpu is None:
            raise
        free, total = gpu.memory()  # while what the failed call held is still there
        raise ConfigError(
            f"{gpu.device} ran out of memory {what}: {gigabytes(free)} of {gigabytes(total)} were free; {lower}"
        ) from None
