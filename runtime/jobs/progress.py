"""Telling a person how a run is going: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pagemill.jobs.batch import Totals
from pagemill.jobs.inputs import Inputs, count_pages
from pagemill.results import PageResult

_SECONDS_BETWEEN_LINES = 10.0
_PAGES_BEFORE_ETA = 8  # the first pages of a batch finish together, late: their rate says little


class ProgressReport:
    """Context manager that shows `Totals` as they grow.

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
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if live:
            self._bar = Progress(
                TextColumn("[bold]reading"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, state="")
        self._stopped = False
        self._counter = threading.Thread(
            target=self._count, args=(inputs,), name="pagemill-count", daemon=True
        )

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        self._counter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._counter.join()  # pdfium must not be at work when the interpreter takes it down
        if self._bar is not None:
            self._bar.stop()

    def on_page(self, result: PageResult, totals: Totals) -> None:
        """Show the counts after one more page."""
        self._totals = totals
        if self._bar is not None:
            self._refresh()
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(self._state(), highlight=False, soft_wrap=True)

    def _count(self, inputs: Inputs) -> None:
        for self._known, self._complete in count_pages(inputs):
            if self._bar is not None:
                self._refresh()
            if self._stopped:
                return

    def _refresh(self) -> None:
        assert self._bar is not None
        # An incomplete total would show a bar that moves backwards.
        total = self._known if self._complete else None
        self._bar.update(
            self._task, completed=self._already + self._totals.pages, total=total, state=self._state()
        )

    def _state(self) -> str:
        totals = self._totals
        done = self._already + totals.pages
        parts = [f"{done}/{max(self._known, done)}{'' if self._complete else '+'} pages", rates(totals)]
        if self._complete and totals.pages >= _PAGES_BEFORE_ETA and done < self._known:
            left = (self._known - done) * totals.seconds / totals.pages
            parts.append(f"ETA {duration(left)}")
        parts += [f"{totals.statuses['degenerate']} degenerate", f"{totals.statuses['error']} failed"]
        return " · ".join(parts)


def summary(totals: Totals, output: str) -> str:
    """Return what a finished run did, in a few lines."""
    counts = totals.statuses
    lines = [
        f"{totals.pages} page{'' if totals.pages == 1 else 's'}: "
        f"{counts['ok']} ok, {counts['degenerate']} degenerate, {counts['error']} failed"
        f" · {duration(totals.seconds)} · {rates(totals)} → {output}"
    ]
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
    return error if error.startswith(page.source) else f"{page.source}, page {page.page}: {error}"


def rates(totals: Totals) -> str:
    """Return pages/s and tokens/s of a run."""
    seconds = max(totals.seconds, 1e-9)
    if not totals.pages:
        return "0 pages/s"
    return f"{totals.pages / seconds:.3g} pages/s · {totals.output_tokens / seconds:,.0f} tokens/s"


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
