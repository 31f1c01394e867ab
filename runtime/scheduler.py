"""What runs in each step: one ragged batch under a token budget, images under a pixel budget, blocks under the pool.

There are no prefill and decode phases: a sequence has tokens that are not computed yet, and a step computes some.
Decoding sequences (one token behind) come first, then chunks of running prefills, then waiting sequences are
admitted. Admission counts the blocks that running sequences are predicted to need in the end, never
`max_new_tokens`; where the prediction was too low and blocks run out, the sequence that would be served last
gives its blocks back and is computed again later (most of its blocks are usually still findable by content).

A step may be planned before the tokens of the one before it are known: `advance` counts a step's tokens as computed and puts
placeholders where its new tokens will be, `settle` puts the tokens there. Between the two, and only then, the last token of a
sequence may be negative: -1 - r stands for the token of row r of that step. What is planned meanwhile may turn out wrong, where
a sequence ends or is rolled back: `advance` passes over that.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush, nsmallest
from operator import attrgetter
from typing import Any, NamedTuple

from pagemill.cache import BlockPool, ImageCache, OutOfBlocks
from pagemill.results import FinishReason
from pagemill.sequence import Sequence, SequenceImage

_LOOK_AHEAD = 4  # waiting sequences whose images may be encoded before they are admitted


class Work(NamedTuple):
    """What one sequence computes in a step."""

    seq: Sequence
    start: int
    """Its tokens that were computed before."""
    num_tokens: int
    """Tokens that the step computes, from there on."""
    drafted: int
    """How many of them are its draft's; it gets a new token unless this is negative: then its last token is not among them."""

    @property
    def holds(self) -> bool:
        """Whether the sequence is still where it was when this was planned, so that it needs what was computed."""
        return self.seq.finish_reason is None and self.seq.num_computed == self.start

    @property
    def wants(self) -> bool:
        """Whether a new token is still wanted: it has got none meanwhile."""
        return self.holds and 0 <= self.drafted == self.start + self.num_tokens - len(self.seq.token_ids)


@dataclass(slots=True)
class StepPlan:
    """One step: images to encode, then blocks to copy, then tokens to compute, in this order; and images for later steps."""

    encode: list[tuple[Sequence, SequenceImage]]
    copies: list[tuple[int, int]]
    """(source, destination) block ids"""
    work: list[Work]
    ahead: list[tuple[Sequence, SequenceImage]] = field(default_factory=list)
    """Images of waiting sequences, to be encoded beside the step."""
    marks: tuple[Any, Any, Any] | None = None
    """The runner's: moments of the device before the step's images, after them, after the decoder."""

    def wanting(self) -> Iterator[Work]:
        """The work of sequences that get new tokens; each has a row of logits for the token after its last, and one after each
        token of its draft."""
        return (work for work in self.work if work.drafted >= 0)


@dataclass(slots=True)
class _Budget:
    """A step being planned."""

    tokens: int
    image_tokens: int
    work: dict[int, Work] = field(default_factory=dict)
    encode: list[tuple[Sequence, SequenceImage]] = field(default_factory=list)


class OutputLengthPredictor:
    """Predicts how many tokens a page will give, from its image tokens and what finished pages took.

    Keeps a running mean and mean deviation of output tokens per image token (as TCP estimates round trips, RFC 6298)
    and predicts the mean plus two deviations: too low costs a preemption, too high an idle place in the batch.
    """

    def __init__(self) -> None:
        self.mean, self.deviation = 0.75, 0.15

    @staticmethod
    def _size(seq: Sequence) -> int:
        return seq.num_image_tokens or max(seq.num_prompt, 64)

    def predict(self, seq: Sequence) -> int:
        """Predicted number of output tokens."""
        return int((self.mean + 2 * self.deviation) * self._size(seq)) + 1

    def observe(self, seq: Sequence) -> None:
        """Learn from a sequence that ended by itself."""
        ratio = (len(seq.token_ids) - seq.num_prompt) / self._size(seq)
        self.deviation += 0.05 * (abs(ratio - self.mean) - self.deviation)
        self.mean += 0.05 * (ratio - self.mean)


class Scheduler:
    """Holds every live sequence. `schedule` plans a step, `advance` and `settle` (`update` is both) take its tokens."""

    def __init__(
        self,
        blocks: BlockPool,
        images: ImageCache[Any],
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_step_image_tokens: int,
        encode_ahead: bool = False,
    ) -> None:
        """`encode_ahead`: beside steps that only decode, plan images of sequences that wait."""
        self.blocks, self.images = blocks, images
        self.encode_ahead = encode_ahead
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.max_step_image_tokens = max_step_image_tokens
        self.predictor = OutputLengthPredictor()
        self.running: list[Sequence] = []
        """In serving order: priority, then arrival."""
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._early: list[Sequence] = []
        """Waiting sequences that hold images already, in the order in which they came to them."""
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._committed = 0
        self.num_waiting = 0
        self.num_preemptions = 0
        self.num_shared_tokens = 0
        """Tokens whose computation prefix sharing saved."""

    @property
    def has_work(self) -> bool:
        """Whether any sequence is live."""
        return bool(self.running or self.num_waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. It must fit the pool on its own: `max_tokens` at most the tokens of all blocks."""
        if seq.max_tokens > self.blocks.num_blocks * self.blocks.block_size:
            raise AssertionError(f"a sequence of {seq.max_tokens} tokens can never fit the pool")
        heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1

    def cancel(self, seq: Sequence) -> None:
        """End a sequence wherever it is, between steps; a no-op if it has ended."""
        if seq.finish_reason is None:
            self.finish(seq, "cancelled")

    def schedule(self, now: float = 0.0) -> StepPlan:
        """Plan the next step, taking blocks and image space for it. `now` is the clock for timelines, in seconds."""
        step = _Budget(self.max_step_tokens, self.max_step_image_tokens)
        block_size, work = self.blocks.block_size, step.work
        behind: list[Sequence] = []
        for seq in self.running.copy():
            computed = seq.num_computed
            total = len(seq.token_ids)
            if computed < seq.num_prompt or total - computed > 1:
                behind.append(seq)
            # A negative row: preempted by an earlier one in this loop. A full one may only wait for its last token.
            elif seq.row >= 0 and step.tokens and (total < seq.max_tokens or seq.token_ids[-1] >= 0):
                if computed < len(seq.block_table) * block_size:
                    work[seq.id] = Work(seq, computed, 1, computed + 1 - total)
                    step.tokens -= 1
                else:
                    self._place(seq, 1, step)
        for seq, _, n, _ in list(work.values()):
            if seq.draft:  # only into room that is free: a guess takes nothing from anybody
                room = (len(seq.block_table) + self.blocks.num_free) * block_size - seq.num_computed - n
                if (drafted := min(len(seq.draft), step.tokens, room)) > 0:
                    step.tokens += n
                    self._place(seq, n + drafted, step)
        for seq in behind:
            if seq.row >= 0 and step.tokens:
                self._place_chunk(seq, step)
        while step.tokens and (admitted := self._admit(now)) is not None:
            if not self._place_chunk(admitted, step):
                break
        # An image whose sequence was preempted while planning is encoded only if another still holds it.
        encode = [(seq, image) for seq, image in step.encode if image.digest in self.images]
        copies, self.blocks.copies = self.blocks.copies, []
        planned = list(work.values())
        plan = StepPlan(encode, copies, planned)
        seldom = self.encode_ahead and self.num_waiting and planned and not encode
        if seldom and all(start >= seq.num_prompt for seq, start, _, _ in planned):
            plan.ahead = self._look_ahead()
        return plan

    def advance(self, plan: StepPlan) -> list[tuple[Sequence, int]]:
        """Count a step as computed once the device has been given all of it. Returns the sequences that wait for their new token,
        each with the number of its work in `plan.wanting()`.
        """
        pending: list[tuple[Sequence, int]] = []
        block_size, row, number = self.blocks.block_size, 0, 0
        for seq, start, count, drafted in plan.work:
            if seq.finish_reason is None and seq.num_computed == start:  # as `Work.holds`
                total = len(seq.token_ids)
                seq.num_computed = computed = min(start + count, total)
                if computed // block_size > seq.num_published:
                    self._publish(seq)
                if count > 1 or computed <= seq.num_prompt:
                    needed = {image.digest for image in seq.images if image.end > computed}
                    for image in seq.images:
                        if image.digest not in needed:
                            self.images.release(image.digest, seq.id)
                if 0 <= drafted == start + count - total:
                    seq.token_ids.append(-1 - row)
                    pending.append((seq, number))
            if drafted >= 0:
                row += 1 + drafted
                number += 1
        return pending

    def settle(
        self, new: Iterable[tuple[Sequence, list[int], list[float]]], now: float = 0.0
    ) -> list[tuple[Sequence, FinishReason]]:
        """Give the sequences that wait for it what they got: one token or more each, with log-probabilities.

        All but the last of a sequence's new tokens are its draft's, whose keys and values are right. Returns the sequences
        that have come to their end and why; `finish` releases them.
        """
        ended: list[tuple[Sequence, FinishReason]] = []
        for seq, token_ids, logprobs in new:
            if seq.token_ids.pop() >= 0:
                raise AssertionError(f"sequence {seq.id} waits for no token")
            room = seq.max_tokens - len(seq.token_ids)
            if len(token_ids) == 1 < room and token_ids[0] not in seq.stop_ids:  # most of the time
                seq.token_ids.append(token_ids[0])
                seq.logprobs += logprobs
                if seq.timeline.first_token is None:
                    seq.timeline.first_token = now
                continue
            end = next((at for at, token in enumerate(token_ids, 1) if token in seq.stop_ids), 0)
            if end and end <= room:
                ended.append((seq, "stop"))
            elif len(token_ids) >= room:
                end = room
                ended.append((seq, "length"))
            else:
                end = len(token_ids)
            seq.token_ids += token_ids[:end]
            seq.logprobs += logprobs[:end]
            if end > 1:
                seq.num_computed += end - 1
                self._publish(seq)
            if seq.timeline.first_token is None:
                seq.timeline.first_token = now
        return ended

    def abandon(self, pending: list[tuple[Sequence, int]]) -> None:
        """Forget what a step that failed was to bring: the tokens of sequences that wait for them, and images of later steps."""
        for seq, _ in pending:
            if seq.token_ids[-1] < 0:
                seq.token_ids.pop()
                seq.num_computed = min(seq.num_computed, len(seq.token_ids) - 1)
        for seq in self._early.copy():
            self._let_go(seq)

    def update(
        self, plan: StepPlan, token_ids: list[list[int]], logprobs: list[list[float]], now: float = 0.0
    ) -> list[tuple[Sequence, FinishReason]]:
        """`advance`, and `settle` with the tokens of each of `plan.wanting()`, in that order."""
        pending = self.advance(plan)
        if len(token_ids) != len(pending):
            raise AssertionError(f"tokens of {len(token_ids)} sequences for {len(pending)}")
        return self.settle(((seq, token_ids[i], logprobs[i]) for seq, i in pending), now)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a live sequence and release all it holds, between steps."""
        if reason == "stop":
            self.predictor.observe(seq)
        if seq.row >= 0:
            self._release(seq)
        else:  # its place in the heap is skipped when it comes up
            self.num_waiting -= 1
            self._let_go(seq)
            for image in seq.images:
                image.patches = image.patches[:0].copy()
            if not self.num_waiting:
                self._waiting.clear()
        seq.finish_reason = reason

    def rollback(self, seq: Sequence, num_tokens: int) -> None:
        """Forget a running sequence's tokens after the first `num_tokens` (at least the prompt), between steps."""
        if not seq.num_prompt <= num_tokens <= len(seq.token_ids):
            raise AssertionError(f"cannot roll {len(seq.token_ids)} tokens back to {num_tokens}")
        del seq.token_ids[num_tokens:], seq.logprobs[num_tokens - seq.num_prompt :]
        # The last token kept is computed again: its logits choose the next one.
        seq.num_computed = min(seq.num_computed, num_tokens - 1)
        seq.num_once_computed = min(seq.num_once_computed, num_tokens)
        full = seq.num_computed // self.blocks.block_size
        del seq.block_digests[full:]
        seq.num_published = min(seq.num_published, full)
        seq.num_synced = min(seq.num_synced, full)
        try:
            self.blocks.truncate(seq.block_table, seq.num_computed)
        except OutOfBlocks:
            # The block at the cut is shared and there is none to copy it to: it is computed again.
            seq.num_computed = full * self.blocks.block_size
            self.blocks.truncate(seq.block_table, seq.num_computed)

    def check(self) -> None:
        """Raise `AssertionError` unless every block, row and image hold is explained by a live sequence."""
        self.blocks.check(seq.block_table for seq in self.running)
        if len(self._rows) + len(self.running) != self.max_num_seqs:
            raise AssertionError(
                f"{len(self._rows)} rows free, {len(self.running)} running of {self.max_num_seqs}"
            )
        if self._committed != sum(seq.committed_blocks for seq in self.running):
            raise AssertionError(f"{self._committed} blocks committed, not what running sequences add up to")
        if any(seq.row >= 0 or seq.finish_reason is not None for seq in self._early):
            raise AssertionError("images held early for a sequence that does not wait")
        if any(token < 0 for seq in self.running for token in seq.token_ids[-1:]):
            raise AssertionError("a token that never came")
        if not self.has_work and len(self.images):
            raise AssertionError(f"{len(self.images)} images held by nobody alive")

    def _place_chunk(self, seq: Sequence, step: _Budget) -> bool:
        """Schedule as much of a prefill as tokens and images allow; False if nothing."""
        n = self._fit_images(seq, min(len(seq.token_ids) - seq.num_computed, step.tokens), step)
        return n > 0 and self._place(seq, n, step)

    def _place(self, seq: Sequence, n: int, step: _Budget) -> bool:
        """Schedule `n` tokens of a running sequence, preempting from the end of the queue until its blocks are there.

        False if it had to give way itself.
        """
        missing = self.blocks.blocks_for(seq.num_computed + n) - len(seq.block_table)
        while missing > self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is seq:
                return False
        if missing > 0:
            seq.block_table += self.blocks.allocate(missing)
            over = len(seq.block_table) - seq.committed_blocks
            if over > 0:
                seq.committed_blocks += over
                self._committed += over
        computed = seq.num_computed
        step.work[seq.id] = Work(seq, computed, n, computed + n - len(seq.token_ids))
        step.tokens -= n
        return True

    def _fit_images(self, seq: Sequence, n: int, step: _Budget) -> int:
        """Hold the images that the next `n` tokens touch, planning their encoding; return how many tokens can run."""
        start = seq.num_computed
        for image in seq.images:
            if image.end <= start:
                continue
            if image.start >= start + n:
                break
            if not self.images.hold(image.digest, seq.id):
                # The first image of a step is let in whatever its size, so that a large page is never stuck.
                fits = not step.encode or image.num_tokens <= step.image_tokens
                if not fits or not self._reserve(seq, image):
                    return max(image.start - start, 0)
                step.encode.append((seq, image))
                step.image_tokens -= image.num_tokens
        return n

    def _shared(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of a waiting sequence already. At least one token is always computed, for its logits."""
        size = self.blocks.block_size
        return self.blocks.match(seq.digests((len(seq.token_ids) - 1) // size, size))

    def _reserve(self, seq: Sequence, image: SequenceImage) -> bool:
        """Reserve space for an image of a running sequence; waiting ones give back theirs for it, the last first."""
        while not self.images.reserve(image.digest, image.num_tokens, seq.id):
            if not self._early:
                return False
            self._let_go(self._early[-1])
        return True

    def _let_go(self, seq: Sequence) -> None:
        """Release the images that a waiting sequence holds."""
        if seq in self._early:
            self._early.remove(seq)
            for image in seq.images:
                self.images.release(image.digest, seq.id)

    def _look_ahead(self) -> list[tuple[Sequence, SequenceImage]]:
        """Images of the sequences that come next, held for them: as many as are encoded in a step, into space that is free."""
        ahead: list[tuple[Sequence, SequenceImage]] = []
        if len(self._early) >= _LOOK_AHEAD:
            return ahead
        images = self.images
        room = self.max_step_image_tokens - sum(seq.num_image_tokens for seq in self._early)
        for _, seq in nsmallest(_LOOK_AHEAD, self._waiting):
            wanted = seq.num_image_tokens
            if seq.finish_reason is not None or seq in self._early or not wanted:
                continue
            room -= wanted
            if room < 0 or images.used_tokens + wanted > images.capacity_tokens:
                break
            shared = len(self._shared(seq)) * self.blocks.block_size
            self._early.append(seq)
            for image in seq.images:
                if image.end > shared and not images.hold(image.digest, seq.id):
                    images.reserve(image.digest, image.num_tokens, seq.id)
                    ahead.append((seq, image))
        return ahead

    def _admit(self, now: float) -> Sequence | None:
        """Make the first waiting sequence running if the blocks it is predicted to need are not spoken for."""
        while self._waiting and self._waiting[0][1].finish_reason is not None:
            heappop(self._waiting)
        if not self._waiting or not self._rows:
            return None
        seq, blocks = self._waiting[0][1], self.blocks
        num_tokens, shared = len(seq.token_ids), self._shared(seq)
        remaining = max(self.predictor.predict(seq) - (num_tokens - seq.num_prompt), blocks.block_size)
        committed = blocks.blocks_for(min(num_tokens + remaining, seq.max_tokens))
        if self.running:
            now_missing = blocks.blocks_for(num_tokens) - len(shared)
            if self._committed + committed > blocks.num_blocks or now_missing > blocks.num_free_besides(
                shared
            ):
                return None
        heappop(self._waiting)
        self.num_waiting -= 1
        if seq in self._early:  # it holds on to its images until they are computed, as all that run
            self._early.remove(seq)
        blocks.share(shared)
        seq.block_table = shared
        seq.num_computed = len(shared) * blocks.block_size
        seq.num_published = len(shared)
        seq.num_synced = 0
        seq.committed_blocks = committed
        seq.row = self._rows.pop()
        if seq.timeline.scheduled is None:
            seq.timeline.scheduled = now
        self._committed += committed
        self.num_shared_tokens += seq.num_computed
        insort(self.running, seq, key=attrgetter("order"))
        return seq

    def _preempt(self, seq: Sequence, step: _Budget) -> None:
        """Take a running sequence's blocks back; it waits at the head of its priority and is computed again."""
        placed = step.work.pop(seq.id, None)
        if placed is not None:
            step.tokens += placed.num_tokens
        self._release(seq)
        seq.num_once_computed = max(seq.num_once_computed, seq.num_computed)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.release(seq.block_table)
        seq.block_table = []
        for image in seq.images:
            self.images.release(image.digest, seq.id)
        self._rows.append(seq.row)
        seq.row = -1
        self._committed -= seq.committed_blocks
        seq.committed_blocks = 0

    def _publish(self, seq: Sequence) -> None:
        full = seq.num_computed // self.blocks.block_size
        digests = seq.digests(full, self.blocks.block_size)
        for i in range(seq.num_published, full):
            self.blocks.publish(seq.block_table[i], digests[i])
        seq.num_published = full
