"""Memory and energy of a run, where the system lets them be read.

Energy is that of the whole processor packages (RAPL, in /sys/class/powercap, often readable by root alone) and of the GPU
that the engine runs on (NVML, through nvidia-ml-py): all that was drawn meanwhile, by whatever program.
"""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made. RAPL's counters start again after some minutes of full load: call `joules` once in a while.

    Any thread may.
    """

    def __init__(self, device: str = "cpu", powercap: Path = _POWERCAP) -> None:
        self._lock = threading.Lock()
        self._total = 0.0
        self._counters = [*_packages(powercap), *_gpu(device)]
        self._last = [read() for read, _ in self._counters]

    def joules(self) -> float | None:
        """Return the energy drawn so far; None where none can be read."""
        with self._lock:
            for i, (read, wraps_at) in enumerate(self._counters):
                with suppress(Exception):
                    now = read()
                    self._total += now - self._last[i] + (wraps_at if now < self._last[i] else 0.0)
                    self._last[i] = now
        return self._total if self._counters else None


_Counter = tuple[Callable[[], float], float]
"""A reading in joules, and where it starts again from 0."""


def _packages(powercap: Path) -> list[_Counter]:
    found: list[_Counter] = []
    with suppress(OSError, ValueError):  # parts of a package have a second number; they are in the package's
        for folder in sorted(f for f in powercap.iterdir() if re.fullmatch(r"intel-rapl:\d+", f.name)):
            counter = folder / "energy_uj"
            float(counter.read_text())
            wraps_at = float((folder / "max_energy_range_uj").read_text()) / 1e6
            found.append((lambda counter=counter: float(counter.read_text()) / 1e6, wraps_at))  # type: ignore[misc]
    return found


def _gpu(device: str) -> list[_Counter]:
    if not device.startswith("cuda"):
        return []
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

        def read() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        read()
        return [(read, 0.0)]
    except Exception:  # not installed, no driver, a card that does not count
        return []


class MemoryMeter:
    """Peak bytes since it was made: allocated on the GPU, or resident in this process (its mapped files included)."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # else the peak is that of the process's whole life
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak in bytes."""
        if self._device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        with (
            suppress(OSError, StopIteration, ValueError),
            open("/proc/self/status", encoding="ascii") as file,
        ):
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
