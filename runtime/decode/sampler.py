"""Logits to tokens: what a request may ask for, and how the next token is drawn.

Greedy rows (temperature 0, no penalty) go through one fused kernel. Others follow the order that transformers uses: repetition
penalty, temperature, top-k, top-p. A draw uses the request's own random stream, so it does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagemill.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends."""

    max_new_tokens: int | None = None
    """Most tokens to generate; None takes the model's own limit."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen, prompt included (arXiv 1909.05858)."""
    seed: int | None = None
    """Makes draws repeatable; None takes fresh randomness."""
    stop: tuple[str, ...] = ()
    """End when the output contains one of these; the output is cut before it."""
    ignore_eos: bool = False
    """Go on after the end token, to max_new_tokens (for measurements)."""
    logprobs: bool = False
    """Report the log-probability of each output token."""

    def __post_init__(self) -> None:
        def refuse(name: str, should: str) -> None:
            raise ConfigError(f"SamplingParams: {name} should be {should}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                refuse(name, "an integer")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                refuse(name, "a number")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            refuse("max_new_tokens", "at least 1")
        if not 0 <= self.temperature < float("inf"):
            refuse("temperature", "zero or a positive number")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "above 0 and at most 1")
        if self.top_k < 0:
            refuse("top_k", "0 (all) or a positive count")
        if not 0 < self.repetition_penalty < float("inf"):
            refuse("repetition_penalty", "a positive number")
        if self.seed is not None and self.seed < 0:
            refuse("seed", "None or a non-negative integer")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(s, str) and s for s in self.stop):
            refuse("stop", "non-empty strings")


class SamplingState:
    """The random stream of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.random = np.random.default_rng(params.seed) if params.temperature > 0 else None

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.random is None and self.params.repetition_penalty == 1.0


Greedy = Callable[[Tensor], tuple[Tensor, Tensor]]
"""logits float32 `[S, V]` to token ids `[S]` and their log-probabilities `[S]`."""


def sample(
    logits: Tensor, states: Sequence[SamplingState], histories: Sequence[Sequence[int]], greedy: Greedy
) -> tuple[list[int], list[float]]:
    """Choose the next token of each row.

    `logits` float32 `[S, V]`; `histories` the token ids of each row's sequence, prompt included. Returns S token ids and
    their log-probabilities under the unmodified logits; a log-probability that is not finite marks a row whose logits were not.
    """
    tokens, logprobs = greedy(logits)
    token_ids, logprob_list = tokens.tolist(), logprobs.tolist()
    for i, state in enumerate(states):
        if not state.plain_greedy:
            token_ids[i] = _choose(logits[i], state, histories[i])
            logprob_list[i] = torch.log_softmax(logits[i], -1)[token_ids[i]].item()
    return token_ids, logprob_list


def _choose(logits: Tensor, state: SamplingState, history: Sequence[int]) -> int:
    """Choose one token of one row, `[V]`."""
    p = state.params
    scores = logits.double()
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), dtype=torch.int64, device=scores.device)
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
    if state.random is None:
        return int(scores.argmax())
    scores = scores / p.temperature
    if p.top_k and p.top_k < len(scores):
        scores = torch.where(scores < scores.topk(p.top_k).values[-1], float("-inf"), scores)
    ordered, ids = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if p.top_p < 1.0:
        keep = int((cumulative - probabilities < p.top_p).sum())
        cumulative = cumulative[: max(keep, 1)]
    draw = state.random.random() * float(cumulative[-1])
    return int(ids[min(int(torch.searchsorted(cumulative, draw, right=True)), len(cumulative) - 1)])
