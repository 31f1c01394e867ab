"""The pages of a TIFF file: walk its chain of directories, and hand one to the decoder as if it were the
first.

Pillow reaches page n by parsing all before it, so that a damaged page takes the later ones with it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from pagemill.errors import PageError

MAX_TIFF_PAGES = 10_000
"""Pages read of one TIFF file; one with more is refused."""

_NEW_SUBFILE_TYPE = 254
_NOT_A_PAGE = 0b101  # a reduced version of another image, or its mask


def directories(file: BinaryIO) -> Iterator[int]:
    """Yield the offset of each page's directory, lazily: thumbnails and masks after the first are left out.

    A pointer that leads out of the file counts as one page, so that what it stood for does not vanish unseen.
    Raises PageError past MAX_TIFF_PAGES.
    """
    layout = _Layout(_read(file, 0, 16))
    offset, seen = layout.first, set[int]()
    while offset and offset not in seen:
        seen.add(offset)
        if len(seen) > MAX_TIFF_PAGES:
            raise PageError(f"the TIFF file has more than {MAX_TIFF_PAGES} pages, split it")
        head = _read(file, offset, layout.count.size)
        if len(head) < layout.count.size:
            yield offset
            return
        entries = min(layout.count.unpack(head)[0], 65535)
        body = _read(file, offset + layout.count.size, entries * layout.entry_size + layout.pointer.size)
        if len(seen) == 1 or not layout.subfile_type(body, entries) & _NOT_A_PAGE:
            yield offset
        tail = body[entries * layout.entry_size :]
        if len(tail) < layout.pointer.size:
            return
        offset = layout.pointer.unpack(tail)[0]


def open_page(file: BinaryIO, page: int, offset: int | None = None) -> BinaryIO:
    """Return `file` as a TIFF whose first directory is that of `page` (from 1); raises PageError if it has
    none.

    `offset` is the page's directory as `directories` found it; without it, the chain is walked up to the page.
    """
    if offset is None and page >= 1:
        offset = next(islice(directories(file), page - 1, None), None)
    if offset is None:
        raise PageError("does not exist in this TIFF file")
    header = bytearray(_read(file, 0, 16))
    layout = _Layout(bytes(header))
    layout.pointer.pack_into(header, layout.pointer_at, offset)
    return io.BufferedReader(
        _Patched(file.fileno(), bytes(header[: layout.pointer_at + layout.pointer.size]))
    )


class _Layout:
    """Byte order and field widths of a TIFF or BigTIFF file, from its header."""

    def __init__(self, header: bytes) -> None:
        order = "<" if header[:2] == b"II" else ">"
        big = b"+" in header[2:4]
        self.order = order
        self.count = struct.Struct(order + ("Q" if big else "H"))
        self.pointer = struct.Struct(order + ("Q" if big else "I"))
        self.entry_size, self.pointer_at = (20, 8) if big else (12, 4)
        if len(header) < self.pointer_at + self.pointer.size:
            raise PageError("the TIFF file ends within its header")
        self.first: int = self.pointer.unpack_from(header, self.pointer_at)[0]

    def subfile_type(self, body: bytes, entries: int) -> int:
        tag = struct.Struct(self.order + "HH")
        for at in range(0, min(entries * self.entry_size, len(body) - self.entry_size + 1), self.entry_size):
            number, kind = tag.unpack_from(body, at)
            if number == _NEW_SUBFILE_TYPE and kind == 4:  # LONG, its value at the start of the last field
                return int(
                    struct.unpack_from(self.order + "I", body, at + self.entry_size - self.pointer.size)[0]
                )
        return 0


class _Patched(io.FileIO):
    """A file whose first bytes read as `header`. It shares the descriptor and leaves closing it to its
    owner."""

    def __init__(self, descriptor: int, header: bytes) -> None:
        super().__init__(descriptor, "rb", closefd=False)
        self._header = header
        self.seek(0)

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        at = self.tell()
        count = super().readinto(view) or 0
        over = self._header[at : at + count]
        view[: len(over)] = over
        return count


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
    except (OverflowError, ValueError, OSError):  # an offset that no file can have
        return b""
    return file.read(size)
