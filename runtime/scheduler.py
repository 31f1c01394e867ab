"""What runs in each step: one ragged batch under a token budget, images under a pixel budget, blocks under the pool.

There are no prefill and decode phases: a sequence has tokens that are not computed yet, and a step computes some.
Decoding sequences (one token behind) come first, then chunks of running prefills, then waiting sequences are
admitted. Admission counts the blocks that running sequences are predicted to need in the end, never
`max_new_tokens`; where the prediction was too low and blocks run out, the sequence that would be served last
gives its blocks back and is computed again later (most of its blocks are usually still findable by content).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any

from pagemill.cache import BlockPool, ImageCache, OutOfBlocks
from pagemill.results import FinishReason
from pagemill.sequence import Sequence, SequenceImage


@dataclass(slots=True)
class StepPlan:
    """One step: images to encode, then blocks to copy, then tokens to compute, in this order."""

    encode: list[tuple[Sequence, SequenceImage]]
    copies: list[tuple[int, int]]
    """(source, destination) block ids"""
    work: list[tuple[Sequence, int]]
    """Sequences with the number of tokens each computes, from its `num_computed` on. Those whose last token is among
    them get a new one; tokens beyond it are its draft's."""

    def wanting(self) -> Iterator[tuple[Sequence, list[int]]]:
        """The sequences that get new tokens, each with the part of its draft that is computed."""
        for seq, n in self.work:
            drafted = seq.num_computed + n - len(seq.token_ids)
            if drafted >= 0:
                yield seq, seq.draft[:drafted]


@dataclass(slots=True)
class _Budget:
    """A step being planned."""

    tokens: int
    image_tokens: int
    work: dict[int, tuple[Sequence, int]] = field(default_factory=dict)
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
    """Holds every live sequence. `schedule` plans a step, `update` takes its tokens, in turn."""

    def __init__(
        self,
        blocks: BlockPool,
        images: ImageCache[Any],
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_step_image_tokens: int,
    ) -> None:
        self.blocks, self.images = blocks, images
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.max_step_image_tokens = max_step_image_tokens
        self.predictor = OutputLengthPredictor()
        self.running: list[Sequence] = []
        """In serving order: priority, then arrival."""
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
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
            if seq.row >= 0:
                self.finish(seq, "cancelled")
            else:  # its place in the heap is skipped when it comes up
                seq.finish_reason = "cancelled"
                self.num_waiting -= 1
                for image in seq.images:
                    image.patches = image.patches[:0].copy()
                if not self.num_waiting:
                    self._waiting.clear()

    def schedule(self, now: float = 0.0) -> StepPlan:
        """Plan the next step, taking blocks and image space for it. `now` is the clock for timelines, in seconds."""
        step = _Budget(self.max_step_tokens, self.max_step_image_tokens)
        block_size, work = self.blocks.block_size, step.work
        behind: list[Sequence] = []
        for seq in self.running.copy():
            computed = seq.num_computed
            if computed < seq.num_prompt or len(seq.token_ids) - computed > 1:
                behind.append(seq)
            elif seq.row >= 0 and step.tokens:  # a negative row: preempted by an earlier one in this loop
                if computed < len(seq.block_table) * block_size:
                    work[seq.id] = (seq, 1)
                    step.tokens -= 1
                else:
                    self._place(seq, 1, step)
        for seq, n in list(work.values()):
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
        return StepPlan(encode, copies, list(work.values()))

    def update(
        self, plan: StepPlan, token_ids: list[list[int]], logprobs: list[list[float]], now: float = 0.0
    ) -> list[tuple[Sequence, FinishReason]]:
        """Take a step's tokens: one or more for each sequence of `plan.wanting()`, in that order.

        All but the last of a sequence's new tokens are its draft's, whose keys and values are right. Returns the sequences
        that have come to their end and why; `finish` releases them.
        """
        ended: list[tuple[Sequence, FinishReason]] = []
        block_size = self.blocks.block_size
        i = 0
        for seq, n in plan.work:
            total = len(seq.token_ids)
            computed = seq.num_computed + n
            if computed >= total:
                new, new_logprobs = token_ids[i], logprobs[i]
                i += 1
                end = next((at for at, token in enumerate(new, 1) if token in seq.stop_ids), 0)
                room = seq.max_tokens - total
                if end and end <= room:
                    ended.append((seq, "stop"))
                elif len(new) >= room:
                    end = room
                    ended.append((seq, "length"))
                else:
                    end = len(new)
                seq.token_ids += new[:end]
                seq.logprobs += new_logprobs[:end]
                computed = total + end - 1
                if seq.timeline.first_token is None:
                    seq.timeline.first_token = now
            seq.num_computed = computed
            if computed // block_size > seq.num_published:
                self._publish(seq)
            if n > 1 or computed <= seq.num_prompt:
                needed = {image.digest for image in seq.images if image.end > computed}
                for image in seq.images:
                    if image.digest not in needed:
                        self.images.release(image.digest, seq.id)
        if i != len(token_ids):
            raise AssertionError(f"tokens of {len(token_ids)} sequences for {i}")
        return ended

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a running sequence and release all it holds, between steps."""
        if reason == "stop":
            self.predictor.observe(seq)
        self._release(seq)
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
        step.work[seq.id] = (seq, n)
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
                if not fits or not self.images.reserve(image.digest, image.num_tokens, seq.id):
                    return max(image.start - start, 0)
                step.encode.append((seq, image))
                step.image_tokens -= image.num_tokens
        return n

    def _admit(self, now: float) -> Sequence | None:
        """Make the first waiting sequence running if the blocks it is predicted to need are not spoken for."""
        while self._waiting and self._waiting[0][1].finish_reason is not None:
            heappop(self._waiting)
        if not self._waiting or not self._rows:
            return None
        seq, blocks = self._waiting[0][1], self.blocks
        num_tokens = len(seq.token_ids)
        # At least one token is always computed, for its logits.
        shared = blocks.match(seq.digests((num_tokens - 1) // blocks.block_size, blocks.block_size))
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
            step.tokens += placed[1]
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
