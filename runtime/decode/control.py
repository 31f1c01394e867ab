"""What steers one sequence's tokens: guidance, loop guard, rescue and drafts, or a reference to score. Knows tokens alone.

Rescue. A loop is rolled back to the start of its second repetition, so that one good instance stays, and may not simply go on:
the first time its continuation is banned (below), later the string that is being written is closed through the grammar, so
that the next field begins. After `max_rescues` the sequence ends. (A second ban leaves more pages degenerate
than closing: `bench/results/rescue.md`.)

The ban. Where the last `window` tokens follow the loop's body, in whatever phase, the token that would go on with it is
forbidden from there to the end of the output. The window is the body itself, at least `_MIN_WINDOW` tokens, so that short runs
(the zeros of an amount) stay possible, and at most `_MAX_WINDOW`, so that a long body is left early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pagemill.decode.drafts import Drafter
from pagemill.decode.guidance import Guide
from pagemill.decode.loops import Loop, LoopDetector
from pagemill.decode.sampler import SamplingParams, SamplingState
from pagemill.results import LoopEvent

_MIN_WINDOW, _MAX_WINDOW = 4, 24


class Control:
    """The steering of one sequence; every token of its output passes through `extend`, in order."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        guide: Guide | None = None,
        guard: LoopDetector | None = None,
        drafter: Drafter | None = None,
        reference: Sequence[int] | None = None,
    ) -> None:
        """`reference` is the whole output, given: its tokens are not chosen, only their probabilities are wanted."""
        self.params = params
        self.reference = reference
        self.sampling = SamplingState(params)
        self.guide, self.drafter = guide, drafter
        self._guard = guard
        self._bans: dict[tuple[int, ...], set[int]] = {}
        """Tokens that may not follow these ones."""
        self._barred: tuple[int, int] | None = None
        """(index in the output, token): the token that began a repetition may not stand there again."""
        self._num_output = 0
        self._num_rescues = 0
        self.events: list[LoopEvent] = []
        self.num_drafted = self.num_accepted = 0

    @property
    def masked(self) -> bool:
        """Whether the next token is restricted."""
        return self.guide is not None or bool(self._bans) or self._barred is not None

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens guessed to come next. Raises `RequestError` if the grammar exceeds its limits."""
        if self.drafter is None or limit < 1:
            return []
        draft = self.drafter.propose(limit)
        return draft if self.guide is None else draft[: self.guide.open_draft(draft)]

    def fill_masks(self, history: Sequence[int], draft: Sequence[int], out: npt.NDArray[np.int32]) -> None:
        """Fill `out` int32 `[1 + len(draft), V / 32]` with what may come after `history` and after each draft token."""
        rows = len(out)
        if self.guide is None:
            out[:] = -1
        else:
            rows = self.guide.masks(draft, out)
        for i in range(rows if self._bans or self._barred is not None else 0):
            banned = set(self._banned(history, draft[:i]))
            if banned:
                row = out[i].copy()
                for token in banned:
                    row.view(np.uint32)[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
                if row.any():  # the grammar's only way stays open
                    out[i] = row

    def _banned(self, history: Sequence[int], draft: Sequence[int]) -> Iterator[int]:
        if self._barred is not None and self._barred[0] == self._num_output + len(draft):
            yield self._barred[1]
        tail = (*history[-_MAX_WINDOW:], *draft)
        for window in {len(key) for key in self._bans}:
            yield from self._bans.get(tail[-window:], ())

    def extend(self, token_ids: Sequence[int]) -> Loop | None:
        """Take the output's next tokens (none that ends it). Returns a loop if they close one."""
        self._num_output += len(token_ids)
        if self.guide is not None:
            self.guide.accept(token_ids)
        if self.drafter is not None:
            self.drafter.extend(token_ids)
        found: Loop | None = None
        if self._guard is not None:
            for token in token_ids:
                loop = self._guard.push(token)
                found = found or loop
        return found

    def rollback(self, num_tokens: int) -> None:
        """Forget the output after its first `num_tokens` tokens."""
        if self.guide is not None:
            self.guide.rollback(self._num_output - num_tokens)
        if self._guard is not None:
            self._guard.rollback(num_tokens)
        if self.drafter is not None:
            self.drafter.rollback(num_tokens)
        self._num_output = num_tokens

    def rescue(self, loop: Loop, output: Sequence[int]) -> list[int] | None:
        """Roll back to where `loop` began and keep it from going on; `output` is the output with the loop in it.

        Returns tokens to go on with (none where a ban is enough), or None where the sequence has to end.
        """
        self.rollback(loop.start)
        self._num_rescues += 1
        # Where a draft went on beyond the loop, more was drawn: the stream begins anew.
        self.sampling = SamplingState(self.params, self._num_rescues)
        closing: list[int] | None = None
        action: Literal["ban", "close", "end"] = "end"
        if self.params.guard == "rescue" and self._num_rescues <= self.params.max_rescues:
            closing = []
            if self._num_rescues > 1 and self.guide is not None:
                closing = self.guide.end_string()
            action = "close" if closing else "ban"
            if not closing:
                self._barred = (loop.start, output[loop.start])
                if loop.kind != "counter":
                    self._ban(output[loop.start : loop.start + loop.period])
        self.events.append(
            LoopEvent(loop.kind, loop.start, loop.period, loop.repeats, loop.end - loop.start, action)
        )
        return closing

    def _ban(self, body: Sequence[int]) -> None:
        """Forbid to go on with `body` where it has just been written, in whatever phase."""
        period = len(body)
        window = min(max(period, _MIN_WINDOW), _MAX_WINDOW)
        for phase in range(period):
            key = tuple(body[(phase + i) % period] for i in range(window))
            self._bans.setdefault(key, set()).add(body[(phase + window) % period])

    def restart(self, params: SamplingParams) -> None:
        """Begin the output again, with other parameters."""
        self.rollback(0)
        self.params, self.sampling = params, SamplingState(params)
        self._bans, self._barred, self._num_rescues = {}, None, 0
