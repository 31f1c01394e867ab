"""`pagemill bench`: pages a second, how soon they are there, and what they cost, measured on this machine.

A client hands pages to the engine, as a server would: one call a page, at most as many in flight as `Engine.read` keeps.
Offline it hands over the next page as soon as one is finished; with a rate, pages arrive at times drawn from a Poisson process,
and a page that finds the client full counts its waiting. A workload that is longer than the pages at hand goes over them again
and again, each time in another order and with another salt: nothing is in a cache, and no draft comes from an earlier reading
of the same page. No salt is used twice, so repeats are as cold as first runs; what the engine learned of lengths and costs stays.

The result file
---------------
`{"schema": "pagemill-bench/1", "kind": "bench", "environment", "model", "engine", "workload", "price", "runs"}`, where

environment  date, command, machine, cores, memory_bytes, load_average_at_start, system, commit, versions
engine       `Engine.describe()` of the first run's engine
workload     inputs, distinct_pages, pages, seed, warmup, repeats: with the settings, all that is needed to repeat it
price        usd_per_hour and source, or null
runs         one for each point of a sweep, the repeat of median pages_per_s:

name, settings       the settings are all of `Settings`
pages, failed        pages read, and pages that could not be (they count nowhere else)
seconds              from the first page handed over (at a rate: from 0) to the last one finished
pages_per_s          pages / seconds: at a rate below what the machine can do, that rate
spread               pages_per_s of every repeat
tokens_per_s         prompt (images included) and output tokens of the pages read, by the same seconds
page_tokens          image, prompt and output tokens of a page: mean, p50, p95
latency_s            p50, p95 and p99 over pages (linear between ranks; pages that needed no model do not count):
    ttft             to the first token. At a rate from the arrival; offline, where nobody waits, from being taken up:
                     preparation, and from scheduling to the first token
    tpot             from the first token to the last, by output tokens but one
    page             to the last token, begun as ttft
stage_s_per_page     seconds of the run by pages. vision, prefill, decode, guidance and idle add up to seconds / pages;
                     decode holds sampling and bookkeeping (`stats` has them apart), guidance is making token masks, idle is
                     an engine with nothing to do. prepare runs beside them, in other threads
occupancy            places of the batch that were taken, mean over the time that the engine worked
kv_use               KV blocks in use: mean likewise, and peak
waste_tokens         degenerate: output of pages that ended so. discarded: generated and thrown away (loops, attempts not
                     taken). recompute: computed again after a preemption. rejected_drafts. padding: 0, batches are ragged
stats                `EngineStats` of the run
peak_memory_bytes    resident, or allocated on the GPU
energy_j             of processors and GPU, or null
usd_per_page         price * seconds / pages: what the machine costs while it does this; usd_per_million_pages
quality              benchmark_score with its interval (low, high), cer, degeneration_rate, pages; bits_per_char; or null
timeline             source, page, status, arrived, scheduled, first_token, finished (seconds from the start; null where there
                     was none), loops (a count), image, prompt and output (tokens)
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pagemill.cost.environment import environment
from pagemill.cost.meters import EnergyMeter, MemoryMeter
from pagemill.cost.workload import Settings, Workload
from pagemill.errors import ConfigError, PageError, printable
from pagemill.files import written_whole
from pagemill.pages.source import PageRef
from pagemill.results import PageResult
from pagemill.score import Reading, Truth, score, summarize
from pagemill.stats import EngineStats

SCHEMA = "pagemill-bench/1"


class Reader(Protocol):
    """What a run needs of an engine."""

    @property
    def read(self) -> Callable[..., Iterable[PageResult]]:
        """`read(ref, salt=..., params=..., resolution=...)` yields the one result of a page."""

    def stats(self, *, restart_peak: bool = False) -> EngineStats:
        """Counters."""

    def describe(self) -> dict[str, Any]:
        """What the engine is, `max_num_seqs` and `prepare_threads` among it."""


@dataclass(frozen=True)
class _Seen:
    """One page of a run; moments in seconds from its start."""

    turn: int
    arrived: float
    finished: float
    result: PageResult

    @property
    def asked(self) -> bool:
        """Whether the model was asked."""
        return self.result.status != "error" and self.result.shortcut is None

    @property
    def first_token(self) -> float:
        return self.finished - self.result.seconds.decode

    @property
    def scheduled(self) -> float:
        return self.first_token - self.result.seconds.vision - self.result.seconds.prefill

    def begun(self, offline: bool) -> float:
        return self.scheduled - self.result.seconds.prepare if offline else self.arrived

    def row(self) -> dict[str, Any]:
        """The page in the timeline."""

        def moment(t: float) -> float | None:
            return round(max(t, 0.0), 4) if self.asked else None

        r = self.result
        return {
            "source": r.source,
            "page": r.page,
            "status": r.status,
            "arrived": round(self.arrived, 4),
            "scheduled": moment(self.scheduled),
            "first_token": moment(self.first_token),
            "finished": round(self.finished, 4),
            "loops": len(r.loops),
            "image": r.tokens.image,
            "prompt": r.tokens.prompt,
            "output": r.tokens.output,
        }


# The run.


def drive(
    reader: Reader,
    workload: Workload,
    settings: Settings,
    salt: str,
    on_page: Callable[[PageResult], None] | None = None,
) -> list[_Seen]:
    """Read the pages of a run, in order of completion; the first one is handed over (at a rate: could arrive) at second 0."""
    from pagemill.decode.sampler import SamplingParams

    facts = reader.describe()
    resolution = settings.resolution
    how = {
        "resolution": resolution if resolution in ("auto", "full") else int(resolution),
        "params": SamplingParams(
            max_new_tokens=settings.max_new_tokens,
            guidance=settings.guidance,
            guard=settings.guard,  # type: ignore[arg-type]
            drafts=settings.drafts,  # type: ignore[arg-type]
        ),
    }
    arrivals = None if settings.rate is None else workload.arrivals(settings.rate)
    seen: list[_Seen] = []
    begun = time.perf_counter()

    def read(ref: PageRef, turn: int, arrival: float | None) -> None:
        arrived = time.perf_counter() - begun if arrival is None else arrival
        (result,) = reader.read(ref, salt=f"{salt}/{turn}", **how)
        seen.append(_Seen(turn, arrived, time.perf_counter() - begun, result))
        if on_page is not None:
            on_page(result)

    in_flight = int(facts["max_num_seqs"]) + 2 * int(facts["prepare_threads"])
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="pagemill-bench")
    try:
        jobs = []
        for i, (ref, turn) in enumerate(workload.turns()):
            arrival = None if arrivals is None else arrivals[i]
            if arrival is not None:
                time.sleep(max(0.0, begun + arrival - time.perf_counter()))
            jobs.append(pool.submit(read, ref, turn, arrival))
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return seen


def measure(
    reader: Reader,
    workload: Workload,
    settings: Settings,
    salt: str,
    on_page: Callable[[PageResult], None] | None = None,
) -> tuple[dict[str, Any], list[_Seen]]:
    """Do one run; return what was measured, and its pages. Raises `PageError` if no page could be read."""
    energy, memory = EnergyMeter(settings.device), MemoryMeter(settings.device)

    def watch(result: PageResult) -> None:
        energy.joules()
        if on_page is not None:
            on_page(result)

    before = reader.stats(restart_peak=True)
    seen = drive(reader, workload, settings, salt, watch)
    stats = reader.stats().since(before)
    return summary(seen, stats, settings) | {
        "peak_memory_bytes": memory.peak(),
        "energy_j": energy.joules(),
    }, seen


def summary(seen: Sequence[_Seen], stats: EngineStats, settings: Settings) -> dict[str, Any]:
    """The numbers of a run that come from its pages and counters. Raises `PageError` if no page could be read."""
    read = [page for page in seen if page.result.status != "error"]
    if not read:
        raise PageError(f"no page could be read: {seen[0].result.error if seen else 'there was none'}")
    asked = [page for page in read if page.asked]
    offline = settings.rate is None
    seconds = max(page.finished for page in seen) or 1e-9
    prompt, output = (sum(getattr(p.result.tokens, kind) for p in read) for kind in ("prompt", "output"))
    return {
        "pages": len(read),
        "failed": len(seen) - len(read),
        "seconds": seconds,
        "pages_per_s": len(read) / seconds,
        "tokens_per_s": {"prompt": prompt / seconds, "output": output / seconds},
        "page_tokens": {
            kind: _spread([getattr(p.result.tokens, kind) for p in asked])
            for kind in ("image", "prompt", "output")
        },
        "latency_s": {
            "ttft": percentiles([p.first_token - p.begun(offline) for p in asked]),
            "tpot": percentiles(
                [
                    p.result.seconds.decode / (p.result.tokens.output - 1)
                    for p in asked
                    if p.result.tokens.output > 1
                ]
            ),
            "page": percentiles([p.finished - p.begun(offline) for p in asked]),
        },
        "stage_s_per_page": {
            stage: s / len(read)
            for stage, s in (
                ("prepare", sum(p.result.seconds.prepare for p in read)),
                ("vision", stats.encode_s),
                ("prefill", stats.prefill_s),
                ("decode", stats.decode_s + stats.sampling_s + stats.bookkeeping_s),
                ("guidance", stats.masks_s),
                ("idle", max(seconds - stats.busy_s, 0.0)),
            )
        },
        "occupancy": stats.occupancy,
        "kv_use": {
            "mean": stats.kv_use,
            "peak": stats.kv_peak_blocks / stats.num_blocks if stats.num_blocks else 0.0,
        },
        "waste_tokens": {
            "degenerate": sum(p.result.tokens.output for p in read if p.result.status == "degenerate"),
            "discarded": stats.discarded_tokens,
            "padding": 0,
            "recompute": stats.recompute_tokens,
            "rejected_drafts": stats.rejected_draft_tokens,
        },
        "stats": asdict(stats),
        "timeline": [p.row() for p in sorted(seen, key=lambda p: p.arrived)],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, linear between ranks; empty for no values."""
    if not values:
        return {}
    found = np.percentile(np.asarray(values, dtype=np.float64), (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95 = np.percentile(np.asarray(values, dtype=np.float64), (50, 95))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p95": float(p95)}


def quality(truths: Sequence[Truth], seen: Sequence[_Seen]) -> dict[str, Any] | None:
    """Score the first reading of every page by `pagemill.score`; None without truth. Raises `ScoreError`."""
    if not truths:
        return None
    readings = [
        Reading(
            name=p.result.source,
            page=p.result.page,
            fields={name: getattr(p.result, name) for name in ("header", "margin", "footer", "text")},
            raw=p.result.raw or None,
            finish_reason=p.result.finish_reason,
            status=p.result.status,
            error=p.result.error,
            tokens=p.result.tokens.output,
        )
        for p in seen
        if p.turn == 0
    ]
    found = summarize(score(truths, readings)[0])
    of_score = found["fields"]["benchmark_score"]
    return {
        "benchmark_score": of_score["value"],
        "low": of_score["low"],
        "high": of_score["high"],
        "cer": found["fields"]["cer"]["value"],
        "degeneration_rate": found["degeneration_rate"]["value"],
        "bits_per_char": None,
        "pages": found["pages"],
    }


def bench(
    workload: Workload,
    runs: Sequence[tuple[str, Settings]],
    *,
    load: Callable[[Settings], Any],
    price: Mapping[str, Any] | None = None,
    on_run: Callable[[str], None] | None = None,
    on_page: Callable[[PageResult], None] | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure `runs`, with engines from `load` (context managers); return the result file's content.

    `on_run` is called before each run with its name, `on_page` after each page, from any thread, `on_result` with the result so
    far after each run.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "bench",
        "environment": environment(),
        "model": runs[0][1].model,
        "engine": {},
        "workload": workload.describe(),
        "price": None if price is None else dict(price),
        "runs": [],
    }
    by_engine = itertools.groupby(runs, key=lambda run: (run[1].model, run[1].engine_options()))
    for _, group in by_engine:
        same = list(group)
        with load(same[0][1]) as engine:
            result["engine"] = result["engine"] or engine.describe()
            for name, settings in same:
                if on_run is not None:
                    on_run(name)
                result["runs"].append(_point(engine, workload, name, settings, price, on_page))
                if on_result is not None:
                    on_result(result)
    return result


def _point(
    engine: Reader,
    workload: Workload,
    name: str,
    settings: Settings,
    price: Mapping[str, Any] | None,
    on_page: Callable[[PageResult], None] | None,
) -> dict[str, Any]:
    """All repeats of one run; the one of median speed stands for them."""
    if workload.warmup:
        warm = replace(workload, pages=workload.warmup)
        drive(engine, warm, replace(settings, rate=None), f"{name}/warm")
    repeats = [measure(engine, workload, settings, f"{name}/{i}", on_page) for i in range(workload.repeats)]
    repeats.sort(key=lambda done: done[0]["pages_per_s"])
    numbers, seen = repeats[(len(repeats) - 1) // 2]
    run = {
        "name": name,
        "settings": asdict(settings),
        "model": settings.model,
        **numbers,
        "spread": [done["pages_per_s"] for done, _ in repeats],
        "usd_per_page": None,
        "usd_per_million_pages": None,
        "quality": quality(workload.truths, seen),
    }
    if price is not None:
        run["usd_per_page"] = price["usd_per_hour"] / 3600 * numbers["seconds"] / numbers["pages"]
        run["usd_per_million_pages"] = 1e6 * run["usd_per_page"]
    run["timeline"] = run.pop("timeline")  # last: it is long
    return run


def write(result: Mapping[str, Any], path: str) -> None:
    """Write a result file, whole or not at all. Raises `ConfigError` where it cannot."""
    try:
        with written_whole(Path(path)) as beside, open(beside, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False, allow_nan=False)
    except OSError as error:
        raise ConfigError(f"{printable(path)} cannot be written: {error.strerror or error}.") from None


def check_writable(path: str) -> None:
    """Raise `ConfigError` if a result could not be written to `path`: before an hour of work, not after."""
    target = Path(path)
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise ConfigError(
            f"{printable(path)} cannot be written: give a file in a folder that exists and is yours."
        )


# For people.


class Progress:
    """A line on a terminal that says which run it is and how many pages are done; nothing elsewhere."""

    def __init__(self, console: Console, runs: int, workload: Workload) -> None:
        self._status = console.status("loading") if console.is_terminal else None
        self._runs, self._pages = runs, workload.pages * workload.repeats
        self._run = self._done = 0
        self._name = ""

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def on_run(self, name: str) -> None:
        """A run begins."""
        self._run, self._done, self._name = self._run + 1, 0, name
        self._say()

    def on_page(self, _: object = None) -> None:
        """A page is done; any thread may say so."""
        self._done += 1
        self._say()

    def _say(self) -> None:
        if self._status is not None:
            which = f"run {self._run} of {self._runs}, " if self._runs > 1 else ""
            self._status.update(
                escape(printable(f"{which}{self._name}: {self._done} of {self._pages} pages"))
            )


def show(result: Mapping[str, Any]) -> RenderableType:
    """Return the runs as tables: speed, latency and cost; where the time of a page went; what was wasted."""
    runs, load = result["runs"], result["workload"]
    where = result["environment"]
    title = (
        f"{result['model']}, {load['pages']} page{'' if load['pages'] == 1 else 's'} a run "
        f"({load['distinct_pages']} distinct), {where['machine']}, {where['cores']} cores"
    )
    parts: list[RenderableType] = [
        Text(printable(title), style="bold"),
        "",
        _speed(runs, result["price"]),
        "",
        _latency(runs),
        "",
        _stages(runs),
        "",
        _waste(runs),
    ]
    if where["load_average_at_start"] > 0.5 * where["cores"]:
        parts.append(
            Text(
                f"Other programs ran when this began (load average {where['load_average_at_start']}): take the "
                "times as upper bounds.",
                style="yellow",
            )
        )
    if failed := sum(run["failed"] for run in runs):
        parts.append(Text(f"{failed} pages could not be read; they count nowhere.", style="yellow"))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table


def _speed(runs: Sequence[Mapping[str, Any]], price: Mapping[str, Any] | None) -> Table:
    scored = any(run["quality"] for run in runs)
    energy = any(run["energy_j"] is not None for run in runs)
    columns = ["pages/s", "tokens/s", "batch", "KV peak", "memory"]
    columns += ["J/page"] * energy + ["$/M pages"] * (price is not None) + ["score"] * scored
    table = _table("speed: pages and output tokens, share of places and KV blocks taken", "", *columns)
    for run in runs:
        cells = [
            f"{run['pages_per_s']:.3g}",
            f"{run['tokens_per_s']['output']:.0f}",
            f"{100 * run['occupancy']:.0f} %",
            f"{100 * run['kv_use']['peak']:.0f} %",
            f"{run['peak_memory_bytes'] / 1e9:.2f} GB",
        ]
        if energy:
            cells.append("-" if run["energy_j"] is None else f"{run['energy_j'] / run['pages']:.1f}")
        if price is not None:
            cells.append(f"{run['usd_per_million_pages']:,.2f}")
        if scored:
            found = run["quality"]
            cells.append("-" if not found else f"{found['benchmark_score']:.3f}")
        table.add_row(escape(printable(run["name"])), *cells)
    return table


def _latency(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("latency: p50, p95, p99", "", "first token, s", "a token, ms", "page, s")
    for run in runs:
        latency = run["latency_s"]
        cells = [
            " ".join(f"{scale * s:.{digits}f}" for s in latency[kind].values()) or "-"
            for kind, scale, digits in (("ttft", 1, 2), ("tpot", 1e3, 1), ("page", 1, 2))
        ]
        table.add_row(escape(printable(run["name"])), *cells)
    return table


def _stages(runs: Sequence[Mapping[str, Any]]) -> Table:
    stages = list(runs[0]["stage_s_per_page"])
    table = _table("seconds a page; prepare runs beside the others, which add up", "", *stages)
    for run in runs:
        table.add_row(
            escape(printable(run["name"])), *(f"{run['stage_s_per_page'][stage]:.3f}" for stage in stages)
        )
    return table


def _waste(runs: Sequence[Mapping[str, Any]]) -> Table:
    kinds = list(runs[0]["waste_tokens"])
    titles = (kind.removeprefix("rejected_") for kind in kinds)
    table = _table("tokens wasted, of all computed", "", *titles, "all")
    for run in runs:
        stats = run["stats"]
        computed = sum(
            stats[f"{kind}_tokens"] for kind in ("prefill", "decode", "recompute", "rejected_draft")
        )
        cells = [f"{run['waste_tokens'][kind]:,}" for kind in kinds]
        table.add_row(escape(printable(run["name"])), *cells, f"{computed:,}")
    return table
