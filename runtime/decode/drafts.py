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
_NGRAM = 3  # tokens that must match before an output is followed
_NOWHERE = (None, 0, 0)  # nothing is followed
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

    _CANDIDATES = 8  # of the places with the same n-gram, the newest are compared

    def __init__(self, max_tokens: int = 1 << 17) -> None:
        self.max_tokens, self.num_tokens = max_tokens, 0
        self._pages: OrderedDict[int, tuple[str, array[int]]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._next_page = 0

    def add(self, document: str, token_ids: Sequence[int]) -> None:
        """Add a finished page's output; one longer than the whole index is cut."""
        ids = array("i", token_ids[: self.max_tokens])
        if len(ids) <= _NGRAM:
            return
        while self.num_tokens + len(ids) > self.max_tokens:
            self._drop()
        page, self._next_page = self._next_page, self._next_page + 1
        self._pages[page] = document, ids
        self.num_tokens += len(ids)
        for end in range(_NGRAM, len(ids)):
            self._places.setdefault(tuple(ids[end - _NGRAM : end]), []).append((page, end))

    def holds(self, ngram: tuple[int, ...]) -> bool:
        """Whether `find` would find something for an output that ends with these `_NGRAM` tokens."""
        return ngram in self._places

    def find(self, tail: Sequence[int], document: str) -> tuple[Sequence[int] | None, int, int]:
        """Where `tail` occurred before: the page's tokens, the index after the match, the match's length in tokens.

        The longest match wins, then the same document, then the newest page; (None, 0, 0) if there is none.
        """
        best: tuple[int, bool, int, int] | None = None
        places = self._places.get(tuple(tail[-_NGRAM:]), [])
        for page, end in places[: -1 - self._CANDIDATES : -1]:
            owner, ids = self._pages[page]
            most, length = min(end, len(tail), _MAX_MATCH), _NGRAM
            while length < most and ids[end - 1 - length] == tail[-1 - length]:
                length += 1
            found = length, owner == document, page, end
            if best is None or found > best:
                best = found
        if best is None:
            return _NOWHERE
        length, _, page, end = best
        self._pages.move_to_end(page)
        return self._pages[page][1], end, length

    def _drop(self) -> None:
        page, (_, ids) = self._pages.popitem(last=False)
        self.num_tokens -= len(ids)
        for key in {tuple(ids[end - _NGRAM : end]) for end in range(_NGRAM, len(ids))}:
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
        self, find: Callable[[tuple[int, ...]], tuple[Sequence[int] | None, int, int]], prior: Sequence[float]
    ) -> None:
        self._find, self._worth = find, _Worth(prior)
        self.state: tuple[Sequence[int] | None, int, int] = (None, 0, 0)
        """Tokens followed, index expected next, tokens agreed."""

    @property
    def acceptance(self) -> float:
        ids, at, agreed = self.state
        return self._worth(agreed) if ids is not None and at < len(ids) else 0.0

    def advance(self, token: int, ngram: tuple[int, ...], learn: bool) -> None:
        """The output grew by `token` and ends with `ngram` now; `find` knows it already."""
        ids, at, agreed = self.state
        if ids is not None and at < len(ids):
            right = ids[at] == token
            if learn:
                self._worth.learn(agreed, right)
            if right:
                self.state = ids, at + 1, min(agreed + 1, _MAX_MATCH)
                return
        self.state = self._find(ngram)

    def guess(self, limit: int) -> list[int]:
        ids, at, _ = self.state
        return list(ids[at : at + limit]) if ids is not None else []


class Drafter:
    """Guesses the next tokens of one sequence. Engine thread only.

    `texts`: token ids (`draft_text_tokens`) of whole-page guesses, such as the PDF's text layer. `index`: earlier pages;
    `document`: this page's. `vocabulary`: the bytes of every token id, empty for special tokens. `encode` splits the rest of a
    word where the model's tokens and the text's do not meet; without it nothing is guessed there.
    """

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
            before, key = self._before.pop(), tuple(self._output[-_NGRAM:])
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
        key = tuple(self._output[-_NGRAM:])
        for output in self._outputs:
            output.advance(token, key, learn)
        self._before.append(self._last.get(key, -1))
        self._last[key] = len(self._output)

    def _find_own(self, ngram: tuple[int, ...]) -> tuple[Sequence[int] | None, int, int]:
        end = self._last.get(ngram, -1)
        return (self._output, end, _NGRAM) if end >= 0 else _NOWHERE

    def _find_page(self, ngram: tuple[int, ...]) -> tuple[Sequence[int] | None, int, int]:
        if self._index is None or not self._index.holds(ngram):
            return _NOWHERE
        return self._index.find(self._output[-_MAX_MATCH:], self._document)


class _Costs:
    """Seconds by size: exponentially weighted means in classes of sizes, made non-decreasing (pool adjacent violators)."""

    _CLASSES_PER_OCTAVE = 4
    _WINDOW = 20.0  # steps that a mean goes over
    _FORGET = 0.995  # per step, of a class that is not seen
    _NOTABLE = 0.01  # share that a mean changes by before the curve is drawn anew

    def __init__(self) -> None:
        self._classes: dict[int, list[float]] = {}  # mean size, mean seconds, weight, step last seen
        self._drawn: dict[int, float] = {}  # mean seconds of a class in the curve
        self._curve: tuple[list[float], list[float]] | None = None

    def add(self, size: int, seconds: float, step: int) -> None:
        here = self._class(size)
        kept = self._classes.setdefault(here, [float(size), seconds, 0.0, step])
        kept[2] = min(kept[2] * self._FORGET ** (step - kept[3]) + 1.0, self._WINDOW)
        kept[0] += (size - kept[0]) / kept[2]
        kept[1] += (seconds - kept[1]) / kept[2]
        kept[3] = step
        if abs(kept[1] - self._drawn.get(here, math.inf)) > self._NOTABLE * abs(kept[1]):
            self._curve = None

    def known(self, size: int, since: int, weight: float, around: int = 0) -> bool:
        """Whether steps of about this size were seen often enough, and since a step; `around` classes count as about."""
        here = self._class(size)
        return any(
            (kept := self._classes.get(i)) is not None and kept[2] >= weight and kept[3] > since
            for i in range(here - around, here + around + 1)
        )

    def points(self) -> tuple[list[float], list[float]]:
        """Sizes, increasing, and seconds, non-decreasing."""
        if self._curve is None:
            sizes: list[float] = []
            pools: list[list[float]] = []  # seconds, weight, number of classes
            last_step = max((kept[3] for kept in self._classes.values()), default=0)
            for i, (size, seconds, weight, seen) in sorted(self._classes.items()):
                self._drawn[i] = seconds
                sizes.append(size)
                pools.append([seconds, weight * self._FORGET ** (last_step - seen) + 1e-9, 1])
                while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                    value, w, count = pools.pop()
                    last = pools[-1]
                    last[0] = (last[0] * last[1] + value * w) / (last[1] + w)
                    last[1] += w
                    last[2] += count
            self._curve = sizes, [value for value, _, count in pools for _ in range(int(count))]
        return self._curve

    def _class(self, size: int) -> int:
        return int(self._CLASSES_PER_OCTAVE * math.log2(size))


class DraftBudget:
    """How many draft tokens a step may carry: as many as raise the expected tokens per second.

    A step's cost is what its sequences cost, measured in steps without drafts, and what the drafts add to that, measured for each
    octave of the number of sequences: a draft token shares the weights and the keys and values that its sequence reads anyhow,
    so it may cost much less than a sequence, and how much less depends on the machine. A token is drafted where it and all
    before it are right with at least some probability; of a row of such thresholds, the one that promises the most tokens a
    second is taken. One per engine, engine thread only.
    """

    _OUTLIER = 2.0  # a step counts at most this many times what was expected
    _UNKNOWN = 0.5  # of a sequence's cost is taken for a draft token's, where nothing was seen
    _MARGIN = 1.03  # drafts must promise this much more tokens a second
    _EXPLORE = 0.005  # share of all time that trying longer drafts may cost
    _STALE = 100  # steps after which a class is looked at again
    _SELDOM = 8  # of so many steps without drafts that nobody asked for, one is looked at
    _ENOUGH = 1.5  # steps of a class, older ones for less, that its mean is believed from
    _NEAR = 2  # classes to both sides that tell enough of what sequences cost
    _THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.12)
    _MOST = 0.98  # no guess is taken to be surer

    def __init__(self) -> None:
        self._alone = _Costs()
        self._extra: dict[int, _Costs] = {}  # by octave of the number of sequences
        self._steps = 0
        self._asked = True  # for a step without drafts
        self._credit = 0.0  # seconds
        self._probed: float | None = None  # seconds expected without what the last step tried out
        self._tables: dict[int, list[tuple[list[int], list[float]]]] = {}

    def observe(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """A step that computed one token and so many draft tokens for these sequences, and nothing else, took `seconds`."""
        if num_sequences < 1 or num_drafts < 0 or not 1e-9 < seconds < 1e5:
            return
        self._steps += 1
        if not num_drafts and not self._asked and self._steps % self._SELDOM:
            self._credit += self._EXPLORE * seconds
            return
        if self._steps > 1:
            seconds = min(seconds, self._OUTLIER * self.cost(num_sequences, num_drafts))
        self._asked = False
        self._credit = min(self._credit + self._EXPLORE * seconds, 2 * seconds)
        if self._probed is not None:
            self._credit -= max(0.0, seconds - self._probed)
            self._probed = None
        if num_drafts:
            extra = self._extra.setdefault(num_sequences.bit_length(), _Costs())
            extra.add(num_drafts, seconds - self.cost(num_sequences), self._steps)
        else:
            self._alone.add(num_sequences, seconds, self._steps)

    def cost(self, num_sequences: int, num_drafts: int = 0) -> float:
        """Seconds that a step is expected to take; 0 before anything was observed."""
        sizes, seconds = self._alone.points()
        if not sizes:
            return 0.0
        i = bisect_right(sizes, num_sequences)
        if i == 0:
            alone = seconds[0] * (1 - self._UNKNOWN * (1 - num_sequences / sizes[0]))
        else:
            alone = _interpolate(sizes, seconds, i, num_sequences, self._UNKNOWN * seconds[-1] / sizes[-1])
        if not num_drafts:
            return alone
        sizes, seconds = self._drafts(num_sequences).points()
        return alone + self._added(sizes, seconds, num_drafts, self._UNKNOWN * alone / num_sequences)

    @staticmethod
    def _added(sizes: list[float], seconds: list[float], num_drafts: int, unknown: float) -> float:
        """What so many drafts add by these points, or `unknown` each if there is none."""
        if not sizes:
            return unknown * num_drafts
        i = bisect_right(sizes, num_drafts)
        if i == 0:
            return max(seconds[0], 0.0) * num_drafts / sizes[0]
        return max(_interpolate(sizes, seconds, i, num_drafts, max(seconds[-1], 0.0) / sizes[-1]), 0.0)

    def lengths(self, acceptances: Sequence[float], limit: int) -> list[int]:
        """Draft tokens for each sequence that decodes this step, at most `limit`.

        `acceptances`: of each sequence's drafter, 0 for one without guesses or drafter. The first steps of a batch size, and
        one in a hundred later, go without drafts: what drafts add cannot be known otherwise.
        """
        num, least = len(acceptances), self._THRESHOLDS[-1]
        active = sum(p >= least for p in acceptances)
        since = self._steps - self._STALE
        if limit < 1 or not active:
            return [0] * num
        if not self._alone.known(num, since, self._ENOUGH, self._NEAR):
            self._asked = True
            return [0] * num
        extra = self._drafts(num)
        sizes, seconds = extra.points()
        # Far beyond what was seen, costs are a guess: go there by degrees.
        most = max(2 * sizes[-1] if sizes else 0, 4, active)
        table = self._table(min(limit, int(most) // active))
        options = [table[int(100 * p) if p < self._MOST else -1] for p in acceptances if p >= least]
        totals = [sum(row) for row in zip(*(rows for rows, _ in options), strict=True)]
        gains = [sum(row) for row in zip(*(gains for _, gains in options), strict=True)]
        alone = self.cost(num)
        unknown = self._UNKNOWN * alone / num
        best, best_rate, best_added = -1, self._MARGIN * num / alone, 0.0
        last, longer, longer_added = 0, -1, 0.0
        for i, total in enumerate(totals):
            if total == last:
                continue
            last, added = total, self._added(sizes, seconds, total, unknown)
            if (rate := (num + gains[i]) / (alone + added)) > best_rate:
                best, best_rate, best_added, longer = i, rate, added, -1
            elif longer < 0:
                longer, longer_added = i, added
        if (
            longer >= 0
            and self._credit >= longer_added - best_added
            and not extra.known(totals[longer], since, self._ENOUGH)
        ):
            best, self._probed = longer, alone + best_added
        if best < 0:
            return [0] * num
        chosen = iter(options)
        return [next(chosen)[0][best] if p >= least else 0 for p in acceptances]

    def _drafts(self, num_sequences: int) -> _Costs:
        """What drafts add at this number of sequences, or at the nearest that was seen."""
        octave = num_sequences.bit_length()
        found = self._extra.get(octave)
        if found is None and self._extra:
            found = self._extra[min(self._extra, key=lambda seen: abs(seen - octave))]
        return found or _Costs()

    def _table(self, limit: int) -> list[tuple[list[int], list[float]]]:
        """By acceptance in hundredths, up to `_MOST`: lengths by threshold, and the tokens they promise."""
        if (table := self._tables.get(limit)) is None:
            p = np.maximum(np.arange(round(100 * self._MOST) + 1) / 100, 1e-9)[:, None]
            rows = np.minimum(
                np.floor(np.log(self._THRESHOLDS) / np.log(p) + 1e-9), limit
            )  # p**length >= threshold
            gains = p * (1 - p**rows) / (1 - p)
            table = list(zip(rows.astype(int).tolist(), gains.tolist(), strict=True))
            self._tables[limit] = table
        return table


def _interpolate(sizes: Sequence[float], values: Sequence[float], i: int, size: float, least: float) -> float:
    """The value at `size`, which is between point `i - 1` and `i`, or beyond the last: there rising by at least `least`."""
    if i == len(sizes):
        if i > 1:
            least = max(least, (values[-1] - values[-2]) / (sizes[-1] - sizes[-2]))
        return values[-1] + least * (size - sizes[-1])
    share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])
