"""PDF pages, rendered by pdfium.

pdfium is not thread-safe, so every call into it, closing included, holds one lock for the whole process: PDF
pages render in turn, on one core, while images go on decoding beside them. A document is opened anew for each
page, which costs well under a millisecond for common files and leaves nothing open between pages.
"""

from __future__ import annotations

import math
import os
import threading
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
        if not 1 <= page <= len(document):
            raise PageError(f"does not exist, the PDF file has {len(document)} pages")
        try:
            sheet = document[page - 1]
        except pypdfium2.PdfiumError as error:
            raise PageError("is damaged in the PDF file and cannot be rendered") from error
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
