"""How well a model expects what a page says: bits per character of the reference, given the page.

Teacher forcing: the model is shown the page and the reference answer, and asked at every token how probable it found that token.
The sum of -log2 p over the answer's tokens is what a perfect coder with this model would spend on it (Shannon), and divided by
the characters that the page says it compares models of any vocabulary. Nothing is generated. A field's bits are those of the
tokens that touch its value; what remains is the answer's form (keys, punctuation), which a page's own number includes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pagemill.decode.guidance import PageFormat
from pagemill.decode.page import FIELDS, field_spans, parse_page
from pagemill.results import Seconds, TokenCounts


@dataclass(frozen=True, slots=True)
class Bits:
    """What a text costs under the model."""

    bits: float
    characters: int
    """Of the text as the page says it, without the answer's escapes."""

    @property
    def per_character(self) -> float | None:
        """None for an empty text."""
        return self.bits / self.characters if self.characters else None


@dataclass(frozen=True, slots=True)
class Alignment:
    """One page's reference under the model."""

    source: str
    """The page's file; empty for pixels."""
    page: int
    whole: Bits
    """All tokens of the answer, over the characters of all its fields."""
    fields: Mapping[str, Bits]
    """By field that says something."""
    tokens: TokenCounts = field(default_factory=TokenCounts)
    seconds: Seconds = field(default_factory=Seconds)
    logprobs: Sequence[float] = ()
    """Natural log-probability of every token of the answer."""
    error: str | None = None
    """One sentence, where the page could not be scored; its numbers are NaN then."""

    @property
    def bits_per_char(self) -> float | None:
        """Bits per character of the whole reference; None where it is empty or could not be scored."""
        return None if self.error else self.whole.per_character


FAILED = Bits(math.nan, 0)


def reference_answer(text: str | Mapping[str, str | None], form: PageFormat | None) -> str:
    """Return the answer that a perfect model gives for a page.

    `text` is the page's fields (header, margin, footer, text), or a string: a JSON object of fields, or else plain text.
    `form` is how the model writes a page's JSON, None for one that answers in plain text. Keys come in the order of `form`
    where it is fixed, else in that of `text`; a model that leaves no key out writes null. Plain text is the fields line by
    line, in the order of `text`.
    """
    fields: Mapping[str, object] = {"text": text} if isinstance(text, str) else text
    if isinstance(text, str):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and any(name in value for name in FIELDS):
            fields = value
    if form is None:
        if fields.keys() == {"text"}:
            return str(fields["text"] or "")
        return "\n".join(str(value) for value in fields.values() if value is not None and str(value).strip())
    names = [name for name in fields if name in form.keys]
    if form.order == "fixed":
        names = [name for name in form.keys if name in fields or not form.optional]
    elif not form.optional:
        names += [name for name in form.keys if name not in fields]
    answer = {name: fields.get(name) for name in names}
    return json.dumps(answer, ensure_ascii=False, separators=(form.item_separator, form.key_separator))


def field_bits(pieces: Sequence[bytes], logprobs: Sequence[float]) -> tuple[Bits, dict[str, Bits]]:
    """Return the bits of a whole answer and of each of its fields.

    `pieces` are the bytes of the answer's tokens, `logprobs` their natural log-probabilities. Raises ValueError if the lengths
    differ.
    """
    if len(pieces) != len(logprobs):
        raise ValueError(f"{len(pieces)} tokens with {len(logprobs)} log-probabilities")
    bits = -np.asarray(logprobs, np.float64) / math.log(2)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    starts = ends - np.diff(ends, prepend=0)
    answer = b"".join(pieces)
    read = parse_page(answer.decode("utf-8", "replace"))._asdict()
    fields = {}
    for name, (start, end) in field_spans(answer.decode("latin-1")).items():
        if value := read[name]:
            inside = np.maximum(starts, start) < np.minimum(ends, end)
            fields[name] = Bits(float(bits[inside].sum()), len(value))
    return Bits(float(bits.sum()), sum(one.characters for one in fields.values())), fields
