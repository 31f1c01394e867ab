"""Where, when and with what a measurement was made: printed and saved with every result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagemill.cost.environment import environment

PAGES = Path(__file__).parent / "pages"


def describe(*packages: str) -> dict[str, Any]:
    """Return what `pagemill.cost.environment` says, with the versions of `packages`."""
    return environment(packages)


def lines(environment: Mapping[str, Any]) -> list[str]:
    """Return it as lines, for a reader."""
    return [
        f"{name.replace('_', ' ')}: "
        + (", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value))
        for name, value in environment.items()
    ]


def show(environment: Mapping[str, Any]) -> None:
    print("\n".join(lines(environment)))
