"""One batch run: what the engine reads goes to the output, once, and is counted when it is safe there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pagemill.errors import DeviceError
from pagemill.jobs.inputs import Inputs
from pagemill.jobs.output import Output
from pagemill.results import PageResult


class PageReader(Protocol):
    """What a run needs of an engine."""

    @property
    def read(self) -> Callable[..., Iterator[PageResult]]:
        """`read(inputs, skip=pages, **how)` yields a result for every page that is not in `skip`, in order of completion."""


@dataclass
class Totals:
    """Counts of one run. Everything counted is safe in the output."""

    started: float = field(default_factory=time.monotonic)
    statuses: Counter[str] = field(default_factory=Counter)
    """Pages of this run by status."""
    earlier: Counter[str] = field(default_factory=Counter)
    """Pages that the output held before this run, by status."""
    output_tokens: int = 0
    loops: int = 0
    """Repetition loops that the guard caught."""
    shortcuts: int = 0
    """Pages answered without the model: blank ones and duplicates."""
    seconds: float = 0.0
    """Wall clock from the start of reading to the page counted last."""
    failures: list[PageResult] = field(default_factory=list)
    """The first few pages that failed in this run."""

    @property
    def pages(self) -> int:
        """Pages of this run."""
        return self.statuses.total()

    @property
    def read(self) -> int:
        """Pages of this run that did not fail: what a rate counts, since most failures take no time."""
        return self.pages - self.statuses["error"]

    @property
    def failed(self) -> int:
        """Pages with status `error` in the output, earlier runs included."""
        return self.statuses["error"] + self.earlier["error"]

    def add(self, result: PageResult) -> None:
        """Count one page."""
        self.statuses[result.status] += 1
        self.output_tokens += result.tokens.output
        self.loops += len(result.loops)
        self.shortcuts += result.shortcut is not None
        self.seconds = time.monotonic() - self.started
        if result.status == "error" and len(self.failures) < 5:
            self.failures.append(result)


def run(
    engine: PageReader,
    inputs: Inputs,
    output: Output,
    *,
    on_page: Callable[[PageResult, Totals], None] | None = None,
    **how: Any,
) -> Totals:
    """Read every page of `inputs` that `output` does not hold yet; return the counts. `how` goes to `Engine.read`.

    `on_page` is called after each page that is safe in the output, from another thread. A KeyboardInterrupt,
    and a DeviceError, drops the pages that are being read, keeps the finished ones and is raised again; so is an OutputError.
    """
    totals = Totals(earlier=output.statuses)

    def written(result: PageResult) -> None:
        totals.add(result)
        if on_page is not None:
            on_page(result, totals)

    finished = output.finished
    # Before the writer starts and drops what was there: this refuses options that cannot be meant.
    pages = engine.read(inputs.sources, skip=finished, **how)
    try:
        with output.writer(written) as writer:
            for result in inputs.unreadable:
                if (result.source, result.page) not in finished:
                    writer.put(result)
            for result in pages:
                writer.put(result)
    except (KeyboardInterrupt, DeviceError):
        if not output.resumable:
            output.finish(inputs.ranks)  # a stream gets what there is
        raise
    output.finish(inputs.ranks)
    return totals
