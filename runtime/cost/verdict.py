"""What a volume of pages costs a month with each run and each published price, and what to make of it in a few sentences.

A machine is paid for in one of two ways. Rented by the hour, it costs pages / (pages/s) x price and nothing while it idles.
Left on, whole machines are paid for all month, and none is loaded above `LOAD`, since pages do not arrive evenly.

The run that is recommended is the cheapest of those within `NEAR` of the best benchmark_score; simulated runs only if nothing was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagemill.cost.devices import HOURS_A_MONTH
from pagemill.cost.published import Published
from pagemill.cost.resultfile import Run
from pagemill.cost.units import number, percent, plural, score, seconds, usd, volume

LOAD = 0.8
"""Highest mean utilisation of machines that are left on."""
NEAR = 0.01
"""A difference of benchmark_score that is not worth paying for."""
VOLUMES = tuple(digit * 10**power for power in range(3, 9) for digit in (1, 2, 5))
"""Pages a month, from a thousand to half a billion."""
_MOST_RUNS = 8


@dataclass(frozen=True)
class Row:
    """What one way to read the pages costs in a month."""

    label: str
    kind: str
    score: float | None
    usd: float
    """Pages paid by the page, machines by the hour that they work."""
    always_on: float | None
    """Dollars, if machines are left on all month."""
    machines: int | None
    chosen: bool


@dataclass(frozen=True)
class Verdict:
    """What to say about one volume."""

    pages: int
    headline: tuple[tuple[str, bool], ...]
    """Its text in pieces; True: to be stressed."""
    sentences: tuple[str, ...]
    rows: tuple[Row, ...]
    """The cheapest first."""


def volumes(extra: int) -> list[int]:
    """Return the volumes that the page offers, `extra` among them."""
    return sorted({*VOLUMES, extra})


def machines(pages: float, pages_per_s: float) -> int:
    """Return how many machines read that many pages a month, loaded to at most `LOAD`."""
    return max(1, math.ceil(pages / (pages_per_s * 3600 * HOURS_A_MONTH * LOAD) - 1e-9))


def always_on(run: Run, pages: float) -> tuple[int, float] | None:
    """Return how many machines, and dollars a month with all left on; None where the price is not by the hour."""
    if run.usd_per_hour is None or run.pages_per_s <= 0:
        return None
    count = machines(pages, run.pages_per_s)
    return count, count * HOURS_A_MONTH * run.usd_per_hour


def frontier(points: Iterable[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto frontier of (dollars, score), the cheapest first: nothing is both cheaper and better."""
    order = sorted(enumerate(points), key=lambda item: (item[1][0], -item[1][1], item[0]))
    best, kept = -math.inf, []
    for index, (_, value) in order:
        if value > best:
            best = value
            kept.append(index)
    return kept


def choose(runs: Sequence[Run]) -> Run | None:
    """Return the run to recommend; None if none has a price."""
    priced = [run for run in runs if run.usd_per_million is not None]
    pool = [run for run in priced if run.kind != "simulated"] or priced
    best = max((run.score for run in pool if run.score is not None), default=None)
    if best is not None:
        pool = [run for run in pool if run.score is not None and run.score >= best - NEAR]
    return min(pool, key=lambda run: run.usd_per_million or 0.0, default=None)


def judge(runs: Sequence[Run], offers: Sequence[Published], pages: int) -> Verdict:
    """Return what `pages` a month cost and which run to take."""
    chosen = choose(runs)
    offers = [offer for offer in offers if offer.score is not None and offer.usd_per_million is not None]
    rows = _rows(runs, offers, pages, chosen)
    if chosen is None or chosen.usd_per_million is None:
        fastest = max(runs, key=lambda run: run.pages_per_s)
        takes = seconds(pages / fastest.pages_per_s) if fastest.pages_per_s > 0 else "forever"
        return Verdict(
            pages,
            (
                (f"{volume(pages)} pages take ", False),
                (fastest.name, True),
                (
                    f", the fastest run, {takes} of machine time. No run has a price to make dollars of it.",
                    False,
                ),
            ),
            (
                "State what the machine costs: pagemill report --usd-per-hour, or the price of pagemill bench.",
            ),
            rows,
        )
    cost = pages / 1e6 * chosen.usd_per_million
    by = ", by simulation," if chosen.kind == "simulated" else ""
    return Verdict(
        pages,
        (
            (f"At {volume(pages)} pages a month, ", False),
            (chosen.name, True),
            (f"{by} reads them for ", False),
            (f"{usd(cost)} a month", True),
            (".", False),
        ),
        tuple(
            sentence
            for sentence in (
                _how(chosen, pages),
                _quality(chosen, runs),
                _stability(chosen),
                *_against(chosen, offers, pages, cost),
            )
            if sentence
        ),
        rows,
    )


def _rows(
    runs: Sequence[Run], offers: Sequence[Published], pages: int, chosen: Run | None
) -> tuple[Row, ...]:
    cheapest = sorted(
        (run for run in runs if run.usd_per_million is not None),
        key=lambda run: (run is not chosen, run.usd_per_million),
    )[:_MOST_RUNS]
    rows = []
    for run in cheapest:
        count, month = always_on(run, pages) or (None, None)
        cost = pages / 1e6 * (run.usd_per_million or 0.0)
        rows.append(Row(run.name, run.kind, run.score, cost, month, count, run is chosen))
    for offer in offers:
        cost = offer.usd(pages) or 0.0
        rows.append(Row(offer.label, "published", offer.score, cost, None, None, False))
    return tuple(sorted(rows, key=lambda row: row.usd))


def _how(run: Run, pages: int) -> str:
    per_thousand = f"{usd((run.usd_per_million or 0.0) / 1000)} per 1,000 pages"
    on = always_on(run, pages)
    if on is None:
        return f"That is {per_thousand}."
    count, month = on
    paid = pages / 1e6 * (run.usd_per_million or 0.0) / run.usd_per_hour if run.usd_per_hour else 0.0
    used = pages / run.pages_per_s / 3600
    share = "paid only while it works" if used > 0.99 * paid else f"{percent(used / paid)} of them at work"
    return (
        f"That is {per_thousand}: at {number(run.pages_per_s)} pages/s they take {_hours(paid)} of a machine at "
        f"{usd(run.usd_per_hour)} an hour, {share}. Left on all month, loaded to at most "
        f"{100 * LOAD:.0f} %, {plural(count, 'machine')} would cost {usd(month)}."
    )


def _hours(hours: float) -> str:
    return f"{number(hours)} {'hour' if number(hours) == '1.00' else 'hours'}"


def _quality(run: Run, runs: Sequence[Run]) -> str:
    if run.score is None:
        return "Its benchmark_score is not known: without a score, cheap says nothing about good."
    q = run.quality
    bounds = f" ({score(q.low)} to {score(q.high)})" if q and q.low is not None and q.high is not None else ""
    said = f"Its benchmark_score is {score(run.score)}{bounds}"
    rated = [r for r in runs if r.score is not None and r.usd_per_million is not None]
    rated = [r for r in rated if (r.kind == "simulated") == (run.kind == "simulated")]
    best = max(rated, key=lambda r: r.score or 0.0)
    if best is not run and (best.score or 0.0) > run.score:
        more = _times(best.usd_per_million or 0.0, run.usd_per_million or 0.0)
        said += f"; the best, {best.name} ({score(best.score)}), costs {more}"
    elif len(rated) > 1:
        said += f", the best of {len(rated)} runs"
    low = min(rated, key=lambda r: r.usd_per_million or 0.0)
    if low is not run:
        less = _times(low.usd_per_million or 0.0, run.usd_per_million or 0.0)
        said += f"; the cheapest, {low.name}, costs {less} but reaches only {score(low.score)}"
    return said + "."


def _stability(run: Run) -> str:
    rate = run.quality.degeneration_rate if run.quality else None
    if rate is None:
        return ""
    if rate == 0:
        return f"None of its {plural(run.pages, 'page')} ran into a loop."
    said = f"{percent(rate)} of its pages degenerated into loops"
    lost, output = run.waste.get("degenerate"), run.output_tokens_per_s
    if lost and output:
        said += f", which took {percent(min(1.0, lost / (output * run.seconds)))} of the output tokens"
    return said + "."


def _against(run: Run, offers: Sequence[Published], pages: int, cost: float) -> Iterable[str]:
    if not offers:
        return
    costs = {
        offer.label: offer.usd(pages) or 0.0 for offer in offers if not offer.basis.startswith("published")
    }
    offers = [offer for offer in offers if offer.label in costs]
    cheap = min(offers, key=lambda offer: costs[offer.label])
    best = max(offers, key=lambda offer: offer.score or 0.0)
    said = (
        f"Of the published API prices, the cheapest is {cheap.label} at {usd(costs[cheap.label])} "
        f"({_times(costs[cheap.label], cost)})"
    )
    if best is not cheap:
        said += (
            f"; {best.label}, the best of them on the DharmaOCR benchmark ({score(best.score)}), comes to "
            f"{usd(costs[best.label])} ({_times(costs[best.label], cost)})"
        )
    yield said + "."
    on = always_on(run, 1)
    if on is not None and cheap.usd_per_million:
        even = on[1] / (cheap.usd_per_million / 1e6)
        if machines(even, run.pages_per_s) == 1:
            yield (
                f"Against {cheap.label}, a machine that is left on pays from {number(even)} pages a month."
            )


def _times(cost: float, base: float) -> str:
    """Return `cost` relative to `base`, in words."""
    if base <= 0 or cost <= 0:
        return usd(cost)
    ratio = cost / base
    if ratio >= 1.5:
        return f"{float(f'{ratio:.2g}'):,g} times as much"
    if ratio >= 1.005:
        return f"{100 * ratio - 100:.0f} % more"
    return f"{100 - 100 * ratio:.0f} % less" if ratio < 0.995 else "as much"
