"""Sampling: greedy, penalties, truncation of the distribution, seeds, and independence of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagemill.decode.sampler import SamplingParams, SamplingState, Want, sample
from pagemill.errors import ConfigError
from pagemill.kernels.sampling import greedy_reference


def draw(logits, params, histories=None, times=1):
    states = [SamplingState(params) for _ in logits]
    histories = histories or [[0]] * len(logits)
    return [plain(logits, states, histories)[0] for _ in range(times)]


def plain(logits, states, histories):
    """One token a row."""
    wants = [Want(state, history) for state, history in zip(states, histories, strict=True)]
    tokens, logprobs = sample(logits, wants, greedy_reference)
    return [row[0] for row in tokens], [row[0] for row in logprobs]


def test_greedy_takes_the_likeliest_and_reports_its_probability():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 4.0]])
    states = [SamplingState(SamplingParams())] * 2
    tokens, logprobs = plain(logits, states, [[0], [0]])
    assert tokens == [1, 0], "the lowest index wins a tie"
    np.testing.assert_allclose(logprobs, torch.log_softmax(logits, -1)[[0, 1], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=5),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=0.9, top_k=7, top_p=0.7, repetition_penalty=1.5),
        dict(temperature=1.0, top_k=1),
        dict(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(params):
    torch.manual_seed(0)
    logits, history, n = torch.randn(1, 20) * 2, [3, 4, 4, 9], 4000
    warpers = LogitsProcessorList()
    if "repetition_penalty" in params:
        warpers.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    warpers.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    expected = warpers(torch.tensor([history]), logits.clone()).softmax(-1)[0].numpy()
    drawn = np.bincount(
        [t[0] for t in draw(logits, SamplingParams(seed=1, **params), [history], n)], minlength=20
    )
    assert not drawn[expected == 0].any(), "a token outside the kept set"
    assert np.abs(drawn / n - expected).max() < 0.035


def test_greedy_with_penalty_matches_transformers():
    torch.manual_seed(1)
    logits, history = torch.randn(6, 30), [[1, 2, 3, 20], [5], [0, 0], [29], [7, 8], [4]]
    got = draw(logits, SamplingParams(repetition_penalty=3.0), history)[0]
    for row, (token, ids) in enumerate(zip(got, history, strict=True)):
        expected = RepetitionPenaltyLogitsProcessor(3.0)(torch.tensor([ids]), logits[row : row + 1].clone())
        assert token == expected.argmax().item()


def test_a_seeded_request_draws_the_same_in_any_company():
    torch.manual_seed(2)
    logits = torch.randn(3, 50)
    params = SamplingParams(temperature=1.0, seed=7)
    alone, crowd = SamplingState(params), [SamplingState(params), SamplingState(SamplingParams(temperature=2.0)),
                                           SamplingState(SamplingParams())]  # fmt: skip
    for _ in range(20):
        one = plain(logits[:1], [alone], [[0]])[0][0]
        assert one == plain(logits, crowd, [[0]] * 3)[0][0]


def test_broken_logits_show_in_the_log_probability():
    logits = torch.full((1, 4), float("nan"))
    _, logprobs = plain(logits, [SamplingState(SamplingParams())], [[0]])
    assert not np.isfinite(logprobs[0])


VOCABULARY = 40


def logits_after(history):
    """A model: what comes next depends on the whole history."""
    seed = abs(hash(tuple(history))) % 2**31
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        top_k=st.sampled_from([0, 5]),
        seed=st.integers(0, 9),
    ),
    data=st.data(),
)
def test_drafts_change_no_token_and_no_probability(params, data):
    """Greedy, penalised and drawn tokens alike: right, partly right, wrong and empty drafts give the same output."""
    allowed = np.random.default_rng(0).integers(0, 2, (60, VOCABULARY), dtype=np.uint8)
    allowed[:, 7] = 1
    masks = np.pad(np.packbits(allowed, axis=1, bitorder="little"), ((0, 0), (0, 3))).view(np.int32)
    masked = data.draw(st.booleans())

    def step(state, history, draft):
        rows = [history + draft[:i] for i in range(len(draft) + 1)]
        mask = torch.from_numpy(masks[[len(row) for row in rows]]) if masked else None
        (ids,), (lps,) = sample(
            torch.stack([logits_after(row) for row in rows]),
            [Want(state, history, draft)],
            greedy_reference,
            mask,
        )
        return ids, lps

    state, truth, probabilities = SamplingState(params), [1, 2], []
    while len(truth) < 30:
        ids, lps = step(state, truth, [])
        truth = truth + ids
        probabilities += lps
    state, output, found = SamplingState(params), [1, 2], []
    while len(output) < 25:
        right = data.draw(st.integers(0, 4))
        draft = truth[len(output) : len(output) + right]
        draft = draft + data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))
        ids, lps = step(state, output, draft)
        assert len(ids) >= min(right, len(draft)) + 1 or len(ids) == len(draft) + 1
        output = output + ids
        found += lps
    assert output == truth[: len(output)]
    np.testing.assert_array_equal(found, probabilities[: len(found)])


def test_a_mask_holds_for_every_way_of_choosing():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    mask = torch.tensor([[0b1100]], dtype=torch.int32)
    for params in (
        SamplingParams(),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(temperature=5.0, seed=1),
        SamplingParams(temperature=5.0, seed=1, top_k=1),
    ):
        state = SamplingState(params)
        drawn = {sample(logits, [Want(state, [0])], greedy_reference, mask)[0][0][0] for _ in range(40)}
        assert drawn <= {2, 3}
        assert 2 in drawn


@pytest.mark.parametrize(
    "bad",
    [dict(max_new_tokens=0), dict(temperature=-1), dict(temperature=float("nan")), dict(top_p=0), dict(top_p=1.1),
     dict(top_k=-1), dict(repetition_penalty=0), dict(seed=-1),
     dict(top_k=2.5), dict(seed=1.5), dict(max_new_tokens=True), dict(temperature="hot"),
     dict(stop=("",)), dict(stop=[3]), dict(guidance="json"), dict(guidance=7), dict(guard="on"), dict(max_rescues=-1),
     dict(max_retries=1.5), dict(drafts=True)],
    ids=str,
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_stop_accepts_one_string_or_a_list():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")
