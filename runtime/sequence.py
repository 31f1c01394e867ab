"""One request inside the engine: its tokens, images, blocks and progress."""

from __future__ import annotations

import hashlib
import struct
from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagemill.decode.control import Control
from pagemill.decode.sampler import SamplingParams
from pagemill.decode.verdict import Attempt
from pagemill.model.rope import Grid
from pagemill.results import FinishReason


@dataclass(slots=True)
class SequenceImage:
    """One image of a prompt: where its placeholders lie and what is in it."""

    start: int
    """Index of its first placeholder token."""
    num_tokens: int
    grid: Grid
    digest: bytes
    """128-bit content digest of the patches."""
    levels: npt.NDArray[np.float32]
    """float32 `[channels, 256]`, what a byte of the patches stands for."""
    patches: npt.NDArray[np.uint8]
    """uint8 `[t*h*w, channels * patch_size**2]`, kept until the sequence ends: preemption may need them again."""

    @property
    def end(self) -> int:
        """Index after its last placeholder token."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Timeline:
    """Moments of a sequence's life, in seconds of a monotonic clock; None until they happen."""

    arrived: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    vision: float = 0.0
    """Seconds of image encoding attributed to this sequence; none for what was encoded beside earlier steps."""


@dataclass(slots=True)
class FinishedAttempt:
    """One way a page came out, kept until it is known which to take."""

    token_ids: list[int]
    logprobs: list[float]
    closing: str
    degenerate: bool
    verdict: Attempt


@dataclass(slots=True)
class PageTask:
    """What is known of a page beyond its picture."""

    document: str = ""
    """The file it is a page of: pages of one document lend each other drafts."""
    salt: str = ""
    """Pages of another salt lend it nothing."""
    texts: list[list[int]] = field(default_factory=list)
    """Guesses of the whole output, as token ids."""
    num_glyphs: int | None = None
    """Estimated characters on the page, and those that its rules might be."""
    num_rule_glyphs: int = 0
    expected_tokens: int | None = None
    """A bound of the output that is plausible for the page."""


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Lengths come from `token_ids` and `num_computed`, nothing is stored twice."""

    id: int
    token_ids: list[int]
    """Prompt and output so far."""
    num_prompt: int
    images: list[SequenceImage]
    positions: npt.NDArray[np.int32]
    """int32 `[3, num_prompt]`, M-RoPE positions of the prompt."""
    position_delta: int
    """Position minus index for every token after the prompt."""
    params: SamplingParams
    max_tokens: int
    """Most tokens, prompt included, that the sequence may reach."""
    stop_ids: frozenset[int]
    control: Control
    """What steers its tokens: random stream, guidance, loop guard, drafts."""
    priority: int = 0
    """Lower runs first; equal priorities run first come, first served."""
    draft: list[int] = field(default_factory=list)
    """Guesses of the next tokens, for the coming step to verify."""
    num_computed: int = 0
    """Tokens whose keys and values lie in the cache."""
    num_once_computed: int = 0
    """Tokens that were computed before a preemption took their blocks: computing them again is waste."""
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_published: int = 0
    """Leading blocks of the table already made findable."""
    committed_blocks: int = 0
    """Blocks the scheduler counts on this sequence to need in the end."""
    row: int = -1
    """Row in the runner's block-table array while running."""
    num_synced: int = 0
    """Leading blocks of the table that the runner's row holds."""
    num_preemptions: int = 0
    page: PageTask | None = None
    closing: str = ""
    """Text that completes an output which was cut."""
    attempts: list[FinishedAttempt] = field(default_factory=list)
    best: int = 0
    """Index of the attempt that was taken."""
    num_discarded: int = 0
    """Output tokens generated and thrown away again: loops, attempts that were not taken."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """One sentence, where the finish reason is "error"."""
    logprobs: list[float] = field(default_factory=list)
    """Of each output token, natural; NaN where the grammar left no choice and the model was not asked."""
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of the queue: priority, then arrival."""
        return self.priority, self.id

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of all images."""
        return sum(image.num_tokens for image in self.images)

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    def digests(self, count: int, block_size: int) -> list[bytes]:
        """Content digests of the first `count` full blocks: 128-bit BLAKE2b chained over the parent block.

        The bytes hashed are the parent's digest, the token ids, and for every image that the block overlaps the image's
        digest with the block's offset in it.
        """
        for i in range(len(self.block_digests), count):
            start, end = i * block_size, (i + 1) * block_size
            h = hashlib.blake2b(self.block_digests[-1] if i else b"pagemill", digest_size=16)
            h.update(array("q", self.token_ids[start:end]).tobytes())
            for image in self.images:
                if image.start < end and start < image.end:
                    h.update(image.digest + struct.pack("<q", start - image.start))
            self.block_digests.append(h.digest())
        return self.block_digests[:count]
