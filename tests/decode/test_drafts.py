"""Drafts: guesses of every source, their recovery after differences, roll-back, bounded memory, and the length that pays."""

import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.decode.drafts import DraftBudget, Drafter, DraftIndex, draft_text_tokens

# Tokens are single bytes, and some pairs and words above them, so that one text can be split in many ways.
VOCABULARY = [bytes([i]) for i in range(256)]
VOCABULARY += [
    w.encode() for w in ["os", " de", " a", "\\n", "\\nA", "\\nB", '",', ' "', '": "', "tro", "ção", "ão"]
]
BY_PIECE = {piece: token for token, piece in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Split greedily, longest token first."""
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        piece = next(data[at : at + n] for n in range(8, 0, -1) if data[at : at + n] in BY_PIECE)
        ids.append(BY_PIECE[piece])
        at += len(piece)
    return ids


def decode(ids: list[int]) -> str:
    return b"".join(VOCABULARY[i] for i in ids).decode(errors="replace")


def drafter(text: str | None = None, **options) -> Drafter:
    texts = [] if text is None else [draft_text_tokens(text, encode)]
    return Drafter(vocabulary=VOCABULARY, texts=texts, encode=encode, **options)


def verify(guesses: Drafter, output: list[int], limit: int = 8) -> int:
    """Let a model that writes `output` verify the guesses; returns the steps it took."""
    done = steps = 0
    while done < len(output):
        draft = guesses.propose(limit)
        assert len(draft) <= limit
        accepted = 0
        while (
            accepted < min(len(draft), len(output) - done - 1) and draft[accepted] == output[done + accepted]
        ):
            accepted += 1
        guesses.feedback(len(draft), accepted)
        guesses.extend(output[done : done + accepted + 1])
        done += accepted + 1
        steps += 1
    return steps


def page(header: str | None, footer: str | None, text: str) -> str:
    return json.dumps({"header": header, "margin": None, "footer": footer, "text": text}, ensure_ascii=False)


TEXT = (
    'Art. 1º O prazo é de 30 dias\nBem "citado", as partes\nC:\\pasta e outros de atenção\nAssinado em Goiás'
)


def test_a_text_is_tokenised_as_the_inside_of_a_json_string():
    assert decode(draft_text_tokens(' a "b"\r\n\n  c\\d \n', encode)) == 'a \\"b\\"\\nc\\\\d'
    assert draft_text_tokens(" \n\n", encode) == []


def test_a_true_text_layer_saves_most_steps():
    output = encode(page("Tribunal de Justiça", "fl. 308", TEXT))
    guesses = drafter(f"Tribunal de Justiça\n{TEXT}\nfl. 308")
    assert verify(guesses, output) < 0.5 * len(output)
    assert guesses.num_accepted > 0.5 * len(output)
    assert verify(drafter(), output) > 0.85 * len(output)


def test_the_text_begins_after_the_header_also_where_the_footer_is_written_first():
    guesses = drafter(f"Cabeçalho da página\n{TEXT}\nRodapé da página")
    guesses.extend(encode('{"header": "Cabeçalho da página", "footer": "Rodapé da página", "text": "'))
    assert decode(guesses.propose(4)) == "Art."


@pytest.mark.parametrize(
    ("written", "goes_on"),
    [
        ("O prazo é de 80 dias e a multa", " de dez"),  # a letter replaced
        ("O prazo é e 30 dias e a multa", " de dez"),  # left out
        ("O prazzo é de 30 dias e a multa", " de dez"),  # added
        ("O réu é de 30 dias e a multa", " de dez"),  # a word replaced
        ("O prazo é de 3", "0 dias"),
        ("em Goiás, O prazo é de 3", "0 dias"),
    ],
)
def test_a_difference_does_not_lose_the_place(written, goes_on):
    guesses = drafter("O prazo é de 30 dias e a multa de dez por cento")
    guesses.extend(encode('{"text": "' + written))
    assert decode(guesses.propose(8)).startswith(goes_on)


def test_words_split_differently_are_followed_and_guessed_anew():
    text = draft_text_tokens("x\nAtenção e outros", encode)
    assert BY_PIECE[b"\\nA"] in text
    guesses = Drafter(vocabulary=VOCABULARY, texts=[text], encode=encode)
    guesses.extend([*encode('{"text": "x'), BY_PIECE[b"\\n"]])  # the model split the line break from the word
    assert decode(guesses.propose(4)) == "Atenção"[: len(decode(guesses.propose(4)))]
    assert guesses.propose(1) == encode("A")
    guesses.extend(encode("Aten") + list("çã".encode()))
    assert decode(guesses.propose(2)).startswith("o ")
    without = Drafter(vocabulary=VOCABULARY, texts=[text])
    without.extend([*encode('{"text": "x'), BY_PIECE[b"\\n"]])
    assert without.propose(4) == []


def test_own_output_and_earlier_pages_are_guessed_from():
    row = encode("Total: R$ 0,00; ")
    guesses = drafter()
    guesses.extend(row + row[:8])
    assert guesses.propose(5) == row[8:13]
    index = DraftIndex()
    index.add("a", encode("Recibo de pagamento nº 1"))
    guesses = drafter(index=index)
    guesses.extend(encode("Recibo de pag"))
    assert decode(guesses.propose(20)) == "amento nº 1"
    assert 0 < guesses.acceptance < 1


def test_the_same_document_is_preferred_then_the_newest_page_and_longer_matches_before_both():
    index = DraftIndex()
    index.add("a", encode("vide folha 1"))
    index.add("b", encode("vide folha 2"))
    index.add("c", encode("conforme vide folha 3"))
    for document, before, expected in [
        ("a", "", "1"),
        ("x", "", "3"),
        ("b", "", "2"),
        ("b", "conforme ", "3"),
    ]:
        tail = encode(before + "vide folha ")
        ids, at, length = index.find(tail, document)
        assert ids is not None
        assert decode(ids[at : at + 1]) == expected
        assert length == len(tail)
    assert index.find(encode("nada"), "a") == (None, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 3), max_size=30)), max_size=25))
def test_the_index_is_bounded_and_finds_exactly_what_it_holds(pages):
    index = DraftIndex(max_tokens=64)
    for document, ids in pages:
        index.add(document, ids)
        assert index.num_tokens == sum(len(ids) for _, ids in index._pages.values()) <= 64
    held = Counter(tuple(ids[e - 3 : e]) for _, ids in index._pages.values() for e in range(3, len(ids)))
    assert {key: len(places) for key, places in index._places.items()} == held
    for key in held:
        ids, at, length = index.find(key, "a")
        assert ids is not None
        assert length == 3
        assert tuple(ids[at - 3 : at]) == key


def test_pages_in_use_stay_in_the_index():
    index = DraftIndex(max_tokens=40)
    index.add("a", encode("abcdefghijklmno"))
    index.add("b", encode("ABCDEFGHIJKLMNO"))
    index.find(encode("abc"), "")
    index.add("c", encode("0123456789x"))
    assert index.find(encode("abc"), "")[0] is not None
    assert index.find(encode("ABC"), "")[0] is None


pieces = st.lists(st.sampled_from([*encode('abc":de'), *range(256, len(VOCABULARY))]), max_size=80)


@settings(max_examples=80, deadline=None)
@given(pieces, pieces, pieces, st.data())
def test_rollback_is_as_if_the_rest_had_never_been_written(text, kept, dropped, data):
    index = DraftIndex()
    index.add("a", text + kept)

    def make() -> Drafter:
        return Drafter(vocabulary=VOCABULARY, texts=[text], index=index, encode=None)

    rolled, plain = make(), make()
    for part in (kept, dropped):
        rolled.extend(part)
        if data.draw(st.booleans()):
            rolled.propose(4)
    rolled.rollback(len(kept))
    plain.extend(kept)
    plain.propose(4)
    rolled.propose(4)
    assert [p.state for p in rolled._pointers] == [p.state for p in plain._pointers]
    assert (rolled._output, rolled._last, rolled._before) == (plain._output, plain._last, plain._before)
    assert rolled._tail == plain._tail
    rolled.rollback(len(kept) + 5)
    assert rolled._output == kept


@settings(max_examples=80, deadline=None)
@given(pieces, pieces, st.integers(0, 6))
def test_any_text_and_output_verify_to_the_same_end(text, output, limit):
    index = DraftIndex()
    index.add("a", output[:20])
    one, two = (
        Drafter(vocabulary=VOCABULARY, texts=[text, output], index=index, encode=encode) for _ in range(2)
    )
    assert verify(one, output, limit) == verify(two, output, limit) <= len(output)
    assert one.num_accepted == two.num_accepted
    assert 0 <= one.acceptance <= 1


def test_a_misleading_text_is_soon_distrusted_and_a_good_one_trusted_again():
    rng = random.Random(1)
    guesses = drafter("".join(rng.choices("bcdfg", k=400)) + "\n" + TEXT)
    worths = []
    for letter in rng.choices("bcdfg", k=300):  # a little agrees by chance, nothing goes on
        guesses.extend(encode(letter))
        worths.append(guesses.acceptance)
    assert sum(worths[-100:]) / 100 < 0.45
    guesses.extend(encode(TEXT[:27]))
    assert guesses.acceptance > 0.85


def test_sample_pages_take_less_than_half_the_steps_with_their_text():
    """Real outputs of the miniature, with its misreadings, against the true text."""
    from tokenizers import Tokenizer

    import pagemill

    root = Path(pagemill.__file__).parent / "assets" / "pagemill-tiny" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(root))
    unicode_of = bytes_to_unicode()
    vocabulary = [b""] * tokenizer.get_vocab_size()
    for piece, token in tokenizer.get_vocab(with_added_tokens=False).items():
        vocabulary[token] = bytes(unicode_of[c] for c in piece)
    samples = Path(__file__).parents[2] / "bench" / "pages"
    rows = [json.loads(line) for line in (samples / "reference_hf_fp32.jsonl").read_text().splitlines()]
    truths = {
        row["file"]: row["truth"]
        for row in map(json.loads, (samples / "truth.jsonl").read_text().splitlines())
    }
    index, steps, tokens = DraftIndex(), 0, 0
    for row in rows:
        if not row["file"].startswith(("legal", "form")):
            continue
        truth, output = truths[row["file"]], row["token_ids"]
        split = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        text = draft_text_tokens(
            "\n".join(filter(None, (truth["header"], truth["text"], truth["footer"]))), split
        )
        guesses = Drafter(vocabulary=vocabulary, texts=[text], index=index, encode=split)
        steps += verify(guesses, output)
        tokens += len(output)
        index.add(row["file"], output)
    assert tokens / steps > 3


def bytes_to_unicode() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Machine:
    """Steps of known cost, with noise, prefill and hiccups; sequences whose drafts are right with probability `p`."""

    def __init__(self, cost, noise=0.05, hiccups=0.01, prefill=50):
        self.cost, self.noise, self.hiccups, self.prefill = cost, noise, hiccups, prefill
        self.budget, self.rng = DraftBudget(), random.Random(0)

    def run(self, num, p, steps=800, limit=8):
        """Return tokens per second against no drafts, and mean drafts of a sequence and step, in the second half."""
        seconds = tokens = drafts = plain = 0.0
        for step in range(steps):
            other = 2000 if self.prefill and step % self.prefill == 7 else 0
            lengths = self.budget.lengths([p] * num, limit)
            assert len(lengths) == num
            assert all(0 <= length <= limit for length in lengths)
            size = num + other + sum(lengths)
            took = self.cost(size) * math.exp(self.rng.gauss(0, self.noise))
            if not other:
                took *= 20 if self.rng.random() < self.hiccups else 1
                self.budget.observe(num, sum(lengths), took)
            if step >= steps // 2 and not other:
                seconds += self.cost(size)
                plain += self.cost(num)
                tokens += sum((1 - p ** (length + 1)) / (1 - p) for length in lengths)
                drafts += sum(lengths)
        count = plain / self.cost(num)
        return tokens / seconds * self.cost(num) / num, drafts / num / count


def flat_then_linear(n):
    return 1e-3 * (1 + max(0, n - 32) / 32)


def test_a_draft_token_is_not_taken_for_a_sequence():
    """Sequences read keys and values of their own, drafts those of their sequence."""
    budget = DraftBudget()
    rng = random.Random(0)
    for num in (16, 8, 2):
        for _ in range(60):
            lengths = budget.lengths([0.9] * num, 8)
            seconds = 1.5e-3 + 0.5e-3 * num + 0.15e-3 * sum(lengths)
            budget.observe(num, sum(lengths), seconds * math.exp(rng.gauss(0, 0.02)))
        assert sum(budget.lengths([0.9] * num, 8)) >= 3 * num


def linear(n):
    return 1e-4 * (2 + n)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_long_drafts_alone_and_none_in_a_full_batch(noise):
    gain, length = Machine(flat_then_linear, noise).run(1, 0.9)
    assert gain > 5
    assert length > 7
    gain, length = Machine(flat_then_linear, noise).run(64, 0.3)
    assert gain > 0.985
    assert length < 0.05
    gain, length = Machine(flat_then_linear, noise).run(16, 0.9)
    assert gain > 1.6, "half of the flat part is free"
    assert 0.7 < length < 3


@pytest.mark.parametrize("cost", [flat_then_linear, linear, lambda n: 1e-3, lambda n: 1e-4 * n])
@pytest.mark.parametrize("num", [1, 4, 16, 64])
@pytest.mark.parametrize("p", [0.1, 0.4, 0.7])
def test_drafts_never_cost_more_than_they_bring(cost, num, p):
    gain, _ = Machine(cost).run(num, p, steps=400)
    assert gain > 0.97


def test_exploration_costs_at_most_one_percent():
    machine = Machine(lambda n: 1e-4 * n, noise=0, hiccups=0, prefill=0)
    for num in (1, 8, 64):
        assert machine.run(num, 0.2, steps=2000)[0] > 0.99


def test_it_finds_back_when_acceptance_or_costs_change():
    machine = Machine(flat_then_linear)
    assert machine.run(2, 0.0)[1] == 0
    assert machine.run(2, 0.9)[1] > 5
    machine.cost = lambda n: 1e-3 * n  # the machine is busy now: every token costs
    assert machine.run(2, 0.4, steps=1600)[0] > 0.97
    machine.cost = flat_then_linear
    assert machine.run(2, 0.9, steps=1600)[1] > 5


def test_a_cold_start_is_careful():
    budget = DraftBudget()
    assert budget.cost(1) == 0
    assert budget.lengths([0.9, 0.9], 8) == [0, 0]
    for _ in range(2):
        budget.observe(2, 0, 0.01)
    assert sum(budget.lengths([0.98, 0.98], 64)) <= 8


def test_only_sequences_with_guesses_get_drafts():
    budget = DraftBudget()
    for drafts in (0, 0, 0, 4, 8, 16):
        budget.lengths([0.9] * 4, 8)
        budget.observe(4, drafts, 0.01)
    lengths = budget.lengths([0.95, 0.0, 0.6, 0.01], 8)
    assert lengths[0] > lengths[2] >= lengths[1] == lengths[3] == 0
    assert budget.lengths([], 8) == []
    assert budget.lengths([0.9] * 4, 0) == [0] * 4
    assert budget.lengths([1.0] * 4, 8) != [0] * 4


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 500), st.integers(-1, 5000), st.floats(allow_nan=True, allow_infinity=True)
        ),
        max_size=40,
    )
)
def test_costs_never_fall_with_the_size_whatever_was_observed(steps):
    budget = DraftBudget()
    for num, drafts, seconds in steps:
        budget.observe(num, drafts, seconds)
    for costs in (
        [budget.cost(n) for n in range(0, 600, 17)],
        [budget.cost(3, n) for n in range(0, 6000, 171)],
    ):
        assert all(math.isfinite(c) and c >= 0 for c in costs)
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(costs))
    assert len(budget.lengths([0.9, 0.5], 8)) == 2
