"""`pagemill report`: result files in, one HTML page out that needs no network.

Python does all that is text: the verdict (`verdict.py`) for every volume the page offers, the tables, the escaping (Jinja).
The page's script (`assets/report.js`) only draws: it hands the numbers in a JSON block to Observable Plot, sorts tables,
and switches between what is already there. A content security policy in the page allows the inlined scripts by their hashes and
nothing from elsewhere, so that a string that got past the escaping still could not run.

Plot was taken for the page because its charts are SVG: they print sharply, take the page's colours and fonts from CSS, need no
`eval`, and cost 0.5 MB with D3, where plotly.js and ECharts cost 1.1 MB and more, and uPlot draws on a canvas.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from pagemill import __version__
from pagemill.cost import units
from pagemill.cost.devices import reference
from pagemill.cost.published import Published, published
from pagemill.cost.resultfile import (
    LATENCIES,
    PERCENTILES,
    STAGES,
    WASTE,
    Request,
    ResultError,
    ResultFile,
    Run,
    load,
)
from pagemill.cost.verdict import NEAR, choose, frontier, judge, volumes
from pagemill.decode.page import FIELDS
from pagemill.errors import OutputError, printable
from pagemill.files import written_whole

PAGES_PER_MONTH = 2_000_000
MOST_PAGES_PER_MONTH = 10**12

_SCRIPTS = ("d3-7.9.2.min.js", "plot-0.6.17.min.js", "report.js")
_MARK = b"<!doctype html>\n<!-- pagemill report -->\n"
_MOST_BARS = 40  # runs in a bar chart
_MOST_SERIES = 12
_MOST_LISTED = 30  # pages in the table beside a timeline
_DRAWN, _DRAWN_IN_ALL = 1500, 30_000  # pages of one timeline, of all


def write(
    paths: Sequence[str],
    output: str,
    *,
    pages_per_month: int = PAGES_PER_MONTH,
    usd_per_hour: float | None = None,
    title: str = "",
) -> int:
    """Write the report of the result files `paths` to the file `output`; return its size in bytes.

    `usd_per_hour` is the price of a machine in files that state none. A report that is there is replaced, any other file is not.
    Raises `ResultError` for the files and `OutputError` for the output.
    """
    _may_replace(output)
    page = render(load(paths, usd_per_hour), pages_per_month=pages_per_month, title=title)
    data = page.encode("utf-8")
    try:
        with written_whole(Path(output)) as file:
            file.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{printable(output)} cannot be written: {error.strerror}.") from None
    return len(data)


def render(files: Sequence[ResultFile], *, pages_per_month: int = PAGES_PER_MONTH, title: str = "") -> str:
    """Return the page."""
    if not 1 <= pages_per_month <= MOST_PAGES_PER_MONTH:
        raise ResultError(
            f"{pages_per_month} pages a month: give a number from 1 to {MOST_PAGES_PER_MONTH:,}."
        )
    runs = [run for file in files for run in file.runs]
    offers = published()
    data = _charts(files, runs, offers)
    scripts = [_asset(name) for name in _SCRIPTS]
    page = _template().render(
        title=printable(title)[:200] or "Pages per dollar",
        version=__version__,
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        files=files,
        runs=runs,
        verdicts=[judge(runs, offers, pages) for pages in volumes(pages_per_month)],
        pages_per_month=pages_per_month,
        columns=_columns(runs),
        offers=offers,
        collected=reference().collected,
        near=NEAR,
        data=data,
        stages=STAGES,
        fields=[name for name in FIELDS if any(name in run.bits_by_field for run in runs)],
        waste=WASTE,
        most_bars=_MOST_BARS,
        timelines=[_listed(run) for run in runs if run.timeline],
        several_workloads=_read_different_pages(runs),
        json=Markup(_inline_json(data)),  # escaped by `_inline_json`
        css=Markup(_asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        licences=_asset("LICENSES.txt"),
    )
    return _MARK.decode() + page.removeprefix("<!doctype html>\n")


# What the script draws.


def _charts(files: Sequence[ResultFile], runs: Sequence[Run], offers: Sequence[Published]) -> dict[str, Any]:
    points = [
        {
            "name": run.name,
            "group": run.kind,
            "usd": _short(run.usd_per_million),
            "score": run.score,
            "low": run.quality.low if run.quality else None,
            "high": run.quality.high if run.quality else None,
            "note": f"{units.plural(run.pages, 'page')}, {units.number(run.pages_per_s)} pages/s",
        }
        for run in runs
        if run.usd_per_million and run.score is not None
    ]
    unrated = [
        {"name": run.name, "group": run.kind, "usd": _short(run.usd_per_million)}
        for run in runs
        if run.usd_per_million and run.score is None
    ]
    given = [
        {
            "name": offer.label,
            "group": "published",
            "usd": _short(offer.usd_per_million),
            "score": offer.score,
            "note": f"{offer.basis}. Price: {offer.price_source}. Score: {offer.score_source}",
        }
        for offer in offers
        if offer.usd_per_million and offer.score is not None
    ]
    return {
        "points": points + given,
        "unrated": unrated,
        "frontier": _frontier([p for p in points if p["group"] != "simulated"]),
        "publishedFrontier": _frontier(given),
        "stages": _bars([r for r in runs if r.stages], lambda run: run.stages, 1.0),
        "waste": _bars([r for r in runs if r.waste and r.pages], lambda run: run.waste, None),
        "sweeps": _sweeps(files),
        "alignment": [
            {
                "name": run.name,
                "group": run.kind,
                "bits": q.bits_per_char,
                "low": q.bits_low,
                "high": q.bits_high,
                "score": q.benchmark_score,
            }
            for run in runs
            if (q := run.quality) and q.bits_per_char is not None and q.benchmark_score is not None
        ],
        "timelines": _timelines(runs),
        "shown": _shown(runs),
    }


def _frontier(points: Sequence[dict[str, Any]]) -> list[str]:
    return [points[i]["name"] for i in frontier([(p["usd"], p["score"]) for p in points])]


def _bars(
    runs: Sequence[Run], parts: Callable[[Run], dict[str, float]], scale: float | None
) -> list[dict[str, Any]]:
    """Return stacked bars, one row a part; `scale` None divides by the run's pages."""
    return [
        {"run": run.name, "part": part, "value": _short(value * (scale or 1 / run.pages))}
        for run in runs[:_MOST_BARS]
        for part, value in parts(run).items()
    ]


def _sweeps(files: Sequence[ResultFile]) -> list[dict[str, Any]]:
    """Return series of runs of one file that differ in one number among their settings, and in nothing else."""
    series: list[dict[str, Any]] = []
    for file in files:
        if file.kind == "compare":
            continue
        values: dict[str, set[str | float | None]] = {}
        for key in {key for run in file.runs for key in run.settings}:
            values[key] = {run.settings.get(key) for run in file.runs}
        varied = sorted(key for key in values if len(values[key]) > 1 and key != "model")
        for key in varied:
            groups: dict[str, list[Run]] = defaultdict(list)
            for run in file.runs:
                if isinstance(run.settings.get(key), float):
                    others = [f"{k} {_setting(run.settings.get(k))}" for k in varied if k != key]
                    groups[", ".join([run.model, *others])].append(run)
            for label, members in groups.items():
                if len({run.settings[key] for run in members}) > 1:
                    members.sort(key=lambda run: float(run.settings[key]))
                    series.append({"label": label, "key": key, "points": [_swept(r, key) for r in members]})
    series = series[:_MOST_SERIES]
    for index, one in enumerate(series):
        if sum(one["label"] == other["label"] and one["key"] == other["key"] for other in series) > 1:
            one["label"] = f"{one['label']} #{index + 1}"
    return series


def _swept(run: Run, key: str) -> dict[str, Any]:
    page = run.latency.get("page", {})
    return {
        "name": run.name,
        "value": run.settings[key],
        "rate": _short(run.pages_per_s),
        "p50": _short(page.get("p50")),
        "p95": _short(page.get("p95")),
        "usd": _short(run.usd_per_million),
    }


def _setting(value: str | float | None) -> str:
    return units.MISSING if value is None else f"{value:g}" if isinstance(value, float) else value


def _timelines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    drawn = [run for run in runs if run.timeline]
    share = max(50, min(_DRAWN, _DRAWN_IN_ALL // max(1, len(drawn))))
    return [
        {
            "run": run.name,
            "rows": [
                [
                    r.name,
                    _short(r.arrived),
                    _short(r.scheduled),
                    _short(r.first_token),
                    _short(r.finished),
                    r.status,
                ]
                for r in _thinned(run.timeline, share)
            ],
        }
        for run in drawn
    ]


def _shown(runs: Sequence[Run]) -> str | None:
    """The run whose timeline is shown first: the recommended, if it knows its first tokens, else the fastest that does."""
    chosen = choose(runs)
    telling = [run for run in runs if any(page.first_token is not None for page in run.timeline)]
    measured = [run for run in telling if run.kind != "simulated"] or telling
    if chosen in telling or not telling:
        return chosen.name if chosen else None
    return max(measured, key=lambda run: run.pages_per_s).name


def _thinned(pages: Sequence[Request], most: int) -> list[Request]:
    """Return at most `most` pages in the order of their start: all that did not end well first, then every n-th."""
    bad = [page for page in pages if page.status != "ok"][:most]
    good = [page for page in pages if page.status == "ok"]
    room = most - len(bad)
    step = max(1, -(-len(good) // max(1, room)))
    kept = bad + (good[::step] if room else [])
    return sorted(
        kept, key=lambda page: (page.scheduled if page.scheduled is not None else page.arrived, page.arrived)
    )


@dataclass(frozen=True)
class _Timeline:
    """What is said of one run's pages in words."""

    run: str
    counts: str
    listed: list[Request]


def _read_different_pages(runs: Sequence[Run]) -> bool:
    """Whether runs that read real pages, and kept their names, did not all read the same ones."""
    read = {
        frozenset(page.name.rpartition("/")[2] for page in run.timeline)
        for run in runs
        if run.timeline and run.kind != "simulated"
    }
    return len(read) > 1


def _listed(run: Run) -> _Timeline:
    by_status: dict[str, int] = defaultdict(int)
    for page in run.timeline:
        by_status[page.status] += 1
    counts = ", ".join(
        f"{count:,} {status}" for status, count in sorted(by_status.items(), key=lambda i: -i[1])
    )
    worst = sorted(run.timeline, key=lambda page: (page.status == "ok", page.arrived - page.finished))
    return _Timeline(run.name, f"{units.plural(len(run.timeline), 'page')}: {counts}", worst[:_MOST_LISTED])


# Tables.


@dataclass(frozen=True)
class _Column:
    """One column of the table of runs: what it says, and what it is sorted by."""

    head: str
    hint: str
    cells: list[tuple[float | str | None, str]]
    style: str = "n"
    """n: a number; minor: left out on paper."""


def _columns(runs: Sequence[Run]) -> list[_Column]:
    columns: list[_Column] = []

    def text(head: str, hint: str, values: list[str], style: str = "") -> None:
        columns.append(_Column(head, hint, [(value, value) for value in values], style))

    def column(
        head: str,
        hint: str,
        value: Callable[[Run], float | None],
        show: Callable[[float | None], str],
        style: str = "n",
    ) -> None:
        values = [value(run) for run in runs]
        if any(v is not None for v in values):
            columns.append(_Column(head, hint, [(v, show(v)) for v in values], style))

    def quality(name: str) -> Callable[[Run], float | None]:
        return lambda run: getattr(run.quality, name) if run.quality else None

    def latency(name: str, percentile: str) -> Callable[[Run], float | None]:
        return lambda run: run.latency.get(name, {}).get(percentile)

    text("kind", "measured here, compared with it, or simulated", [run.kind for run in runs])
    column("$/M pages", "per million pages, the machine always busy", lambda r: r.usd_per_million, units.usd)
    column("$/hour", "of the machine", lambda r: r.usd_per_hour, units.usd, "n minor")
    column("score", "benchmark_score: mean of Levenshtein ratio and BLEU-4", lambda r: r.score, units.score)
    column("CER", "character error rate", quality("cer"), units.percent)
    column("degenerate", "share of pages that ended in a loop", quality("degeneration_rate"), units.percent)
    column("bits/char", "of the reference given the page", quality("bits_per_char"), units.number)
    column("pages", "", lambda r: r.pages, lambda v: units.MISSING if v is None else f"{v:,.0f}")
    column("pages/s", "", lambda r: r.pages_per_s, units.number)
    column("tokens/s", "output tokens a second", lambda r: r.output_tokens_per_s, units.number)
    meanings = ("time to first token", "time per output token", "time of a page")
    for name, meaning in zip(LATENCIES, meanings, strict=True):
        for p in PERCENTILES:
            style = "n" if name == "page" and p != "p99" else "n minor"
            column(f"{name} {p}", f"{meaning}, percentile {p[1:]}", latency(name, p), units.seconds, style)
    column("occupancy", "share of the batch in use", lambda r: r.occupancy, units.percent, "n minor")
    column("KV peak", "share of the cache, at most", lambda r: r.kv_peak, units.percent, "n minor")
    column("memory", "peak", lambda r: r.peak_memory_bytes, units.size)
    column(
        "J/page", "energy", lambda r: r.energy_j / r.pages if r.energy_j and r.pages else None, units.number
    )
    text("model", "", [run.model for run in runs], "minor")
    return columns


# Putting it together.


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _inline_json(data: object) -> str:
    """Return JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        usd=units.usd,
        number=units.number,
        seconds=units.seconds,
        percent=units.percent,
        score=units.score,
        volume=units.volume,
    )
    return environment.from_string(_asset("report.html"))


@lru_cache(maxsize=8)
def _asset(name: str) -> str:
    return (resources("pagemill.cost") / "assets" / name).read_text("utf-8")


@lru_cache(maxsize=8)
def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _may_replace(output: str) -> None:
    """Refuse an output that is something else than a report: a slip of the fingers must not cost a result file."""
    try:
        with open(output, "rb") as file:
            if file.read(len(_MARK)) != _MARK:
                raise OutputError(
                    f"{printable(output)} is there and is no report of pagemill: give another name."
                )
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(output)} cannot be written: {error}.") from None
