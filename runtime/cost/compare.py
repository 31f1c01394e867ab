"""`pagemill compare`: which model for my documents, answered on one's own pages.

The same pages go through every engine, one engine after another, and what came out is scored against the truth: quality (the
metric of `pagemill.score`, all fields joined, so that engines of plain text are on equal terms), stability (degenerate pages by
the published rule, pages that failed), speed and dollars a page. With alignment, pagemill's engines also tell how well their
model expects what the pages say, before a token is generated: bits per character of the truth (`pagemill.decode.alignment`).

The result file is that of `pagemill bench` (documented there), `kind` being "compare": one run for every engine, with these keys
beside:

spec, engine     as given, and what the engine says of itself
price            usd_per_hour, usd_per_page, or usd_per_m_input and usd_per_m_output, each with `source`; or null
quality          bench's keys, `failed` (a rate: a failed page counts as an empty one) and, with alignment, bits_per_char_low
                 and bits_per_char_high
scores           everything `pagemill.score.summarize` says
alignment        bits_per_char of all pages with its interval, by_field likewise, pages, seconds; or null
by_page          file, page, benchmark_score, cer, degenerate, error, seconds, bits_per_char, bits_by_field
error            why the engine read nothing, or not all; or null

Of engines that are not pagemill, what cannot be seen from outside is missing (stages, KV use, waste, memory).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pagemill.cost.bench import SCHEMA
from pagemill.cost.engines import Answer, EngineSpec, Outcome, Pagemill, ReadOptions, fields_of
from pagemill.cost.environment import environment
from pagemill.cost.workload import price_of
from pagemill.decode.alignment import Alignment
from pagemill.decode.page import FIELDS
from pagemill.engine import Engine
from pagemill.errors import ConfigError, PageError, PagemillError, printable
from pagemill.pages.source import PageRef, expand_inputs, list_pages
from pagemill.score import Reading, ScoreError, Truth, match, ratios, read_truths, score, summarize


@dataclass(frozen=True)
class Price:
    """What an engine costs, by one of three ways."""

    usd_per_hour: float | None = None
    usd_per_page: float | None = None
    usd_per_m_tokens: tuple[float, float] | None = None
    """Of a million prompt tokens, and of output."""
    source: str = "given on the command line"

    def of_page(self, outcome: Outcome) -> float | None:
        """Dollars for a page that was read; None where that cannot be told."""
        numbers = outcome.numbers
        if not numbers["pages"]:
            return None
        if self.usd_per_page is not None:
            return self.usd_per_page
        if self.usd_per_hour is not None:
            return float(self.usd_per_hour / 3600 * numbers["seconds"] / numbers["pages"])
        assert self.usd_per_m_tokens is not None
        dollars = 0.0
        for answer in outcome.answers:
            if answer.error is None:
                if answer.prompt_tokens is None or answer.output_tokens is None:
                    return None
                given, taken = self.usd_per_m_tokens
                dollars += (given * answer.prompt_tokens + taken * answer.output_tokens) / 1e6
        return dollars / float(numbers["pages"])

    def describe(self) -> dict[str, Any]:
        """What of it goes into the result."""
        if self.usd_per_hour is not None:
            return {"usd_per_hour": self.usd_per_hour, "source": self.source}
        if self.usd_per_page is not None:
            return {"usd_per_page": self.usd_per_page, "source": self.source}
        given, taken = self.usd_per_m_tokens or (None, None)
        return {"usd_per_m_input": given, "usd_per_m_output": taken, "source": self.source}


def parse_prices(given: Sequence[str], names: Sequence[str]) -> dict[str, Price]:
    """Parse `NAME=USD/page`, `NAME=IN+OUT/Mtoken`, and `NAME=...` as `pagemill bench` takes a price an hour.

    A price without a NAME is that of every engine without its own. Raises `ConfigError`.
    """
    prices: dict[str, Price] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        name = printable(name.strip())
        if equals and name not in names:
            raise ConfigError(
                f"--price {printable(text)}: no engine is called {name}; there are {', '.join(names)}."
            )
        if name in prices:
            raise ConfigError(f"--price {printable(text)}: {name or 'the price of all'} has one already.")
        prices[name] = _price(value.strip(), text)
    every = prices.pop("", None)
    return prices if every is None else {name: prices.get(name, every) for name in names}


def _price(value: str, text: str) -> Price:
    amount, slash, unit = value.rpartition("/")
    if not slash or unit not in ("page", "Mtoken"):
        hourly = price_of(value)
        return Price(usd_per_hour=hourly["usd_per_hour"], source=hourly["source"])
    try:
        amounts = [float(part) for part in amount.split("+")]
        if len(amounts) != (1 if unit == "page" else 2) or not all(0 <= a < math.inf for a in amounts):
            raise ValueError
    except ValueError:
        shape = "USD/page" if unit == "page" else "INPUT+OUTPUT/Mtoken"
        raise ConfigError(f"--price {printable(text)}: write {shape}, dollars of zero or more.") from None
    if unit == "page":
        return Price(usd_per_page=amounts[0])
    return Price(usd_per_m_tokens=(amounts[0], amounts[1]))


# What is read.


@dataclass(frozen=True)
class Pages:
    """The pages of a comparison, each with its truth."""

    refs: list[PageRef]
    truths: list[Truth]
    unknown: int
    """Pages at hand that no truth is known of; they are not read."""


def select_pages(inputs: Sequence[str], truth: str) -> Pages:
    """Find the pages of files, folders and globs that a truth is known of.

    A file that cannot be read fails with every engine, if it has a truth. Raises `PageError` for an input without a file,
    `ScoreError` for a truth that cannot be read or knows none of the pages.
    """
    truths = read_truths(truth)
    refs: dict[tuple[str, int], PageRef] = {}
    for source in dict.fromkeys(expand_inputs(list(inputs))):
        try:
            refs |= {(ref.source, ref.page): ref for ref in list_pages(source)}
        except PageError:
            refs.setdefault((source, 1), PageRef(source, 1))
    found, _ = match(truths, [Reading(ref.source, ref.page, {}) for ref in refs.values()])
    if not found:
        raise ScoreError(
            f"{printable(truth)} knows none of the {len(refs)} pages: its rows should name them by path or file name, and page."
        )
    chosen = [refs[reading.name, reading.page] for _, reading in found]
    return Pages(chosen, [truth for truth, _ in found], len(refs) - len(found))


# The runs.


def compare(
    pages: Pages,
    specs: Sequence[EngineSpec],
    options: ReadOptions,
    *,
    prices: Mapping[str, Price] | None = None,
    alignment: bool = False,
    workload: Mapping[str, Any] | None = None,
    on_run: Callable[[str], None] | None = None,
    on_page: Callable[[], None] | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Read `pages` with every engine and score them; return the result file's content.

    An engine that cannot work costs itself alone: its run has `error`. `on_run` is called before each engine with its name,
    `on_page` after each page, from any thread, `on_result` with the result so far after each engine.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "compare",
        "environment": environment(),
        "model": ", ".join(spec.name for spec in specs),
        "engine": {},
        "workload": {"pages": len(pages.refs), "without_truth": pages.unknown, **(workload or {})},
        "price": None,
        "runs": [],
    }
    for spec in specs:
        if on_run is not None:
            on_run(spec.name)
        price = (prices or {}).get(spec.name)
        result["runs"].append(_run(pages, spec, options, price, alignment, on_page or (lambda: None)))
        if on_result is not None:
            on_result(result)
    return result


def _run(
    pages: Pages,
    spec: EngineSpec,
    options: ReadOptions,
    price: Price | None,
    alignment: bool,
    on_page: Callable[[], None],
) -> dict[str, Any]:
    run: dict[str, Any] = {
        "name": spec.name,
        "spec": printable(spec.spec),
        "settings": {},
        "model": spec.name,
        "engine": {},
        "pages": 0,
        "failed": len(pages.refs),
        "seconds": 0.0,
        "pages_per_s": 0.0,
        "price": None if price is None else price.describe(),
        "usd_per_page": None,
        "usd_per_million_pages": None,
        "quality": None,
        "scores": None,
        "alignment": None,
        "by_page": [],
        "error": None,
        "timeline": [],
    }
    try:
        with spec.open(options) as reader:
            run["engine"] = reader.describe()
            run["settings"] = {"kind": reader.kind, "concurrency": options.concurrency or "default"}
            outcome = reader.run(pages.refs, on_page)
            aligned: list[Alignment] = []
            began = time.perf_counter()
            if alignment and isinstance(reader, Pagemill):
                aligned = align(reader.engine, pages)
            seconds = time.perf_counter() - began
    except PagemillError as error:
        run["error"] = printable(str(error))
        return run
    run |= outcome.numbers
    run["error"] = outcome.error
    if price is not None and (dollars := price.of_page(outcome)) is not None:
        run |= {"usd_per_page": dollars, "usd_per_million_pages": 1e6 * dollars}
    run |= _scored(pages, outcome.answers, aligned)
    if aligned:
        run["alignment"] = alignment_summary(aligned) | {"seconds": seconds}
        bits = run["alignment"]["bits_per_char"]
        run["quality"] |= {
            "bits_per_char": bits["value"],
            "bits_per_char_low": bits["low"],
            "bits_per_char_high": bits["high"],
        }
    run["timeline"] = run.pop("timeline")  # last: it is long
    return run


def align(engine: Engine, pages: Pages) -> list[Alignment]:
    """Score every page's truth under the model; pages in their order."""
    texts = [
        {name: truth.fields[name] for name in truth.order if truth.fields.get(name) is not None}
        for truth in pages.truths
    ]
    return list(engine.score(pages.refs, texts))


def alignment_summary(aligned: Sequence[Alignment]) -> dict[str, Any]:
    """Bits per character over pages, all bits by all characters, with bootstrap intervals; in all and by field.

    Pages that could not be scored, or say nothing, do not count.
    """

    def share(bits: Any) -> tuple[float, float] | None:
        return (bits.bits, float(bits.characters)) if bits is not None and bits.characters else None

    shares = {"bits_per_char": [None if one.error else share(one.whole) for one in aligned]}
    shares |= {name: [share(one.fields.get(name)) for one in aligned] for name in FIELDS}
    found = ratios(shares)
    return {
        "pages": found["bits_per_char"]["pages"],
        "bits_per_char": found.pop("bits_per_char"),
        "by_field": found,
        "errors": [one.error for one in aligned if one.error],
    }


def _scored(pages: Pages, answers: Iterable[Answer], aligned: Sequence[Alignment]) -> dict[str, Any]:
    """Quality, in the keys of the result file."""
    by_page = {(answer.source, answer.page): answer for answer in answers}
    in_order = [by_page[ref.source, ref.page] for ref in pages.refs]
    # The truth's own names: which page is whose has been settled.
    readings = [
        Reading(
            truth.name,
            truth.page,
            dict.fromkeys(FIELDS) if answer.error else fields_of(answer),
            answer.raw,
            answer.finish_reason,
            "error" if answer.error else None if answer.record is None else answer.record.status,
            answer.error,
            answer.output_tokens,
        )
        for truth, answer in zip(pages.truths, in_order, strict=True)
    ]
    scores, _ = score(pages.truths, readings)
    found = summarize(scores)
    overall = found["fields"]["benchmark_score"]
    rows = []
    for i, (page, answer) in enumerate(zip(scores, in_order, strict=True)):
        one = aligned[i] if aligned else None
        rows.append(
            {
                "file": answer.source,
                "page": answer.page,
                "benchmark_score": page.fields.benchmark_score,
                "cer": page.fields.cer,
                "degenerate": page.degenerate,
                "error": answer.error,
                "seconds": round(answer.finished - answer.started, 4),
                "bits_per_char": None if one is None else one.bits_per_char,
                "bits_by_field": {}
                if one is None
                else {name: bits.per_character for name, bits in one.fields.items()},
            }
        )
    return {
        "quality": {
            "benchmark_score": overall["value"],
            "low": overall["low"],
            "high": overall["high"],
            "cer": found["fields"]["cer"]["value"],
            "degeneration_rate": found["degeneration_rate"]["value"],
            "failed": found["failed"]["value"],
            "bits_per_char": None,
            "pages": found["pages"],
        },
        "scores": found,
        "by_page": rows,
    }


# For people.


def show(result: Mapping[str, Any]) -> RenderableType:
    """Return the engines side by side, and what went wrong."""
    runs, where, pages = result["runs"], result["environment"], result["workload"]["pages"]
    title = f"{pages} page{'' if pages == 1 else 's'}, {where['machine']}, {where['cores']} cores"
    parts: list[RenderableType] = [
        Text(printable(title), style="bold"),
        "",
        _quality_table(runs),
        "",
        _speed_table(runs),
    ]
    if aligned := [run for run in runs if run["alignment"]]:
        parts += ["", _field_table(aligned)]
    if unknown := result["workload"]["without_truth"]:
        parts.append(Text(f"Not read, since no truth is known: {unknown} page{'' if unknown == 1 else 's'}."))
    return Group(*parts, *(Text(printable(note), style="yellow") for run in runs for note in _notes(run)))


def _notes(run: Mapping[str, Any]) -> Iterator[str]:
    if run["error"]:
        yield f"{run['name']}: {run['error']}"
        return
    failures = [page for page in run["by_page"] if page["error"]]
    for page in failures[:_NAMED]:
        yield f"{run['name']}, {page['file']} page {page['page']}: {page['error']}"
    if len(failures) > _NAMED:
        yield f"{run['name']}: {len(failures)} pages failed in all"


def _quality_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("quality and stability", "benchmark_score", "95 %", "CER", "degenerate", "failed")
    for run in runs:
        if (quality := run["quality"]) is None:
            table.add_row(escape(printable(run["name"])), *"-----")
            continue
        table.add_row(
            escape(printable(run["name"])),
            f"{quality['benchmark_score']:.3f}",
            f"{quality['low']:.3f} to {quality['high']:.3f}",
            *(f"{100 * quality[key]:.1f} %" for key in ("cer", "degeneration_rate", "failed")),
        )
    return table


def _speed_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("speed and cost", "pages/s", "page p50", "p95", "p99", "$/M pages")
    for run in runs:
        if not run["pages"]:
            table.add_row(escape(printable(run["name"])), *"-----")
            continue
        latency, dollars = run["latency_s"]["page"], run["usd_per_million_pages"]
        table.add_row(
            escape(printable(run["name"])),
            f"{run['pages_per_s']:.2f}",
            *(f"{latency[p]:.2f} s" for p in ("p50", "p95", "p99")),
            "-" if dollars is None else f"{dollars:,.2f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    table.add_column("", overflow="fold", max_width=40)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


_NAMED = 5


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _field_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    title = "alignment: bits per character of the truth, given the page"
    table = _table(title, "all", "95 %", *FIELDS, "seconds")
    for run in runs:
        found = run["alignment"]
        bits = found["bits_per_char"]
        table.add_row(
            escape(printable(run["name"])),
            _three(bits["value"]),
            f"{_three(bits['low'])} to {_three(bits['high'])}",
            *(_three(found["by_field"][name]["value"]) for name in FIELDS),
            f"{found['seconds']:.1f}",
        )
    return table
