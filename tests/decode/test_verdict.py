"""The verdict on a page: probabilities over the right tokens, ink against text, the better attempt."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.decode.page import FIELDS, field_spans
from pagemill.decode.verdict import (
    WINDOW,
    Attempt,
    Confidence,
    best_attempt,
    confidence,
    num_printed,
    text_mismatch,
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut `data` into tokens at these places, in whatever order, some of them empty."""
    edges = [0, *sorted(min(p, len(data)) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def geometric(logprobs: list[float]) -> float:
    return math.prod(max(math.exp(x), 1e-4) ** (1 / len(logprobs)) for x in logprobs)


places = st.lists(st.integers(0, 300), max_size=40)
pages = st.dictionaries(st.sampled_from(FIELDS), st.none() | st.text(max_size=30), min_size=1)


@given(pages, places, st.integers(0, 300), st.data())
def test_each_field_is_the_mean_of_the_tokens_that_touch_it(page, places, keep, data):
    """Against a list of owners, byte by byte; tokens cut characters, and the output may be cut anywhere."""
    raw = json.dumps(page, ensure_ascii=False)[:keep]
    pieces = cut(raw.encode(), places)
    logprobs = data.draw(
        st.lists(
            st.just(math.nan) | st.floats(-20, 0, allow_nan=False),
            min_size=len(pieces),
            max_size=len(pieces),
        )
    )
    owners: dict[str, set[int]] = {}
    by_byte = [i for i, piece in enumerate(pieces) for _ in piece]
    for name, (start, end) in field_spans(raw).items():
        span = slice(len(raw[:start].encode()), len(raw[:end].encode()))
        owners[name] = {i for i in by_byte[span] if not math.isnan(logprobs[i])}
    expected = {name: geometric([logprobs[i] for i in own]) for name, own in owners.items() if own}
    found = confidence(pieces, logprobs)
    assert found.fields == pytest.approx(expected)

    chosen = [x for x in logprobs if not math.isnan(x)]
    if not chosen:
        assert found.mean is found.worst is None
        return
    windows = [geometric(chosen[i : i + WINDOW]) for i in range(max(len(chosen) - WINDOW, 0) + 1)]
    assert found.mean == pytest.approx(geometric(chosen))
    assert found.worst == pytest.approx(min([*windows, geometric(chosen)]))


def test_a_doubtful_word_shows_in_its_field_and_in_the_worst_window():
    pieces = [b'{"header": "', b"Nota", b'", "text": "', *[b" word"] * 60, b'"}']
    logprobs = [math.nan, math.log(0.9), math.nan, *[math.log(0.99)] * 60, math.nan]
    calm = confidence(pieces, logprobs)
    logprobs[30:34] = [math.log(0.1)] * 4
    doubtful = confidence(pieces, logprobs)
    assert calm.worst == pytest.approx((0.9 * 0.99**23) ** (1 / 24))
    assert doubtful.worst == pytest.approx((0.99**20 * 0.1**4) ** (1 / 24))
    assert doubtful.fields["header"] == calm.fields["header"] == pytest.approx(0.9)
    assert doubtful.fields["text"] < calm.fields["text"] == pytest.approx(0.99)


@given(st.lists(st.binary(max_size=6), max_size=20))
def test_any_bytes_have_a_verdict(pieces):
    found = confidence(pieces, [-1.0] * len(pieces))
    assert (found.mean is None) == (not pieces)
    assert set(found.fields) <= set(FIELDS)


def test_nothing_chosen_has_no_confidence():
    assert confidence([], []) == Confidence(None, None, {})
    assert confidence([b"{}"], [math.nan]) == Confidence(None, None, {})
    with pytest.raises(ValueError, match="2 tokens with 1"):
        confidence([b"a", b"b"], [0.0])


def test_one_impossible_token_does_not_make_the_page_impossible():
    assert confidence([b"a"], [-math.inf]).mean == pytest.approx(1e-4)
    assert confidence([b"a"] * 100, [-math.inf] + [0.0] * 99).mean == pytest.approx(1e-4**0.01)


@given(st.integers(0, 100_000), st.floats(0.4, 2.5))
def test_an_estimate_off_by_twice_is_no_mismatch(num_chars, factor):
    assert text_mismatch(num_chars, round(num_chars * factor)) is None
    assert text_mismatch(num_chars, None) is None


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_mismatch_grows_with_the_distance(num_chars, num_glyphs):
    """Less text on the same ink never turns "little" into agreement, and the reverse; the two are mirrored."""
    found = text_mismatch(num_chars, num_glyphs)
    mirrored = {"little": "much", "much": "little", None: None}
    assert text_mismatch(num_glyphs, num_chars) == mirrored[found]
    if found == "little" and num_chars:
        assert text_mismatch(num_chars - 1, num_glyphs) == "little"
    if found == "much":
        assert text_mismatch(num_chars + 1, num_glyphs) == "much"


@pytest.mark.parametrize(
    ("num_chars", "num_glyphs", "expected"),
    [
        (0, 1000, "little"),  # a full page, nothing read
        (150, 1500, "little"),  # the model stopped after a paragraph
        (1000, 0, "much"),  # invented on a blank page
        (8000, 900, "much"),  # a loop
        (0, 40, None),  # a stain, a logo
        (30, 0, None),  # a page number in faint print
        (0, 0, None),
    ],
)
def test_mismatch(num_chars, num_glyphs, expected):
    assert text_mismatch(num_chars, num_glyphs) == expected


def test_rules_may_have_been_read_as_characters_or_not():
    assert text_mismatch(1000, 50) == "much"
    assert text_mismatch(1000, 50, 900) is None
    assert text_mismatch(50, 50, 900) is None


def test_printed_characters_are_those_that_leave_ink():
    assert num_printed(["a b\n c\u00a0", None, "", "é—"]) == 5
    assert num_printed(['<table border="1"><tr><td>1</td><td>20</td></tr></table>']) == 3
    assert num_printed(["| a | b |\n|---|---|\n| 1 | 2 |"]) == 4
    assert num_printed(["1 < 2 > 0"]) == 5


def attempt(
    mean: float | None = 0.9,
    *,
    valid: bool = True,
    reason: str = "stop",
    mismatch: str | None = None,
) -> Attempt:
    return Attempt("", reason, valid, Confidence(mean, mean, {}), mismatch)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (attempt(0.1), attempt(0.9, valid=False)),
        (attempt(0.1), attempt(0.9, reason="loop")),
        (attempt(0.1), attempt(0.9, reason="length")),
        (attempt(0.1), attempt(0.9, mismatch="much")),
        (attempt(0.9), attempt(0.8)),
        (attempt(0.0), attempt(None)),
        (attempt(0.1, valid=True, reason="length"), attempt(0.9, valid=False)),
    ],
)
def test_the_better_attempt_wins_wherever_it_stands(better, worse):
    assert best_attempt([better, worse]) == 0
    assert best_attempt([worse, better]) == 1
    assert best_attempt([worse, better, worse]) == 1


def test_the_earliest_of_equals_wins():
    assert best_attempt([attempt(), attempt()]) == 0
    with pytest.raises(ValueError, match="no attempts"):
        best_attempt([])


def test_another_attempt_has_to_be_worth_its_tokens():
    assert not attempt(0.1).ended_badly
    assert not attempt(reason="length", mismatch="much").ended_badly, "it would mostly be cut again"
    for bad in (attempt(valid=False), attempt(reason="loop"), attempt(mismatch="little")):
        assert bad.ended_badly
