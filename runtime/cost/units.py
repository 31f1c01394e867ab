"""Numbers as people read them: dollars, counts, seconds, shares, bytes."""

from __future__ import annotations

import math

MISSING = "–"


def usd(value: float | None) -> str:
    """Return dollars: $0.0123, $0.09, $4.56, $78.90, $789, $12,300."""
    if value is None:
        return MISSING
    if value == 0:
        return "$0"
    if 0.9995 <= value < 99.995:
        return f"${value:.2f}"
    said = number(value)
    if value < 1:  # at least cents, and no zeros behind them
        whole, _, cents = said.partition(".")
        said = f"{whole}.{cents[:2]}{cents[2:].rstrip('0')}"
    return f"${said}"


def number(value: float | None) -> str:
    """Return a number to three figures, with thousands separated."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    value = _three_figures(value)
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 12)}f}"


def volume(pages: float) -> str:
    """Return a count of pages as it is said: 500, 20 k, 2.5 M, 1,234,567."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if pages >= size and float(f"{pages / size:.3g}") * size == pages:
            return f"{pages / size:.3g} {letter}"
    return f"{pages:,.0f}"


def seconds(value: float | None) -> str:
    """Return a time: 350 µs, 12.3 ms, 4.56 s, 7 min 5 s, 3 h 20 min."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{number(value * 1e6)} µs"
    if value < 0.9995:
        return f"{number(value * 1e3)} ms"
    if value < 120:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours:,} h {minutes} min" if minutes and hours < 100 else f"{hours:,} h"


def percent(share: float | None) -> str:
    """Return a share of one as a percentage, to three figures and at most two decimals."""
    if share is None:
        return MISSING
    if 0 < share < 1e-4:
        return "< 0.01 %"
    return f"{number(share * 100)} %" if share == 0 or share >= 0.01 else f"{share * 100:.2f} %"


def size(num_bytes: float | None) -> str:
    """Return bytes in decimal units."""
    if num_bytes is None:
        return MISSING
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{number(num_bytes / unit)} {letter}"
    return f"{num_bytes:.0f} B"


def score(value: float | None) -> str:
    """Return a score between 0 and 1."""
    return MISSING if value is None else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _three_figures(value: float) -> float:
    return float(f"{value:.3g}")
