"""The journal: a JSONL file of finished pages, locked by one run, that survives `kill -9`.

A line is a record and a record is a line: `{"source":...}` and a newline. A run that is killed leaves at most
one line without its newline, which the next run cuts off. Anything else that is not a record means that the
file is not ours, and it is left as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pagemill.errors import OutputError
from pagemill.files import sync_folder
from pagemill.jobs.inputs import PageKey, page_key
from pagemill.results import PageResult

_FIRST_BYTES = b'{"source":'
_STATUSES = ("ok", "degenerate", "error")
_TEXTS = ("header", "margin", "footer", "text", "error")
_FOLDER = "user.pagemill.folder"
"""Extended attribute of a journal: the folder that its relative sources start from."""


def encode(result: PageResult) -> bytes:
    """Return the record as one line of valid UTF-8 JSON, newline included.

    Bytes of a file name that are not UTF-8 (lone surrogates in Python) become JSON escapes such as `\\udcff`,
    so that `os.fsencode(json.loads(line)["source"])` is the file's name again.
    """
    return result.to_json().encode("utf-8", "backslashreplace") + b"\n"


class FinishedPages(Collection[tuple[str, int]]):
    """The set of finished `(source, page)`, however the source is spelled."""

    def __init__(self) -> None:
        self._keys: set[PageKey] = set()

    def add(self, source: str, page: int) -> None:
        """Mark a page as finished."""
        self._keys.add(page_key(source, page))

    def __contains__(self, page: object) -> bool:
        return isinstance(page, tuple) and page_key(*page) in self._keys

    def __iter__(self) -> Iterator[PageKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Journal:
    """An open, locked journal. Nothing in the file changes before `start`."""

    def __init__(self, path: Path, fd: int, *, created: bool) -> None:
        self.path = path
        self.fd = fd
        self._created = created
        self.finished = FinishedPages()
        self.statuses: Counter[str] = Counter()
        """How many records of each status the file held when it was opened."""
        self.note: str | None = None
        """What the user should know of the file, in one sentence."""
        self.whole_bytes = 0
        """Length of the leading part of the file that is to stay: whole records."""

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> Journal:
        """Open and lock `path`, creating it if it is not there; read what is finished if `resume`.

        Raises:
            OutputError: another run has it; it holds records and neither `resume` nor `overwrite` is set; it
                holds something else than records, or records of another folder (with `resume`); the system
                refuses.
        """
        existed = os.path.exists(path)
        journal = cls(path, _open_locked(path), created=not existed)
        try:
            if resume:
                journal._scan()
            elif not overwrite and os.fstat(journal.fd).st_size > 0:
                raise OutputError(
                    f"{path} already holds something: use --resume to go on with it, "
                    "or --overwrite to replace it."
                )
        except BaseException:
            os.close(journal.fd)
            raise
        return journal

    @classmethod
    def temporary(cls) -> Journal:
        """Open a journal without a name, for results that go to a stream once they are all there."""
        try:
            with tempfile.TemporaryFile(prefix="pagemill-") as file:
                return cls(Path(tempfile.gettempdir()), os.dup(file.fileno()), created=False)
        except OSError as error:
            raise cannot_write("a temporary file", error) from error

    def _scan(self) -> None:
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            start = file.read(len(_FIRST_BYTES))
            if not _FIRST_BYTES.startswith(start.rstrip(b"\0")):
                raise OutputError(f"{self.path} does not hold pagemill records, so it is left as it is.")
            file.seek(0)
            relative = False
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not _is_torn(line):
                        raise self._not_a_record(number)
                    break
                record = _parse(line)
                if record is None:
                    raise self._not_a_record(number)
                self.finished.add(record["source"], record["page"])
                self.statuses[record["status"]] += 1
                self.whole_bytes += len(line)
                relative = relative or not os.path.isabs(record["source"])
        if relative:
            self._check_folder()

    def _check_folder(self) -> None:
        """Refuse to go on from another folder: there the relative sources would be other files."""
        folder = self._folder()
        if folder is None or not os.path.isdir(folder):
            self.note = (
                f"{self.path} holds relative names and not the folder they start from: "
                "they are taken to start from this one."
            )
        elif not os.path.samefile(folder, os.curdir):
            raise OutputError(
                f"{self.path} holds names that start from {folder}: go on with --resume in that folder, "
                "or write to another file."
            )

    def _folder(self) -> str | None:
        try:
            return os.fsdecode(os.getxattr(self.fd, _FOLDER))
        except OSError:  # a copied file, or a file system without attributes
            return None

    def _not_a_record(self, line: int) -> OutputError:
        return OutputError(
            f"line {line} of {self.path} is not a pagemill record, so the file is left as it is: "
            "remove that line, or write to another file."
        )

    def start(self) -> None:
        """Cut off what is not to stay (a torn line; everything, with `overwrite`) and go to the end."""
        os.ftruncate(self.fd, self.whole_bytes)
        os.lseek(self.fd, 0, os.SEEK_END)
        with contextlib.suppress(OSError):  # without the attribute, --resume says what it assumes
            os.setxattr(self.fd, _FOLDER, os.fsencode(os.getcwd()))
        os.fsync(self.fd)
        sync_folder(self.path)

    def records(self, ranks: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Yield all records, by the rank of their source (`ranks`: absolute path → rank), then by page.

        Sources without a rank (an earlier run had other inputs) follow the others.
        """
        with os.fdopen(os.dup(self.fd), "rb") as file:
            file.seek(0)
            places: list[tuple[int, int, int]] = []
            offset = 0
            for line in file:
                record = json.loads(line)
                rank = ranks.get(os.path.abspath(record["source"]), len(ranks))
                places.append((rank, record["page"], offset))
                offset += len(line)
            for _, _, offset in sorted(places):
                file.seek(offset)
                yield json.loads(file.readline())

    def close(self) -> None:
        """Release the lock; a new journal that stayed empty leaves no file behind."""
        if self._created and os.fstat(self.fd).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, or None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if (
        isinstance(record, dict)
        and isinstance(record.get("source"), str)
        and type(record.get("page")) is int
        and record.get("status") in _STATUSES
        and all(name in record and isinstance(record[name], str | None) for name in _TEXTS)
    ):
        return record
    return None


def _is_torn(line: bytes) -> bool:
    """Tell whether a last line without a newline is what a kill leaves of a record: a part, or all but the end."""
    line = line.rstrip(b"\0")  # zeros can follow where the machine lost power after the file had grown
    if not _FIRST_BYTES.startswith(line[: len(_FIRST_BYTES)]):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    except RecursionError:
        return False
    return _parse(line) is not None


def _open_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OutputError(f"{path} is not a regular file.")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held the lock may have removed the file between our open and our lock.
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(
                    f"another run is writing {path}: wait for it, or choose another file."
                ) from None
            raise cannot_write(path, error) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def cannot_write(path: Path | str, error: OSError, hint: str = "") -> OutputError:
    """Return the sentence for a write that the system refused."""
    return OutputError(f"cannot write {path}: {error.strerror or error}{hint}.")
