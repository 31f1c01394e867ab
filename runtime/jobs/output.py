"""Where records go: a durable file (through a journal), or a stream such as standard output."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from pagemill.errors import ConfigError, OutputError
from pagemill.jobs.documents import RENDERERS, write_atomically
from pagemill.jobs.journal import FinishedPages, Journal, cannot_write
from pagemill.jobs.writer import GroupWriter
from pagemill.results import PageResult

Format = Literal["jsonl", "json", "md", "txt"]
FORMATS: tuple[Format, ...] = get_args(Format)


def infer_format(output: str | None) -> Format:
    """Return the format that the suffix of `output` names; JSONL for standard output (None or `-`).

    Raises:
        ConfigError: the suffix names no format.
    """
    if output is None or output == "-":
        return "jsonl"
    suffix = Path(output).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ConfigError(
            f"{output}: the suffix names no format, so give one with --format {'|'.join(FORMATS)}."
        )
    return suffix


class Output(ABC):
    """An opened output. A context manager: leaving it releases the file and its lock."""

    format: Format
    resumable: bool
    """Whether a run that stops early can be continued."""
    name: str
    """For messages."""
    finished: FinishedPages
    """Pages that were there before this run and are not read again."""
    statuses: Counter[str]
    """How many of them have each status."""
    note: str | None = None
    """What the user should know of the output, in one sentence."""

    @abstractmethod
    def writer(self, on_written: Callable[[PageResult], None]) -> GroupWriter:
        """Start writing; from here on the output changes. `on_written` follows each record that is safe."""

    @abstractmethod
    def finish(self, ranks: dict[str, int]) -> None:
        """Make the final document: by the rank of the source (absolute path → rank), then by page."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held."""

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FileOutput(Output):
    """A regular file. JSONL is the journal itself; other formats are rendered from a journal beside."""

    resumable = True

    def __init__(self, path: Path, format: Format, *, resume: bool, overwrite: bool) -> None:
        self.format = format
        self.name = str(path)
        self._path = path
        journal = _journal_path(path, format)
        # With a journal beside it, the file is the earlier version that --overwrite was to replace.
        if not (overwrite or os.path.exists(journal)) and os.path.exists(path) and path.stat().st_size:
            raise OutputError(
                f"{path} is already there and no unfinished run belongs to it: "
                "use --overwrite to replace it, or write to another file."
            )
        self._journal = Journal.open(journal, resume=resume, overwrite=overwrite)
        self.finished = self._journal.finished
        self.statuses = self._journal.statuses
        self.note = self._journal.note

    def writer(self, on_written: Callable[[PageResult], None]) -> GroupWriter:
        """Cut off a torn line, or everything with `overwrite`, and append."""
        try:
            self._journal.start()
        except OSError as error:
            raise self._explain(error) from error
        return GroupWriter(self._journal.fd, sync=True, on_written=on_written, explain=self._explain)

    def finish(self, ranks: dict[str, int]) -> None:
        """Render the journal into the document, then remove the journal."""
        if self.format == "jsonl":
            return
        try:
            write_atomically(self._path, RENDERERS[self.format](self._journal.records(ranks)))
            self._journal.path.unlink()
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OutputError:
        return cannot_write(self._path, error, "; the pages reported so far are safe: go on with --resume")

    def close(self) -> None:
        """Release the lock."""
        self._journal.close()


class StreamOutput(Output):
    """Standard output, a pipe or a device: JSONL as pages finish, other formats at the end."""

    resumable = False

    def __init__(self, fd: int, format: Format, name: str) -> None:
        """Take over `fd`."""
        self.format = format
        self.name = name
        self._fd = fd
        self._journal = None if format == "jsonl" else Journal.temporary()
        self.finished = FinishedPages()
        self.statuses = Counter()

    def writer(self, on_written: Callable[[PageResult], None]) -> GroupWriter:
        """Write to the stream, or to a temporary journal."""
        fd = self._fd if self._journal is None else self._journal.fd
        return GroupWriter(fd, sync=False, on_written=on_written, explain=self._explain)

    def finish(self, ranks: dict[str, int]) -> None:
        """Write the document, where there is one."""
        if self._journal is None:
            return
        try:
            with open(self._fd, "wb", closefd=False) as stream:
                for chunk in RENDERERS[self.format](self._journal.records(ranks)):
                    stream.write(chunk.encode("utf-8", "backslashreplace"))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OutputError:
        return cannot_write(self.name, error)

    def close(self) -> None:
        """Close the stream."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._fd)


def open_output(
    output: str | None = None,
    format: Format | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    sources: Iterable[str] = (),
) -> Output:
    """Open where the records go; nothing that was there changes before the first page is written.

    `output` is a file, or None or `-` for standard output. `format` is by default what the suffix says. With
    `resume`, pages that the file holds are finished; with `overwrite`, the file is replaced; with neither, a
    file that holds something is refused. An output that is one of the `sources`, under whatever name, is
    refused always.

    Raises:
        ConfigError: the options do not go together.
        OutputError: the file cannot be written, is in use, holds something that must not be lost, or holds names
            that start from another folder than this (with `resume`).
    """
    if output == "":
        raise ConfigError("the output has an empty name: give a file with -o, or - for standard output.")
    format = format or infer_format(output)
    if resume and overwrite:
        raise ConfigError("--resume keeps what the output holds and --overwrite drops it: give one of them.")
    if output is None or output == "-":
        if resume:
            raise ConfigError("--resume needs a file to go on with: give one with -o.")
        try:
            _refuse_sources([os.fstat(1)], "standard output", sources)
            return StreamOutput(os.dup(1), format, "standard output")
        except OSError as error:
            raise cannot_write("standard output", error) from error
    path = Path(os.path.realpath(output))
    if os.path.isdir(path):
        raise OutputError(f"{output} is a folder: name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        if resume:
            raise ConfigError(f"--resume needs a regular file to go on with, and {output} is none.")
        try:
            return StreamOutput(os.open(path, os.O_WRONLY | os.O_CLOEXEC), format, output)
        except OSError as error:
            raise cannot_write(output, error) from error
    written = {path, _journal_path(path, format)}
    _refuse_sources([os.stat(file) for file in written if os.path.exists(file)], output, sources)
    return FileOutput(path, format, resume=resume, overwrite=overwrite)


def _journal_path(path: Path, format: Format) -> Path:
    return path if format == "jsonl" else path.with_name(path.name + ".journal.jsonl")


def _refuse_sources(written: list[os.stat_result], name: str, sources: Iterable[str]) -> None:
    """Raise OutputError if a file that is about to be written is one of the sources, by whatever path or link."""
    files = {(file.st_dev, file.st_ino) for file in written if stat.S_ISREG(file.st_mode)}
    for source in sources if files else ():
        try:
            found = os.stat(source)
        except (OSError, ValueError):
            continue  # reading it says what is wrong
        if (found.st_dev, found.st_ino) in files:
            raise OutputError(f"writing to {name} would destroy the input {source}: write to another file.")
