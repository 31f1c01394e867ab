"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["sync_folder", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the name of an empty file beside `path` for the block to write; it becomes `path` when the block has ended.

    Also after a loss of power `path` is what it was or what was written: the file is synced, renamed, and its folder
    synced. Its mode is that of any new file, also where the block has put another file in its place. If the block raises,
    the file is removed; a process that is killed leaves `.pagemill-*.tmp`. Raises OSError.
    """
    beside = path.parent / f".pagemill-{secrets.token_hex(8)}.tmp"
    with open(beside, "xb") as file:  # never over a file that is somebody's
        mode = os.fstat(file.fileno()).st_mode & 0o777
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make a new name of a file durable: its folder has to reach the disk as well."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
