"""What `pagemill bench` is asked for: the pages and how often, the settings of each run, sweeps over them, a price."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pagemill.errors import ConfigError, PageError, printable
from pagemill.pages.source import PageRef, expand_inputs, list_pages
from pagemill.score import Truth, read_truths

_MOST_RUNS = 256
_MOST_PAGES = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What one run is made with."""

    model: str = "pagemill-tiny"
    dtype: str = "auto"
    quantize: str = "none"
    kv_cache_dtype: str = "auto"
    device: str = "cpu"
    kernels: str = "auto"
    concurrency: int = 32
    """Places in the batch."""
    rate: float | None = None
    """Pages that arrive in a second; None is offline."""
    guard: str = "rescue"
    guidance: str = "auto"
    drafts: str = "auto"
    resolution: str = "auto"
    max_new_tokens: int | None = None
    kv_cache_gb: float | None = None
    threads: int | None = None

    def engine_options(self) -> dict[str, Any]:
        """The arguments of `Engine.from_pretrained` beside the model; runs of equal ones share an engine."""
        options: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "max_num_seqs": self.concurrency,
        }
        if self.quantize != "none":
            options["quantize"] = self.quantize
        if self.kv_cache_dtype != "auto":
            options["kv_cache_dtype"] = self.kv_cache_dtype
        if self.kv_cache_gb is not None:
            options["kv_cache_bytes"] = int(self.kv_cache_gb * 1e9)
        if self.threads is not None:
            options["num_threads"] = self.threads
        return options


@dataclass(frozen=True)
class Workload:
    """Which pages are read, and how often."""

    inputs: list[str]
    refs: list[PageRef]
    """Pages at hand, each once."""
    pages: int
    """Pages of a run."""
    seed: int = 0
    """Of the order and of the arrivals."""
    warmup: int = 2
    """Pages that are read before a run, not counted."""
    repeats: int = 1
    truths: list[Truth] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What of it goes into the result."""
        return {
            "inputs": self.inputs,
            "distinct_pages": len(self.refs),
            "pages": self.pages,
            "seed": self.seed,
            "warmup": self.warmup,
            "repeats": self.repeats,
        }

    def turns(self) -> Iterator[tuple[PageRef, int]]:
        """Yield the pages of a run, each with the number of the pass over the pages at hand; each pass has its own order."""
        random = np.random.default_rng(self.seed)
        for turn in itertools.count():
            order = random.permutation(len(self.refs))
            left = self.pages - turn * len(self.refs)
            yield from ((self.refs[i], turn) for i in order[:left])
            if left <= len(self.refs):
                return

    def arrivals(self, rate: float) -> list[float]:
        """Seconds at which the pages of a run arrive, `rate` a second on average, exponential times between them."""
        random = np.random.default_rng((self.seed, 1))
        return [float(t) for t in np.cumsum(random.exponential(1 / rate, self.pages))]


def samples() -> tuple[list[str], Path]:
    """The sample pages of the source tree, and their truth. Raises `PageError` where there is none."""
    folder = Path(__file__).resolve().parents[2] / "bench" / "pages"
    found = sorted(os.path.relpath(file) for file in folder.glob("*_[0-9][0-9].png"))
    if not found:
        raise PageError(
            "the sample pages come with pagemill's source, not with the installed package: name files or folders to read."
        )
    return found, folder / "truth.jsonl"


def load_workload(
    inputs: Sequence[str],
    *,
    pages: int | None = None,
    truth: str | None = None,
    seed: int = 0,
    warmup: int = 2,
    repeats: int = 1,
) -> Workload:
    """List the pages of files, folders and globs; without any, the sample pages, whose truth is known.

    `pages` is the length of a run, by default each page once. A file that cannot be read stays in, as one page that fails.
    Raises `PageError` where no file can be read, and `ScoreError` for a truth that cannot.
    """
    given, truth_file = list(inputs), None if truth is None else Path(truth)
    if not given:
        given, known = samples()
        truth_file = truth_file or known
    refs: list[PageRef] = []
    broken: list[PageError] = []
    for source in dict.fromkeys(expand_inputs(given)):
        try:
            refs += list_pages(source)
        except PageError as error:
            broken.append(error)
            refs.append(PageRef(source, 1))
    if len(broken) == len(refs):
        raise broken[0] if broken else PageError(f"{printable(', '.join(given))[:500]}: there is no page.")
    if pages is not None and not 1 <= pages <= _MOST_PAGES:
        raise ConfigError(f"--pages should be from 1 to {_MOST_PAGES:,}, got {pages}.")
    shown = list(inputs) or ["the sample pages"]
    truths = [] if truth_file is None else read_truths(truth_file)
    return Workload(shown, refs, pages or len(refs), seed, warmup, repeats, truths)


def _word(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parse


def _number(lowest: float, highest: float, kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        says = f"{'a whole number' if kind is int else 'a number'} from {lowest:g} to {highest:g}"
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(says) from None
        if not lowest <= value <= highest:  # nan is in no range
            raise ValueError(says)
        return value

    return parse


def _rate(text: str) -> float | None:
    return None if text == "offline" else float(_number(1e-6, 1e6, float)(text))


def _resolution(text: str) -> str:
    return text if text in ("auto", "full") else str(_number(28, 20000, int)(text))


_SWEEPS: Mapping[str, Callable[[str], Any]] = {
    "concurrency": _number(1, 4096, int),
    "rate": _rate,
    "dtype": _word("auto", "bfloat16", "float32"),
    "quantize": _word("none", "int8", "int4"),
    "kv_cache_dtype": _word("auto", "int8", "fp8"),
    "kernels": _word("auto", "reference", "native", "triton"),
    "guard": _word("rescue", "stop", "off"),
    "guidance": _word("auto", "page", "off"),
    "drafts": _word("auto", "off"),
    "resolution": _resolution,
    "max_new_tokens": _number(1, 1 << 20, int),
    "kv_cache_gb": _number(1e-6, 1e6, float),
    "threads": _number(1, 4096, int),
    "model": str,
}


def sweep(base: Settings, sweeps: Sequence[str]) -> list[tuple[str, Settings]]:
    """Return the runs that `name=value,value,...` texts ask for, with their names; several multiply.

    Runs of one engine lie side by side. Raises `ConfigError` for what is not a sweep.
    """
    axes: dict[str, list[Any]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        parse = _SWEEPS.get(name)
        if not equals or parse is None:
            known = ", ".join(_SWEEPS)
            raise ConfigError(
                f"--sweep {printable(text)}: write NAME=VALUE,VALUE,... with one of {known}."
            ) from None
        if name in axes:
            raise ConfigError(f"--sweep {name} is given twice: put all values into one.")
        try:
            axes[name] = list(dict.fromkeys(parse(value.strip()) for value in values.split(",")))
        except ValueError as error:
            raise ConfigError(f"--sweep {printable(text)}: each value should be {error}.") from None
    if (count := math.prod(len(values) for values in axes.values())) > _MOST_RUNS:
        raise ConfigError(f"the sweeps ask for {count} runs, more than {_MOST_RUNS}: leave out some values.")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    named = [(_name(point) or _name(_changed(base)), replace(base, **point)) for point in points]
    return sorted(named, key=lambda run: points.index(_first_like(run[1], named, points)))


def _first_like(
    settings: Settings, named: list[tuple[str, Settings]], points: list[dict[str, Any]]
) -> dict[str, Any]:
    """The first point that is run with the same engine."""
    own = settings.model, settings.engine_options()
    return next(
        point
        for point, (_, other) in zip(points, named, strict=True)
        if (other.model, other.engine_options()) == own
    )


def _changed(settings: Settings) -> dict[str, Any]:
    plain = Settings()
    changed = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {k: v for k, v in changed.items() if k in ("concurrency", "rate") or v != getattr(plain, k)}


def _name(point: Mapping[str, Any]) -> str:
    """How a run is called: `concurrency=8, offline`."""
    words = []
    for name, value in point.items():
        number = f"{value:g}" if isinstance(value, float) else str(value)
        words.append("offline" if name == "rate" and value is None else f"{name}={number}")
    return ", ".join(words)


def price_of(text: str) -> dict[str, Any]:
    """Dollars an hour: a number, or `GPU:PROVIDER` (what `find_price` takes) from the reference data. Raises `ConfigError`."""
    try:
        usd = float(text)
    except ValueError:
        from pagemill.cost.devices import find_price

        device, _, which = text.partition(":")
        price = find_price(device, which or "on-demand")
        return {"usd_per_hour": price.usd_per_hour, "source": f"{price.id}, {price.date}: {price.source}"}
    if not (math.isfinite(usd) and usd >= 0):
        raise ConfigError(f"--price should be dollars an hour, zero or more, got {text}.")
    return {"usd_per_hour": usd, "source": "given on the command line"}
