"""Scores of what was read against the truth, by the metric of the DharmaOCR benchmark (arXiv 2604.14314).

    benchmark_score = (mean Levenshtein ratio + mean BLEU-4) / 2

Two protocols, both reported where the rows allow it:

fields  header, margin, text and footer of the record, joined line by line. The order of a record's keys is fixed and says
        nothing, so its fields are joined in the order of the truth: that of the `assistant` JSON, or `READING_ORDER` where the
        truth is a `truth` object.
raw     the published evaluation, for rows that hold the model's output in `raw`: the values of its JSON in its own order, and
        JSON that does not parse as it stands, braces and escapes included. Compare engines by this one.

CER and WER are edit distances over the length of the truth in characters and words, mean over pages; `cer_total` and
`wer_total` are all edits over all characters or words. A page is degenerate by the published rule (`decode/page.py`), or if
the loop guard stopped it. Intervals are percentile bootstraps over pages.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pagemill.decode.page import FIELDS, is_degenerate, is_json_object, parse_page
from pagemill.errors import PagemillError, printable

READING_ORDER = ("header", "margin", "text", "footer")
_METRICS = ("benchmark_score", "levenshtein", "bleu", "cer", "wer")
RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
"""Of the bootstrap."""


class ScoreError(PagemillError):
    """A truth or a file of records cannot be scored; names the file and the line."""


# The metric.


def plain(x: object) -> str:
    """Return the text of a page: the values of a JSON object in its own order, one a line; of anything else, itself.

    Values that are null or blank are left out. The same function serves the truth and the prediction.
    """
    try:
        value = json.loads(str(x))
    except (ValueError, RecursionError):
        return str(x)
    if isinstance(value, dict):
        return "\n".join(str(v) for v in value.values() if v is not None and str(v).strip())
    return str(x)


def joined(fields: Mapping[str, str | None], order: Sequence[str] = READING_ORDER) -> str:
    """Return the fields that are there, one after another."""
    return "\n".join(v for name in order if (v := fields.get(name)) is not None and v.strip())


def bleu(truth: str, read: str) -> float:
    """Return BLEU (Papineni et al. 2002) of one reading, words split at white space, n-grams up to 4 with equal weights.

    Smoothing is method 1 of Chen and Cherry (2014): an n-gram size without any match counts as 0.1 matches.
    """
    reference, candidate = truth.split(), read.split()
    logs = []
    for n in range(1, 5):
        matches = (_ngrams(candidate, n) & _ngrams(reference, n)).total()
        if n == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or 0.1) / max(len(candidate) - n + 1, 1)))
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(math.fsum(logs) / 4 + brevity)


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


@dataclass(frozen=True, slots=True)
class TextScore:
    """One text against its truth."""

    edits: int
    """Characters to insert, delete or replace."""
    characters: int
    """Of the truth."""
    longest: int
    """Characters of the longer text."""
    word_edits: int
    words: int
    bleu: float

    @property
    def levenshtein(self) -> float:
        """1 - edits / length of the longer text; 0 where both are empty, as published."""
        return 1 - self.edits / self.longest if self.longest else 0.0

    @property
    def benchmark_score(self) -> float:
        """This text's part of the published mean."""
        return (self.levenshtein + self.bleu) / 2

    @property
    def cer(self) -> float:
        """Edits over characters of the truth; where that is empty, 0 for an empty reading and else 1."""
        return self.edits / self.characters if self.characters else float(self.edits > 0)

    @property
    def wer(self) -> float:
        """The same in words."""
        return self.word_edits / self.words if self.words else float(self.word_edits > 0)


@lru_cache(maxsize=16)  # a page of nothing but text is the same by either protocol, and by field
def score_text(truth: str, read: str) -> TextScore:
    """Score the text `read` against `truth`."""
    words, read_words = truth.split(), read.split()
    return TextScore(
        edits=Levenshtein.distance(truth, read),
        characters=len(truth),
        longest=max(len(truth), len(read)),
        word_edits=Levenshtein.distance(words, read_words),
        words=len(words),
        bleu=bleu(truth, read),
    )


# Rows of the two files.


@dataclass(frozen=True, slots=True)
class Truth:
    """What a page says."""

    name: str
    """File as written in the row, or the id of a benchmark page."""
    page: int
    answer: str
    """The answer that a perfect model gives: JSON, its values in the order of the truth, or plain text."""
    text: str
    """All fields, joined."""
    fields: Mapping[str, str | None]
    order: tuple[str, ...]
    """The order in which a record's fields are joined to be compared with `text`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of a page: a record of pagemill, or another engine's answer."""

    name: str
    page: int
    fields: Mapping[str, str | None]
    raw: str | None = None
    finish_reason: str | None = None
    status: str | None = None
    error: str | None = None
    tokens: int | None = None
    """Output tokens."""


def read_truths(path: str | os.PathLike[str]) -> list[Truth]:
    """Read truths, a JSON object a line. Raises `ScoreError`, naming the line.

    A row names its page by `file` (or `source`, `id`) and `page` (1 where missing) and holds `truth`, an object of fields, or
    `assistant`, a string with the answer's JSON (or plain text), whose order counts.
    """
    truths = []
    for where, row in _rows(path):
        name, page = _place(row, where)
        if isinstance(row.get("assistant"), str):
            answer = row["assistant"]
            value = json.loads(answer) if is_json_object(answer) else {}
            fields = {key: None if value.get(key) is None else str(value[key]) for key in FIELDS}
            order = tuple(dict.fromkeys([*(key for key in value if key in FIELDS), *READING_ORDER]))
            truths.append(Truth(name, page, answer, plain(answer), fields, order))
        elif isinstance(row.get("truth"), dict):
            fields = _fields(row["truth"], where)
            answer = json.dumps(row["truth"])
            truths.append(Truth(name, page, answer, joined(fields), fields, READING_ORDER))
        else:
            raise ScoreError(
                f"{where} holds no truth: it should be an object in `truth` or a string in `assistant`."
            )
    return truths


def read_readings(path: str | os.PathLike[str]) -> list[Reading]:
    """Read records, a JSON object a line: pagemill's, or rows with the model's output in `raw`.

    Raises `ScoreError`, naming the line. Fields that a row lacks are taken from `raw`, tolerantly.
    """
    readings = []
    for where, row in _rows(path):
        name, page = _place(row, where)
        raw, status = _string(row, "raw", where), _string(row, "status", where)
        fields = _fields(row, where)
        if raw is not None and not any(key in row for key in FIELDS):
            fields = parse_page(raw)._asdict()
        elif raw is None and status != "error" and not any(key in row for key in FIELDS):
            raise ScoreError(
                f"{where} holds nothing read: it should have {', '.join(FIELDS)}, or the model's output in `raw`."
            )
        tokens = row.get("tokens")
        output = tokens.get("output") if isinstance(tokens, dict) else None
        readings.append(
            Reading(
                name,
                page,
                dict.fromkeys(FIELDS) if status == "error" else fields,
                raw,
                _string(row, "finish_reason", where),
                status,
                (_string(row, "error", where) or "no reason given") if status == "error" else None,
                output if isinstance(output, int) else None,
            )
        )
    return readings


def _rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{os.fspath(path)} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    why = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
                    raise ScoreError(
                        f"{where} is not JSON ({why}): mend or remove it, or finish the run that wrote it."
                    ) from None
                if not isinstance(row, dict):
                    raise ScoreError(f"{where} should be a JSON object, one page.")
                yield where, row
    except OSError as error:
        raise ScoreError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error


def _place(row: dict[str, Any], where: str) -> tuple[str, int]:
    name = next((row[key] for key in ("source", "file", "id") if row.get(key) is not None), None)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ScoreError(f"{where} names no page: it should have `source`, `file` or `id`.")
    page = row.get("page", 1)
    if isinstance(page, bool) or not isinstance(page, int):
        raise ScoreError(f"{where}: `page` should be a number, counted from 1.")
    return str(name), page


def _fields(row: dict[str, Any], where: str) -> dict[str, str | None]:
    return {key: _string(row, key, where) for key in FIELDS}


def _string(row: dict[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ScoreError(f"{where}: `{key}` should be a string or null.")
    return value


# Which reading belongs to which truth.

Kind = Literal["failed", "no record", "no truth", "ambiguous", "repeated truth", "repeated record"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is not simply scored."""

    kind: Kind
    name: str
    page: int
    note: str


_Place = tuple[str, int]


def match(
    truths: Sequence[Truth], readings: Sequence[Reading]
) -> tuple[list[tuple[Truth, Reading]], list[Problem]]:
    """Pair truths with readings by path and page, else by file name and page; an id is a name without its suffix.

    A name that fits several files is ambiguous, and neither side is scored. Of rows repeated for one page the last one
    counts. Returns the pairs, in the order of the truths, and all rows that are left over or repeated.
    """
    problems: list[Problem] = []
    by_path: dict[_Place, Truth] = {}
    for truth in truths:
        key = (os.path.normpath(truth.name), truth.page)
        if key in by_path:
            problems.append(Problem("repeated truth", *key, "the last one counts"))
        by_path[key] = truth
    by_name: dict[_Place, list[_Place]] = defaultdict(list)
    for path, page in by_path:
        by_name[os.path.basename(path), page].append((path, page))

    found: dict[_Place, list[Reading]] = defaultdict(list)
    ambiguous: set[_Place] = set()
    for reading in readings:
        path, page = os.path.normpath(reading.name), reading.page
        name = os.path.basename(path)
        keys = [(path, page)] if (path, page) in by_path else by_name.get((name, page))
        keys = keys or by_name.get((os.path.splitext(name)[0], page), [])
        if len(keys) == 1:
            found[keys[0]].append(reading)
        elif keys:
            ambiguous.update(keys)
            paths = ", ".join(path for path, _ in keys)
            problems.append(Problem("ambiguous", reading.name, page, f"not scored: it may be {paths}"))
        else:
            problems.append(Problem("no truth", reading.name, page, "not scored"))

    pairs = []
    for (path, page), truth in by_path.items():
        by_source: dict[str, list[Reading]] = defaultdict(list)
        for reading in found[path, page]:
            by_source[os.path.normpath(reading.name)].append(reading)
        source = path if path in by_source or len(by_source) != 1 else next(iter(by_source))
        note = f"not scored: {truth.name} may be any of them"
        problems += [Problem("ambiguous", other, page, note) for other in by_source if other != source]
        if source in by_source:
            *earlier, last = by_source[source]
            problems += [
                Problem("repeated record", reading.name, page, "the last one counts") for reading in earlier
            ]
            pairs.append((truth, last))
        elif not by_source and (path, page) not in ambiguous:
            problems.append(Problem("no record", truth.name, page, "not scored"))
    problems += [
        Problem("failed", reading.name, reading.page, f"counts as empty: {reading.error}")
        for _, reading in pairs
        if reading.error is not None
    ]
    return pairs, problems


# Pages, and all of them together.


@dataclass(frozen=True, slots=True)
class PageScore:
    """One page against its truth."""

    name: str
    page: int
    fields: TextScore
    """Of all fields, joined."""
    raw: TextScore | None
    """By the published protocol; None where the model's output is not known."""
    by_field: dict[str, TextScore]
    """Of the fields that the truth has."""
    missed: frozenset[str]
    """Fields that only the truth has."""
    invented: frozenset[str]
    """Fields that only the reading has."""
    degenerate: bool
    valid_json: bool | None
    """None where the model's output is not known."""
    failed: bool
    finish_reason: str | None
    tokens: int | None


def score_page(truth: Truth, reading: Reading) -> PageScore:
    """Score one reading."""
    has, got = ({name for name, v in side.fields.items() if v and v.strip()} for side in (truth, reading))
    raw = reading.raw
    written = [raw] if raw is not None else [reading.fields.get(name) or "" for name in FIELDS]
    return PageScore(
        name=truth.name,
        page=truth.page,
        fields=score_text(truth.text, joined(reading.fields, truth.order)),
        raw=None if raw is None else score_text(plain(truth.answer), plain(raw)),
        by_field={
            name: score_text(truth.fields[name] or "", reading.fields.get(name) or "")
            for name in FIELDS
            if name in has
        },
        missed=frozenset(has - got),
        invented=frozenset(got - has),
        degenerate=reading.status == "degenerate"
        or any(is_degenerate(text, reading.finish_reason) for text in written),
        valid_json=None if raw is None else is_json_object(raw),
        failed=reading.error is not None,
        finish_reason=reading.finish_reason,
        tokens=reading.tokens,
    )


def score(truths: Sequence[Truth], readings: Sequence[Reading]) -> tuple[list[PageScore], list[Problem]]:
    """Score all readings that have a truth. Raises `ScoreError` where none has."""
    pairs, problems = match(truths, readings)
    if not pairs:
        first = [f"{rows[0].name} page {rows[0].page}" if rows else "nothing" for rows in (truths, readings)]
        raise ScoreError(
            f"the two files have no page in common: the truth begins with {first[0]}, the records with {first[1]}."
        )
    if any(reading.raw is not None for _, reading in pairs):
        # A page that failed left no output, which counts as an empty one, as its fields do.
        pairs = [(t, replace(r, raw="") if r.error and r.raw is None else r) for t, r in pairs]
    return [score_page(truth, reading) for truth, reading in pairs], problems


def summarize(pages: Sequence[PageScore]) -> dict[str, Any]:
    """Return the means over pages, with bootstrap intervals, as a tree for JSON; rates are fractions.

    Each leaf has `value`, `low`, `high` and `pages`, the number of pages it is known for; without any the others are None.
    Raises ValueError for no pages.
    """
    if not pages:
        raise ValueError("there are no pages to score")
    shares: dict[str, list[tuple[float, float] | None]] = {}

    def means(path: str, values: Iterable[float | None]) -> None:
        shares[path] = [None if value is None else (value, 1.0) for value in values]

    def texts(path: str, scores: Sequence[TextScore | None]) -> None:
        for metric in _METRICS:
            means(f"{path}.{metric}", [None if s is None else getattr(s, metric) for s in scores])
        shares[f"{path}.cer_total"] = [None if s is None else (s.edits, s.characters) for s in scores]
        shares[f"{path}.wer_total"] = [None if s is None else (s.word_edits, s.words) for s in scores]

    texts("fields", [page.fields for page in pages])
    texts("raw", [page.raw for page in pages])
    for name in FIELDS:
        scores = [page.by_field.get(name) for page in pages]
        texts(f"by_field.{name}", scores)
        means(f"by_field.{name}.exact", [None if s is None else s.edits == 0 for s in scores])
        has = [name in page.by_field for page in pages]
        missed = [name in page.missed if it else None for page, it in zip(pages, has, strict=True)]
        invented = [None if it else name in page.invented for page, it in zip(pages, has, strict=True)]
        means(f"by_field.{name}.missed", missed)
        means(f"by_field.{name}.invented", invented)
    means("degeneration_rate", [page.degenerate for page in pages])
    means("valid_json", [page.valid_json for page in pages])
    means("failed", [page.failed for page in pages])

    tree: dict[str, Any] = {"pages": len(pages)}
    for path, numbers in ratios(shares).items():
        *branches, leaf = path.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = numbers
    return tree


def ratios(
    shares: Mapping[str, Sequence[tuple[float, float] | None]],
) -> dict[str, dict[str, float | int | None]]:
    """Return quotients of sums over pages, with bootstrap intervals: `value`, `low`, `high`, and `pages` that it is known for.

    `shares` holds, by name, a dividend and a divisor for each page, None where it is not known; all lists are of the same
    pages, at least one. A quotient of nothing is None.
    """
    parts = np.array([[share or (0.0, 0.0) for share in column] for column in shares.values()])
    values = _ratio(parts.sum(axis=1))
    low, high = _bootstrap(parts)
    found: dict[str, dict[str, float | int | None]] = {}
    for i, (name, column) in enumerate(shares.items()):
        numbers = (None if math.isnan(x) else float(x) for x in (values[i], low[i], high[i]))
        found[name] = dict(zip(("value", "low", "high"), numbers, strict=True))
        found[name]["pages"] = sum(share is not None for share in column)
    return found


def _ratio(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Quotients of the last axis, `[..., 2]`; NaN over zero."""
    over = np.where(sums[..., 1] > 0, sums[..., 1], np.nan)
    ratio: npt.NDArray[np.float64] = sums[..., 0] / over
    return ratio


def _bootstrap(parts: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both ends of the intervals `[metrics]` of ratios of sums over pages, `parts` being `[metrics, pages, 2]`."""
    metrics, n, _ = parts.shape
    by_page = parts.transpose(1, 0, 2).reshape(n, -1)
    random = np.random.default_rng(SEED)
    drawn = np.empty((RESAMPLES, metrics))
    for i in range(RESAMPLES):
        times = np.bincount(random.integers(n, size=n), minlength=n)
        drawn[i] = _ratio((times @ by_page).reshape(metrics, 2))
    # A metric of a few pages may miss from a draw; one of no page misses from all.
    known = ~np.isnan(drawn).all(axis=0)
    ends = np.full((2, metrics), np.nan)
    ends[:, known] = np.nanquantile(drawn[:, known], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return ends[0], ends[1]


def report(truth: str | os.PathLike[str], read: str | os.PathLike[str]) -> dict[str, Any]:
    """Score one file against the other: everything there is to say, ready for JSON. Raises `ScoreError`."""
    pages, problems = score(read_truths(truth), read_readings(read))
    cut = [page for page in pages if page.finish_reason == "length"]
    cut_at = [page.tokens for page in cut if page.tokens is not None]
    return {
        "truth": os.fspath(truth),
        "read": os.fspath(read),
        **summarize(pages),
        "token_cap": {
            "pages_cut": len(cut),
            "at_least": min(cut_at, default=None),
            "at_most": max(cut_at, default=None),
            "longest_page": max((page.tokens for page in pages if page.tokens is not None), default=None),
        },
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "problems": [asdict(problem) for problem in problems],
        "by_page": [_page_row(page) for page in pages],
    }


def _page_row(page: PageScore) -> dict[str, Any]:
    def numbers(s: TextScore | None) -> dict[str, float] | None:
        if s is None:
            return None
        return {metric: getattr(s, metric) for metric in _METRICS}

    return {
        "file": page.name,
        "page": page.page,
        "fields": numbers(page.fields),
        "raw": numbers(page.raw),
        "by_field": {name: numbers(s) for name, s in page.by_field.items()},
        "missed": [name for name in FIELDS if name in page.missed],
        "invented": [name for name in FIELDS if name in page.invented],
        "degenerate": page.degenerate,
        "valid_json": page.valid_json,
        "failed": page.failed,
        "finish_reason": page.finish_reason,
        "tokens": page.tokens,
    }


# For people.

_WORST, _NAMED = 10, 5


def show(result: Mapping[str, Any]) -> RenderableType:
    """Return what `report` found as tables: all pages, by field, the worst pages, and what was not simply scored."""
    parts: list[RenderableType] = [_summary_table(result), "", _field_table(result["by_field"])]
    if worst := _worst_table(result["by_page"]):
        parts += ["", worst]
    parts += ["", Text(_degeneration(result))]
    if result["raw"]["benchmark_score"]["value"] is None:
        parts.append(
            Text("The rows do not hold the model's output, so valid JSON and the raw score are not known.")
        )
    parts += [Text(line, style="yellow") for line in _problem_lines(result["problems"])]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _summary_table(result: Mapping[str, Any]) -> Table:
    pages = result["pages"]
    title = f"{pages} page{'' if pages == 1 else 's'} of {printable(result['read'])} against {printable(result['truth'])}"
    table = _table(escape(title), "", "fields", "95 %", "raw output", "95 %")

    def row(name: str, form: Callable[[float | None], str], *leaves: Mapping[str, Any]) -> None:
        cells = []
        for leaf in leaves:
            known = leaf["value"] is not None
            cells += [form(leaf["value"]), f"{form(leaf['low'])} to {form(leaf['high'])}" if known else ""]
        table.add_row(name, *cells)

    for key, name, form in (
        ("benchmark_score", "benchmark_score", _decimal),
        ("levenshtein", "Levenshtein ratio", _decimal),
        ("bleu", "BLEU-4", _decimal),
        ("cer", "CER, mean of pages", _percent),
        ("cer_total", "CER, all characters", _percent),
        ("wer", "WER, mean of pages", _percent),
        ("wer_total", "WER, all words", _percent),
    ):
        row(name, form, result["fields"][key], result["raw"][key])
    row("degenerate pages", _percent, result["degeneration_rate"])
    row("failed pages", _percent, result["failed"])
    row("valid JSON", _percent, result["valid_json"])
    return table


def _field_table(by_field: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    columns = ("pages", "Levenshtein", "BLEU-4", "CER", "WER", "exact", "missed", "invented")
    table = _table("by field", "", *columns)
    for name, metrics in by_field.items():
        table.add_row(
            name,
            str(metrics["cer"]["pages"]),
            *(_decimal(metrics[key]["value"]) for key in ("levenshtein", "bleu")),
            *(_percent(metrics[key]["value"]) for key in ("cer", "wer", "exact", "missed", "invented")),
        )
    return table


def _worst_table(pages: Sequence[Mapping[str, Any]]) -> Table | None:
    worst = sorted(pages, key=lambda page: page["fields"]["benchmark_score"])[:_WORST]
    worst = [page for page in worst if page["fields"]["cer"] > 0]
    if not worst:
        return None
    table = _table("worst pages", "", "benchmark_score", "CER")
    table.add_column("", justify="left", ratio=1)
    for page in worst:
        notes = [
            "failed" * page["failed"],
            "degenerate" * page["degenerate"],
            "broken JSON" * (page["valid_json"] is False),
            *(f"{name} missed" for name in page["missed"]),
            *(f"{name} invented" for name in page["invented"]),
        ]
        table.add_row(
            escape(printable(f"{page['file']} page {page['page']}")),
            _decimal(page["fields"]["benchmark_score"]),
            _percent(page["fields"]["cer"]),
            ", ".join(note for note in notes if note),
        )
    return table


def _degeneration(result: Mapping[str, Any]) -> str:
    cap = result["token_cap"]
    rule = "Degenerate: cut by the token cap with the last 15 characters there four times, or stopped by the loop guard."
    if not cap["pages_cut"]:
        longest = "" if cap["longest_page"] is None else f"; the longest has {cap['longest_page']} tokens"
        return f"{rule} The cap cut no page{longest}."
    if cap["at_most"] is None:
        at = "an unknown number of"
    elif cap["at_least"] == cap["at_most"]:
        at = str(cap["at_most"])
    else:
        at = f"{cap['at_least']} to {cap['at_most']}"
    return f"{rule} Pages cut: {cap['pages_cut']}, at {at} tokens."


def _problem_lines(problems: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for kind in get_args(Kind):
        pages: dict[str, list[str]] = defaultdict(list)
        for problem in problems:
            if problem["kind"] == kind:
                pages[problem["note"]].append(f"{problem['name']} page {problem['page']}")
        for note, names in list(pages.items())[:_NAMED]:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield printable(f"{kind}, {note}: {', '.join(names[:_NAMED])}{more}")
        if len(pages) > _NAMED:
            yield f"{kind}: {sum(map(len, pages.values()))} in all"
