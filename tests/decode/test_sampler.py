"""Sampling: greedy, penalties, truncation of the distribution, seeds, and independence of the batch."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagemill.decode.sampler import SamplingParams, SamplingState, sample
from pagemill.errors import ConfigError
from pagemill.kernels.sampling import greedy_reference


def draw(logits, params, histories=None, times=1):
    states = [SamplingState(params) for _ in logits]
    histories = histories or [[0]] * len(logits)
    return [sample(logits, states, histories, greedy_reference)[0] for _ in range(times)]


def test_greedy_takes_the_likeliest_and_reports_its_probability():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 4.0]])
    states = [SamplingState(SamplingParams())] * 2
    tokens, logprobs = sample(logits, states, [[0], [0]], greedy_reference)
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
        one = sample(logits[:1], [alone], [[0]], greedy_reference)[0][0]
        assert one == sample(logits, crowd, [[0]] * 3, greedy_reference)[0][0]


def test_broken_logits_show_in_the_log_probability():
    logits = torch.full((1, 4), float("nan"))
    _, logprobs = sample(logits, [SamplingState(SamplingParams())], [[0]], greedy_reference)
    assert not np.isfinite(logprobs[0])


@pytest.mark.parametrize(
    "bad",
    [dict(max_new_tokens=0), dict(temperature=-1), dict(temperature=float("nan")), dict(top_p=0), dict(top_p=1.1),
     dict(top_k=-1), dict(repetition_penalty=0), dict(seed=-1),
     dict(top_k=2.5), dict(seed=1.5), dict(max_new_tokens=True), dict(temperature="hot"),
     dict(stop=("",)), dict(stop=[3])],
    ids=str,
)  # fmt: skip
def test_impossible_parameters_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_stop_accepts_one_string_or_a_list():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")
