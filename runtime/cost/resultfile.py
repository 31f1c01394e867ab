"""Result files of `pagemill bench`, `compare` and the simulator, read back and checked.

Everything in such a file is a stranger's word: sizes are bounded, numbers have to be finite and not negative, text is made
printable and cut. What is missing or wrong is one `ResultError` that names the file and the key. Keys that are not known are
passed over, so that a newer pagemill may add some without a new version of the schema.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pagemill.decode.page import FIELDS
from pagemill.errors import PagemillError, printable

SCHEMA = "pagemill-bench/1"
KINDS = {"bench": "measured", "compare": "compared", "simulation": "simulated"}
"""The `kind` of a file, and what its runs are called."""
STAGES = ("prepare", "vision", "prefill", "decode", "guidance", "idle")
WASTE = ("degenerate", "discarded", "padding", "recompute", "rejected_drafts")
LATENCIES = ("ttft", "tpot", "page")
PERCENTILES = ("p50", "p95", "p99")

MAX_FILE_BYTES = 50_000_000
MAX_RUNS = 500
"""Of all files together."""
_MAX_PAGES = 2_000_000  # of one timeline
_MAX_FACTS = 300  # of an environment, an engine, a workload
_LARGEST = 1e18
_LONGEST_NAME, _LONGEST_TEXT = 200, 2000


class ResultError(PagemillError):
    """A result file cannot be read; names the file and the key."""


@dataclass(frozen=True)
class Quality:
    """How well the pages were read. Scores and rates lie in [0, 1]; `low` and `high` bound the score."""

    benchmark_score: float | None
    low: float | None
    high: float | None
    cer: float | None
    degeneration_rate: float | None
    bits_per_char: float | None
    bits_low: float | None
    bits_high: float | None


@dataclass(frozen=True)
class Request:
    """One page's way through a run. Times are seconds from the start of the run; None where it did not get there."""

    name: str
    arrived: float
    scheduled: float | None
    first_token: float | None
    finished: float
    status: str
    loops: int


@dataclass(frozen=True)
class Run:
    """One run of one file. Times in seconds, money in US dollars; None: not known."""

    name: str
    file: int
    """Index of its file."""
    kind: str
    """One of the values of `KINDS`."""
    model: str
    settings: dict[str, str | float]
    pages: int
    seconds: float
    pages_per_s: float
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    latency: dict[str, dict[str, float]]
    """By `LATENCIES`, then by `PERCENTILES`; what is not known is left out, here and below."""
    stages: dict[str, float]
    """Seconds a page. `prepare` runs beside the others, which add up to `seconds`."""
    occupancy: float | None
    kv_mean: float | None
    kv_peak: float | None
    waste: dict[str, float]
    """Tokens."""
    peak_memory_bytes: float | None
    energy_j: float | None
    usd_per_hour: float | None
    usd_per_million: float | None
    quality: Quality | None
    bits_by_field: dict[str, float]
    error: str
    """Why it read nothing, or not all; empty if it did."""
    timeline: tuple[Request, ...]

    @property
    def score(self) -> float | None:
        """The benchmark_score, if there is one."""
        return self.quality.benchmark_score if self.quality else None


@dataclass(frozen=True)
class ResultFile:
    """One result file."""

    path: str
    kind: str
    model: str
    price_source: str | None
    usd_per_hour: float | None
    environment: list[tuple[str, str]]
    engine: list[tuple[str, str]]
    workload: list[tuple[str, str]]
    runs: tuple[Run, ...]


def load(paths: Sequence[str], usd_per_hour: float | None = None) -> list[ResultFile]:
    """Read result files; `usd_per_hour` is the price of a machine in files that state none.

    Names of runs are made unique over all files. Raises `ResultError`.
    """
    files: list[ResultFile] = []
    for path in paths:
        files.append(_File(path, len(files), usd_per_hour).read())
        if sum(len(file.runs) for file in files) > MAX_RUNS:
            raise ResultError(f"{printable(path)}: more than {MAX_RUNS} runs in all; give fewer files.")
    if not any(file.runs for file in files):
        raise ResultError(f"{printable(', '.join(paths))[:500]}: there is no run in it to report.")
    return _distinct(files)


def _distinct(files: list[ResultFile]) -> list[ResultFile]:
    """Make the names of runs unique: by the file's name, then by number."""
    names = Counter(run.name for file in files for run in file.runs)
    taken: set[str] = set()

    def unique(run: Run, path: str) -> Run:
        name = run.name
        if names[name] > 1 and len(files) > 1:
            name = f"{name} ({_stem(path)})"
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name} #{count}"
        taken.add(candidate)
        return replace(run, name=candidate)

    return [replace(file, runs=tuple(unique(run, file.path) for run in file.runs)) for file in files]


def _whose(name: str, model: str, settings: dict[str, str | float]) -> str:
    """A run's name, with the model's where it tells settings alone: beside runs of other files that would not say enough."""
    first = name.partition(", ")[0]
    told = first == "offline" or first.partition("=")[0] in settings or first == settings.get("device")
    return f"{model}, {name}" if told and model not in name else name


def _stem(path: str) -> str:
    return _clip(os.path.splitext(os.path.basename(path))[0], _LONGEST_NAME)


def _clip(text: str, longest: int) -> str:
    text = printable(text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"


class _File:
    """One file while it is read; `where` in its methods is the way to a value, for the error message."""

    def __init__(self, path: str, index: int, usd_per_hour: float | None) -> None:
        self.path, self.index, self.usd_per_hour = path, index, usd_per_hour

    def fail(self, what: str) -> NoReturn:
        raise ResultError(f"{printable(self.path)}: {printable(what)}") from None

    def read(self) -> ResultFile:
        top = self.mapping(self.parse(), "the file")
        schema = top.get("schema")
        if schema != SCHEMA:
            said = f"schema {_clip(repr(schema), 60)}" if "schema" in top else "no schema"
            self.fail(
                f"it has {said}, not {SCHEMA!r}: it is no result of this version; run pagemill bench again."
            )
        kind = top.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            self.fail(f"kind should be one of {', '.join(KINDS)}, not {_clip(repr(kind), 60)}.")
        model = self.text(top, "model", "the file")
        price = self.mapping(top.get("price") or {}, "price")
        stated = self.number(price, "usd_per_hour", "price")
        runs = top.get("runs")
        if not isinstance(runs, list):
            self.fail("runs should be a list." if "runs" in top else "runs is missing.")
        if len(runs) > MAX_RUNS:
            self.fail(f"{len(runs)} runs are more than the {MAX_RUNS} that a report shows.")
        usd_per_hour = self.usd_per_hour if stated is None else stated
        return ResultFile(
            path=_clip(self.path, _LONGEST_NAME),
            kind=kind,
            model=model,
            price_source=self.text(price, "source", "price") if price.get("source") else None,
            usd_per_hour=usd_per_hour,
            environment=self.facts(top, "environment"),
            engine=self.facts(top, "engine"),
            workload=self.facts(top, "workload"),
            runs=tuple(
                self.run(self.mapping(run, f"runs[{i}]"), f"runs[{i}]", KINDS[kind], model, usd_per_hour)
                for i, run in enumerate(runs)
            ),
        )

    def parse(self) -> object:
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.fail(f"it cannot be read ({reason}).")
        if len(data) > MAX_FILE_BYTES:
            self.fail(f"it is larger than {MAX_FILE_BYTES // 1_000_000} MB; no result of pagemill is.")

        def constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not a number of JSON")

        try:
            return json.loads(data.decode("utf-8-sig"), parse_constant=constant)
        except (ValueError, RecursionError) as error:
            self.fail(f"it is not JSON: {_clip(str(error), 200)}.")

    def run(self, run: dict[str, Any], where: str, kind: str, model: str, usd_per_hour: float | None) -> Run:
        tokens = self.part(run, "tokens_per_s", where)
        latency = self.part(run, "latency_s", where)
        kv = self.part(run, "kv_use", where)
        quality = self.part(run, "quality", where)
        own = self.part(run, "price", where)
        stated = self.number(own, "usd_per_hour", f"{where}.price")
        if stated is None:
            stated = self.number(run, "usd_per_hour", where)
        if own or stated is not None:  # a run that has a price of its own may have none by the hour
            usd_per_hour = stated
        pages_per_s = self.needed(run, "pages_per_s", where)
        per_million = self.number(run, "usd_per_million_pages", where)
        if per_million is None and (per_page := self.number(run, "usd_per_page", where)) is not None:
            per_million = per_page * 1e6
        if per_million is None and usd_per_hour is not None and pages_per_s > 0:
            per_million = usd_per_hour / 3600 / pages_per_s * 1e6
        if run.get("model"):
            model = self.text(run, "model", where, _LONGEST_NAME)
        settings = self.settings(run, where)
        return Run(
            name=_clip(_whose(self.text(run, "name", where, _LONGEST_NAME), model, settings), _LONGEST_NAME),
            file=self.index,
            kind=kind,
            model=model[:_LONGEST_NAME],
            settings=settings,
            pages=int(self.needed(run, "pages", where)),
            seconds=self.needed(run, "seconds", where),
            pages_per_s=pages_per_s,
            prompt_tokens_per_s=self.number(tokens, "prompt", f"{where}.tokens_per_s"),
            output_tokens_per_s=self.number(tokens, "output", f"{where}.tokens_per_s"),
            latency={
                name: found
                for name in LATENCIES
                if (found := self.numbers(latency, name, PERCENTILES, f"{where}.latency_s"))
            },
            stages=self.numbers(run, "stage_s_per_page", STAGES, where),
            occupancy=self.share(run, "occupancy", where),
            kv_mean=self.share(kv, "mean", f"{where}.kv_use"),
            kv_peak=self.share(kv, "peak", f"{where}.kv_use"),
            waste=self.numbers(run, "waste_tokens", WASTE, where),
            peak_memory_bytes=self.number(run, "peak_memory_bytes", where),
            energy_j=self.number(run, "energy_j", where),
            usd_per_hour=usd_per_hour,
            usd_per_million=per_million,
            quality=self.quality(quality, f"{where}.quality") if quality else None,
            bits_by_field=self.bits(self.part(run, "alignment", where), f"{where}.alignment"),
            error=self.text(run, "error", where, 300) if run.get("error") else "",
            timeline=self.timeline(run, where),
        )

    def quality(self, found: dict[str, Any], where: str) -> Quality:
        return Quality(
            benchmark_score=self.share(found, "benchmark_score", where),
            low=self.share(found, "low", where),
            high=self.share(found, "high", where),
            cer=self.number(found, "cer", where),
            degeneration_rate=self.share(found, "degeneration_rate", where),
            bits_per_char=self.number(found, "bits_per_char", where),
            bits_low=self.number(found, "bits_per_char_low", where),
            bits_high=self.number(found, "bits_per_char_high", where),
        )

    def bits(self, alignment: dict[str, Any], where: str) -> dict[str, float]:
        fields = self.part(alignment, "by_field", where)
        where = f"{where}.by_field"
        found = {name: self.number(self.part(fields, name, where), "value", where) for name in FIELDS}
        return {name: value for name, value in found.items() if value is not None}

    def settings(self, run: dict[str, Any], where: str) -> dict[str, str | float]:
        settings = self.part(run, "settings", where)
        if len(settings) > _MAX_FACTS:
            self.fail(f"{where}.settings holds more than {_MAX_FACTS} entries.")
        found: dict[str, str | float] = {}
        for key, value in settings.items():
            if value is None:
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[_clip(key, 60)] = self.value(value, f"{where}.settings.{key}", lowest=-_LARGEST)
            else:
                found[_clip(key, 60)] = _clip(_said(value), _LONGEST_NAME)
        return found

    def timeline(self, run: dict[str, Any], where: str) -> tuple[Request, ...]:
        rows = run.get("timeline")
        if rows is None:
            return ()
        where = f"{where}.timeline"
        if not isinstance(rows, list) or len(rows) > _MAX_PAGES:
            self.fail(f"{where} should be a list of at most {_MAX_PAGES:,} pages.")
        return tuple(self.request(row, f"{where}[{i}]") for i, row in enumerate(rows))

    def request(self, row: object, where: str) -> Request:
        page = self.mapping(row, where)
        source, number = self.text(page, "source", where, _LONGEST_NAME), page.get("page")
        status = self.text(page, "status", where, 40) if "status" in page else "ok"
        loops = page.get("loops")
        arrived, finished = self.needed(page, "arrived", where), self.number(page, "finished", where)
        scheduled = self.number(page, "scheduled", where)
        return Request(
            name=f"{source} p. {int(self.value(number, f'{where}.page'))}" if number is not None else source,
            arrived=arrived,
            scheduled=scheduled,
            first_token=self.number(page, "first_token", where),
            finished=max(arrived, finished if finished is not None else scheduled or arrived),
            status=status,
            loops=len(loops) if isinstance(loops, list) else int(self.number(page, "loops", where) or 0),
        )

    # Values.

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{where} should be an object.")
        return value

    def part(self, holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
        value = holder.get(key)
        return {} if value is None else self.mapping(value, f"{where}.{key}")

    def text(self, holder: dict[str, Any], key: str, where: str, longest: int = _LONGEST_TEXT) -> str:
        value = holder.get(key)
        if not isinstance(value, str):
            self.fail(f"{where}: {key} {'should be text' if key in holder else 'is missing'}.")
        return _clip(value, longest)

    def needed(self, holder: dict[str, Any], key: str, where: str) -> float:
        value = self.number(holder, key, where)
        if value is None:
            self.fail(f"{where}: {key} is missing.")
        return value

    def number(self, holder: dict[str, Any], key: str, where: str) -> float | None:
        value = holder.get(key)
        return None if value is None else self.value(value, f"{where}.{key}")

    def share(self, holder: dict[str, Any], key: str, where: str) -> float | None:
        value = self.number(holder, key, where)
        if value is not None and value > 1:
            self.fail(f"{where}.{key} should lie between 0 and 1, got {value:g}.")
        return value

    def numbers(self, holder: dict[str, Any], key: str, names: Sequence[str], where: str) -> dict[str, float]:
        part = self.part(holder, key, where)
        return {n: v for n in names if (v := self.number(part, n, f"{where}.{key}")) is not None}

    def value(self, value: object, where: str, lowest: float = 0.0) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(f"{where} should be a number, got {_clip(_said(value), 60)}.")
        # An int may be too large for a float; 1e999 parses as infinity.
        if not lowest <= value <= _LARGEST or math.isnan(value):
            self.fail(f"{where} is no plausible number: {_clip(str(value), 40)}.")
        return float(value)

    def facts(self, top: dict[str, Any], key: str) -> list[tuple[str, str]]:
        """Return an object of facts as lines of dotted key and text, at most `_MAX_FACTS` of them."""
        found: list[tuple[str, str]] = []

        def walk(value: object, name: str) -> None:
            if len(found) >= _MAX_FACTS:
                return
            if isinstance(value, dict):
                for inner, child in value.items():
                    walk(child, f"{name}.{inner}" if name else inner)
            elif value is not None:
                found.append((_clip(name, _LONGEST_NAME), _clip(_said(value), _LONGEST_TEXT)))

        walk(self.part(top, key, "the file"), "")
        return found


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
