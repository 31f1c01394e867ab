"""The metric, against cases worked out by hand, and against the scores published with the model."""

from __future__ import annotations

import math

import pytest
from score import (
    PageScore,
    bleu,
    by_group,
    character_error_rate,
    is_degenerate,
    is_json_object,
    joined,
    levenshtein_ratio,
    plain,
    score_answers,
    summarize,
    transformers_answers,
)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ('{"text": "b", "header": "a"}', "b\na"),  # its own order
        ('{"header": null, "margin": " \\n", "text": "x", "footer": ""}', "x"),
        ('{"header": "  a ", "text": "b"}', "  a \nb"),  # blank values go, others keep their spaces
        ('{"page": 3, "text": ["x"]}', "3\n['x']"),
        ("{}", ""),
        ("[1, 2]", "[1, 2]"),
        ("12", "12"),
        ("null", "null"),
        (None, "None"),
        ("", ""),
        ("plain words", "plain words"),
        ('{"text": "cut off', '{"text": "cut off'),
        ('{"text": "a\nb"}', '{"text": "a\nb"}'),  # a raw newline is not JSON
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_plain(output: object, text: str) -> None:
    assert plain(output) == text


def test_joined_has_the_text_before_the_footer() -> None:
    assert (
        joined({"footer": "f", "text": "t\n2", "margin": None, "header": "h", "source": "s"}) == "h\nt\n2\nf"
    )
    assert joined({}) == ""


@pytest.mark.parametrize(
    ("truth", "read", "ratio", "cer"),
    [
        ("kitten", "sitting", 1 - 3 / 7, 3 / 6),
        ("ação", "acao", 0.5, 0.5),  # characters, not bytes
        ("abc", "abc", 1, 0),
        ("abc", "", 0, 1),
        ("ab", "xxxxxx", 0, 3),  # can be above one
        ("", "abc", 0, 1),
        ("", "", 0, 0),  # the published ratio gives nothing for two empty texts
    ],
)
def test_edit_distance(truth: str, read: str, ratio: float, cer: float) -> None:
    assert levenshtein_ratio(truth, read) == pytest.approx(ratio)
    assert character_error_rate(truth, read) == pytest.approx(cer)


def test_bleu() -> None:
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1)
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples
    assert bleu("a b c d e", "a b c d x") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # too short by half: brevity penalty exp(1 - 8/4)
    assert bleu("a b c d e f g h", "a b c d") == pytest.approx(math.exp(-1))
    # method 1 counts 0.1 where there is no match: 2 of 4 words, 0.1 of 3, 0.1 of 2, 0.1 of 1
    assert bleu("a b c d", "a x c y") == pytest.approx((2 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25)
    # a repeated word counts as often as the truth has it; smoothing again for the longer ones
    assert bleu("a b", "a a") == pytest.approx((1 / 2 * 0.1 / 1 * 0.1 * 0.1) ** 0.25)
    for truth, read in [("", ""), ("a b", ""), ("", "a b"), ("a b", "x y")]:
        assert bleu(truth, read) == 0


def test_degenerate() -> None:
    unit = "fifteen chars. "
    assert len(unit) == 15
    assert is_degenerate("start " + unit * 4, "length")
    assert not is_degenerate("start " + unit * 3, "length")
    assert not is_degenerate("start " + unit * 9, "stop")  # it ended by itself
    assert is_degenerate(unit + "x" + unit + "y" + unit + "z" + unit, "length")  # anywhere in the text
    assert not is_degenerate("a" * 14, "length")
    assert not is_degenerate("a" * 59, "length")  # three, without overlap
    assert is_degenerate("a" * 60, "length")
    assert is_degenerate("short", "loop")  # the engine's guard is no way round the rule


def test_valid_json_is_an_object() -> None:
    assert is_json_object('{"text": "a"}')
    for raw in ("[1]", "null", "words", '{"text": "a', ""):
        assert not is_json_object(raw)


def test_summary_averages_over_pages() -> None:
    scores = [
        PageScore("form_1.png", 1.0, 0.5, 0.0, False, True),
        PageScore("legal_2.png", 0.5, 0.0, 0.3, True, False),
        PageScore("hard_3.png", 0.0, 0.0, 3.0, False, True),
    ]
    groups = by_group(scores)
    assert {name: row["pages"] for name, row in groups.items()} == {
        "clean": 2,
        "form": 1,
        "legal": 1,
        "hard": 1,
    }
    clean = groups["clean"]
    assert clean["benchmark_score"] == pytest.approx((0.75 + 0.25) / 2)
    assert clean["cer"] == pytest.approx(0.15)
    assert clean["degeneration_rate"] == clean["valid_json"] == 0.5
    with pytest.raises(ValueError, match="no pages"):
        summarize([])


def test_the_model_card_is_reproduced() -> None:
    """What transformers wrote, scored here, gives the scores published with pagemill-tiny."""
    answers = transformers_answers()
    assert len(answers) == 48
    record = by_group(score_answers(answers)["record"])
    for group, score, cer, pages in [("clean", 0.829, 0.054, 36), ("hard", 0.185, 0.778, 12)]:
        assert record[group]["benchmark_score"] == pytest.approx(score, abs=0.0006)
        assert record[group]["cer"] == pytest.approx(cer, abs=0.0006)
        assert record[group]["degeneration_rate"] == 0
        assert record[group]["pages"] == pages
    assert record["hard"]["valid_json"] == pytest.approx(8 / 12)
    # The raw way counts a page of broken JSON as it stands, so it is the stricter one.
    raw = by_group(score_answers(answers)["raw"])
    broken = {a.file for a in answers if not is_json_object(a.raw)}
    assert raw["clean"]["valid_json"] == pytest.approx(35 / 36)
    assert len(broken) == 5
    assert raw["clean"]["benchmark_score"] < record["clean"]["benchmark_score"]
