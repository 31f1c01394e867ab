"""Files to pages: find them, tell what they are, and decode one page at a time.

What a file is follows from its first bytes, never from its name. Every failure is a PageError of one sentence
that names the file, and the page where there is one; a bad page leaves the file's other pages readable.
"""

from __future__ import annotations

import glob
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pagemill.errors import ConfigError, PageError
from pagemill.pages import image, pdf, tiff

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pdf")
"""The files taken from a folder, in any case; a file named outright may have any suffix."""

MAX_FILE_BYTES = 2 << 30
"""Larger files are refused unread."""


@dataclass(frozen=True)
class PageRef:
    """One page of one file; `source` is the path as given, `page` counts from 1."""

    source: str
    page: int
    offset: int | None = field(default=None, compare=False)
    """Where a TIFF page's directory lies, so that loading page n need not walk past the n - 1 before it."""


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Return the files that paths, folders and glob patterns stand for, in order and each once.

    A folder gives the files below it with a known suffix (`SUFFIXES`), sorted, without hidden ones and
    without following links to folders. A pattern (`**` included) gives what it matches, as a shell would; a
    path that exists is never read as a pattern. A folder that cannot be listed stands for itself, after the files
    around it: reading it says why. Raises PageError for an input that gives no file.
    """
    found: dict[str, None] = {}
    for given in inputs:
        if not given:
            raise PageError("an input has an empty name: name files, folders or globs")
        files = _expand(given)
        if not files:
            raise PageError(f"{given}: {_nothing(given)}")
        found.update(dict.fromkeys(files))
    return list(found)


def list_pages(source: str) -> Iterator[PageRef]:
    """Yield the pages of a file, one by one as they are found.

    An image is one page, whatever its frames; a multi-page TIFF and a PDF are many. Raises PageError where
    the file cannot be read, is in none of the formats, is password-protected, or has no pages. A page that
    cannot be decoded is listed all the same: `load_page` says what is wrong with it.
    """
    with _errors(source):
        file = _open(source)
    with file:
        with _errors(source):
            kind = _kind(file)
            offsets = iter(tiff.directories(file)) if kind == "TIFF" else None
            count = pdf.count_pages(source) if kind == "PDF" else 1
        if offsets is None:
            for page in range(1, count + 1):
                yield PageRef(source, page)
            return
        page = 0
        while True:
            with _errors(source):
                offset = next(offsets, None)
            if offset is None:
                break
            page += 1
            yield PageRef(source, page, offset)
    if page == 0:
        raise PageError(f"{source}: the TIFF file has no pages")


def load_page(ref: PageRef, dpi: float) -> npt.NDArray[np.uint8]:
    """Decode one page to uint8 [H, W, 3], RGB, C-contiguous, upright, transparency over white.

    `dpi` is the resolution that a PDF page is rendered at; images keep their own pixels. Safe to call from
    many threads: images decode side by side, PDF pages in turn (pdfium is not thread-safe). Raises PageError
    where the page cannot be decoded or is larger than the limits of `pagemill.pages.image`, ConfigError for a
    `dpi` that is not positive.
    """
    if not (math.isfinite(dpi) and dpi > 0):
        raise ConfigError(f"dpi must be a positive number, not {dpi!r}")
    with _errors(ref.source, ref.page), _open(ref.source) as file:
        kind = _kind(file)
        if kind == "PDF":
            return pdf.render_page(ref.source, ref.page, dpi)
        if kind == "TIFF":
            return image.decode(tiff.open_page(file, ref.page, ref.offset), kind)
        if ref.page != 1:
            raise PageError(f"does not exist, the file is a {kind} image of one page")
        return image.decode(file, kind)


def page_text(ref: PageRef) -> str:
    """Return the text layer of a PDF page, cleaned (`pdf.page_text`); empty for a page without one and for images.

    Raises PageError where the file or the page cannot be read.
    """
    with _errors(ref.source, ref.page):
        with _open(ref.source) as file:
            kind = _kind(file)
        return pdf.page_text(ref.source, ref.page) if kind == "PDF" else ""


def is_pdf(ref: PageRef) -> bool:
    """Tell whether a page has no pixels of its own, but is rendered at a resolution; raises PageError as `load_page`."""
    with _errors(ref.source, ref.page), _open(ref.source) as file:
        return _kind(file) == "PDF"


class _errors:  # noqa: N801, used like a function
    """Turn whatever goes wrong inside into a PageError that names the file and the page.

    Decoders of hostile bytes raise nearly anything (struct.error, ZeroDivisionError, MemoryError): all of it
    means the page cannot be read.
    """

    def __init__(self, source: str, page: int | None = None) -> None:
        self.where = source if page is None else f"{source}, page {page}"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        if isinstance(error, PageError):
            raise PageError(f"{self.where}: {error}") from error.__cause__
        if isinstance(error, OSError) and error.strerror:
            raise PageError(f"{self.where}: cannot be read ({error.strerror})") from error
        if isinstance(error, MemoryError):
            raise PageError(f"{self.where}: needs more memory than there is") from error
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise PageError(
            f"{self.where}: cannot be decoded, the file is damaged or not supported ({detail})"
        ) from error


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)


def _kind(file: BinaryIO) -> str:
    """Name the format by the first bytes; PDF readers accept up to 1024 bytes before the header."""
    head = file.read(1024 + len(b"%PDF-"))
    file.seek(0)
    if not head:
        raise PageError("the file is empty")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if b"%PDF-" in head:
        return "PDF"
    raise PageError("is not a page in a known format (PNG, JPEG, WebP, BMP, TIFF, PDF)")


def _open(source: str) -> BinaryIO:
    try:
        status = os.stat(source)
    except FileNotFoundError:
        raise PageError("there is no such file") from None
    except ValueError:  # a NUL in the path
        raise PageError("is not a possible file name") from None
    if stat.S_ISDIR(status.st_mode):
        os.scandir(source).close()  # a folder that cannot be listed says why
        raise PageError("is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise PageError("is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise PageError(
            f"the file has {status.st_size / 1e9:.1f} GB, the limit is {MAX_FILE_BYTES / 1e9:.1f} GB"
        )
    return open(source, "rb")


def _expand(given: str) -> list[str]:
    if os.path.isdir(given):
        return list(_walk(given))
    if os.path.lexists(given):
        return [given]
    if not glob.has_magic(given):
        return []
    files = []
    for match in sorted(glob.glob(given, recursive=True)):
        files += list(_walk(match)) if os.path.isdir(match) else [match]
    return files


def _walk(folder: str) -> Iterator[str]:
    unlisted: list[str] = []
    for parent, folders, files in os.walk(
        folder, onerror=lambda error: unlisted.append(error.filename or folder)
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)
    yield from unlisted


def _nothing(given: str) -> str:
    if os.path.isdir(given):
        return f"the folder has no pages (files ending in {', '.join(SUFFIXES)})"
    if glob.has_magic(given):
        return "no file matches this pattern"
    return "there is no such file or folder"
