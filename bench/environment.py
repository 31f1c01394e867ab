"""Where, when and with what a measurement was made: printed and saved with every result."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

PAGES = Path(__file__).parent / "pages"


def describe(*packages: str) -> dict[str, str]:
    """Return date (UTC), command, machine and load average, and the versions of pagemill, torch and `packages`."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gb():.0f} GB",
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in ("pagemill", "torch", *packages)]
        ),
    }


def show(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        print(f"{name}: {value}")


def _cpu() -> str:
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
