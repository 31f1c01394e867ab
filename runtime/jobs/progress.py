"""Telling a person how a run is going: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from pagemill.errors import printable
from pagemill.jobs.batch import Totals
from pagemill.jobs.inputs import Inputs, count_pages
from pagemill.results import PageResult

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_TICKS = 0.5
_PAGES_BEFORE_ETA = 8  # the first pages of a batch finish together, late: their rate says little


class ProgressReport:
    """Context manager that shows `Totals` as they grow, and the time also while no page finishes.

    Pages are counted in the background while the first ones are read, so that a folder of a thousand PDF
    files starts at once; until all are counted the number known so far carries a `+` and there is no ETA.
    """

    def __init__(self, console: Console, inputs: Inputs, *, already: int, live: bool) -> None:
        """Report on `console`; `already` pages of the inputs are finished before the run."""
        self._console = console
        self._already = already
        self._known = 0
        self._complete = False
        self._totals = Totals()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if live:
            self._bar = Progress(
                # Its own clock: rich's stops at the total, and a count by suffix can be too low.
                _TextColumn(self.clock, Column(no_wrap=True, min_width=7)),
                BarColumn(bar_width=10, table_column=Column(no_wrap=True, min_width=10)),
                _TextColumn(self.state, Column(no_wrap=True, overflow="ellipsis")),
                console=console,
                transient=True,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=None)
        self._stopped = threading.Event()
        self._counter = threading.Thread(
            target=self._count, args=(inputs,), name="pagemill-count", daemon=True
        )
        self._ticker = threading.Thread(target=self._tick, name="pagemill-progress", daemon=True)

    def __enter__(self) -> ProgressReport:
        self._totals = Totals()
        self._counter.start()
        if self._bar is not None:
            self._bar.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._counter.join()  # pdfium must not be at work when the interpreter takes it down
        self._ticker.join()
        if self._bar is not None:
            self._bar.stop()

    def on_page(self, result: PageResult, totals: Totals) -> None:
        """Take the counts after one more page; they are shown at the next tick."""
        self._totals = totals

    def _count(self, inputs: Inputs) -> None:
        for self._known, self._complete in count_pages(inputs):
            if self._stopped.is_set():
                return

    def _tick(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_TICKS):
            if self._bar is None:
                self._console.print(
                    f"{duration(self._elapsed())} · {self.state()}", highlight=False, soft_wrap=True
                )
            else:
                # An incomplete total would show a bar that moves backwards.
                total = self._known if self._complete else None
                self._bar.update(self._task, completed=self._already + self._totals.pages, total=total)

    def _elapsed(self) -> float:
        return time.monotonic() - self._totals.started

    def clock(self) -> str:
        """Return the time since the start as `0:00:00`."""
        return str(timedelta(seconds=int(self._elapsed())))

    def state(self) -> str:
        """Return the counts in one line, what matters most first."""
        totals, elapsed = self._totals, self._elapsed()
        done = self._already + totals.pages
        parts = [f"{done}/{max(self._known, done)}{'' if self._complete else '+'} pages"]
        if totals.read:
            parts.append(f"{totals.read / elapsed:.3g} pages/s")
        if self._complete and totals.read >= _PAGES_BEFORE_ETA and done < self._known:
            parts.append(f"{duration((self._known - done) * elapsed / totals.read)} left")
        for status, name in (("error", "failed"), ("degenerate", "degenerate")):
            if totals.statuses[status]:
                parts.append(f"{totals.statuses[status]} {name}")
        return " · ".join(parts)


class _TextColumn(ProgressColumn):
    """What a function says, asked anew each time the bar is drawn."""

    def __init__(self, say: Callable[[], str], column: Column) -> None:
        super().__init__(column)
        self._say = say

    def render(self, task: Task) -> Text:
        return Text(self._say())


def summary(totals: Totals, output: str) -> str:
    """Return what a finished run did, in a few lines."""
    counts = totals.statuses
    lines = [
        f"{totals.pages} page{'' if totals.pages == 1 else 's'}: "
        f"{counts['ok']} ok, {counts['degenerate']} degenerate, {counts['error']} failed"
        f" · {duration(totals.seconds)} · {rates(totals)} → {printable(output)}"
    ]
    if totals.loops:
        lines.append(
            f"  {totals.loops} repetition loop{'s were' if totals.loops > 1 else ' was'} caught and cut short."
        )
    if totals.shortcuts:
        pages = "pages were" if totals.shortcuts > 1 else "page was"
        lines.append(f"  {totals.shortcuts} {pages} blank or a duplicate, and answered without the model.")
    lines += [f"  failed: {_naming(page)}" for page in totals.failures]
    if (more := counts["error"] - len(totals.failures)) > 0:
        lines.append(f"  and {more} more: their records say why.")
    if totals.earlier["error"]:
        lines.append(
            f"  {totals.earlier['error']} pages had failed in an earlier run and were not read again."
        )
    return "\n".join(lines)


def _naming(page: PageResult) -> str:
    """Return a page's error; most of them name the file already."""
    error = page.error or "unknown"
    return printable(error if error.startswith(page.source) else f"{page.source}, page {page.page}: {error}")


def rates(totals: Totals) -> str:
    """Return pages/s, failed ones aside, and tokens/s of a run."""
    seconds = max(totals.seconds, 1e-9)
    if not totals.read:
        return "0 pages/s"
    return f"{totals.read / seconds:.3g} pages/s · {totals.output_tokens / seconds:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """Return seconds as `4.2 s`, `42 s`, `3:07 min` or `2:05 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
