"""What comes out: `PageResult`, one record a page, and `RequestOutput`, one answer a request."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "degenerate", "error"]
FinishReason = Literal["stop", "length", "loop", "cancelled", "error"]


@dataclass(slots=True)
class TokenCounts:
    """Tokens of one page: `image` placeholders, whole `prompt` (image included), `output`, and those that were generated and
    thrown away again (loops, attempts that were not taken).
    """

    image: int = 0
    prompt: int = 0
    output: int = 0
    discarded: int = 0


@dataclass(slots=True)
class Seconds:
    """Where one page's time went, in seconds of wall clock.

    `queued` waits for the scheduler, `prepare` decodes and patches, `vision` is the page's share of
    its image encoding call, `prefill` and `decode` run from first scheduling to the first token and from
    there to the last.
    """

    queued: float = 0.0
    prepare: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(slots=True)
class LoopEvent:
    """A repetition that the guard found, and what it did about it."""

    kind: str
    """run (one token), period (a body of tokens) or counter (a body whose numbers count)"""
    at: int
    """Output tokens kept: the second repetition began here."""
    period: int
    """Tokens of one repetition."""
    repeats: int
    tokens: int
    """Output tokens thrown away."""
    action: Literal["ban", "close", "end"]
    """The continuation was banned, the string was closed, or the page was ended."""


@dataclass(slots=True)
class PageResult:
    """One page's record; `to_json` writes the keys in this order."""

    source: str
    page: int
    status: Status
    header: str | None = None
    margin: str | None = None
    footer: str | None = None
    text: str | None = None
    finish_reason: FinishReason = "stop"
    tokens: TokenCounts = field(default_factory=TokenCounts)
    seconds: Seconds = field(default_factory=Seconds)
    model: str = ""
    error: str | None = None
    confidence: dict[str, Any] | None = None
    """`mean` and `worst` token probability (`pagemill.decode.verdict.Confidence`) and the mean of each field, in `fields`."""
    mismatch: Literal["little", "much"] | None = None
    """Little text for the page's ink, or much."""
    loops: list[LoopEvent] = field(default_factory=list)
    """Repetitions that the guard found, in every attempt."""
    drafts: tuple[int, int] = (0, 0)
    """Draft tokens verified, and accepted."""
    attempts: int = 1
    """Times the page was generated; 0 where the model was not asked."""
    shortcut: str | None = None
    """Why the model was not asked: `blank`, or the page that this one is an exact duplicate of."""
    raw: str = field(default="", repr=False)
    """The model's output before parsing; not part of the record."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a plain dictionary, keys in the documented order."""
        return {
            "source": self.source,
            "page": self.page,
            "status": self.status,
            "header": self.header,
            "margin": self.margin,
            "footer": self.footer,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "tokens": {
                "image": self.tokens.image,
                "prompt": self.tokens.prompt,
                "output": self.tokens.output,
                "discarded": self.tokens.discarded,
            },
            "seconds": {
                "queued": round(self.seconds.queued, 4),
                "prepare": round(self.seconds.prepare, 4),
                "vision": round(self.seconds.vision, 4),
                "prefill": round(self.seconds.prefill, 4),
                "decode": round(self.seconds.decode, 4),
            },
            "model": self.model,
            "error": self.error,
            "confidence": self.confidence,
            "mismatch": self.mismatch,
            "loops": [asdict(event) for event in self.loops],
            "drafts": {"proposed": self.drafts[0], "accepted": self.drafts[1]},
            "attempts": self.attempts,
            "shortcut": self.shortcut,
        }

    def to_json(self) -> str:
        """Return the record as one line of UTF-8 JSON, without the newline."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class RequestOutput:
    """The answer to one request of `Engine.generate`."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    """None while the request is still running."""
    tokens: TokenCounts
    seconds: Seconds
    logprobs: list[float] | None = None
    """Log-probability of each output token, where `SamplingParams.logprobs` asked for it; NaN where a grammar forced it."""
    error: str | None = None
