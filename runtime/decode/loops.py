"""Repetition loops, found while they are generated.

Algorithm. The detector works on the bytes of the output, not on its tokens: a loop of tokens is one of bytes as well, and so is
a loop whose text is tokenised differently each time round. Runs of digits are folded to one `0`, which makes a counting body
("1. ... 2. ... 3. ...") an exactly repeated one. Then, in two parts:

1. A cheap watch, every `CHECK_EVERY` tokens: do the last `KEY` bytes also stand one period back? If not, where did they last
   occur, nearby first, then in the last `WINDOW` bytes? That distance is the new candidate period. A candidate survives a few
   failed checks, so a changed character does not hide a loop.
2. A proof, only once the candidate has lasted as long as the weakest rule below could ask for: walk back through the text as
   long as it equals the text one period before, small differences skipped; judge the numbers that were folded; compare with
   how often a real page may say such a thing. If it is not enough, the proof also tells how many bytes are missing, and is not
   tried again before.

How often may a page repeat itself? That depends on what is repeated: a printed line holds only so many characters and a page
only so many lines, so rules, dot leaders and tables of zeros are let go on as far as paper goes, while a paragraph of prose is
suspect after a few times. The constants below are that table. Where the length of the page is known from its ink, a
repetition beyond it needs a quarter of the evidence, and one within it may be rows of cells read as one long line.

Cost. A push copies the token's bytes; a check compares 16 bytes and, outside a loop, searches at most `WINDOW` bytes: O(1) a
token. Proofs are O(tail) but come after geometric or exactly computed waits. Memory is a few bytes per output token.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from pagemill.errors import ConfigError

LINE_CHARS = 300
"""Visible characters that one printed line never reaches by repeating a label or a rule (A4 across, 6 pt: about 250)."""
JOINED_LINES = 3
"""Times as many where the page may be as long as that and the body has a space: weak models read rows as one line."""
PAGE_LINES = 72
"""Lines that repeat one another, more than a page holds (A4, 8 pt, single-spaced: about 70)."""
LABEL_LETTERS = 10
LABEL_REPEATS = 50
"""A body with the letters of a label: a form's, or a row of a list to be signed. (A body with fewer is a row of cells.)"""
LINE_LETTERS = 40
LINE_REPEATS = 8
"""A body with the letters of a line of prose: a refrain, a clause of every item. Letters are those of different words."""
PARAGRAPH_LETTERS = 150
PARAGRAPH_REPEATS = 4
"""A longer body: a stanza, or one of the four vouchers of a page; a fifth must have begun."""
UNSURE = 2
"""Times as many repetitions where numbers count or characters change: instalments, calendars, certificates do that."""
BEYOND_PAGE = 4
"""Beyond the expected length of the page, all of the above is divided by this, down to LEAST_REPEATS."""
LEAST_REPEATS = 3

CHECK_EVERY = 8
KEY = 16
WINDOW = 4096
"""Longest period in bytes: about 1,000 tokens of a large vocabulary."""
SLACK = 12
"""Bytes that a changed place may have, and that a period may drift by at it."""
MISSES = 6
"""Failed checks in a row that end a candidate."""
GLITCH_GAP = 24
SPARE_GLITCHES = 3
"""Bytes repeated for each changed place, at least; a few changes may come close together."""
LONGEST_NUMBER = 24
"""Digits that are folded; a longer run is no number, and its further digits enter the text, as 0xB0 to 0xB9."""
MOST_BODIES = 12
"""Bodies after which the numbers in them may begin anew."""

Numbers = Literal["same", "counting", "free"]

_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_NOT_LETTERS = bytes(b for b in range(0xC0) if not chr(b).isascii() or not chr(b).isalpha())
_BREAK = re.compile(rb"\\n|\n|<tr|<br")
_TAG = re.compile(rb"<[^<>]*>")
_NUMBER = re.compile(rb"\d+")
_FOLDED = re.compile(rb"0")


@dataclass(frozen=True, slots=True)
class Loop:
    """A repetition that goes on longer than a page could."""

    kind: Literal["run", "period", "counter"]
    """One token again and again; a body of `period` tokens; a body whose numbers count."""
    start: int
    """Index, among output tokens, of the first token of the second repetition: rolling back to it keeps one instance."""
    period: int
    """Tokens of the latest repetition."""
    repeats: int
    """Whole instances of the body, the first included."""
    end: int
    """Output tokens when it was found."""


def token_pieces(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Return the bytes of every token id below `vocab_size` of a byte-level BPE; special and unused ids have none."""
    alphabet = _byte_alphabet()
    pieces = [b""] * vocab_size
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id < vocab_size:
            try:
                pieces[token_id] = bytes([alphabet[c] for c in token])
            except KeyError:
                pieces[token_id] = token.encode()
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if token_id < vocab_size:
            pieces[token_id] = b"" if added.special else added.content.encode()
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character for each byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class LoopDetector:
    """Watches the output of one sequence."""

    def __init__(self, pieces: Sequence[bytes], expected_tokens: int | None = None) -> None:
        """`pieces` are the bytes of every token id (special tokens: none); `expected_tokens` is a plausible upper bound
        of the page's output, if known. Raises `ConfigError` unless it is positive.
        """
        if expected_tokens is not None and expected_tokens < 1:
            raise ConfigError(f"expected_tokens should be None or at least 1, got {expected_tokens}")
        self._pieces = pieces
        self._expected = expected_tokens
        self._ids: list[int] = []
        self._begins: list[int] = []
        """Where each token begins in the text."""
        self._text = bytearray()
        """The output, numbers folded."""
        self._digits = 0
        """Digits that the output ends with."""
        self._restart()

    def _restart(self) -> None:
        self._check_at = len(self._ids) + CHECK_EVERY
        self._period = 0
        """The candidate, in bytes of the text; 0 is none."""
        self._misses = 0
        self._prove_at = 0
        """Bytes of the text before which a proof of the candidate cannot succeed."""
        self._rest_until = 0
        """The same for whatever candidate: the last proof's tail is paid off."""
        self._late = False

    def push(self, token_id: int) -> Loop | None:
        """Take one output token; return a loop once it is certain enough. A loop that goes on is reported rarely again."""
        text = self._text
        self._ids.append(token_id)
        self._begins.append(len(text))
        piece = self._pieces[token_id]
        if b"0" in piece.translate(_ZEROS):
            piece = self._fold(piece)
        elif piece:
            self._digits = 0
        else:
            # A token without text must still be seen to repeat: bytes that no UTF-8 text has.
            piece = bytes((0xFF, 0x80 | token_id & 63, 0x80 | token_id >> 6 & 63, 0x80 | token_id >> 12 & 63))
            self._digits = 0
        text += piece
        return self._check() if len(self._ids) >= self._check_at else None

    def rollback(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` output tokens."""
        if not 0 <= num_tokens <= len(self._ids):
            raise AssertionError(f"cannot roll {len(self._ids)} output tokens back to {num_tokens}")
        if num_tokens < len(self._ids):
            del self._text[self._begins[num_tokens] :]
            del self._ids[num_tokens:], self._begins[num_tokens:]
            self._digits = 0
            for token_id in reversed(self._ids):
                piece = self._pieces[token_id]
                tail = len(piece) - len(piece.rstrip(b"0123456789"))
                self._digits += tail
                if not piece or tail < len(piece):
                    break
        self._restart()

    def _fold(self, piece: bytes) -> bytes:
        """Return `piece` as it enters the text, and keep count of the digits that end it."""
        folded = bytearray()
        for byte in piece:
            if 0x30 <= byte <= 0x39:
                self._digits += 1
                if self._digits == 1:
                    folded.append(0x30)
                elif self._digits > LONGEST_NUMBER:
                    folded.append(byte | 0x80)
            else:
                self._digits = 0
                folded.append(byte)
        return bytes(folded)

    def _check(self) -> Loop | None:
        """Follow the candidate period, or look for another."""
        count, text = len(self._ids), self._text
        self._check_at = count + CHECK_EVERY
        n, period = len(text), self._period
        if n <= KEY:
            return None
        key = text[n - KEY :]
        if period and text[max(n - KEY - period, 0) : n - period] == key:
            self._misses = 0
        elif not self._search(key):
            return None
        if not self._late and self._expected is not None and count > self._expected:
            self._late, self._prove_at = True, 0
        return self._prove() if n >= self._prove_at else None

    def _search(self, key: bytearray) -> bool:
        """Find where the last bytes occurred before: around one period back, else anywhere in the window. False: nowhere."""
        text, period = self._text, self._period
        n = len(text)
        slack = min(SLACK, period // 4)
        if period:
            at = text.rfind(key, max(n - KEY - period - slack, 0), min(n - period + slack, n - 1))
            if at >= 0 and self._misses < MISSES:
                self._period = n - KEY - at
                self._misses += 1  # a period that drifts at every check is none
                return True
        at = text.rfind(key, max(n - WINDOW, 0), n - 1)
        if at >= 0:
            distance = n - KEY - at
            whole = text[n - distance :] == text[max(n - 2 * distance, 0) : n - distance]
            # Two periods back: the instance before may have had a changed character here.
            double = period > 2 * SLACK and abs(distance - 2 * period) <= slack
            if not period or whole or self._misses >= (MISSES if double else 2):
                self._period, self._misses = distance, 0
                self._prove_at = max(n + KEY, self._rest_until)
                return True
        self._misses += 1
        if self._misses > MISSES:
            self._period = 0
        return False

    def _prove(self) -> Loop | None:
        """Return the loop if the repetition of the candidate is longer than a page allows, else set when to ask again."""
        text, period = self._text, self._period
        n = len(text)
        exact, similar = self._walk_back()
        in_body = text.count(b"0", n - period)
        values, offsets = self._numbers(max(similar - period, 0)) if in_body else ([], [])

        # From where on the numbers repeat as well. They may do so less often than what stands between them: "1,5 2,5 1,5 2,5".
        times = _lag(values, in_body) // in_body if in_body else 1
        same = max(exact, similar + (times - 1) * period)
        changed = _last_change(values, times * in_body)
        if changed >= 0:
            same = max(same, offsets[changed] + 1)

        # The tails that could be a loop: the surest first, and longer, less sure ones.
        tails: list[tuple[int, int, Numbers, bool]] = [(same, times * period, "same", True)]
        if exact < same:
            inside = values[bisect_left(offsets, exact - period) :]
            tails.append((exact, period, _judge(inside, in_body), True))
        if similar < exact or exact < same:
            tails.append((similar, period, _judge(values, in_body, shifted=True), False))
        missing = n - similar
        for start, size, numbers, sure in tails:
            wanted = self._missing(bytes(text[n - size :]), start, numbers, sure)
            if wanted <= 0:
                self._prove_at = 2 * n - start
                # Where only the first instances differ, they may be the page's own: keep them.
                differ = numbers == "same" and 2 * (n - same) >= n - start
                return self._loop(same if differ else start, size, numbers)
            missing = min(missing, wanted)
        self._prove_at = n + max(missing, KEY)
        self._rest_until = n + (n - similar) // 4
        return None

    def _missing(self, body: bytes, start: int, numbers: Numbers, sure: bool) -> int:
        """Return how many bytes the tail from `start`, repetitions of `body`, is too short for the rule that wants least."""
        tail = bytes(self._text[start:])
        letters = _letters(body)
        easier = BEYOND_PAGE if self._late else 1
        wanted: list[float] = []

        if letters >= LABEL_LETTERS and numbers != "free":
            if letters >= PARAGRAPH_LETTERS:
                allowed = PARAGRAPH_REPEATS + 0.1
            else:
                allowed = LINE_REPEATS if letters >= LINE_LETTERS else LABEL_REPEATS
            repeats = max(allowed / easier, LEAST_REPEATS)
            if not sure or numbers == "counting":
                repeats *= UNSURE
            wanted.append((repeats - 1) * len(body) - len(tail))

        if letters or numbers != "free":
            doubt = UNSURE if numbers == "free" else 1
            breaks = [m.end() for m in _BREAK.finditer(tail)]
            in_body = len(_BREAK.findall(body))
            if breaks:
                wanted.append((doubt * PAGE_LINES / easier - len(breaks)) * len(body) / max(in_body, 1))
            if letters < LINE_LETTERS and not in_body:
                if self._expected is not None and not self._late and b" " in body:
                    doubt *= JOINED_LINES
                line = len(_TAG.sub(b" ", tail[breaks[-1] if breaks else 0 :]))
                wanted.append(doubt * LINE_CHARS / easier - line)

        least = (LEAST_REPEATS - 1) * len(body) - len(tail)
        return math.ceil(max(min(wanted, default=len(tail)), least))

    def _loop(self, start: int, size: int, numbers: Numbers) -> Loop:
        n, count = len(self._text), len(self._ids)
        first = self._token_at(start)
        kind: Literal["run", "period", "counter"] = "period" if numbers == "same" else "counter"
        if len(set(self._ids[first:])) == 1:
            kind = "run"
        return Loop(
            kind=kind,
            start=first,
            period=1 if kind == "run" else max(count - self._token_at(n - size), 1),
            repeats=1 + (n - start) // size,
            end=count,
        )

    def _token_at(self, offset: int) -> int:
        """Return the index of the first token that begins at or after `offset`; folded digits go with their number."""
        i = bisect_right(self._begins, offset)
        return i - 1 if i and self._begins[i - 1] == offset else i

    def _walk_back(self) -> tuple[int, int]:
        """Return where the tail begins that repeats the text one period before: without any difference, and with small ones."""
        text, period = self._text, self._period
        end = i = len(text)
        exact, glitches, changed = -1, 0, 0
        while True:
            i -= _common_suffix(text, i, i - period)
            if exact < 0:
                exact = i
            glitches += 1
            if (glitches - SPARE_GLITCHES) * GLITCH_GAP + 2 * changed > end - i:
                return exact, i
            for skip in range(2 * SLACK + 1):
                key = text[max(i - skip - SLACK, 0) : i - skip]
                back = i - skip - period
                if len(key) < SLACK or back < SLACK:
                    return exact, i
                at = back - SLACK
                if text[at:back] != key:
                    at = text.rfind(key, max(at - SLACK, 0), min(back + SLACK, i - skip - 1))
                if at >= 0:
                    period = i - skip - SLACK - at
                    i -= skip
                    changed += skip
                    break
            else:
                return exact, i

    def _numbers(self, low: int) -> tuple[list[bytes], list[int]]:
        """Return the first digits of each number that begins at or after `low`, and where it begins in the text."""
        text, pieces = self._text, self._pieces
        first = self._token_at(low)
        if first == len(self._ids):
            return [], []
        low = self._begins[first]
        raw = b"".join([pieces[i] for i in self._ids[first:]])
        if low and (text[low - 1] == 0x30 or 0xB0 <= text[low - 1] <= 0xB9):
            raw = raw.lstrip(b"0123456789")
        values = [digits[:LONGEST_NUMBER] for digits in _NUMBER.findall(raw)]
        return values, [m.start() for m in _FOLDED.finditer(text, low)]


def _lag(values: list[bytes], in_body: int) -> int:
    """Return after how many numbers they repeat: a multiple of `in_body`, that itself if none is seen."""
    for lag in range(in_body, min(MOST_BODIES * in_body, len(values) // 2) + 1, in_body):
        if values[-lag:] == values[-2 * lag : -lag]:
            return lag
    return in_body


def _last_change(values: list[bytes], lag: int) -> int:
    """Return the index of the last number that differs from that `lag` before it, or -1."""
    for i in range(len(values) - 1, lag - 1, -1):
        if values[i] != values[i - lag]:
            return i
    return -1


def _judge(values: list[bytes], in_body: int, shifted: bool = False) -> Numbers:
    """Judge numbers, `in_body` of them in one body: nearly the same every time, counting, or neither.

    `shifted`: a changed place may have added or taken away a number.
    """
    if not in_body:
        return "same"
    steps = [int(b) - int(a) for a, b in zip(values, values[in_body:], strict=False)]
    again = list(zip(steps, steps[in_body:], strict=False))
    if any(steps[-in_body:]) and sum(a == b for a, b in again) >= 0.8 * max(len(again), 1):
        return "counting"
    near = range(max(in_body - 2, 1), in_body + 3) if shifted else (in_body,)
    known = sum(any(values[i] == values[i - k] for k in near if k <= i) for i in range(in_body, len(values)))
    return "same" if known >= 0.8 * (len(values) - in_body) else "free"


def _letters(body: bytes) -> int:
    """Count the letters of the different words, markup and escapes left out; a character beyond ASCII counts once."""
    words = set(_TAG.sub(b" ", body.replace(b"\\n", b"\n")).split())
    return len(b"".join(words).translate(None, _NOT_LETTERS))


def _common_suffix(text: bytearray, i: int, j: int) -> int:
    """Return the largest k with text[i - k : i] == text[j - k : j], for j < i: doubling, then halving steps."""
    k, step = 0, 32
    while k + step <= j and text[i - k - step : i - k] == text[j - k - step : j - k]:
        k += step
        step *= 2
    while step > 1:
        step //= 2
        if k + step <= j and text[i - k - step : i - k] == text[j - k - step : j - k]:
            k += step
    return k
