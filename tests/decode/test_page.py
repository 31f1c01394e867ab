"""The model's answer to fields: valid JSON exactly, broken JSON without losing text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.decode.page import PageFields, field_spans, is_degenerate, is_json_object, parse_page

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


def test_a_page_that_the_guard_stopped_is_degenerate():
    assert is_degenerate("short", "loop")


@given(pages, st.booleans(), st.sampled_from([None, 2]))
def test_spans_hold_the_values(page, ascii_only, indent):
    raw = json.dumps(page, ensure_ascii=ascii_only, indent=indent)
    spans = field_spans(raw)
    assert spans.keys() == {name for name, value in page.items() if value is not None}
    for name, (start, end) in spans.items():
        assert json.loads(f'"{raw[start:end]}"', strict=False) == page[name]


@given(pages, st.data())
def test_spans_in_bytes_hold_the_values(page, data):
    """Decoded as Latin-1 the spans are those in UTF-8 bytes, whatever the characters and wherever the answer is cut."""
    raw = json.dumps(page, ensure_ascii=False)
    cut = raw[: data.draw(st.integers(0, len(raw)))]
    encoded = cut.encode("utf-8", "surrogatepass")
    in_characters, in_bytes = field_spans(cut), field_spans(encoded.decode("latin-1"))
    assert in_bytes.keys() == in_characters.keys()
    for name, (start, end) in in_characters.items():
        b_start, b_end = in_bytes[name]
        assert encoded[b_start:b_end] == cut[start:end].encode("utf-8", "surrogatepass")


@given(pages, st.data())
def test_spans_agree_with_what_was_read(page, data):
    """A field has text if and only if its span is not empty, also in broken JSON."""
    raw = json.dumps(page, ensure_ascii=False)
    at = data.draw(st.integers(0, len(raw)))
    raw = raw[:at] + data.draw(st.sampled_from(["", '"', "\\", "}", "x"])) + raw[at + 1 :]
    fields, spans = parse_page(raw)._asdict(), field_spans(raw)
    assert {name for name, value in fields.items() if value} == {
        name for name, (start, end) in spans.items() if end > start
    }


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("# A title", {"text": "# A title"}),
        ("", {"text": ""}),
        ('{"other": 1}', {"text": '{"other": 1}'}),
        ('{"text": ["a", 1], "other": "x", "header": null}', {"text": '["a", 1]'}),
        (' {"text" : "a\\"b\\\\" , "footer":"f"} ', {"text": 'a\\"b\\\\', "footer": "f"}),
        ('{"text": "a "quoted" word", "header": null}', {"text": 'a "quoted" word'}),
        ('{"text": "a", "text": "b"}', {"text": "b"}),
        ('{"header": "h", "text": "cut \\u00e', {"header": "h", "text": "cut \\u00e"}),
        ('{"text": "ends in a backslash\\\\"', {"text": "ends in a backslash\\\\"}),
        ('{"text": "a"} and more', {"text": 'a"} and more'}),
    ],
)
def test_spans_of_odd_answers(raw, expected):
    assert {name: raw[slice(*span)] for name, span in field_spans(raw).items()} == expected


@pytest.mark.parametrize("raw", ["[1]", "null", "words", '{"text": "a', "", "[" * 100_000])
def test_only_an_object_is_a_valid_answer(raw):
    assert not is_json_object(raw)
    assert is_json_object('{"text": "a"}')
