"""Where, when and with what a measurement was made: saved with every result."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("pagemill", "torch", "numpy", "tokenizers", "llguidance", "pillow", "pypdfium2")


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return date (UTC), command, machine, cores, memory, load, versions of what matters and of `packages`, and the commit."""
    program = [os.path.basename(sys.argv[0])]
    if program == ["__main__.py"]:  # python -m pagemill
        program = ["pagemill"]
    elif program[0].endswith(".py"):
        program = ["python", os.path.relpath(sys.argv[0])]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([*program, *sys.argv[1:]]),
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in (*_PACKAGES, *packages) if (found := _version(name)) is not None},
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this file is in, marked where files differ from it; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
