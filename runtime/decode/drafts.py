"""Drafts: cheap guesses of the next tokens, verified by the model in one step, so that the output stays the model's own.

Guesses come from what a page is likely to repeat: its text layer or another engine's output, earlier pages of the run (suffix
matches, arXiv 2411.04975), and the page's own output. A pointer follows each source, advances while the output agrees, and is
found again where it does not. All pointers are followed whether they are used or not, so what a source is worth is known
without spending a draft on it. How long the drafts of a step may be follows from what steps have cost (`DraftBudget`).

Texts are compared byte by byte: a model splits a word differently after a quote than after a line break, and differently again
where it misread a letter. Only the guess itself is made of tokens.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

_MAX_MATCH = 32  # tokens; a longer match is not told from this one
_MAX_TEXT_TOKENS = 1 << 15  # of one text; more cannot come out of one page
_SNAPSHOT_TOKENS = 32  # between states kept for roll-back


def draft_text_tokens(text: str, encode: Encode) -> list[int]:
    """Tokens of a page's text as the model would write it: inside a JSON string, without blank lines."""
    lines = (line.strip() for line in text.splitlines())
    escaped = json.dumps("\n".join(line for line in lines if line), ensure_ascii=False)
    return encode(escaped[1:-1]) if len(escaped) > 2 else []


class DraftIndex:
    """Outputs of earlier pages, found by n-gram. Engine thread only.

    Holds at most `max_tokens` tokens (about 200 bytes each); the page that has gone unused for longest is dropped first.
    """

    _NGRAM = 3  # tokens
    _CANDIDATES = 8  # of the places with the same n-gram, the newest are compared

    def __init__(self, max_tokens: int = 1 << 17) -> None:
        self.max_tokens, self.num_tokens = max_tokens, 0
        self._pages: OrderedDict[int, tuple[str, array[int]]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._next_page = 0

    def add(self, document: str, token_ids: Sequence[int]) -> None:
        """Add a finished page's output; one longer than the whole index is cut."""
        ids = array("i", token_ids[: self.max_tokens])
        if len(ids) <= self._NGRAM:
            return
        while self.num_tokens + len(ids) > self.max_tokens:
            self._drop()
        page, self._next_page = self._next_page, self._next_page + 1
        self._pages[page] = document, ids
        self.num_tokens += len(ids)
        for end in range(self._NGRAM, len(ids)):
            self._places.setdefault(tuple(ids[end - self._NGRAM : end]), []).append((page, end))

    def find(self, tail: Sequence[int], document: str) -> tuple[Sequence[int] | None, int, int]:
        """Where `tail` occurred before: the page's tokens, the index after the match, the match's length in tokens.

        The longest match wins, then the same document, then the newest page; (None, 0, 0) if there is none.
        """
        best: tuple[int, bool, int, int] | None = None
        places = self._places.get(tuple(tail[-self._NGRAM :]), [])
        for page, end in places[: -1 - self._CANDIDATES : -1]:
            owner, ids = self._pages[page]
            most, length = min(end, len(tail), _MAX_MATCH), self._NGRAM
            while length < most and ids[end - 1 - length] == tail[-1 - length]:
                length += 1
            found = length, owner == document, page, end
            if best is None or found > best:
                best = found
        if best is None:
            return None, 0, 0
        length, _, page, end = best
        self._pages.move_to_end(page)
        return self._pages[page][1], end, length

    def _drop(self) -> None:
        page, (_, ids) = self._pages.popitem(last=False)
        self.num_tokens -= len(ids)
        for key in {tuple(ids[end - self._NGRAM : end]) for end in range(self._NGRAM, len(ids))}:
            left = [place for place in self._places[key] if place[0] != page]
            if left:
                self._places[key] = left
            else:
                del self._places[key]


class _Worth:
    """Share of right guesses, exponentially smoothed, by how long the source has agreed (in powers of two)."""

    _PRIOR_WEIGHT = 8.0  # guesses
    _DECAY = 0.98

    def __init__(self, prior: Sequence[float]) -> None:
        self._right = [p * self._PRIOR_WEIGHT for p in prior]
        self._total = [self._PRIOR_WEIGHT] * len(prior)

    def __call__(self, agreed: int) -> float:
        i = min(agreed.bit_length(), len(self._total) - 1)
        return self._right[i] / self._total[i]

    def learn(self, agreed: int, right: bool) -> None:
        i = min(agreed.bit_length(), len(self._total) - 1)
        self._right[i] = self._right[i] * self._DECAY + right
        self._total[i] = self._total[i] * self._DECAY + 1


class _TextPointer:
    """Follows one text, by bytes.

    Where the output leaves the text, the pointer is put behind the nearest place with the output's last bytes: eight or four
    of them a little ahead, eight anywhere, three ahead, and so on down to one within three bytes of where replaced letters
    would put it. Otherwise it moves on, for a while, as if as many bytes had been replaced.
    """

    _SEARCHES = ((8, False), (4, False), (8, True), (3, False), (5, True), (2, False))  # bytes, anywhere
    _AHEAD = 32  # bytes beyond the expected place
    _LOST = 32  # bytes without agreement after which nothing is guessed
    _SURE = 6  # bytes of agreement that confirm a place
    _PRIOR = (0.2, 0.35, 0.5, 0.75, 0.85, 0.9, 0.95)  # a little below the sample pages with their true texts

    def __init__(self, token_ids: Sequence[int], vocabulary: Sequence[bytes], encode: Encode | None) -> None:
        pieces = [vocabulary[token] for token in token_ids]
        self._ids, self._vocabulary, self._encode = list(token_ids), vocabulary, encode
        self._text = b"".join(pieces)
        self._starts = list(accumulate(map(len, pieces), initial=0))[: len(pieces)]
        self._lines = [0]
        while (at := self._text.find(b"\\n", self._lines[-1])) >= 0:
            self._lines.append(at + 2)
        self._worth = _Worth(self._PRIOR)
        self.state = (0, 0, 0, 0)
        """Byte expected next, bytes agreed, byte after the last confirmed place, bit set of the lines seen."""

    @property
    def acceptance(self) -> float:
        at, agreed, confirmed, _ = self.state
        if at >= len(self._text) or at - confirmed > self._LOST:
            return 0.0
        return self._worth(agreed)

    def advance(self, piece: bytes, tail: bytes, learn: bool) -> None:
        """The output grew by the bytes of one token and now ends with `tail`."""
        if not piece:
            return
        at, agreed, confirmed, seen = self.state
        right = self._text.startswith(piece, at)
        if learn and at < len(self._text) and at - confirmed <= self._LOST:
            self._worth.learn(agreed, right)
        if right:
            at, agreed = at + len(piece), min(agreed + len(piece), 64)
        elif tail.endswith((b'": "', b'":"')):
            # A field begins: most likely with the first line that no field before it took.
            line = (~seen & (seen + 1)).bit_length() - 1
            at, agreed = (self._lines[line] if line < len(self._lines) else len(self._text)), 0
            confirmed = at
        else:
            at, agreed = self._find(tail, at + len(piece), confirmed)
        if agreed >= self._SURE:
            confirmed = at
            seen |= 1 << bisect_left(self._lines, at) - 1
        self.state = at, agreed, confirmed, seen

    def guess(self, limit: int) -> list[int]:
        at, ids = self.state[0], []
        i = bisect_left(self._starts, at)
        if i == len(self._starts) or self._starts[i] != at:
            # Within a token: the rest of the word is split anew, up to where both splits meet.
            if self._encode is None or self._text[at] & 0xC0 == 0x80:  # within a character nobody splits
                return []
            for token in self._encode(self._text[at : at + 24].decode("utf-8", "ignore")):
                ids.append(token)
                at += len(self._vocabulary[token])
                i = bisect_left(self._starts, at)
                if i < len(self._starts) and self._starts[i] == at:
                    break
            else:
                return ids[:-1][:limit]  # the last one may be cut
        return (ids + self._ids[i : i + limit])[:limit]

    def _find(self, tail: bytes, expected: int, confirmed: int) -> tuple[int, int]:
        """Byte after the best match of the output's end, and the match's length in bytes."""
        text, until = self._text, max(expected, confirmed) + self._AHEAD
        for length, anywhere in self._SEARCHES:
            if len(tail) < length:
                continue
            key = tail[-length:]
            found = text.find(key, confirmed, len(text) if anywhere else until)
            if found < 0 and anywhere:
                found = text.find(key, 0, confirmed)
            if found >= 0:
                return found + length, length
        found = text.find(tail[-1:], max(confirmed, expected - 4), expected + 3)
        return (found + 1, 1) if found >= 0 else (expected, 0)


class _TokenPointer:
    """Follows outputs, by tokens: those of earlier pages, or the page's own."""

    def __init__(
        self, find: Callable[[], tuple[Sequence[int] | None, int, int]], prior: Sequence[float]
    ) -> None:
        self._find, self._worth = find, _Worth(prior)
        self.state: tuple[Sequence[int] | None, int, int] = (None, 0, 0)
        """Tokens followed, index expected next, tokens agreed."""

    @property
    def acceptance(self) -> float:
        ids, at, agreed = self.state
        return self._worth(agreed) if ids is not None and at < len(ids) else 0.0

    def advance(self, token: int, learn: bool) -> None:
        """The output grew by `token`; it is part of what `find` looks for already."""
        ids, at, agreed = self.state
        right = False
        if ids is not None and at < len(ids):
            right = ids[at] == token
            if learn:
                self._worth.learn(agreed, right)
        self.state = (ids, at + 1, min(agreed + 1, _MAX_MATCH)) if right else self._find()

    def guess(self, limit: int) -> list[int]:
        ids, at, _ = self.state
        return list(ids[at : at + limit]) if ids is not None else []


class Drafter:
    """Guesses the next tokens of one sequence. Engine thread only.

    `texts`: token ids (`draft_text_tokens`) of whole-page guesses, such as the PDF's text layer. `index`: earlier pages;
    `document`: this page's. `vocabulary`: the bytes of every token id, empty for special tokens. `encode` splits the rest of a
    word where the model's tokens and the text's do not meet; without it nothing is guessed there.
    """

    _NGRAM = 3  # tokens of a match within the page's own output
    _PAGES_PRIOR = (0.1, 0.2, 0.3, 0.5, 0.7, 0.75)  # about what the sample pages show
    _OWN_PRIOR = (0.1, 0.2, 0.35, 0.5, 0.5, 0.8)

    def __init__(
        self,
        *,
        vocabulary: Sequence[bytes],
        texts: Sequence[Sequence[int]] = (),
        index: DraftIndex | None = None,
        document: str = "",
        encode: Encode | None = None,
    ) -> None:
        self._vocabulary, self._index, self._document = vocabulary, index, document
        self._output: list[int] = []
        self._tail = b""
        self._pending: list[int] = []  # output not looked at yet: nobody asked
        self._last: dict[tuple[int, ...], int] = {}  # n-gram of the output to the index after it
        self._before: list[int] = []  # for every token, what `_last` held before it
        self._texts = [_TextPointer(text[:_MAX_TEXT_TOKENS], vocabulary, encode) for text in texts]
        self._outputs = [_TokenPointer(self._find_own, self._OWN_PRIOR)]
        if index is not None:
            self._outputs.append(_TokenPointer(self._find_page, self._PAGES_PRIOR))
        self._pointers: list[_TextPointer | _TokenPointer] = [*self._texts, *self._outputs]
        self._snapshots: list[list[tuple[object, ...]]] = []
        self.num_proposed = 0
        self.num_accepted = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """The output grew by these tokens, whoever chose them. Costs nothing until guesses are asked for."""
        self._pending += token_ids

    def rollback(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the output."""
        if num_tokens >= len(self._output):
            del self._pending[num_tokens - len(self._output) :]
            return
        self._pending.clear()
        start = num_tokens // _SNAPSHOT_TOKENS * _SNAPSHOT_TOKENS
        again = self._output[start:num_tokens]
        while len(self._output) > start:
            before, key = self._before.pop(), tuple(self._output[-self._NGRAM :])
            if before >= 0:
                self._last[key] = before
            else:
                self._last.pop(key, None)
            self._output.pop()
        for pointer, state in zip(
            self._pointers, self._snapshots[num_tokens // _SNAPSHOT_TOKENS], strict=True
        ):
            pointer.state = state  # type: ignore[assignment]
        del self._snapshots[num_tokens // _SNAPSHOT_TOKENS :]
        self._tail = b"".join(self._vocabulary[token] for token in self._output[-16:])
        for token in again:
            self._advance(token, learn=False)

    @property
    def acceptance(self) -> float:
        """Probability that the first token `propose` would give is what comes next; 0 where it would give none."""
        self._catch_up()
        return max(pointer.acceptance for pointer in self._pointers)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens guessed to come next, of the source most worth trusting; empty if none matches."""
        self._catch_up()
        best = max(self._pointers, key=lambda pointer: pointer.acceptance)
        return best.guess(limit) if limit > 0 and best.acceptance > 0 else []

    def feedback(self, proposed: int, accepted: int) -> None:
        """Count drafts; what a source is worth is learned from the output itself, drafted or not."""
        self.num_proposed += proposed
        self.num_accepted += accepted

    def _catch_up(self) -> None:
        if self._pending:
            for token in self._pending:
                self._advance(token, learn=True)
            self._pending.clear()

    def _advance(self, token: int, learn: bool) -> None:
        if len(self._output) % _SNAPSHOT_TOKENS == 0:
            self._snapshots.append([pointer.state for pointer in self._pointers])
        self._output.append(token)
        if self._texts:
            piece = self._vocabulary[token]
            self._tail = (self._tail + piece)[-16:]
            for text in self._texts:
                text.advance(piece, self._tail, learn)
        for output in self._outputs:
            output.advance(token, learn)
        key = tuple(self._output[-self._NGRAM :])
        self._before.append(self._last.get(key, -1))
        self._last[key] = len(self._output)

    def _find_own(self) -> tuple[Sequence[int] | None, int, int]:
        end = self._last.get(tuple(self._output[-self._NGRAM :]), -1)
        return (self._output, end, self._NGRAM) if end >= 0 else (None, 0, 0)

    def _find_page(self) -> tuple[Sequence[int] | None, int, int]:
        assert self._index is not None
        return self._index.find(self._output[-_MAX_MATCH:], self._document)


class DraftBudget:
    """How many draft tokens a step may carry: as many as raise the expected tokens per second.

    What a step of n tokens costs is kept as exponentially weighted means in classes of n, made non-decreasing (pool adjacent
    violators) and interpolated: flat while weights are being read, steep behind, whatever the machine. A token is drafted where
    it and all before it are right with at least some probability; of a row of such thresholds, the one that promises the most
    tokens a second is taken. One per engine, engine thread only.
    """

    _CLASSES_PER_OCTAVE = 4
    _WINDOW = 20.0  # steps that a mean goes over
    _FORGET = 0.995  # per step, of a class that is not seen
    _OUTLIER = 2.0  # a step counts at most this many times what was expected
    _UNKNOWN = 0.5  # of a step's cost is taken to grow with its tokens, where nothing was seen
    _MARGIN = 1.02  # drafts must promise this much more tokens a second
    _EXPLORE = 0.005  # share of all time that trying longer drafts may cost
    _STALE = 100  # steps after which a class is looked at again
    _ENOUGH = 3  # steps of a class that its mean is believed from
    _THRESHOLDS = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.12, 0.09, 0.07])

    def __init__(self) -> None:
        self._classes: dict[int, list[float]] = {}  # mean tokens, mean seconds, weight, step last seen
        self._steps = 0
        self._curve: tuple[list[float], list[float]] | None = None
        self._credit = 0.0  # seconds
        self._probed: float | None = None  # seconds expected without what the last step tried out

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens, drafts included, took `seconds`, image encoding excluded."""
        if num_tokens < 1 or not 1e-9 < seconds < 1e5:
            return
        self._steps += 1
        if self._classes:
            seconds = min(seconds, self._OUTLIER * self.cost(num_tokens))
        self._credit = min(self._credit + self._EXPLORE * seconds, 2 * seconds)
        if self._probed is not None:
            self._credit -= max(0.0, seconds - self._probed)
            self._probed = None
        kept = self._classes.setdefault(self._class(num_tokens), [float(num_tokens), seconds, 0.0, 0.0])
        kept[2] = min(kept[2] + 1.0, self._WINDOW)
        kept[0] += (num_tokens - kept[0]) / kept[2]
        kept[1] += (seconds - kept[1]) / kept[2]
        kept[3] = self._steps
        self._curve = None

    def cost(self, num_tokens: float) -> float:
        """Seconds that a step of `num_tokens` tokens is expected to take; 0 before anything was observed."""
        sizes, seconds = self._points()
        if not sizes:
            return 0.0
        i = bisect_right(sizes, num_tokens)
        if i == 0:
            return seconds[0] * (1 - self._UNKNOWN * (1 - num_tokens / sizes[0]))
        if i == len(sizes):
            slope = self._UNKNOWN * seconds[-1] / sizes[-1]
            if i > 1:
                slope = max(slope, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
            return seconds[-1] + slope * (num_tokens - sizes[-1])
        share = (num_tokens - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])

    def lengths(self, acceptances: Sequence[float], limit: int, num_other_tokens: int = 0) -> list[int]:
        """Draft tokens for each sequence that decodes this step, at most `limit`.

        `acceptances`: of each sequence's drafter, 0 for one without guesses. `num_other_tokens`: of prefill in the same step.
        The first steps of a batch size, and one in a hundred later, go without drafts: what drafts add cannot be known otherwise.
        """
        num = len(acceptances)
        p = np.minimum(np.asarray(acceptances, np.float64), 0.98)
        if limit < 1 or num == 0 or p.max() < self._THRESHOLDS[-1]:
            return [0] * num
        if not self._classes or (num_other_tokens == 0 and not self._known(num)):
            return [0] * num
        with np.errstate(divide="ignore"):
            log_p = np.log(p)[:, None]
        base = num + num_other_tokens
        # Far beyond what was seen, costs are a guess: go there by degrees.
        most = max(self._points()[0][-1] * 1.5 + 4 - base, 0)
        rows = np.minimum(np.floor(np.log(self._THRESHOLDS) / log_p + 1e-9), limit)  # p**length >= threshold
        rows = np.clip(np.floor(most - (rows.cumsum(0) - rows)), 0, rows)
        gains = (p[:, None] * (1 - p[:, None] ** rows) / (1 - p[:, None])).sum(0).tolist()
        totals = rows.sum(0).tolist()
        alone, without = self.cost(num), self.cost(base)
        best, best_rate = 0, self._MARGIN * num / alone
        for i, total in enumerate(totals):
            rate = (num + gains[i]) / (alone + (self.cost(base + total) - without))
            if total > 0 and rate > best_rate:
                best, best_rate = i, rate
        longer = next((i for i, total in enumerate(totals) if total > totals[best]), None)
        if longer is not None and not self._known(base + int(totals[longer])):
            expected = self.cost(base + totals[best])
            if self._credit >= self.cost(base + totals[longer]) - expected:
                best, self._probed = longer, expected
        return [int(length) for length in rows[:, best]]

    def _class(self, num_tokens: int) -> int:
        return int(self._CLASSES_PER_OCTAVE * math.log2(num_tokens))

    def _known(self, num_tokens: int) -> bool:
        """Whether steps of about this many tokens were seen often enough, and lately."""
        kept = self._classes.get(self._class(num_tokens))
        return kept is not None and kept[2] >= self._ENOUGH and self._steps - kept[3] < self._STALE

    def _points(self) -> tuple[list[float], list[float]]:
        """Sizes, increasing, and seconds, non-decreasing."""
        if self._curve is None:
            sizes: list[float] = []
            pools: list[list[float]] = []  # seconds, weight, number of classes
            for _, (size, seconds, weight, seen) in sorted(self._classes.items()):
                sizes.append(size)
                pools.append([seconds, weight * self._FORGET ** (self._steps - seen) + 1e-9, 1])
                while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                    value, w, count = pools.pop()
                    last = pools[-1]
                    last[0] = (last[0] * last[1] + value * w) / (last[1] + w)
                    last[1] += w
                    last[2] += count
            self._curve = sizes, [value for value, _, count in pools for _ in range(int(count))]
        return self._curve
