"""Appending records to a file descriptor from a thread of its own, many records to one fsync.

An fsync takes milliseconds; the engine must not wait for it between two steps. While one fsync runs, the
records that arrive gather, and the next one takes them all: the slower the disk, the larger the groups.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType

from pagemill.jobs.journal import encode
from pagemill.results import PageResult


class GroupWriter:
    """Context manager; on leaving it, everything put is written and reported, or its error is raised."""

    def __init__(
        self,
        fd: int,
        *,
        sync: bool,
        on_written: Callable[[PageResult], None],
        explain: Callable[[OSError], Exception],
    ) -> None:
        """Write to `fd` at its current offset; with `sync`, `on_written` runs only after an fsync.

        `on_written` is called from the writer's thread, once a record, in the order of writing. What the
        system refuses is raised as `explain` puts it; a closed pipe stays a BrokenPipeError.
        """
        self._fd = fd
        self._sync = sync
        self._on_written = on_written
        self._explain = explain
        # A SimpleQueue is safe against a KeyboardInterrupt in the middle of put; a Condition is not.
        self._queue: queue.SimpleQueue[PageResult | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pagemill-writer", daemon=True)

    def __enter__(self) -> GroupWriter:
        self._thread.start()
        return self

    def put(self, result: PageResult) -> None:
        """Hand over one record; raises what stopped the writer, if something did."""
        if self._error is not None:
            raise self._error
        self._queue.put(result)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and self._error is not error:
            raise self._error

    def _run(self) -> None:
        try:
            open_ = True
            while open_:
                group = [self._queue.get()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        group.append(self._queue.get_nowait())
                open_ = None not in group
                results = [result for result in group if result is not None]
                self._write(b"".join(map(encode, results)))
                for result in results:
                    self._on_written(result)
        except BrokenPipeError as error:
            self._error = error
        except OSError as error:
            self._error = self._explain(error)
        except BaseException as error:
            self._error = error

    def _write(self, data: bytes) -> None:
        durable = os.lseek(self._fd, 0, os.SEEK_CUR) if self._sync else 0
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if self._sync and data:
                os.fsync(self._fd)
        except OSError:
            if self._sync:
                # What was not reported must not stay half-written; a torn line is cut on resume anyway.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, durable)
            raise
