"""How far a page's answer can be trusted: token probabilities, ink against text, and which of several attempts is best.

Confidence. The geometric mean of the probabilities that the model gave the tokens it chose: over the page, over the worst run
of `WINDOW` of them, and over each field. It ranks pages by their error better than the arithmetic mean (`bench/confidence.py`).
Tokens that a grammar forced (keys, punctuation) say nothing and are left out; a draft's tokens were verified, so they count as
any other.

Ink against text. Connected components count the characters of a page within a factor of about two (dots and accents on one
side, touching letters on the other; 0.52 to 1.48 components a character on the sample pages). Only a disagreement of twice that
is reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pagemill.decode.page import field_spans
from pagemill.results import FinishReason

WINDOW = 24
"""Tokens in the worst window: about a line of text."""
_LEAST = math.log(1e-4)  # a token that a grammar wrung from the model must not make the whole page impossible
_FACTOR = 4
_SLACK = 60
_NO_INK = re.compile(r"\s|</?[a-zA-Z][^<>]*>|\||-{3,}")

Mismatch = Literal["little", "much"]


@dataclass(frozen=True, slots=True)
class Confidence:
    """Geometric mean probabilities, 0 to 1, of the tokens that the model chose."""

    mean: float | None
    """Over the whole output; None if the model chose nothing."""
    worst: float | None
    """The lowest over any `WINDOW` chosen tokens in a row; never above `mean`."""
    fields: dict[str, float]
    """Over the tokens of each field that the page has (header, margin, footer, text)."""


def confidence(pieces: Sequence[bytes], logprobs: Sequence[float]) -> Confidence:
    """Judge an output by the probabilities of its tokens.

    `pieces` are the bytes of each output token, in order; joined they are what the model wrote, in UTF-8, cut or broken as it
    may be. `logprobs` are their natural log-probabilities, NaN for a token that was forced. Raises ValueError if the lengths
    differ.
    """
    if len(pieces) != len(logprobs):
        raise ValueError(f"{len(pieces)} tokens with {len(logprobs)} log-probabilities")
    logs = np.clip(np.asarray(logprobs, np.float64), _LEAST, 0.0)
    chosen = ~np.isnan(logs)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    fields = {}
    if len(pieces):
        starts = ends - np.diff(ends, prepend=0)
        for name, (start, end) in field_spans(b"".join(pieces).decode("latin-1")).items():
            inside = logs[chosen & (np.maximum(starts, start) < np.minimum(ends, end))]
            if len(inside):
                fields[name] = float(np.exp(inside.mean()))
    logs = logs[chosen]
    if not len(logs):
        return Confidence(None, None, fields)
    sums = np.concatenate([[0.0], np.cumsum(logs)])
    width = min(WINDOW, len(logs))
    mean = sums[-1] / len(logs)
    worst = min(mean, (sums[width:] - sums[:-width]).min() / width)
    return Confidence(math.exp(mean), math.exp(worst), fields)


def num_printed(fields: Iterable[str | None]) -> int:
    """Count the characters of a page that leave ink: not white space, nor HTML tags and the bars of Markdown tables."""
    return sum(len(_NO_INK.sub("", value)) for value in fields if value)


def text_mismatch(num_chars: int, num_glyphs: int | None, num_rule_glyphs: int = 0) -> Mismatch | None:
    """Compare the characters read (white space not counted) with those that the page's ink suggests.

    `num_glyphs` is an estimate that may be off by a factor of two, None where there is none; `num_rule_glyphs` are characters
    that may have been read of rules and leaders, or not. "little" means that text was probably left out, "much" that it was
    probably invented: one count is more than four times the other and sixty, so that a logo or a stain on an empty page, or a
    page number on a blank one, is no mismatch.
    """
    if num_glyphs is None:
        return None
    if num_glyphs > _FACTOR * num_chars + _SLACK:
        return "little"
    if num_chars > _FACTOR * (num_glyphs + num_rule_glyphs) + _SLACK:
        return "much"
    return None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a page, as `best_attempt` judges it."""

    raw: str
    """What the model wrote."""
    finish_reason: FinishReason
    valid: bool
    """The answer is a page of valid JSON."""
    confidence: Confidence
    mismatch: Mismatch | None = None

    @property
    def ended_badly(self) -> bool:
        """Whether another attempt is worth its tokens: stopped in a loop, broken, or against the ink.

        One that the token cap cut costs the most and is mostly cut again.
        """
        if self.finish_reason == "stop":
            return not self.valid or self.mismatch is not None
        return self.finish_reason == "loop"


def best_attempt(attempts: Sequence[Attempt]) -> int:
    """Return the index of the best attempt; the earliest of equals. Raises ValueError if there is none.

    In this order: valid JSON; ended by itself rather than cut or stopped; no ink mismatch; the higher mean probability.
    """
    if not attempts:
        raise ValueError("there are no attempts to choose from")

    def merit(index: int) -> tuple[bool, bool, bool, float]:
        a = attempts[index]
        mean = a.confidence.mean
        return a.valid, a.finish_reason == "stop", a.mismatch is None, -1.0 if mean is None else mean

    return max(range(len(attempts)), key=merit)
