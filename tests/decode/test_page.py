"""The model's answer to fields: valid JSON exactly, broken JSON without losing text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.decode.page import PageFields, is_degenerate, parse_page

values = st.none() | st.text()
pages = st.dictionaries(st.sampled_from(PageFields._fields), values, min_size=1)


@given(pages, st.booleans())
def test_valid_json_is_read_exactly(page, ascii_only):
    assert parse_page(json.dumps(page, ensure_ascii=ascii_only)) == PageFields(
        *map(page.get, PageFields._fields)
    )


@given(
    st.text(st.characters(exclude_characters='"\\{}', exclude_categories=["Cs", "Cc"]), min_size=1), st.data()
)
def test_a_cut_answer_keeps_what_was_read(text, data):
    raw = json.dumps({"header": "H", "margin": None, "footer": None, "text": text}, ensure_ascii=False)
    start = raw.index('"text": "') + len('"text": "')
    cut = data.draw(st.integers(start, len(raw) - 1))
    fields = parse_page(raw[:cut])
    assert fields.header == "H"
    assert fields.margin is None
    assert fields.text is not None
    assert text.strip().startswith(fields.text.strip())
    assert len(fields.text.strip()) >= len(text[: cut - start].strip()) - 1


@given(st.text())
def test_anything_gives_fields(raw):
    assert isinstance(parse_page(raw), PageFields)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("# A title\n\ntext", (None, None, None, "# A title\n\ntext")),
        ("[1, 2]", (None, None, None, "[1, 2]")),
        ('{"other": 1}', (None, None, None, '{"other": 1}')),
        ('{"text": "a "quoted" word", "header": null}', (None, None, None, 'a "quoted" word')),
        ('{"text":"a "quoted" word","header":null,"footer":"f"}', (None, None, "f", 'a "quoted" word')),
        ('{"header": "x", "text": "line\\nnext \\u00e1 \\"q\\"', ("x", None, None, 'line\nnext á "q"')),
        ('{"header": "x", "text": "half an escape \\ud83d', ("x", None, None, "half an escape �")),
        ('{"text":"a \\ud800 b"}', (None, None, None, "a � b")),
        ('{"text": ["a", 1]}', (None, None, None, '["a", 1]')),
        ('{"header": "h", "margin": nul', ("h", None, None, None)),
        ("{", (None, None, None, "{")),
        ("", (None, None, None, "")),
    ],
)
def test_broken_answers(raw, expected):
    assert parse_page(raw) == expected


def test_degenerate_is_the_published_rule():
    loop = "abcde fghij klm " * 4
    assert is_degenerate(loop, "length")
    assert not is_degenerate(loop, "stop"), "ended by itself"
    assert not is_degenerate("abcde fghij klm " * 3, "length"), "three times only"
    assert not is_degenerate("a" * 14, "length"), "too short to tell"
