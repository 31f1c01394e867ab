"""Logits to tokens: what a request may ask for, and how the next token is drawn.

Greedy rows (temperature 0, no penalty) go through one fused kernel. Others follow the order that transformers uses: repetition
penalty, temperature, top-k, top-p. A draw uses the request's own random stream, so it does not depend on the batch; only top-p
sorts the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pagemill.decode.guidance import Regex
from pagemill.errors import ConfigError
from pagemill.gpu import to_device


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
    """Go on after the end token, to max_new_tokens (for measurements); an output that `guidance` shapes ends all the same."""
    logprobs: bool = False
    """Report the log-probability of each output token."""
    guidance: str | Mapping[str, Any] | Regex = "auto"
    """What the output conforms to: "page" (the model's page JSON), a JSON schema, a `Regex`, or "off"; "auto" is "page" when
    `Engine.read` asks a model that writes such pages, else "off"."""
    guard: Literal["rescue", "stop", "off"] = "rescue"
    """What happens to a repetition loop: rolled back and suppressed, ended, or nothing (as with `ignore_eos`)."""
    max_rescues: int = 2
    """Loops of one output that are rescued; the next one ends it, and a retry ends at its first."""
    max_retries: int = 1
    """Times that a page which ended badly is generated again from its prompt's cache; pages only."""
    drafts: Literal["auto", "off"] = "auto"
    """Whether guessed tokens are verified several at a time; the output is the same."""

    def __post_init__(self) -> None:
        def refuse(name: str, should: str) -> None:
            raise ConfigError(f"SamplingParams: {name} should be {should}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "top_k", "seed", "max_rescues", "max_retries"):
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
        for name in ("max_rescues", "max_retries"):
            if getattr(self, name) < 0:
                refuse(name, "zero or a positive count")
        if self.guard not in ("rescue", "stop", "off"):
            refuse("guard", "rescue, stop or off")
        if self.drafts not in ("auto", "off"):
            refuse("drafts", "auto or off")
        if isinstance(self.guidance, str):
            if self.guidance not in ("auto", "page", "off"):
                refuse("guidance", "auto, page, off, a JSON schema or a Regex")
        elif not isinstance(self.guidance, Mapping | Regex):
            refuse("guidance", "auto, page, off, a JSON schema or a Regex")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(s, str) and s for s in self.stop):
            refuse("stop", "non-empty strings")


class SamplingState:
    """The random stream of one sequence."""

    def __init__(self, params: SamplingParams, number: int = 0) -> None:
        """`number` tells the streams of one seed apart."""
        self.params = params
        seed = None if params.seed is None else [params.seed, number] if number else params.seed
        self.random = np.random.default_rng(seed) if params.temperature > 0 else None

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.random is None and self.params.repetition_penalty == 1.0


class Greedy(Protocol):
    """logits float32 `[R, V]` to token ids `[R]` and their log-probabilities `[R]`, under a mask int32 `[R, V / 32]`."""

    def __call__(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose each row's likeliest token."""


class Want(NamedTuple):
    """What one sequence wants of a step: its next token, and one more for every draft token that proves right."""

    state: SamplingState
    history: Sequence[int]
    """Token ids so far, prompt included."""
    draft: Sequence[int] = ()
    given: Sequence[int] | None = None
    """The tokens of all `1 + len(draft)` rows, where they are not to be chosen but judged; the draft is their beginning."""


def sample(
    logits: Tensor, wants: Sequence[Want], greedy: Greedy, mask: Tensor | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Choose the next tokens of each sequence, verifying its draft.

    `logits` float32 `[R, V]` has `1 + len(draft)` rows for each want, in turn: after its history, and after each draft
    token. Every row's token is chosen as if it were alone; the first that differs from the draft is the last one taken,
    so a draft changes no output, sampled or greedy (the rows beyond it draw nothing). `mask` int32 `[R, ceil(V / 32)]`
    says which tokens each row may give. Tokens that are given are taken as they are. Returns 1 to `1 + len(draft)` token ids
    for each want and their log-probabilities under the unmodified logits; one that is not finite marks a row whose logits
    were not.
    """
    tokens, logprobs = greedy(logits, mask)
    best, best_logprobs = tokens.tolist(), logprobs.tolist()
    chosen: list[list[int]] = []
    chosen_logprobs: list[list[float]] = []
    first = 0
    for state, history, draft, given in wants:
        if given is not None:
            rows = logits[first : first + len(given)]
            picked = rows.gather(-1, torch.tensor(given, device=rows.device)[:, None])[:, 0]
            chosen.append(list(given))
            chosen_logprobs.append((picked - rows.logsumexp(-1)).tolist())
        elif not draft and state.plain_greedy:
            chosen.append([best[first]])
            chosen_logprobs.append([best_logprobs[first]])
        else:
            ids: list[int] = []
            for i in range(len(draft) + 1):
                row = first + i
                if not state.plain_greedy:
                    allowed = None if mask is None else mask[row]
                    best[row] = int(_choose(logits[row], state, [*history, *draft[:i]], allowed))
                    best_logprobs[row] = torch.log_softmax(logits[row], -1)[best[row]].item()
                ids.append(best[row])
                if i < len(draft) and draft[i] != ids[i]:
                    break
            chosen.append(ids)
            chosen_logprobs.append(best_logprobs[first : first + len(ids)])
        first += len(draft) + 1
    return chosen, chosen_logprobs


def choose(
    logits: Tensor, wants: Sequence[Want | None], greedy: Greedy, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sample` without drafts and given tokens, that waits for no device: its tokens, int64 `[R]`, and log-probabilities, `[R]`.

    There is one row for each want; where that is None, nobody looks at what is chosen.
    """
    tokens, logprobs = greedy(logits, mask)
    for row, want in enumerate(wants):
        if want is not None and not want.state.plain_greedy:
            token = _choose(logits[row], want.state, want.history, None if mask is None else mask[row])
            tokens[row] = token
            logprobs[row] = torch.log_softmax(logits[row], -1).take(token)
    return tokens, logprobs


def _choose(logits: Tensor, state: SamplingState, history: Sequence[int], mask: Tensor | None) -> Tensor:
    """Choose one token, int64 `[]`, of one row, `[V]`. Nothing here looks at a value that a device has still to compute."""
    p = state.params
    scores = logits.double()
    if p.repetition_penalty != 1.0:
        seen = to_device(torch.tensor(sorted(set(history)), dtype=torch.int64), scores.device)
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
    if mask is not None:
        token = torch.arange(len(scores), device=scores.device)
        scores = scores.masked_fill(
            (mask[token // 32] >> (token % 32).to(torch.int32)) & 1 == 0, float("-inf")
        )
    if state.random is None:
        return scores.argmax()
    scores = scores / p.temperature
    if p.top_k and p.top_k < len(scores):
        scores = torch.where(scores < scores.topk(p.top_k).values[-1], float("-inf"), scores)
    if p.top_p == 1.0:  # no order is needed: a whole vocabulary takes long to be sorted
        cumulative = scores.softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulative, state.random.random() * cumulative[-1], right=True)
        return token.clamp(max=len(scores) - 1)  # beyond: the scores are no numbers
    ordered, ids = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # The last that may be drawn: of the smallest set that reaches top_p, the first at least.
    last = (cumulative - probabilities < p.top_p).sum().clamp(min=1) - 1
    draw = state.random.random() * cumulative.take(last)
    return ids.take(torch.minimum(torch.searchsorted(cumulative, draw, right=True), last))
