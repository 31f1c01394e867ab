"""Where pagemill keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """Return the folder `kind` in PAGEMILL_CACHE_DIR, else in pagemill of XDG_CACHE_HOME or ~/.cache; it need not exist."""
    if given := os.environ.get("PAGEMILL_CACHE_DIR"):
        return Path(given).expanduser() / kind
    xdg = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored if it is relative
    base = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return base / "pagemill" / kind
