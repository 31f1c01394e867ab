"""The public engine: pages and requests in, results out.

One thread drives the core; page preparation runs in worker threads beside it; callers wait on queues. Any number of
callers may use one engine at once: their requests share the batch.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pagemill import kernels
from pagemill.config import EngineConfig
from pagemill.core import EngineCore, TokenizedPrompt
from pagemill.decode.alignment import FAILED, Alignment, field_bits, reference_answer
from pagemill.decode.drafts import draft_text_tokens
from pagemill.decode.guidance import PageFormat
from pagemill.decode.page import parse_page
from pagemill.decode.sampler import SamplingParams
from pagemill.decode.verdict import Confidence
from pagemill.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    PagemillError,
    RequestError,
    sentence,
)
from pagemill.gpu import gpu_of, is_lost, named_device, starting, what_it_said
from pagemill.memory import spending
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint, load_model
from pagemill.model.prompt import Profile, Prompter, page_messages, read_profile
from pagemill.pages.fit import FitOptions, Resolution, fit_page, fit_pixels
from pagemill.pages.ink import plausible_output_chars
from pagemill.pages.listing import Inputs, failed_page, find_pages
from pagemill.pages.preprocess import ImageProcessor, PreparedImage
from pagemill.pages.source import PageRef, list_pages, load_page, page_text
from pagemill.results import PageResult, RequestOutput, Seconds, TokenCounts
from pagemill.sequence import PageTask, Sequence
from pagemill.stats import EngineStats
from pagemill.twins import Twins

T = TypeVar("T")
_Task = Callable[[Callable[[T | DeviceError], None]], None]
"""Starts something and sees to it that the callable it is given gets exactly one result, or that the device is lost."""

_JSON_TOKENS = 64  # a page's keys and punctuation, generously
_SCORED = SamplingParams(guidance="off", guard="off", drafts="off", max_retries=0)

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    # A thread that comes back from a kernel into an interpreter that is gone would abort the process.
    for engine in list(_open_engines):
        engine.close()


Image = npt.NDArray[np.uint8] | PreparedImage | str
"""RGB pixels uint8 `[H, W, 3]`, an image prepared already, or the path of an image file (its first page)."""


@dataclass
class Request:
    """One prompt with its images, for `Engine.generate` and `Engine.stream`."""

    prompt: str | SequenceOf[int] | SequenceOf[dict[str, Any]]
    """Text with an image placeholder for each image, token ids likewise, or chat messages for the model's template."""
    images: SequenceOf[Image] = ()
    params: SamplingParams | None = None
    """Overrides the parameters given to the call."""
    priority: int = 0
    """Lower is served first."""
    request_id: str = ""


@dataclass(frozen=True)
class _PageOptions:
    """How the pages of one call are read."""

    params: SamplingParams
    dpi: float
    fit: FitOptions
    draft_text: Callable[[npt.NDArray[np.uint8]], str] | None = None
    salt: str = ""


@dataclass(eq=False)
class _Call:
    """One caller's requests, so that they can be cancelled together."""

    cancelled: bool = False
    live: set[Sequence] = field(default_factory=set)
    twins: Twins = field(default_factory=Twins)


@dataclass(eq=False)
class _Ticket:
    """One request inside the engine and who is told of it, from the engine's thread."""

    call: _Call
    on_end: Callable[[Sequence | None, str | None], None]
    """Called once, with the sequence (None if it was refused) and an error (None if there was none)."""
    on_token: Callable[[Sequence], None] | None = None


class Engine:
    """Reads pages with one model on one device.

    Use it as a context manager, or call `close`: an engine that is only dropped keeps its thread and its memory.
    """

    def __init__(
        self,
        core: EngineCore,
        processor: ImageProcessor,
        *,
        model: str,
        page_prompt: str,
        profile: Profile,
        load_seconds: float,
    ) -> None:
        self.core, self.processor, self.model = core, processor, model
        self.page_prompt, self.profile = page_prompt, profile
        self.dpi, self.max_new_tokens = profile.dpi, profile.max_new_tokens
        self.load_seconds = load_seconds
        self._pool = ThreadPoolExecutor(core.config.prepare_threads, thread_name_prefix="pagemill-prepare")
        self._tickets: dict[Sequence, _Ticket] = {}
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._pid = os.getpid()
        self._closed = False
        self._ended = False
        self._lost: str | None = None  # why the device cannot be used any more
        self.on_turn: Callable[[], None] = lambda: None
        """Called by the engine's thread before each step, and every second while there is none to do: then it does not hang."""
        self._thread = threading.Thread(target=self._run, name="pagemill-engine", daemon=True)
        self._thread.start()
        _open_engines.add(self)

    @classmethod
    def from_pretrained(cls, name: str = "pagemill-tiny", **options: Any) -> Engine:
        """Load a model: the embedded `pagemill-tiny`, a folder, or a Hugging Face id.

        `options` are the fields of `EngineConfig` (device, dtype, kernels, max_num_seqs, kv_cache_bytes ...). Raises
        `CheckpointError`, `ConfigError`, `KernelUnavailable` or `DeviceError`, one sentence each.
        """
        known = EngineConfig.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown engine option {', '.join(unknown)}; known are {', '.join(known)}")
        config = EngineConfig(**options)
        started = time.perf_counter()
        device = named_device(config.device)
        folder = find_checkpoint(name)
        model_config = read_config(folder)
        dtype = _dtype(config.dtype, model_config.dtype)
        if config.num_threads is not None:
            kernels.set_num_threads(config.num_threads)
        profile = read_profile(folder, name)
        prompter = Prompter(folder, model_config.text.vocab_size, model_config.image_token_id)
        page_prompt = prompter.render(page_messages(profile))
        processor = ImageProcessor.from_folder(folder)
        for name_in_both in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
            ours = getattr(model_config.vision, name_in_both)
            theirs = getattr(processor, name_in_both.removeprefix("spatial_"))
            if ours != theirs:
                raise CheckpointError(
                    f"{folder}: config.json has {name_in_both} {ours}, the image settings have {theirs}"
                )
        with starting(str(device), name):
            chosen = kernels.select(config.kernels, device, dtype)
            with spending(gpu_of(device), f"loading {name}", 'use quantize="int4", or a larger device'):
                model = load_model(
                    folder,
                    model_config,
                    chosen,
                    device,
                    dtype,
                    quantize=config.quantize,
                    weight_cache=config.weight_cache,
                    check_beside=True,
                )
            return cls(
                EngineCore(model, prompter, config, dtype, page_format(profile), processor.max_tokens),
                processor,
                model=name,
                page_prompt=page_prompt,
                profile=profile,
                load_seconds=time.perf_counter() - started,
            )

    def read(
        self,
        inputs: Inputs,
        *,
        params: SamplingParams | None = None,
        dpi: float | None = None,
        resolution: Resolution = "auto",
        crop: bool = False,
        draft_text: Callable[[npt.NDArray[np.uint8]], str] | None = None,
        skip: Container[tuple[str, int]] = (),
        salt: str = "",
    ) -> Iterator[PageResult]:
        """Read the pages of image files, PDFs, folders and globs, lazily, yielding each as it is finished.

        A `PageRef` among the inputs is that one page of its file.
        `dpi` is what PDF pages are rendered at where `resolution` does not say otherwise; `resolution` and `crop` are those of
        `pagemill.pages.fit`. `draft_text` guesses a page's text from its RGB pixels, as a classical OCR engine does: it only
        makes the page faster. A page in `skip`, as (source, page), is not read. Blank pages and exact duplicates of a page
        of this call are answered without the model. Calls of different `salt` share no work, neither cached images, keys and
        values, nor drafts from earlier pages: the first call of a salt reads every page as if for the first time.

        A file or page that cannot be read gives a result with status "error" and never stops the others. Leaving the iterator
        early cancels what is still running. Raises `ConfigError` or `RequestError`, at once, for options that cannot be meant;
        and `DeviceError`, while reading, when the device is lost: the pages not yielded by then were not read.
        """
        pages = find_pages(inputs, skip, self.model)
        start, cancel = self.reading(
            params=params, dpi=dpi, resolution=resolution, crop=crop, draft_text=draft_text, salt=salt
        )

        def tasks() -> Iterator[_Task[PageResult]]:
            for page in pages:
                yield partial(_deliver, page) if isinstance(page, PageResult) else partial(start, page)

        def results() -> Iterator[PageResult]:
            try:
                yield from self._flow(tasks())
            finally:
                cancel()

        return results()

    def reading(
        self,
        *,
        params: SamplingParams | None = None,
        dpi: float | None = None,
        resolution: Resolution = "auto",
        crop: bool = False,
        draft_text: Callable[[npt.NDArray[np.uint8]], str] | None = None,
        salt: str = "",
    ) -> tuple[Callable[[PageRef, Callable[[PageResult | DeviceError], None]], None], Callable[[], None]]:
        """Begin what `read` does, for a caller who brings pages one by one: return `start(page, deliver)` and `cancel()`.

        Every page started has its one result delivered, from a thread of the engine; cancelled ones as errors. How many
        are started ahead is the caller's care. Arguments and errors are those of `read`; a DeviceError is delivered.
        """
        params, call = params or SamplingParams(), _Call()
        if params.guidance == "auto":
            params = replace(params, guidance="page" if self.profile.page_json else "off")
        self.core.check_guidance(params)
        fit = FitOptions(resolution, crop, self.profile.text_height)
        options = _PageOptions(params, dpi or self.dpi, fit, draft_text, salt)

        def start(page: PageRef, deliver: Callable[[PageResult | DeviceError], None]) -> None:
            self._start(self._read_page, page, options, call, deliver)

        return start, partial(self._cancel, call)

    def generate(
        self, requests: SequenceOf[Request], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer requests, in their order. One that cannot be served has finish reason "error" and its reason in `error`."""
        call = _Call()
        tasks = (
            partial(self._start, self._prepare_request, i, request, params, call, None)
            for i, request in enumerate(requests)
        )
        try:
            outputs = dict(self._flow(tasks))
        finally:
            self._cancel(call)
        return [outputs[i] for i in range(len(requests))]

    def score(
        self,
        pages: SequenceOf[Image | PageRef],
        texts: SequenceOf[str | Mapping[str, str | None]],
        *,
        dpi: float | None = None,
        resolution: Resolution = "auto",
        crop: bool = False,
    ) -> Iterator[Alignment]:
        """Tell how well the model expects what pages say: bits per character of `texts[i]`, given `pages[i]`; generates nothing.

        A text is a page's fields, or a string (`decode.alignment.reference_answer`); it is put in the model's own form, and the
        page is shown as `read` shows it. Results come in the order of the pages, lazily. A page that cannot be scored has its
        reason in `error` and never stops the others. Leaving the iterator early cancels what is still running. Raises
        `RequestError` if there are not as many texts as pages.
        """
        if len(pages) != len(texts):
            raise RequestError(
                f"there are {len(pages)} pages with {len(texts)} texts: each page needs its own"
            )
        options = _PageOptions(
            _SCORED, dpi or self.dpi, FitOptions(resolution, crop, self.profile.text_height)
        )
        return self._score(pages, texts, options)

    def _score(
        self,
        pages: SequenceOf[Image | PageRef],
        texts: SequenceOf[str | Mapping[str, str | None]],
        options: _PageOptions,
    ) -> Iterator[Alignment]:
        call = _Call()
        tasks = (
            partial(self._start, self._score_page, i, page, text, options, call)
            for i, (page, text) in enumerate(zip(pages, texts, strict=True))
        )
        early: dict[int, Alignment] = {}
        at = 0
        try:
            for i, alignment in self._flow(tasks):
                early[i] = alignment
                while at in early:
                    yield early.pop(at)
                    at += 1
        finally:
            self._cancel(call)

    def _flow(self, tasks: Iterator[_Task[T]]) -> Iterator[T]:
        """Start tasks, a bounded number ahead, and yield what each delivers, in order of completion.

        The bound keeps enough prepared pages that a free place in the batch never waits, and memory small.
        """
        done: queue.SimpleQueue[T | DeviceError] = queue.SimpleQueue()
        most = self.core.config.max_num_seqs + 2 * self.core.config.prepare_threads
        pending = 0
        while True:
            while pending < most and (task := next(tasks, None)) is not None:
                pending += 1
                task(done.put)
            if not pending:
                return
            if isinstance(result := done.get(), DeviceError):
                raise result
            yield result
            pending -= 1

    async def stream(
        self, request: Request, params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Answer one request as it grows: yields the output so far, the last one with its finish reason.

        A slow reader misses intermediate states, never the last. Leaving the iterator cancels the request.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        latest: list[RequestOutput | DeviceError] = []
        call = _Call()

        def deliver(numbered: tuple[int, RequestOutput] | DeviceError) -> None:
            def on_loop() -> None:
                latest[:] = [numbered if isinstance(numbered, DeviceError) else numbered[1]]
                arrived.set()

            with suppress(RuntimeError):  # the caller's loop has ended, and with it all interest
                loop.call_soon_threadsafe(on_loop)

        self._start(self._prepare_request, 0, request, params, call, deliver, deliver)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                if isinstance(output := latest[0], DeviceError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._cancel(call)

    def describe(self) -> dict[str, Any]:
        """What this engine is: model, dtype, the kernels in use, and its budgets."""
        core, text = self.core, self.core.model.config.text
        block_size = core.blocks.block_size
        return {
            "model": self.model,
            "device": str(core.model.vision.device),
            "dtype": str(core.model.vision.dtype).removeprefix("torch."),
            "quantize": core.config.quantize,
            "checkpoint": core.model.checkpoint,
            "kernels": core.model.decoder.kernels.describe(),
            "weights": core.model.weights,
            "layers": text.num_layers,
            "vocabulary": text.vocab_size,
            "max_model_len": core.max_model_len,
            "max_num_seqs": core.config.max_num_seqs,
            "max_step_tokens": core.config.max_step_tokens,
            "prepare_threads": core.config.prepare_threads,
            "kv_cache_bytes": core.kv_cache_bytes,
            "kv_cache_dtype": str(core.kv_dtype).removeprefix("torch."),
            "kv_cache_blocks": core.blocks.num_blocks,
            "kv_block_size": block_size,
            "kv_cache_tokens": core.blocks.num_blocks * block_size,
            "prefix_sharing": core.blocks.prefix_sharing,
            "page_dpi": self.dpi,
            "page_text_height": self.profile.text_height,
            "page_guidance": "page" if self.profile.page_json else "off",
            "max_new_tokens": self.max_new_tokens,
            "load_seconds": round(self.load_seconds, 3),
        }

    def stats(self, *, restart_peak: bool = False) -> EngineStats:
        """What the engine has done so far, up to the last step but perhaps one.

        With `restart_peak`, the peak of KV use begins anew.
        """
        core = self.core
        snapshot = replace(
            core.stats,
            shared_tokens=core.scheduler.num_shared_tokens,
            preemptions=core.scheduler.num_preemptions,
        )
        if restart_peak:
            core.stats.kv_peak_blocks = 0
        return snapshot

    def close(self) -> None:
        """Cancel what runs and end the engine's threads."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        with suppress(Exception) if self._lost else nullcontext():
            self.core.close()
        self._pool.shutdown()  # what is queued there finds the engine closed and says so

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Worker threads: pages and requests become queued sequences.

    def _start(self, task: Callable[..., None], *args: object) -> None:
        if not self._closed and os.getpid() == self._pid:
            try:
                self._pool.submit(task, *args)
                return
            except RuntimeError:  # closed in this moment
                if not self._closed:
                    raise
        task(*args)  # the task finds that there is no engine and says so

    def _check_open(self, call: _Call) -> None:
        if os.getpid() != self._pid:
            raise RequestError("an engine does not survive a fork; make one in each process")
        if self._lost:
            raise DeviceError(self._lost)
        if call.cancelled or self._closed:
            raise RequestError("cancelled" if call.cancelled else "the engine is closed")

    def _read_page(
        self,
        ref: PageRef,
        options: _PageOptions,
        call: _Call,
        deliver: Callable[[PageResult | DeviceError], None],
        alone: bool = False,
    ) -> None:
        """Prepare one page and queue it; whatever happens, exactly one result is delivered. `alone` looks for no duplicate."""
        started = time.perf_counter()
        prepare = 0.0
        leads: bytes | None = None
        """Content that others may wait for."""

        def finish(result: PageResult) -> None:
            if leads is not None:
                call.twins.settle(leads, result)
            deliver(DeviceError(self._lost) if self._lost and result.status == "error" else result)

        def on_end(seq: Sequence | None, error: str | None) -> None:
            if seq is None or error is not None or seq.finish_reason == "cancelled":
                finish(failed_page(ref.source, ref.page, error or "cancelled", self.model, prepare))
            else:
                finish(self._page_result(ref, seq, prepare))

        def follow(first: PageResult | None) -> None:
            if first is None:
                self._start(self._read_page, ref, options, call, deliver, True)
                return
            same = f"duplicate of {first.source} page {first.page}"
            deliver(
                replace(
                    first,
                    source=ref.source,
                    page=ref.page,
                    tokens=TokenCounts(),
                    seconds=Seconds(prepare=prepare),
                    loops=[],
                    drafts=(0, 0),
                    attempts=0,
                    shortcut=same,
                )
            )

        try:
            self._check_open(call)
            image, ink = fit_page(ref, options.dpi, options.fit, self.processor)
            if options.salt:
                salted = hashlib.blake2b(image.content_hash + options.salt.encode(), digest_size=16)
                image = replace(image, content_hash=salted.digest())
            prepare = time.perf_counter() - started
            if ink.blank:
                deliver(
                    PageResult(
                        ref.source,
                        ref.page,
                        "ok",
                        seconds=Seconds(prepare=prepare),
                        model=self.model,
                        attempts=0,
                        shortcut="blank",
                    )
                )
                return
            if not alone:
                if call.twins.join(image.content_hash, follow):
                    return
                leads = image.content_hash
            prompt = self.core.tokenize(self.page_prompt, [image])
            bound, expected = self.max_new_tokens, None
            if self.profile.page_json:  # others write Markdown and HTML, which leave no ink
                chars = plausible_output_chars(ink)  # a token is a character or more
                bound, expected = min(bound, chars + _JSON_TOKENS), chars // 2 + _JSON_TOKENS
            task = PageTask(
                document=ref.source,
                salt=options.salt,
                texts=self._draft_texts(ref, options),
                num_glyphs=ink.num_glyphs,
                num_rule_glyphs=ink.num_rule_glyphs,
                expected_tokens=expected,
            )
            prepare = time.perf_counter() - started
            self._submit(prompt, options.params, 0, _Ticket(call, on_end), bound, task)
        except Exception as error:  # one page's surprise must not cost another page
            on_end(None, sentence(error))

    def _draft_texts(self, ref: PageRef, options: _PageOptions) -> list[list[int]]:
        """Guesses of the page's text as tokens: its text layer, and what the caller's own engine reads."""
        if options.params.drafts == "off":
            return []
        encode = self.core.prompter.encode_text
        texts: list[list[int]] = []
        with suppress(PagemillError):  # the page itself could be rendered
            texts.append(draft_text_tokens(page_text(ref), encode))
        if options.draft_text is not None:
            try:
                texts.append(draft_text_tokens(options.draft_text(load_page(ref, options.dpi)), encode))
            except Exception as error:  # a page needs no draft
                warnings.warn(
                    f"draft_text failed on {ref.source} page {ref.page}: {sentence(error)}", stacklevel=2
                )
        return [text for text in texts if text]

    def _page_result(self, ref: PageRef, seq: Sequence, prepare: float) -> PageResult:
        raw = self.core.text_of(seq)
        reason = seq.finish_reason or "error"
        fields = parse_page(raw)
        attempt, control = seq.attempts[seq.best], seq.control
        if not attempt.degenerate:
            self.core.drafts(seq.page.salt if seq.page else "").add(ref.source, seq.output_ids)
        return PageResult(
            source=ref.source,
            page=ref.page,
            status="degenerate" if attempt.degenerate else "ok",
            header=fields.header,
            margin=fields.margin,
            footer=fields.footer,
            text=fields.text,
            finish_reason=reason,
            tokens=_tokens(seq),
            seconds=_seconds(seq, prepare),
            model=self.model,
            confidence=_rounded(attempt.verdict.confidence),
            mismatch=attempt.verdict.mismatch,
            loops=control.events,
            drafts=(control.num_drafted, control.num_accepted),
            attempts=len(seq.attempts),
            raw=raw,
        )

    def _prepare_request(
        self,
        number: int,
        request: Request,
        params: SamplingParams | None,
        call: _Call,
        on_output: Callable[[tuple[int, RequestOutput]], None] | None,
        deliver: Callable[[tuple[int, RequestOutput] | DeviceError], None],
    ) -> None:
        """Prepare one request and queue it; whatever happens, `deliver` gets exactly one final output, with `number`."""
        started = time.perf_counter()
        prepare = 0.0

        def output(seq: Sequence) -> RequestOutput:
            return RequestOutput(
                request_id=request.request_id,
                text=self.core.text_of(seq),
                token_ids=seq.output_ids,
                finish_reason=seq.finish_reason,
                tokens=_tokens(seq),
                seconds=_seconds(seq, prepare),
                logprobs=list(seq.logprobs) if seq.params.logprobs else None,
            )

        def on_end(seq: Sequence | None, error: str | None) -> None:
            if seq is None or error is not None:
                failed = RequestOutput(
                    request.request_id, "", [], "error", TokenCounts(), Seconds(), error=error
                )
                deliver(DeviceError(self._lost) if self._lost else (number, failed))
            else:
                deliver((number, output(seq)))

        try:
            self._check_open(call)
            images = [self._prepare_image(image) for image in request.images]
            prompt: str | list[int]
            if isinstance(request.prompt, str):
                prompt = request.prompt
            elif request.prompt and isinstance(request.prompt[0], dict):
                prompt = self.core.prompter.render(request.prompt)  # type: ignore[arg-type]
            else:
                prompt = list(request.prompt)  # type: ignore[arg-type]
            tokenized = self.core.tokenize(prompt, images)
            chosen = request.params or params or SamplingParams()
            if isinstance(chosen, SamplingParams):
                self.core.check_guidance(chosen)  # here, where compiling it makes nobody wait
            prepare = time.perf_counter() - started
            on_token = None if on_output is None else lambda seq: on_output((number, output(seq)))
            ticket = _Ticket(call, on_end, on_token)
            self._submit(tokenized, chosen, request.priority, ticket)
        except Exception as error:
            on_end(None, sentence(error))

    def _score_page(
        self,
        number: int,
        page: Image | PageRef,
        text: str | Mapping[str, str | None],
        options: _PageOptions,
        call: _Call,
        deliver: Callable[[tuple[int, Alignment] | DeviceError], None],
    ) -> None:
        """Prepare one page with its reference and queue it; `deliver` gets exactly one result, with `number`."""
        started = time.perf_counter()
        ref = PageRef(page, 1) if isinstance(page, str) else page if isinstance(page, PageRef) else None
        source, number_in_source = ("", number + 1) if ref is None else (ref.source, ref.page)
        prepare = 0.0

        def on_end(seq: Sequence | None, error: str | None) -> None:
            error = error or ("cancelled" if seq is None or seq.finish_reason != "stop" else None)
            if seq is None or error is not None:
                alignment = Alignment(source, number_in_source, FAILED, {}, error=error)
            else:
                pieces = self.core.pieces_of(seq.output_ids)
                alignment = Alignment(
                    source,
                    number_in_source,
                    *field_bits(pieces, seq.logprobs),
                    tokens=_tokens(seq),
                    seconds=_seconds(seq, prepare),
                    logprobs=seq.logprobs,
                )
            deliver(DeviceError(self._lost) if self._lost and alignment.error else (number, alignment))

        try:
            self._check_open(call)
            if ref is not None:
                image, _ = fit_page(ref, options.dpi, options.fit, self.processor)
            elif isinstance(page, PreparedImage):
                image = page
            else:
                image, _ = fit_pixels(np.asarray(page), options.fit, self.processor)
            prompt = self.core.tokenize(self.page_prompt, [image])
            answer = reference_answer(text, self.core.page_format if self.profile.page_json else None)
            reference = self.core.prompter.encode_text(answer)
            prepare = time.perf_counter() - started
            self._submit(prompt, options.params, 0, _Ticket(call, on_end), reference=reference)
        except Exception as error:  # one page's surprise must not cost another page
            on_end(None, sentence(error))

    def _prepare_image(self, image: Image) -> PreparedImage:
        if isinstance(image, PreparedImage):
            return image
        if isinstance(image, str):
            image = load_page(next(list_pages(image)), self.dpi)
        return self.processor.prepare(image)

    # The engine's thread: everything that touches the core.

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._ended:
                self._inbox.append(command)
                self._wake.notify()
                return
        command()  # the thread is gone and touches nothing any more: submissions are refused, cancellations are void

    def _submit(
        self,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        priority: int,
        ticket: _Ticket,
        max_new_tokens: int | None = None,
        page: PageTask | None = None,
        reference: SequenceOf[int] | None = None,
    ) -> None:
        def command() -> None:
            try:
                self._check_open(ticket.call)
                most = max_new_tokens or self.max_new_tokens
                seq = self.core.add(prompt, params, most, priority, page, reference)
            except Exception as error:  # one request's surprise must not cost another
                ticket.on_end(None, sentence(error))
                return
            self._tickets[seq] = ticket
            ticket.call.live.add(seq)

        self._post(command)

    def _cancel(self, call: _Call) -> None:
        call.cancelled = True

        def command() -> None:
            for seq in list(call.live):
                self.core.cancel(seq)
                self._end(seq, None)

        self._post(command)

    def _end(self, seq: Sequence, error: str | None) -> None:
        ticket = self._tickets.pop(seq, None)
        if ticket is None:
            return
        ticket.call.live.discard(seq)
        ticket.on_end(seq, error or seq.error)

    def _run(self) -> None:
        if all(kind.startswith("native") for kind in self.core.model.decoder.kernels.describe().values()):
            # Torch has only glue left to do here. Its OpenMP threads would wait for each other at barriers on cores that
            # the native kernels use: milliseconds for microseconds of work.
            torch.set_num_threads(1)
        if self.core.gpu is not None:
            self.core.gpu.use()
        commands: list[Callable[[], None]] = []
        try:
            while not self._closed:
                with self._wake:
                    while not (self._inbox or self._closed or self.core.scheduler.has_work):
                        self.on_turn()
                        self._wake.wait(1.0)
                    commands, self._inbox = self._inbox, []
                self.on_turn()
                started = time.perf_counter()
                while commands:
                    commands.pop(0)()
                if not self.core.ahead:
                    self.core.stats.bookkeeping_s += time.perf_counter() - started
                if self.core.scheduler.has_work and not self._closed:
                    self._step()
        finally:  # also after a bug in a callback: nobody may wait forever
            self._closed = True
            with self._wake:
                self._inbox = commands + self._inbox
            while not self._ended:
                for seq in list(self._tickets):
                    with suppress(Exception):
                        self.core.cancel(seq)
                    with suppress(Exception):
                        self._end(seq, "the engine was closed before the end")
                with self._wake:
                    commands, self._inbox = self._inbox, []
                    self._ended = not commands
                for command in commands:
                    with suppress(Exception):
                        command()

    def _step(self) -> None:
        failed = False
        try:
            advanced, finished = self.core.step()
        except Exception as error:
            # The running sequences cannot be trusted any more; the engine can, once they have given back what they held.
            reason = f"the engine failed on this batch: {sentence(error)}"
            if is_lost(error, self.core.gpu):
                # Nothing of this process will run there again: every page would fail, so that none is begun.
                device = "the device" if self.core.gpu is None else self.core.gpu.device
                self._lost = reason = (
                    f"{device} is lost to this process ({what_it_said(error)}); "
                    "begin it anew: the pages that were not finished were not read"
                )
                self._closed = True
            for seq in list(self.core.scheduler.running):
                self.core.cancel(seq)
                self._end(seq, reason)
            for seq in [seq for seq in self._tickets if seq.finish_reason is not None]:  # in this very step
                self._end(seq, None)
            advanced = finished = []
            failed = True
        if failed and self.core.gpu is not None:
            # Now that the error is gone, which held what it was raised over.
            with suppress(Exception):
                self.core.gpu.tidy()
        for seq in advanced:
            if seq.finish_reason is None and (on_token := self._tickets[seq].on_token) is not None:
                on_token(seq)
        for seq in finished:
            self._end(seq, None)


def _deliver(result: T, deliver: Callable[[T], None]) -> None:
    deliver(result)


def _tokens(seq: Sequence) -> TokenCounts:
    num_output = len(seq.token_ids) - seq.num_prompt
    return TokenCounts(seq.num_image_tokens, seq.num_prompt, num_output, seq.num_discarded)


def _seconds(seq: Sequence, prepare: float) -> Seconds:
    t = seq.timeline
    end = t.finished if t.finished is not None else time.perf_counter()
    scheduled = t.scheduled if t.scheduled is not None else end
    first = t.first_token if t.first_token is not None else end
    return Seconds(
        queued=scheduled - t.arrived,
        prepare=prepare,
        vision=t.vision,
        prefill=max(first - scheduled - t.vision, 0.0),
        decode=end - first,
    )


def _rounded(confidence: Confidence) -> dict[str, Any]:
    def brief(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    fields = {name: brief(value) for name, value in confidence.fields.items()}
    return {"mean": brief(confidence.mean), "worst": brief(confidence.worst), "fields": fields}


def page_format(profile: Profile) -> PageFormat:
    """How a model of this profile writes a page's JSON."""
    return PageFormat(
        profile.keys, profile.key_order, profile.optional_keys, profile.item_separator, profile.key_separator
    )


def _dtype(asked: str, stored: str) -> torch.dtype:
    """The dtype to compute in; `auto` is the checkpoint's, and bfloat16 for one stored in float16."""
    if asked == "auto":
        asked = "float32" if stored == "float32" else "bfloat16"
    return torch.float32 if asked == "float32" else torch.bfloat16
