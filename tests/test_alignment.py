"""Teacher-forced scoring: the model's own probabilities, whatever else is in the batch and however it is cut."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import IMAGE, Ask, drain, shown
from transformers import Qwen2_5_VLForConditionalGeneration

from pagemill import Engine, Request, SamplingParams, core
from pagemill.decode.alignment import field_bits, reference_answer
from pagemill.decode.guidance import PageFormat
from pagemill.errors import RequestError
from pagemill.model.loader import find_checkpoint
from pagemill.pages.fit import FitOptions, fit_page
from pagemill.pages.source import PageRef
from pagemill.score import read_truths

PAGES = Path(__file__).parents[1] / "bench" / "pages"
TRUTHS = {truth.name: truth for truth in read_truths(PAGES / "truth.jsonl")}
SHORT = min(TRUTHS.values(), key=lambda truth: len(truth.text)).name
OTHER = "form_24.png"


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("pagemill-tiny", dtype="float32", max_num_seqs=4) as engine:
        yield engine


def test_agrees_with_transformers(engine):
    """Every token's log-probability within 1e-3 nats of a plain forward pass over prompt and answer."""
    page = str(PAGES / SHORT)
    (ours,) = engine.score([page], [TRUTHS[SHORT].fields])
    options = FitOptions("auto", False, engine.profile.text_height)
    image, _ = fit_page(PageRef(page, 1), engine.dpi, options, engine.processor)
    prompt = engine.core.tokenize(engine.page_prompt, [image]).token_ids
    answer = json.dumps(TRUTHS[SHORT].fields, ensure_ascii=False)  # as the miniature was taught
    ids = prompt + engine.core.prompter.tokenizer.encode(answer).ids
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        find_checkpoint("pagemill-tiny"), dtype=torch.float32
    )
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
            pixel_values=shown(image),
            image_grid_thw=torch.tensor([image.grid]),
        ).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, tokens[0, len(prompt) :, None])[:, 0]
    assert ours.tokens.output == len(expected)
    np.testing.assert_allclose(ours.logprobs, expected.numpy(), atol=1e-3)
    bits = -expected.sum().item() / math.log(2)
    assert ours.whole.bits == pytest.approx(bits, abs=0.1)
    assert ours.whole.characters == sum(len(value or "") for value in TRUTHS[SHORT].fields.values())


def test_the_truth_is_expected_more_than_another_pages_text(engine):
    pages = [str(PAGES / OTHER), PageRef(str(PAGES / OTHER), 1)]
    right, wrong = engine.score(pages, [TRUTHS[OTHER].fields, TRUTHS[SHORT].fields])
    assert right.bits_per_char < 1 < wrong.bits_per_char
    assert set(right.fields) == {name for name, value in TRUTHS[OTHER].fields.items() if value}
    assert sum(bits.bits for bits in right.fields.values()) <= right.whole.bits + 1
    assert right.seconds.prefill > 0


def test_results_come_in_order_and_a_bad_page_costs_no_other(engine, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    page = str(PAGES / SHORT)
    pages = [page, str(tmp_path / "text.png"), page, page, "missing.png"]
    texts = [TRUTHS[SHORT].fields, "x", "casa " * 40000, {"text": ""}, "x"]
    results = list(engine.score(pages, texts))
    assert [result.source for result in results] == pages
    assert [result.error is None for result in results] == [True, False, False, True, False]
    assert "not a page" in results[1].error
    assert "reference has" in results[2].error
    assert [result.bits_per_char for result in results[1:]] == [None] * 4
    assert results[3].whole.bits > 0
    assert not engine.core.scheduler.has_work
    engine.core.scheduler.check()


def test_pages_and_texts_go_together(engine):
    with pytest.raises(RequestError, match="2 pages with 1 texts"):
        engine.score(["a.png", "b.png"], ["a"])


def test_leaving_early_cancels_the_rest(engine):
    scores = engine.score([str(PAGES / SHORT)] * 8, [TRUTHS[SHORT].fields] * 8)
    assert next(scores).error is None
    scores.close()
    (output,) = engine.generate([Request([1, 2, 3])], SamplingParams(max_new_tokens=2))
    assert output.error is None
    assert not engine.core.scheduler.has_work


# The engine's inside, on a random model.


def score(world, core, ask, reference):
    prompt = core.tokenize(list(ask.prompt), [])
    return core.add(prompt, SamplingParams(), 99, reference=reference)


asks = st.lists(st.integers(0, 5), min_size=1, max_size=30).map(lambda ids: Ask(tuple(ids), (), 6))
references = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(asks, references), min_size=1, max_size=4),
    others=st.lists(asks, max_size=3),
    step=st.sampled_from([5, 17, 200]),
    rows=st.sampled_from([1, 3, 256]),
    blocks=st.sampled_from([12, 40]),
)
def test_neither_company_nor_chunks_nor_budgets_change_a_score(world, pairs, others, step, rows, blocks):
    expected = []
    for ask, reference in pairs:
        alone = world.core(prefix_sharing=False)
        seq = score(world, alone, ask, reference)
        drain(alone)
        assert alone.stats.steps == (1 if len(reference) == 1 else 2)
        expected.append(seq.logprobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "GIVEN_ROWS", rows)
        together = world.core(num_blocks=blocks, block_size=8, max_step_tokens=step, max_num_seqs=3)
        ordinary = [world.add(together, ask) for ask in others]
        scored = [score(world, together, *pair) for pair in pairs]
        drain(together)
    for seq, (_, reference), logprobs in zip(scored, pairs, expected, strict=True):
        assert seq.finish_reason == "stop"
        assert seq.output_ids == reference
        np.testing.assert_allclose(seq.logprobs, logprobs, rtol=1e-6, atol=1e-6)
    for seq, ask in zip(ordinary, others, strict=True):
        assert seq.output_ids == world.reference(ask)


def test_the_models_own_output_scores_as_it_was_generated(world):
    core = world.core()
    ask = Ask((1, 2, IMAGE, 3), (0,), 20)
    written = world.add(core, ask, drafts="off", guard="off")
    drain(core)
    from micro import IMAGES

    seq = core.add(
        core.tokenize(list(ask.prompt), [IMAGES[0]]), SamplingParams(), 99, reference=written.output_ids
    )
    drain(core)
    np.testing.assert_allclose(seq.logprobs, written.logprobs, atol=1e-6)


@pytest.mark.parametrize("reference", [[], [1] * 200])
def test_a_reference_has_to_fit(world, reference):
    core = world.core(num_blocks=10)
    with pytest.raises(RequestError, match="reference"):
        core.add(core.tokenize([1, 2], []), SamplingParams(), 99, reference=reference)


# The answer, and its bits.


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ({"text": 'a\n"b"', "header": "é"}, PageFormat(), '{"text": "a\\n\\"b\\"", "header": "é"}'),
        ({"text": "a", "header": "b"}, PageFormat(order="fixed"), '{"header": "b", "text": "a"}'),
        (
            {"text": "a", "footer": None},
            PageFormat(optional=False, item_separator=",", key_separator=":"),
            '{"text":"a","footer":null,"header":null,"margin":null}',
        ),
        ('{"text": "a", "header": ""}', PageFormat(), '{"text": "a", "header": ""}'),
        ("plain {text}", PageFormat(), '{"text": "plain {text}"}'),
        ({"header": "h", "margin": " ", "text": "t", "footer": None}, None, "h\nt"),
        ('{"text": "a", "header": "b"}', None, "a\nb"),
        ("[1]", None, "[1]"),
    ],
)
def test_the_answer_is_in_the_models_form(text, form, answer):
    assert reference_answer(text, form) == answer


def test_bits_by_field():
    pieces = [b'{"text": "', b"a\\n", b"\xc3", b'\xa9"', b', "header": ', b"null}"]
    whole, fields = field_bits(pieces, [-math.log(2) * n for n in (1, 2, 4, 8, 16, 32)])
    assert whole.bits == pytest.approx(63)
    assert set(fields) == {"text"}
    assert fields["text"].bits == pytest.approx(14)
    assert fields["text"].characters == whole.characters == 3
    assert whole.per_character == pytest.approx(21)
    with pytest.raises(ValueError):
        field_bits(pieces, [0.0])
