"""Drafts: cheap guesses of the next tokens, verified by the model in one step, so that the output stays the model's own.

Guesses come from token sequences that a page is likely to repeat: its text layer or another engine's output, earlier pages of the
run, and the page's own output (prompt lookup, arXiv 2304.04487; suffixes of earlier outputs, arXiv 2411.04975). Each source is
followed by a pointer that advances while the output agrees with it and is found again by n-gram when it does not. All pointers are
followed whether they are used or not, so what a source is worth is known without spending a single draft on it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence

_NGRAMS = (4, 3, 2)
"""Lengths of the matches that find a pointer again, longest first."""
_CANDIDATES = 8
"""Places with the same n-gram that are compared."""
_MAX_RUN = 32
"""Longest match that is told from a longer one."""


def draft_text_tokens(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Tokens of a page's text as the model would write it: as the inside of a JSON string."""
    lines = (line.strip() for line in text.splitlines())
    escaped = json.dumps("\n".join(line for line in lines if line), ensure_ascii=False)
    return encode(escaped[1:-1]) if len(escaped) > 2 else []


class _Tokens:
    """A token sequence whose n-grams can be looked up; grows and shrinks at its end."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.ids: list[int] = []
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in _NGRAMS]
        self._previous: list[list[int]] = [[] for _ in _NGRAMS]
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        ids = self.ids
        for token in token_ids:
            ids.append(token)
            end = len(ids)
            for n, last, previous in zip(_NGRAMS, self._last, self._previous, strict=True):
                if end < n:
                    previous.append(-1)
                    continue
                key = tuple(ids[-n:])
                previous.append(last.get(key, -1))
                last[key] = end

    def truncate(self, length: int) -> None:
        ids = self.ids
        while len(ids) > length:
            for n, last, previous in zip(_NGRAMS, self._last, self._previous, strict=True):
                before = previous.pop()
                if len(ids) >= n:
                    key = tuple(ids[-n:])
                    if before < 0:
                        del last[key]
                    else:
                        last[key] = before
            ids.pop()

    def find(self, tail: Sequence[int], near: int, before: int) -> tuple[int, int]:
        """(index after the best place where `tail` ends, length of the match); (-1, 0) if there is none.

        Longer n-grams win, then places at or after `near`, closest first, then later ones. Places from `before` on do not
        count.
        """
        for level, n in enumerate(_NGRAMS):
            if len(tail) < n:
                continue
            end = self._last[level].get(tuple(tail[-n:]), -1)
            best, tries = -1, 0
            while end >= 0 and tries < _CANDIDATES:
                if end < before:
                    tries += 1
                    if (
                        best < 0 or end >= near
                    ):  # the chain runs from the end: the last one at or after `near` is closest
                        best = end
                    else:
                        break
                end = self._previous[level][end - 1]
            if best >= 0:
                return best, n
        return -1, 0


class DraftIndex:
    """Outputs of earlier pages, found by n-gram. Engine thread only.

    Holds at most `max_tokens` tokens (about 250 bytes each); the page that has gone unused for longest is dropped first.
    """

    def __init__(self, max_tokens: int = 1 << 17) -> None:
        self.max_tokens, self.num_tokens = max_tokens, 0
        self._pages: OrderedDict[int, tuple[str, list[int]]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._next = 0

    def add(self, document: str, token_ids: Sequence[int]) -> None:
        """Add a finished page's output; one longer than the whole index is cut."""
        ids = list(token_ids[: self.max_tokens])
        if len(ids) <= _NGRAMS[-1]:
            return
        while self.num_tokens + len(ids) > self.max_tokens:
            self._drop()
        page, self._next = self._next, self._next + 1
        self._pages[page] = document, ids
        self.num_tokens += len(ids)
        n = 3
        for end in range(n, len(ids)):
            self._places.setdefault(tuple(ids[end - n : end]), []).append((page, end))

    def _drop(self) -> None:
        page, (_, ids) = self._pages.popitem(last=False)
        self.num_tokens -= len(ids)
        for end in range(3, len(ids)):
            key = tuple(ids[end - 3 : end])
            places = self._places.get(key)
            if places is not None:
                places[:] = [place for place in places if place[0] != page]
                if not places:
                    del self._places[key]

    def find(self, tail: Sequence[int], document: str) -> tuple[list[int] | None, int, int]:
        """(token ids of a page, index after the match, length of the match): longest, same document, newest first."""
        best: tuple[int, bool, int, int] | None = None
        for page, end in self._places.get(tuple(tail[-3:]), ())[: -1 - _CANDIDATES : -1]:
            owner, ids = self._pages[page]
            length = 3
            while (
                length < _MAX_RUN
                and length < end
                and length < len(tail)
                and ids[end - 1 - length] == tail[-1 - length]
            ):
                length += 1
            found = length, owner == document, page, end
            if best is None or found > best:
                best = found
        if best is None:
            return None, -1, 0
        self._pages.move_to_end(best[2])
        return self._pages[best[2]][1], best[3], best[0]


class _Follower:
    """A pointer into one source and what its guesses are worth, by how long it has agreed."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.ids: list[int] | None = None
        self.position = 0
        self.run = 0
        self.hits = [8 * p for p in prior]
        self.trials = [8.0] * len(prior)

    @property
    def bucket(self) -> int:
        return min(self.run.bit_length(), len(self.hits) - 1)

    @property
    def acceptance(self) -> float:
        if self.ids is None or self.position >= len(self.ids):
            return 0.0
        return self.hits[self.bucket] / self.trials[self.bucket]

    def judge(self, token: int) -> bool:
        """Whether the guess was `token`, and learn from it."""
        if self.ids is None or self.position >= len(self.ids):
            return False
        bucket, hit = self.bucket, self.ids[self.position] == token
        self.hits[bucket] = self.hits[bucket] * 0.98 + hit
        self.trials[bucket] = self.trials[bucket] * 0.98 + 1
        return hit


class Drafter:
    """Guesses the next tokens of one sequence. Engine thread only."""

    def __init__(
        self, *, texts: Sequence[Sequence[int]] = (), index: DraftIndex | None = None, document: str = ""
    ) -> None:
        self._output = _Tokens()
        self._texts = [_Tokens(text) for text in texts]
        self._index, self._document = index, document
        self._followers = [_Follower((0.4, 0.6, 0.8, 0.9, 0.95)) for _ in texts]
        for follower, tokens in zip(self._followers, self._texts, strict=True):
            follower.ids = tokens.ids
        self._pages = _Follower((0.1, 0.3, 0.4, 0.6, 0.9))
        self._own = _Follower((0.1, 0.2, 0.3, 0.5, 0.8))
        self._all = [*self._followers, self._pages, self._own]
        self._history: list[list[tuple[list[int] | None, int, int]]] = []
        self.num_proposed = 0
        self.num_accepted = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """The output grew by these tokens, whoever chose them."""
        for token in token_ids:
            self._history.append([(f.ids, f.position, f.run) for f in self._all])
            hits = [f.judge(token) for f in self._all]
            self._output.extend((token,))
            tail = self._output.ids[-_MAX_RUN:]
            for follower, hit in zip(self._all, hits, strict=True):
                if hit:
                    follower.position += 1
                    follower.run += 1
            for follower, tokens, hit in zip(self._followers, self._texts, hits, strict=False):
                if not hit:
                    position, run = tokens.find(tail, follower.position, len(tokens.ids) + 1)
                    if position >= 0:
                        follower.position, follower.run = position, run
                    else:
                        # One token differs: the text goes on behind it.
                        follower.position += follower.run > 0
                        follower.run = 0
            if self._index is not None and not hits[-2]:
                self._pages.ids, self._pages.position, self._pages.run = self._index.find(
                    tail, self._document
                )
            if not hits[-1]:
                position, run = self._output.find(tail, len(self._output.ids), len(self._output.ids))
                self._own.ids = self._output.ids if position >= 0 else None
                self._own.position, self._own.run = position, run

    def rollback(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the output."""
        if num_tokens >= len(self._history):
            return
        for follower, state in zip(self._all, self._history[num_tokens], strict=True):
            follower.ids, follower.position, follower.run = state
        del self._history[num_tokens:]
        self._output.truncate(num_tokens)

    @property
    def acceptance(self) -> float:
        """Probability that the next guessed token is what the model writes; 0 where nothing is guessed."""
        return max(follower.acceptance for follower in self._all)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens guessed to come next; empty if no source matches."""
        best = max(self._all, key=lambda follower: follower.acceptance)
        if best.ids is None or best.acceptance <= 0:
            return []
        return best.ids[best.position : best.position + limit]

    def feedback(self, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens `accepted` were right; what sources are worth is learned in `extend`."""
        self.num_proposed += proposed
        self.num_accepted += accepted


class DraftBudget:
    """How many draft tokens a step may carry: as many as pay for their time."""

    def __init__(self) -> None:
        self._seconds: dict[int, tuple[float, float]] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens took `seconds`."""

    def lengths(self, acceptances: Sequence[float], limit: int, num_other_tokens: int = 0) -> list[int]:
        """Draft tokens for each sequence that decodes this step, from its drafter's acceptance; at most `limit` each."""
        return [limit if acceptance > 0.5 else 0 for acceptance in acceptances]
