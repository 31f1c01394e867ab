"""The text layer of PDF pages: whose text, in which order, and what garbage it may hold."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pagemill.errors import PageError
from pagemill.pages import pdf
from pagemill.pages.source import PageRef, page_text

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"


def write_pdf(path: Path, content: bytes) -> str:
    """Write a page of 400 x 600 points with this content stream; font F is Helvetica in Latin 1 of Windows."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 600]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    out, starts = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(out))
        out += b"%d 0 obj%sendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    end = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n" + table
    path.write_bytes(out + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % end)
    return str(path)


def test_digital_pages_have_their_text_in_reading_order():
    with open(SAMPLES / "pdf_truth.jsonl") as file:
        rows = [row for row in map(json.loads, file) if row["text_layer"]]
    assert len(rows) == 3
    for row in rows:
        truth = row["truth"]
        expected = "\n".join(filter(None, (truth["header"], truth["text"], truth["footer"])))
        assert page_text(PageRef(str(SAMPLES / row["file"]), row["page"])) == expected


def test_scans_and_images_have_none(tmp_path):
    assert page_text(PageRef(str(SAMPLES / "scan_prose_3p.pdf"), 2)) == ""
    Image.new("RGB", (40, 60)).save(tmp_path / "a.png")
    assert page_text(PageRef(str(tmp_path / "a.png"), 1)) == ""
    assert page_text(PageRef(write_pdf(tmp_path / "empty.pdf", b""), 1)) == ""


def test_hyphens_spaces_and_control_characters(tmp_path):
    content = rb"BT /F 12 Tf 14 TL 20 500 Td (uma pala-) Tj T* (vra bem-vinda\240aqui \001) Tj T* (\223fim\224) Tj ET"
    assert page_text(PageRef(write_pdf(tmp_path / "a.pdf", content), 1)) == (
        "uma pala-\nvra bem-vinda aqui \n“fim”"
    )


def test_text_outside_of_the_page_does_not_count(tmp_path):
    content = b"BT /F 12 Tf 1 0 0 1 20 500 Tm (visible) Tj 1 0 0 1 20 -900 Tm (below) Tj 1 0 0 1 20 9000 Tm (above) Tj ET"
    assert page_text(PageRef(write_pdf(tmp_path / "a.pdf", content), 1)) == "visible"


def test_long_text_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_TEXT_CHARS", 25)
    lines = b"".join(b"1 0 0 1 20 %d Tm (line %d here) Tj " % (590 - 10 * i, i) for i in range(50))
    text = page_text(PageRef(write_pdf(tmp_path / "a.pdf", b"BT /F 8 Tf " + lines + b"ET"), 1))
    assert text.startswith("line 0 here\nline 1")
    assert len(text) <= 25


def test_pages_that_do_not_exist_or_cannot_be_opened(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", b"")
    with pytest.raises(PageError, match=r"a.pdf, page 2: does not exist"):
        page_text(PageRef(path, 2))
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7\nnothing")
    with pytest.raises(PageError, match=r"b.pdf, page 1: .*damaged"):
        page_text(PageRef(str(tmp_path / "b.pdf"), 1))
    with pytest.raises(PageError, match="no such file"):
        page_text(PageRef(str(tmp_path / "c.pdf"), 1))


def test_ligatures_and_combining_accents():
    assert pdf._clean("e\ufb01caz, a\u0303o\u00ad") == "eficaz, ão"


@given(st.text(max_size=200))
def test_any_text_comes_out_printable_and_normalised(text):
    cleaned = pdf._clean(text)
    assert unicodedata.is_normalized("NFC", cleaned)
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") for c in cleaned)
    assert not any(c in cleaned for c in "\ufffe\uffff\u2028\xad")


@given(st.text("abcé .,-\n", max_size=100).map(str.strip))
def test_clean_text_stays_as_it_is(text):
    assert pdf._clean(text) == text
