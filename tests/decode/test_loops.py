"""Loops are found soon and cut where the second repetition begins; pages that repeat themselves are left alone."""

import random

import loops as bench
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_set import load, tokenizer

from pagemill.decode.loops import LoopDetector, token_pieces
from pagemill.errors import ConfigError

PIECES = [bytes([b]) for b in range(256)] + [b"", "ção".encode(), b"12", b" de", b"...", b"\n\n"]
SPECIAL = 256
PREFIX = '{"header": null, "text": "O Conselho decide que '


def feed(detector, tokens):
    """The first loop reported, and how many tokens were pushed."""
    for i, token in enumerate(tokens):
        if (loop := detector.push(token)) is not None:
            return loop, i + 1
    return None, len(tokens)


def watch(text, expected_tokens=None):
    return feed(LoopDetector(PIECES, expected_tokens), text.encode())[0]


def kept(text, loop):
    return text.encode()[: loop.start].decode()


words = st.text("abcdefghijklmnopqrstuvwxyzçãé", min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    prefix=st.lists(words, max_size=40).map(" ".join),
    body=st.lists(words, min_size=1, max_size=60).map(" ".join),
    end=st.sampled_from([" ", "\n", "\\n", ". "]),
)
def test_any_repeated_body_is_found_and_cut_after_its_first_instance(prefix, body, end):
    tokens = (prefix + (body + end) * (4000 // len(body) + 10)).encode()
    loop, pushed = feed(LoopDetector(PIECES), tokens)
    assert loop is not None
    assert loop.end == pushed
    size = len((body + end).encode())
    # What is discarded repeats what stands before it, and what is kept holds the body once, turned at most.
    assert tokens[loop.start : pushed] == tokens[loop.start - loop.period : pushed - loop.period]
    assert loop.start <= len(prefix.encode()) + 2 * size
    assert loop.start >= loop.period
    assert loop.repeats == (pushed - loop.start) // loop.period + 1 or loop.kind == "run"
    assert loop.repeats >= 4


def test_one_token_again_and_again():
    for token in (ord("."), 257, 259, 260, SPECIAL):
        loop, _ = feed(LoopDetector(PIECES), [*PREFIX.encode(), *[token] * 400])
        assert loop is not None
        assert (loop.kind, loop.period, loop.start) == ("run", 1, len(PREFIX.encode()) + 1)


def test_a_run_of_digits_is_a_run_though_numbers_are_folded():
    loop = watch(PREFIX + "7" * 500)
    assert loop is not None
    assert loop.kind == "run"


@pytest.mark.parametrize(
    "form",
    [
        "{i}. O requerente apresentará os documentos originais.\\n",
        "{day:02d}/{month:02d}/2024 o requerente apresentará documentos\n",
        "valor devido ao requerente: R$ {i}00,00 ",
        "Art. {i} O prazo é de {i} dias; ",
    ],
)
def test_bodies_that_count_are_found(form):
    text = PREFIX + "".join(form.format(i=i, day=i % 28 + 1, month=i // 28 % 12 + 1) for i in range(1, 200))
    loop = watch(text)
    assert loop is not None
    assert loop.kind == "counter"
    assert loop.start <= len((PREFIX + form).encode()) + 5
    assert kept(text, loop).startswith(PREFIX)


def test_the_same_text_in_other_tokens_each_time():
    tiny, rng = tokenizer(), random.Random(1)
    pieces = token_pieces(tiny, 2048)
    body = "deverá apresentar os documentos originais no prazo legal. "
    tokens = list(tiny.encode(PREFIX).ids)
    for _ in range(40):
        at = 0
        while at < len(body):
            size = rng.randint(1, 9)
            tokens += tiny.encode(body[at : at + size]).ids
            at += size
    loop, _ = feed(LoopDetector(pieces), tokens)
    assert loop is not None
    assert tiny.decode(tokens[: loop.start]).count("documentos") == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(40, 400))
def test_a_changed_character_now_and_then_does_not_hide_a_loop(seed, size):
    rng = random.Random(seed)
    body = [rng.choice(b"abcdefghijklmno  ") for _ in range(size)]
    tokens = [rng.choice(b"XYZW") if rng.random() < 0.01 else b for _ in range(60) for b in body]
    assert feed(LoopDetector(PIECES), tokens)[0] is not None


@pytest.mark.parametrize(
    "text",
    {
        "zeros": ("0,00 " * 13 + "\n") * 50,
        "zeros, escaped": (" ".join(["0,00"] * 13) + "\\n") * 50,
        "signatures": ("_" * 100 + "\nNome: Ana de Souza\n") * 12,
        "dot leaders": "".join(f"Capítulo {i} {'.' * 90} {3 * i}\n" for i in range(1, 60)),
        "dashes": ("- " * 45 + "\n") * 40,
        "blank cells": "<table>" + ("<tr>" + "<td></td>" * 31 + "</tr>") * 40 + "</table>",
        "form": "Nome: ________ CPF: ________ Assinatura: ________\n" * 35,
        "chorus": "Ó minha terra, onde canta o sabiá\n" * 10,
        "vouchers": (
            "Recibo: recebi do senhor Paulo de Souza a quantia acima, pela locação do imóvel sito nesta cidade, "
            "referente ao mês corrente, dando plena e geral quitação. Firmo o presente recibo para os devidos fins.\n"
        )
        * 4,
        "digits": "".join(f"{(i * 7919 + 13) ** 3 % 10007:04d} " for i in range(1500)),
        "instalments": "".join(f"Parcela {i}/48 10/{i % 12 + 1:02d}/2024 R$ 350,00\n" for i in range(1, 49)),
        "numbered list": "".join(f"{i}. {'abcdefghijklmnop'[i % 16] * 3} {i * i}\n" for i in range(70)),
        "a page of sim": ("sim " * 20 + "\n") * 35,
    }.items(),
    ids=lambda item: item[0],
)
def test_pages_that_repeat_themselves_are_left_alone(text):
    assert watch(PREFIX + text[1]) is None


def test_a_known_length_of_the_page():
    rows = PREFIX + (" ".join(["0,00"] * 13) + "\n") * 100
    without, within, beyond = watch(rows), watch(rows, 10_000), watch(rows, 1500)
    assert without is not None
    assert within is not None
    assert beyond is not None
    assert 1500 < beyond.end < without.end <= within.end
    joined = PREFIX + "sim " * 200
    assert watch(joined) is not None
    assert watch(joined, 2000) is None, "rows of cells that were read as one line"
    assert watch(joined, 300) is not None


def test_numbers_that_differ_are_kept_though_zeros_follow_in_the_same_form():
    table = "".join(
        " ".join(f"{(i * 37 + j * j * 11) % 90},{i * j % 7}0" for j in range(9)) + "\n" for i in range(12)
    )
    for zeros in (" ".join(["0,00"] * 9) + "\n", "0,00 "):
        text = PREFIX + table + zeros * 400
        loop = watch(text)
        assert loop is not None
        assert kept(text, loop).startswith(PREFIX + table[:-1])
        assert loop.start < len((PREFIX + table).encode()) + 2 * len("0,00 " * 9)


def test_numbers_may_repeat_less_often_than_what_stands_between_them():
    body = "1,5 2,5 30,5 7,1 "
    loop = watch(PREFIX + body * 100)
    assert loop is not None
    assert (loop.kind, loop.period) == ("period", len(body))
    assert len(PREFIX + body) <= loop.start + 1 <= len(PREFIX + 2 * body)


def test_the_same_tokens_after_a_rollback_are_judged_the_same():
    text = (PREFIX + "12" * 4 + "7" * 500).encode()
    detector = LoopDetector(PIECES)
    loop, _ = feed(detector, text)
    assert loop is not None
    for keep in (loop.start, loop.start - 1, len(PREFIX.encode()) + 3, 10, 0):
        detector.rollback(keep)
        again, _ = feed(detector, text[keep:])
        assert again is not None
        assert (again.kind, again.start) == (loop.kind, loop.start)


def test_after_a_rollback_the_discarded_text_counts_no_more():
    line = "O requerente apresentará os documentos originais no prazo.\n".encode()
    detector = LoopDetector(PIECES)
    for i in range(8):
        for _ in range(5):
            assert feed(detector, line)[0] is None
        detector.rollback(len(line))
        assert feed(detector, f"Outra linha {i}\n".encode() * 2)[0] is None
        detector.rollback(len(line))


def test_nothing_can_be_kept_that_is_not_there():
    detector = LoopDetector(PIECES)
    feed(detector, b"abc")
    detector.rollback(3)
    with pytest.raises(AssertionError, match="cannot roll 3 output tokens back to 4"):
        detector.rollback(4)
    with pytest.raises(ConfigError, match="expected_tokens"):
        LoopDetector(PIECES, 0)


def test_pieces_join_to_the_text():
    tiny = tokenizer()
    pieces = token_pieces(tiny, 2048)
    text = "Ação — nº 3 “€ 10”\n\t日本 🎉 ó"
    assert b"".join(pieces[i] for i in tiny.encode(text).ids) == text.encode()
    assert len(pieces) == 2048
    assert pieces[tiny.token_to_id("<|im_end|>")] == b""


@pytest.fixture(scope="module")
def outcomes():
    rows, pieces = load(), token_pieces(tokenizer(), 2048)
    return {know: bench.run(rows, pieces, know) for know in (False, True)}


@pytest.mark.parametrize("know_length", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_labelled_set(outcomes, know_length, held_out):
    chosen = [o for o in outcomes[know_length] if o.row.held_out == held_out]
    loops = [o for o in chosen if o.row.label == "loop"]
    legitimate = [o for o in chosen if o.row.label == "legitimate"]
    assert len(loops) >= 60
    assert len(legitimate) >= 60
    # Where the page may be that long, rows of cells in one line are let go on, and some real loops end by themselves first.
    assert len(bench.detected(loops)) >= (0.92 if know_length else 0.97) * len(loops)
    assert len(bench.false_alarms(chosen)) <= 0.01 * len(legitimate)
