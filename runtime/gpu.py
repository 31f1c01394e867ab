"""What an engine asks of a GPU besides arithmetic: memory, copies behind its back, graphs.

A CPU needs none of it. This is the one seam to a device: tests put a fake in its place (`tests/fake_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pagemill.errors import ConfigError, DeviceError


class Gpu:
    """One CUDA (or HIP) device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._second: torch.cuda.Stream | None = None

    def use(self) -> None:
        """Make it this thread's device: Triton launches on the current one, whatever its arguments lie on."""
        torch.cuda.set_device(self.device)

    def memory(self) -> tuple[int, int]:
        """Bytes that can be had now, what torch holds without using it included, and bytes that the device has."""
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + held, total

    def alive(self) -> bool:
        """Whether it still runs anything for this process: waits for what it was given."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def tidy(self) -> None:
        """Give back what torch holds without using it: pieces of one size are no room for another."""
        torch.cuda.empty_cache()

    def peak(self, run: Callable[[], None]) -> int:
        """Bytes that `run` takes at its height, beyond what was taken before."""
        self.tidy()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.cuda.device(self.device):
            run()
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved(self.device) - before
        self.tidy()
        return peak

    def host_memory(self, num_bytes: int) -> Tensor:
        """Pinned memory, uint8 `[num_bytes]`: only from there does a copy run behind the calls."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, memory: Tensor, to: Tensor) -> Callable[[], None]:
        """Copy pinned memory to the device, behind the calls; return what waits until it has been read."""
        to.copy_(memory, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def fetch(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Copy to the CPU, behind the calls; return what waits for it and returns the copies."""
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))

        def wait() -> list[Tensor]:
            event.synchronize()
            return copies

        return wait

    def beside(self, run: Callable[[], Iterable[Tensor]]) -> tuple[list[Tensor], Callable[[Tensor], None]]:
        """Run on a second stream, which waits for nothing; return its tensors, and what is to be called with each before it is
        read: it makes the current stream wait for them.

        `run` reads what was on the device before this was first called, or what it brings there itself.
        """
        with torch.cuda.device(self.device):
            if self._second is None:
                self._second = torch.cuda.Stream()
                self._second.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._second):
                found = list(run())
                event = torch.cuda.Event()
                event.record()

        def join(tensor: Tensor) -> None:
            current = torch.cuda.current_stream(self.device)
            event.wait(current)
            tensor.record_stream(
                current
            )  # its memory is the second stream's: not to be reused while this one reads it

        return found, join

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` gives the device; return what makes it do the same again, on the same memory.

        `run` is called for its kernels first, on a stream beside, for compiling and loading them cannot be recorded. It must look
        at no value, and all its memory that outlives it must be there before. Graphs share one pool: record the largest first.
        """
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self._side is None:
                self._side = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                run()
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what another engine's thread does meanwhile, allocate say, does not end the recording.
            try:
                with torch.cuda.graph(graph, self._pool, self._side, "thread_local"):
                    run()
            except RuntimeError as error:  # ending a recording that broke off fails, too
                cause = error.__context__
                raise cause if isinstance(cause, torch.OutOfMemoryError) else error from None
        return graph.replay


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on the device. To a GPU it is copied from pinned memory, behind the calls: a plain copy waits for
    all that the stream was given before."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(
        device, non_blocking=True
    )  # torch keeps the pinned memory until it was read


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a torch device; None for a CPU."""
    return Gpu(device) if device.type == "cuda" else None


def named_device(name: str) -> torch.device:
    """The device called cpu, cuda or cuda:N. Raises `ConfigError` where there is none of that name, and `DeviceError` where CUDA
    does not start."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device should be cpu or cuda (or cuda:N), got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device should be cpu or cuda (or cuda:N), got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.backends.cuda.is_built() and torch.version.hip is None:
        raise ConfigError(
            f"device {name} was asked for, but this torch is built for CPUs only: it sees no CUDA device"
        )
    if not torch.cuda.is_available():
        needs = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
        raise ConfigError(
            f"device {name} was asked for, but torch sees no CUDA device: is there a GPU, and a driver not older than "
            f"{needs} needs?"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ConfigError(f"there is no device {name}: torch sees {count}, cuda:0 to cuda:{count - 1}")
    try:
        current = torch.cuda.current_device()
    except RuntimeError as error:  # the driver does not start, whatever it counts
        raise DeviceError(f"device {name} cannot be used ({what_it_said(error)})") from error
    return torch.device("cuda", current if device.index is None else device.index)


_PREFIXES = ("CUDA error: ", "HIP error: ", "Triton Error [CUDA]: ")
_HARMLESS = (
    "out of memory",
    "invalid argument",
    "invalid configuration",
    "too many resources",
    "no kernel image",
)
"""Refusals of one call, after which the device works as before."""


def is_of_device(error: Exception) -> bool:
    """Whether the device or its driver raised an error, and not torch (that it ran out of memory, say) or this program.

    Torch before 2.8 raises RuntimeError for it, and so does Triton.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    accelerator: type[Exception] | None = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(error, accelerator)) or str(error).startswith(_PREFIXES)


def what_it_said(error: Exception) -> str:
    """An error of a device without the lines of advice that torch adds for who looks for the kernel."""
    return str(error).partition("\n")[0]


@contextmanager
def starting(device: str, model: str) -> Iterator[None]:
    """Raise `DeviceError`, one sentence, where the device fails while `model` is loaded to it."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_device(error):
            raise
        raise DeviceError(
            f"{device} failed while {model} was loaded ({what_it_said(error)}); try again, or take another device"
        ) from error


def is_lost(error: Exception, gpu: Gpu | None) -> bool:
    """Whether an error (an illegal access, an uncorrectable ECC error, a device off the bus) has ended this process's
    context on the device, so that nothing will run there until the process is begun anew. Running out of memory has not.

    The device is asked where the error does not tell: cuBLAS's own (CUBLAS_STATUS_...) are the same for a context that is
    lost as for too little memory, and what fails first on one that is lost may say anything.
    """
    told = is_of_device(error) and "CUBLAS_STATUS_" not in str(error)
    if told and not any(harmless in what_it_said(error) for harmless in _HARMLESS):
        return True
    return gpu is not None and not gpu.alive()
