"""PDF pages, rendered by pdfium.

pdfium is not thread-safe, so every call into it, closing included, holds one lock for the whole process: PDF
pages render in turn, on one core, while images go on decoding beside them. A document is opened anew for each
page, which costs well under a millisecond for common files and leaves nothing open between pages.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pypdfium2
from pypdfium2 import raw

from pagemill.errors import PageError

MAX_RASTER_PIXELS = 50_000_000
"""A page that would be larger at the asked DPI is rendered at the DPI that just fits (A4 fits up to 715 DPI).
More would be thrown away in preparation."""

MAX_PDF_PAGES = 50_000
"""A PDF file with more pages is refused."""

MAX_TEXT_CHARS = 200_000
"""Longest text that is taken from a page; a dense page of small print has 20,000 characters."""

_MIN_PAGE_BYTES = 8  # a page cannot take less of a file, however well its description compresses
_POINTS_PER_INCH = 72
_lock = threading.Lock()


def count_pages(source: str) -> int:
    """Return the number of pages, at least 1; raises PageError for a file that pdfium cannot open.

    pdfium believes what the file says of its page count, so a count above MAX_PDF_PAGES, or one that the file is
    too short for, is refused: it would end in as many failed pages.
    """
    with _document(source) as document:
        count = len(document)
    if count < 1:
        raise PageError("the PDF file has no pages")
    if count * _MIN_PAGE_BYTES > (size := os.path.getsize(source)):
        raise PageError(f"the PDF file is damaged, it claims {count} pages in {size} bytes")
    if count > MAX_PDF_PAGES:
        raise PageError(f"the PDF file has {count} pages, more than {MAX_PDF_PAGES}, split it")
    return count


def render_page(source: str, page: int, dpi: float) -> npt.NDArray[np.uint8]:
    """Render page `page` (from 1) over white to uint8 [H, W, 3], RGB; annotations and filled-in fields are
    drawn."""
    with _document(source) as document:
        sheet = _sheet(document, page)
        try:
            width, height = sheet.get_size()
            if not (0 < width < math.inf and 0 < height < math.inf):
                raise PageError(f"has no usable size in the PDF file ({width}x{height} points)")
            scale = dpi / _POINTS_PER_INCH
            # Sides are rounded up to whole pixels: each below one pixel of a thin page still counts as one.
            pixels = math.ceil(width * scale) * math.ceil(height * scale)
            if pixels > MAX_RASTER_PIXELS:
                scale *= math.sqrt(MAX_RASTER_PIXELS / pixels)
            if math.ceil(width * scale) * math.ceil(height * scale) > 2 * MAX_RASTER_PIXELS:
                raise PageError(f"is too long and thin to render ({width:.0f}x{height:.0f} points)")
            bitmap = sheet.render(scale=scale, rev_byteorder=True)
            try:
                rendered = bitmap.to_numpy()
            finally:
                bitmap.close()
        finally:
            sheet.close()
    return np.ascontiguousarray(rendered)


def page_text(source: str, page: int) -> str:
    """Return the text layer of page `page` (from 1) in the file's order, lines ending in a newline; empty if there is none.

    Only what lies on the visible page counts, at most MAX_TEXT_CHARS of it. The text is NFC without control characters; a
    word broken at the end of a line keeps its hyphen and its break, ligatures are spelled out. Nothing says that it is what
    the page shows. Raises PageError where the page does not exist or is damaged.
    """
    with _document(source) as document:
        sheet = _sheet(document, page)
        try:
            try:
                layer = sheet.get_textpage()
            except pypdfium2.PdfiumError:
                return ""
            try:
                left, bottom, right, top = sheet.get_bbox()
                size = raw.FPDFText_GetBoundedText(layer, left, top, right, bottom, None, 0)
                if size <= 0:
                    return ""
                buffer = (ctypes.c_ushort * min(size, MAX_TEXT_CHARS))()
                raw.FPDFText_GetBoundedText(layer, left, top, right, bottom, buffer, len(buffer))
            finally:
                layer.close()
        finally:
            sheet.close()
    return _clean(bytes(buffer).decode("utf-16-le", errors="ignore"))


_LIGATURES = {
    0xFB00: "ff",
    0xFB01: "fi",
    0xFB02: "fl",
    0xFB03: "ffi",
    0xFB04: "ffl",
    0xFB05: "st",
    0xFB06: "st",
}
_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_BROKEN_WORD = re.compile(
    "[\x02\ufffe]\n?"
)  # pdfium's signs for a hyphen at the end of a line, joining the lines
_SPACES = re.compile("[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_UNWANTED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\uffff\ud800-\udfff]"
)


def _clean(text: str) -> str:
    text = _BROKEN_WORD.sub("-\n", _NEWLINES.sub("\n", text))
    text = _UNWANTED.sub("", _SPACES.sub(" ", text))
    return unicodedata.normalize("NFC", text.translate(_LIGATURES)).strip()


def _sheet(document: Any, page: int) -> Any:
    if not 1 <= page <= len(document):
        raise PageError(f"does not exist, the PDF file has {len(document)} pages")
    try:
        return document[page - 1]
    except pypdfium2.PdfiumError as error:
        raise PageError("is damaged in the PDF file and cannot be rendered") from error


@contextmanager
def _document(source: str) -> Iterator[Any]:
    with _lock:
        # Opened by the raw call: its error code is only set on failure, and a document without pages is none.
        handle = raw.FPDF_LoadDocument(os.fsencode(os.path.abspath(source)) + b"\0", None)
        if not handle:
            if raw.FPDF_GetLastError() == raw.FPDF_ERR_PASSWORD:
                raise PageError("the PDF file is protected by a password, remove it first")
            raise PageError("the PDF file is damaged and cannot be opened")
        document = pypdfium2.PdfDocument(handle)
        try:
            yield document
        finally:
            document.close()
