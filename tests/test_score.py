"""The score: the metric against NLTK and independent implementations, rows of every kind, what is reported, the command."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rapidfuzz.distance import Levenshtein
from typer.testing import CliRunner

from pagemill.cli import app
from pagemill.decode.page import FIELDS
from pagemill.score import (
    READING_ORDER,
    Reading,
    Truth,
    bleu,
    joined,
    match,
    plain,
    read_readings,
    read_truths,
    report,
    score,
    score_page,
    score_text,
    summarize,
)

# The metric.

words = st.lists(st.sampled_from(["a", "b", "ção", "d,", "1.000,00"]), max_size=12).map(" ".join)
texts = words | st.text(max_size=40) | st.text("ab \n\u00a0", max_size=20)


def nltk_bleu(truth: str, read: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            sentence_bleu([truth.split()], read.split(), smoothing_function=SmoothingFunction().method1)
        )


def edit_distance(a: str | list[str], b: str | list[str]) -> int:
    """By the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@given(texts, texts)
def test_bleu_is_that_of_nltk(truth, read):
    assert bleu(truth, read) == pytest.approx(nltk_bleu(truth, read), abs=1e-9)
    assert bleu(truth, truth) == pytest.approx(nltk_bleu(truth, truth), abs=1e-9)


@given(texts, texts)
def test_edit_distances_are_the_textbook_ones(truth, read):
    found = score_text(truth, read)
    distance = edit_distance(truth, read)
    longest = max(len(truth), len(read))
    assert found.levenshtein == pytest.approx(1 - distance / longest if longest else 0.0, abs=1e-9)
    if truth:
        assert found.cer == pytest.approx(distance / len(truth), abs=1e-9)
    if truth.split():
        expected = edit_distance(truth.split(), read.split()) / len(truth.split())
        assert found.wer == pytest.approx(expected, abs=1e-9)


def test_bleu_by_hand() -> None:
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


@pytest.mark.parametrize(
    ("truth", "read", "ratio", "cer", "wer"),
    [
        ("kitten", "sitting", 1 - 3 / 7, 3 / 6, 1),
        ("ação", "acao", 0.5, 0.5, 1),  # characters, not bytes
        ("abc", "abc", 1, 0, 0),
        ("a b c", "a x c", 0.8, 0.2, 1 / 3),
        ("abc", "", 0, 1, 1),
        ("ab", "xxxxxx", 0, 3, 1),  # can be above one
        ("a", "a b c", 0.2, 4, 2),
        ("", "abc", 0, 1, 1),
        ("", "", 0, 0, 0),  # the published ratio gives nothing for two empty texts
    ],
)
def test_edit_distance_by_hand(truth: str, read: str, ratio: float, cer: float, wer: float) -> None:
    found = score_text(truth, read)
    assert found.levenshtein == pytest.approx(ratio)
    assert found.cer == pytest.approx(cer)
    assert found.wer == pytest.approx(wer)


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
        ("9" * 5000, "9" * 5000),  # more digits than Python converts
    ],
)
def test_plain(output: object, text: str) -> None:
    assert plain(output) == text


def test_joined_has_the_text_before_the_footer() -> None:
    page = {"footer": "f", "text": "t\n2", "margin": None, "header": "h", "source": "s"}
    assert joined(page) == "h\nt\n2\nf"
    assert joined(page, ("text", "footer", "header")) == "t\n2\nf\nh"
    assert joined({"header": " \n"}) == joined({}) == ""


# The published evaluation, from the definition, and both protocols.


def published(rows: list[tuple[str, str]]) -> float:
    """(mean ratio + mean BLEU) / 2 with rapidfuzz and NLTK, over (assistant, output)."""
    pairs = [(plain(assistant), plain(output)) for assistant, output in rows]
    ratios = [Levenshtein.normalized_similarity(gt, pred) if gt or pred else 0.0 for gt, pred in pairs]
    return (float(np.mean(ratios)) + float(np.mean([nltk_bleu(gt, pred) for gt, pred in pairs]))) / 2


answers = st.dictionaries(st.sampled_from(FIELDS), st.none() | texts).map(
    lambda d: json.dumps(d, ensure_ascii=False)
)


@settings(max_examples=40)  # each takes a bootstrap
@given(st.lists(st.tuples(answers | texts, answers | texts), min_size=1, max_size=5))
def test_the_raw_score_is_the_published_one(rows):
    with_truth = [
        score_page(truth_of(assistant), Reading("a", 1, dict.fromkeys(FIELDS), output))
        for assistant, output in rows
    ]
    found = summarize(with_truth)["raw"]["benchmark_score"]
    assert found["value"] == pytest.approx(published(rows), abs=1e-9)
    assert found["pages"] == len(rows)


def truth_of(assistant: str, name: str = "a", page: int = 1) -> Truth:
    return Truth(name, page, assistant, plain(assistant), dict.fromkeys(FIELDS), READING_ORDER)


@settings(max_examples=12)
@given(st.permutations(FIELDS), st.permutations(FIELDS))
def test_the_order_of_the_keys_costs_a_record_nothing_and_a_raw_output_something(tmp_path_factory, a, b):
    folder = tmp_path_factory.mktemp("order")
    page = {name: f"{name} has a few words of its own" for name in FIELDS}
    write(folder / "t", {"id": 7, "assistant": json.dumps({name: page[name] for name in a})})
    record = {name: page[name] for name in b}
    write(folder / "o", {"source": "7.png", "page": 1, **record, "raw": json.dumps(record)})
    found = report(folder / "t", folder / "o")
    assert found["fields"]["benchmark_score"]["value"] == pytest.approx(1)
    assert (found["raw"]["cer"]["value"] == 0) == (a == b)


def test_fields_that_the_truth_lacks_follow_in_reading_order(tmp_path: Path) -> None:
    write(tmp_path / "t", {"id": "x", "assistant": '{"text": "t", "header": "h"}'})
    write(tmp_path / "o", {"source": "x.png", "header": "h", "margin": "m", "footer": "f", "text": "t"})
    (truth,), (reading,) = read_truths(tmp_path / "t"), read_readings(tmp_path / "o")
    assert truth.order == ("text", "header", "margin", "footer")
    assert score_page(truth, reading).fields.edits == len("\nm\nf")


def test_a_truth_object_has_no_order(tmp_path: Path) -> None:
    write(tmp_path / "t", {"file": "x.png", "truth": {"header": "h", "footer": "f", "text": "t"}})
    (truth,) = read_truths(tmp_path / "t")
    assert truth.text == "h\nt\nf"
    assert plain(truth.answer) == "h\nf\nt"


def test_a_truth_may_be_plain_text(tmp_path: Path) -> None:
    write(tmp_path / "t", {"id": "x", "assistant": "só texto"})
    write(tmp_path / "o", {"source": "x.png", "text": "só texto"})
    found = report(tmp_path / "t", tmp_path / "o")
    assert found["fields"]["cer"]["value"] == 0
    assert found["by_field"]["text"]["cer"]["value"] is None


# Rates.


def test_degenerate_pages() -> None:
    unit = "fifteen chars. "
    truth = truth_of("truth")

    def degenerate(reason: str, raw: str | None = None, status: str | None = None, **fields: str) -> bool:
        return score_page(truth, Reading("a", 1, fields, raw, reason, status)).degenerate

    assert degenerate("length", "start " + unit * 4)
    assert not degenerate("length", "start " + unit * 3)
    assert not degenerate("stop", "start " + unit * 9)
    assert degenerate("loop", "short")
    assert degenerate("loop")
    assert degenerate("stop", status="degenerate"), "the engine saw the raw output"
    assert degenerate("length", text="start " + unit * 4), "without raw, by the fields"
    assert not degenerate("length", unit * 3, text=unit * 4), "the rule is for the raw output"


def test_valid_json_is_known_only_with_the_output(tmp_path: Path) -> None:
    write(tmp_path / "t", *({"file": f"{i}.png", "truth": {"text": "a b"}} for i in range(4)))
    rows = [{"source": f"{i}.png", "text": "a b"} for i in range(4)]
    write(tmp_path / "o", *rows)
    found = report(tmp_path / "t", tmp_path / "o")
    assert found["valid_json"] == {"value": None, "low": None, "high": None, "pages": 0}
    assert found["raw"]["bleu"]["value"] is None
    rows[0]["raw"], rows[1]["raw"] = '{"text": "a b"}', '{"text": "a b'
    write(tmp_path / "o", *rows)
    found = report(tmp_path / "t", tmp_path / "o")
    assert found["valid_json"]["value"] == 0.5
    assert found["valid_json"]["pages"] == found["raw"]["bleu"]["pages"] == 2
    assert found["fields"]["bleu"]["pages"] == 4


def test_a_raw_row_is_read_tolerantly_for_its_fields(tmp_path: Path) -> None:
    write(tmp_path / "t", {"file": "a.png", "truth": {"header": "h", "text": "um dois"}})
    write(tmp_path / "o", {"source": "a.png", "raw": '{"header": "h", "text": "um dois'})
    found = report(tmp_path / "t", tmp_path / "o")
    assert found["fields"]["cer"]["value"] == 0
    assert found["raw"]["cer"]["value"] > 0
    assert found["valid_json"]["value"] == 0


def test_fields_one_by_one(tmp_path: Path) -> None:
    write(
        tmp_path / "t",
        {"file": "a", "truth": {"header": "one two", "margin": None, "footer": "p. 1", "text": "abcd"}},
        {"file": "b", "truth": {"header": None, "margin": " ", "footer": "p. 2", "text": "efgh"}},
    )
    write(
        tmp_path / "o",
        {"source": "a", "header": "one two", "footer": None, "text": "abcx"},
        {"source": "b", "header": "what", "footer": "p. 2", "text": "efgh"},
    )
    by_field = report(tmp_path / "t", tmp_path / "o")["by_field"]

    def value(name: str, metric: str) -> float | None:
        return by_field[name][metric]["value"]

    assert [by_field[name]["cer"]["pages"] for name in FIELDS] == [1, 0, 2, 2]
    assert (value("header", "cer"), value("header", "exact")) == (0, 1)
    assert (value("header", "missed"), value("header", "invented")) == (0, 1)
    assert (value("margin", "cer"), value("margin", "invented")) == (None, 0)
    assert (value("footer", "cer"), value("footer", "missed")) == (0.5, 0.5)
    assert value("text", "cer") == pytest.approx(0.125)
    assert value("text", "invented") is None


def test_totals_weigh_pages_by_their_length(tmp_path: Path) -> None:
    write(tmp_path / "t", *({"file": n, "truth": {"text": t}} for n, t in [("a", "x"), ("b", "y" * 99)]))
    write(tmp_path / "o", *({"source": n, "text": t} for n, t in [("a", "z"), ("b", "y" * 99)]))
    found = report(tmp_path / "t", tmp_path / "o")["fields"]
    assert found["cer"]["value"] == pytest.approx(0.5)
    assert found["cer_total"]["value"] == pytest.approx(0.01)


def test_intervals() -> None:
    """The same every time, a point for equal pages, and about 1.96 standard errors wide for many."""
    random = np.random.default_rng(1)
    pages = [
        score_page(truth_of("abcdefghij" * 10), Reading("a", 1, {"text": "abcdefghij" * 10 + "x" * extra}))
        for extra in random.integers(0, 60, 300)
    ]
    found = summarize(pages)
    assert found == summarize(pages)
    cer = found["fields"]["cer"]
    errors = np.array([page.fields.cer for page in pages])
    half = 1.96 * errors.std() / math.sqrt(len(errors))
    assert cer["value"] == pytest.approx(errors.mean())
    assert cer["value"] - cer["low"] == pytest.approx(half, rel=0.1)
    assert cer["high"] - cer["value"] == pytest.approx(half, rel=0.1)
    same = summarize(pages[:1] * 5)["fields"]["cer"]
    assert same["low"] == pytest.approx(same["value"]) == same["high"]
    with pytest.raises(ValueError, match="no pages"):
        summarize([])


# Which row belongs to which.


def pairing(
    truths: list[tuple[str, int]], readings: list[tuple[str, int]]
) -> tuple[list[int], set[tuple[str, str, int]]]:
    """Match pages by name: the number of the reading that each scored truth got, and the problems."""
    pairs, problems = match(
        [truth_of("t", *place) for place in truths],
        [Reading(*place, {}, tokens=i) for i, place in enumerate(readings)],
    )
    return [reading.tokens for _, reading in pairs], {(p.kind, p.name, p.page) for p in problems}


@pytest.mark.parametrize(
    ("truths", "readings", "pairs", "problems"),
    [
        ([("a.png", 1)], [("scans/a.png", 1)], [0], set()),
        ([("in/a.png", 1)], [("./in/../in/a.png", 1)], [0], set()),
        ([("d.pdf", 1), ("d.pdf", 2)], [("d.pdf", 2), ("d.pdf", 1)], [1, 0], set()),
        ([("17", 1)], [("images/17.jpeg", 1)], [0], set()),
        ([("a.png", 1)], [("b.png", 1)], [], {("no record", "a.png", 1), ("no truth", "b.png", 1)}),
        (
            [("d.pdf", 1)],
            [("d.pdf", 1), ("d.pdf", 2)],
            [0],
            {("no truth", "d.pdf", 2)},
        ),
        # two folders with a file of one name: by path where paths agree
        ([("x/a.png", 1), ("y/a.png", 1)], [("y/a.png", 1), ("x/a.png", 1)], [1, 0], set()),
        ([("x/a.png", 1), ("y/a.png", 1)], [("a.png", 1)], [], {("ambiguous", "a.png", 1)}),
        (
            [("a.png", 1)],
            [("x/a.png", 1), ("y/a.png", 1)],
            [],
            {("ambiguous", "x/a.png", 1), ("ambiguous", "y/a.png", 1)},
        ),
        ([("a.png", 1)], [("x/a.png", 1), ("a.png", 1)], [1], {("ambiguous", "x/a.png", 1)}),
        # repeated rows
        (
            [("a.png", 1)],
            [("a.png", 1), ("./a.png", 1), ("a.png", 1)],
            [2],
            {("repeated record", "a.png", 1), ("repeated record", "./a.png", 1)},
        ),
        ([("a.png", 1), ("a.png", 1)], [("a.png", 1)], [0], {("repeated truth", "a.png", 1)}),
    ],
)
def test_matching(truths, readings, pairs, problems):
    assert pairing(truths, readings) == (pairs, problems)


places = st.tuples(
    st.sampled_from(["a.png", "x/a.png", "y/a.png", "a", "b.pdf", "./b.pdf"]), st.integers(1, 2)
)


@given(st.lists(places, max_size=6), st.lists(places, max_size=6))
def test_no_row_is_ignored(truths, readings):
    """Every row of either file is scored or reported, and none is scored twice."""
    pairs, problems = match(
        [truth_of(str(i), *place) for i, place in enumerate(truths)],
        [Reading(*place, {}, tokens=i) for i, place in enumerate(readings)],
    )
    used = [reading.tokens for _, reading in pairs]
    assert len(used) == len(set(used))
    reported = {(p.name, p.page) for p in problems}
    assert all(i in used or place in reported for i, place in enumerate(readings))
    kept = {truth.answer for truth, _ in pairs}
    named_ambiguous = " ".join(p.note for p in problems if p.kind == "ambiguous")
    for i, (name, page) in enumerate(truths):
        path = name.removeprefix("./")
        assert str(i) in kept or {(name, page), (path, page)} & reported or path in named_ambiguous


def test_the_last_of_repeated_rows_counts() -> None:
    pages, problems = score(
        [truth_of("old"), truth_of("new")],
        [Reading("a", 1, {"text": "else"}), Reading("a", 1, {"text": "new"})],
    )
    assert [page.fields.edits for page in pages] == [0]
    assert {problem.kind for problem in problems} == {"repeated truth", "repeated record"}


def test_a_failed_page_counts_as_empty_and_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "t", *({"file": n, "truth": {"text": "um dois"}} for n in ("a.png", "b.png")))
    write(
        tmp_path / "o",
        {"source": "a.png", "page": 1, "text": "um dois", "raw": '{"text": "um dois"}'},
        {"source": "b.png", "page": 1, "status": "error", "finish_reason": "error", "error": "b.png: broken"},
    )
    found = report(tmp_path / "t", tmp_path / "o")
    assert found["fields"]["cer"]["value"] == found["raw"]["cer"]["value"] == 0.5
    assert found["failed"]["value"] == found["valid_json"]["value"] == 0.5
    assert found["problems"] == [
        {"kind": "failed", "name": "b.png", "page": 1, "note": "counts as empty: b.png: broken"}
    ]


# The command.


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write(tmp_path / "t.jsonl", *({"file": f"p{i}.png", "truth": {"text": "um dois"}} for i in range(3)))
    write(
        tmp_path / "o.jsonl",
        *({"source": f"in/p{i}.png", "page": 1, "text": "um dous", "tokens": {"output": 9}} for i in (0, 1)),
        {"source": "in/p\x1b[31m.png", "page": 1, "text": "um dois"},
    )
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["score", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_table_says_what_was_left_out(files: Path) -> None:
    code, out, _ = run("t.jsonl", "o.jsonl")
    assert code == 0
    assert out.startswith("2 pages of o.jsonl against t.jsonl")
    assert "14.3 %" in out  # one character of seven
    assert "The cap cut no page; the longest has 9 tokens." in out
    assert "no record, not scored: p2.png page 1" in out
    assert "no truth, not scored: in/p\\x1b[31m.png page 1" in out
    assert "\x1b" not in out


def test_json_has_everything(files: Path) -> None:
    code, out, _ = run("t.jsonl", "o.jsonl", "--json")
    assert code == 0
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["pages"] == 2
    assert found["fields"]["cer"]["low"] == pytest.approx(1 / 7)
    assert [page["file"] for page in found["by_page"]] == ["p0.png", "p1.png"]
    assert [(problem["kind"], problem["name"]) for problem in found["problems"]] == [
        ("no truth", "in/p\x1b[31m.png"),
        ("no record", "p2.png"),
    ]
    assert found["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([768, 768], "Pages cut: 2, at 768 tokens."),
        ([300, 768], "Pages cut: 2, at 300 to 768 tokens."),
        ([None, None], "Pages cut: 2, at an unknown number of tokens."),
    ],
)
def test_the_cap_is_stated(files: Path, tokens: list[int | None], said: str) -> None:
    rows = [
        {"source": f"p{i}.png", "text": "x", "finish_reason": "length", "tokens": {"output": n}}
        for i, n in enumerate(tokens)
    ]
    write(files / "o.jsonl", *rows)
    _, out, _ = run("t.jsonl", "o.jsonl")
    assert said in " ".join(out.split())


@pytest.mark.parametrize(
    ("truth", "read", "sentence"),
    [
        (None, "o.jsonl", "none.jsonl cannot be read: No such file or directory."),
        ("t.jsonl", ".", ". cannot be read: Is a directory."),
        ("t.jsonl", '{"source": "p0.png", "text": "a"}\n{"sour', "line 2 is not JSON"),
        ("t.jsonl", '\n[{"source": "p0.png"}]', "line 2 should be a JSON object"),
        ("t.jsonl", '{"text": "a"}', "line 1 names no page"),
        ("t.jsonl", '{"source": "p0.png", "page": "1", "text": "a"}', "line 1: `page` should be a number"),
        ("t.jsonl", '{"source": "p0.png", "text": ["a"]}', "line 1: `text` should be a string or null"),
        ("t.jsonl", '{"source": "p0.png"}', "line 1 holds nothing read"),
        ("t.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("t.jsonl", "", "no page in common: the truth begins with p0.png page 1, the records with nothing."),
        ("t.jsonl", '{"source": "q.png", "text": "a"}', "no page in common"),
        ('{"file": "p0.png"}', "o.jsonl", "line 1 holds no truth"),
        ('{"file": "p0.png", "truth": {"text": 3}}', "o.jsonl", "line 1: `text` should be a string or null"),
        ('{"file": true, "truth": {}}', "o.jsonl", "line 1 names no page"),
    ],
)
def test_mistakes_are_one_sentence(files: Path, truth: str | None, read: str, sentence: str) -> None:
    names = []
    for name, given_file in (("bad_t.jsonl", truth or "none.jsonl"), ("bad_o.jsonl", read)):
        is_name = given_file in ("t.jsonl", "o.jsonl", "none.jsonl", ".")
        names.append(given_file if is_name else write(files / name, given_file).name)
    code, out, err = run(*names)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_bytes_that_are_no_text_are_named(files: Path) -> None:
    (files / "o.jsonl").write_bytes(
        b'{"source": "p0.png", "text": "a"}\n{"source": "p1.png", "text": "\xff"}\n'
    )
    code, _, err = run("t.jsonl", "o.jsonl")
    assert code == 2
    assert "o.jsonl line 2 is not JSON (it is not UTF-8)" in err
