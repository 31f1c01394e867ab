"""What an engine has done: steps, tokens by kind, places, blocks and seconds. Counted always, by a few additions a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

_LEVELS = ("max_num_seqs", "num_blocks", "kv_peak_blocks")


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made. `since` gives those of a span; all but the last three only grow.

    Tokens are counted in the step that computes them, each under one of `prefill`, `decode`, `recompute` and
    `rejected_draft`. Seconds are those of the engine's thread: what other threads do beside it does not count. Of a
    GPU, whose work runs behind the thread, images and decoder count by the device's own events, and what the thread does
    meanwhile does not: the stages add up to the time that passed. Where a step was planned ahead, all that is not the device's is
    bookkeeping: what the thread does beside it counts as far as the device waited for it.
    """

    steps: int = 0
    images: int = 0
    """Images encoded, and their tokens."""
    image_tokens: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed for the first time."""
    decode_tokens: int = 0
    """Output tokens computed for the first time, accepted drafts and what a grammar forces included."""
    recompute_tokens: int = 0
    """Tokens computed again, because a preemption took their blocks."""
    rejected_draft_tokens: int = 0
    """Draft tokens that were not what the model says, and tokens of steps planned ahead that nobody needed."""
    accepted_draft_tokens: int = 0
    """Draft tokens that were; they are part of `decode_tokens`."""
    shared_tokens: int = 0
    """Prompt tokens not computed, because their blocks were found by content."""
    preemptions: int = 0
    finished: int = 0
    """Sequences that came to their end (cancelled ones do not count), with the output tokens that they kept and threw away."""
    output_tokens: int = 0
    discarded_tokens: int = 0
    """Loops and attempts that were not taken."""
    encode_s: float = 0.0
    """Seconds of image encoding; on a GPU those that steps waited for it."""
    prefill_s: float = 0.0
    """Seconds of the decoder and its layout. A step's seconds are split by its tokens: those of prompts, computed again or not,
    are prefill, all others decode."""
    decode_s: float = 0.0
    masks_s: float = 0.0
    """Seconds of making token masks, or of waiting for them."""
    sampling_s: float = 0.0
    bookkeeping_s: float = 0.0
    """All else: drafting, scheduling, what happens to a token once it is chosen, accepting requests."""
    place_seconds: float = 0.0
    """Running sequences times the seconds of their steps."""
    kv_block_seconds: float = 0.0
    """KV blocks in use times the seconds of the steps."""
    kv_peak_blocks: int = 0
    """Most KV blocks in use in a step."""
    max_num_seqs: int = 0
    """Places in the batch, and KV blocks in the pool."""
    num_blocks: int = 0

    @property
    def busy_s(self) -> float:
        """Seconds in which the engine's thread did something."""
        return (
            self.encode_s
            + self.prefill_s
            + self.decode_s
            + self.masks_s
            + self.sampling_s
            + self.bookkeeping_s
        )

    @property
    def occupancy(self) -> float:
        """Share of the batch's places that were taken, mean over the seconds of all steps; 0 before the first."""
        return self.place_seconds / (self.busy_s * self.max_num_seqs) if self.steps else 0.0

    @property
    def kv_use(self) -> float:
        """Share of the KV blocks in use, mean over the seconds of all steps; 0 before the first."""
        return self.kv_block_seconds / (self.busy_s * self.num_blocks) if self.steps else 0.0

    def since(self, earlier: EngineStats) -> EngineStats:
        """Return what was counted after `earlier`; the peak and the sizes are this one's own."""
        names = [f.name for f in fields(self) if f.name not in _LEVELS]
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in names})


def total(parts: Sequence[EngineStats]) -> EngineStats:
    """Add up the counters of several engines. Sizes and peak are the largest of one engine, so that the shares stay shares."""
    combine = {f.name: max if f.name in _LEVELS else sum for f in fields(EngineStats)}
    return EngineStats(
        **{name: how([getattr(s, name) for s in parts] or [0]) for name, how in combine.items()}
    )
