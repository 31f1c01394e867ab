"""The engine's inside: requests in, one step at a time, finished sequences out. One thread drives it.

A step: drafts are guessed, the scheduler plans, token masks are computed while the model runs, tokens are chosen and verified.
Then, a sequence at a time: a loop is rolled back, tokens that the grammar forces are appended, and what has ended is finished, or
begun again from its prompt.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite, nan

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagemill.cache import BlockPool, ImageCache
from pagemill.config import EngineConfig, default_fraction
from pagemill.decode.control import Control
from pagemill.decode.drafts import DraftBudget, Drafter, DraftIndex
from pagemill.decode.guidance import GuideFactory, PageFormat
from pagemill.decode.loops import LoopDetector, token_pieces
from pagemill.decode.page import is_degenerate, is_json_object, parse_page
from pagemill.decode.sampler import SamplingParams, Want, choose, sample
from pagemill.decode.verdict import Attempt, best_attempt, confidence, num_printed, text_mismatch
from pagemill.errors import ConfigError, RequestError, sentence
from pagemill.gpu import Gpu, gpu_of, to_device
from pagemill.memory import free_memory, gigabytes, spending
from pagemill.model.loader import Model
from pagemill.model.prompt import Prompter
from pagemill.model.rope import mrope_positions
from pagemill.pages.preprocess import PreparedImage
from pagemill.results import FinishReason
from pagemill.runner import Embeddings, Runner, block_bytes
from pagemill.scheduler import Scheduler, StepPlan, Work
from pagemill.sequence import FinishedAttempt, PageTask, Sequence, SequenceImage, Timeline
from pagemill.stats import EngineStats

_KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_DEFAULT_MODEL_LEN = 32768
_MAX_DRAFT = 16  # tokens guessed for one sequence in one step
GIVEN_ROWS = 256  # tokens of references judged in one step: a row of logits takes up to 0.6 MB
_ROWS_BESIDE = 48  # masks of fewer rows are made after the model has run: another thread takes over too late
_MAX_SALTS = 4  # whose outputs are remembered for drafts: some 25 MB each
_NOT_FINITE = "the model computed values that are not finite numbers; try float32, or check the checkpoint"
_LOWER_STEP = "lower max_step_tokens, max_step_image_tokens or max_num_seqs, or quantize the weights"
_LOWER_GRAPHS = "lower kv_cache_fraction or max_num_seqs, or set cuda_graphs=False"
_LOWER_USE = "lower kv_cache_fraction, max_step_tokens or max_step_image_tokens"
_RETRY_TEMPERATURE = 0.3  # enough to leave the path that ended badly


@dataclass
class TokenizedPrompt:
    """A prompt ready to be queued: tokens with placeholders expanded, and its images."""

    token_ids: list[int]
    images: list[SequenceImage]


_Tokens = tuple[list[list[int]], list[list[float]]]
"""What `sample` returns: of each of a step's sequences, new tokens and their log-probabilities."""


@dataclass
class _Flight:
    """A step that was given to the device."""

    plan: StepPlan
    wanting: list[Work]
    """Its rows of logits, in order."""
    drafts: list[list[int]]
    logits: Tensor
    masks: Future[npt.NDArray[np.int32]] | None
    started: float
    """When it was planned, or, if that was ahead, when the tokens before it were known."""
    clock: float
    """From when on it is counted for the draft budget, by the clock of that."""
    early: bool
    """Whether it was planned ahead."""

    @property
    def simple(self) -> bool:
        """Whether each sequence gets one token, and all tokens are to be chosen."""
        return not any(self.drafts) and all(work.seq.control.reference is None for work in self.wanting)


class EngineCore:
    """Scheduler, cache and runner of one model on one device."""

    def __init__(
        self,
        model: Model,
        prompter: Prompter,
        config: EngineConfig,
        dtype: torch.dtype,
        page_format: PageFormat | None = None,
        max_image_tokens: int = 0,
    ) -> None:
        """`max_image_tokens`: of the largest image that may come, for which a GPU's memory has to suffice."""
        text = model.config.text
        self.model, self.prompter, self.config = model, prompter, config
        self.gpu = gpu_of(model.vision.device)
        self._ahead = config.overlap and self.gpu is not None
        self.max_model_len = config.max_model_len or min(text.max_position_embeddings, _DEFAULT_MODEL_LEN)
        if self.max_model_len > text.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {self.max_model_len} is beyond the model's {text.max_position_embeddings} positions"
            )
        self._max_image_tokens = min(max_image_tokens, self.max_model_len)
        self.images: ImageCache[Embeddings] = ImageCache(2 * config.max_step_image_tokens)
        self.kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
        if self.kv_dtype not in (dtype, *model.decoder.kernels.quantised_kv):
            raise ConfigError(
                f'kv_cache_dtype "{config.kv_cache_dtype}" needs the Triton kernels and a GPU of compute capability 8.9 or '
                'newer; "int8" takes as many bytes'
            )
        per_block = block_bytes(
            text.num_layers, text.num_kv_heads, text.head_dim, config.block_size, self.kv_dtype
        )
        fraction = config.kv_cache_fraction or default_fraction("cpu" if self.gpu is None else "cuda")
        free = max(0, free_memory(self.gpu) - model.mapped_bytes)
        if self.gpu is not None:
            free -= self._needed(self.gpu, free)
        if config.kv_cache_bytes is not None and config.kv_cache_bytes > free:
            raise ConfigError(
                f"kv_cache_bytes {config.kv_cache_bytes} is more than the {free} bytes of free memory"
            )
        self.kv_cache_bytes = config.kv_cache_bytes or min(
            int(fraction * free),
            per_block * config.max_num_seqs * -(-self.max_model_len // config.block_size),
        )
        num_blocks = self.kv_cache_bytes // per_block
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes {self.kv_cache_bytes} is less than one KV block ({per_block} bytes)"
            )
        self.blocks = BlockPool(num_blocks, config.block_size, config.prefix_sharing)
        self.scheduler = Scheduler(
            self.blocks,
            self.images,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
            max_step_image_tokens=config.max_step_image_tokens,
            encode_ahead=self._ahead,
        )
        self.runner = self._runner(num_blocks)
        if config.cuda_graphs:
            with spending(self.gpu, "recording decode steps", _LOWER_GRAPHS):
                self.runner.record_graphs()
        self._draft_indexes: OrderedDict[str, DraftIndex] = OrderedDict()
        self.draft_budget = DraftBudget()
        self.page_format = page_format or PageFormat()
        # This thread's own time on the CPU: what else runs there does not make drafts dearer.
        self._clock = time.thread_time if self.gpu is None else time.perf_counter
        self._guides = GuideFactory(
            prompter.tokenizer, text.vocab_size, model.config.eos_token_ids, self.page_format
        )
        self._pieces = token_pieces(prompter.tokenizer, text.vocab_size)
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="pagemill-masks")
        self._next_id = 0
        self._flight: _Flight | None = None
        """The step that the device was given before the tokens of the one before it were known."""
        self._dropped: list[StepPlan] = []
        """Steps that the device was given and nobody waited for."""
        self._known: float | None = None
        """On a GPU: when the last step's tokens were known, if there is something left to do since then."""
        self.stats = EngineStats(max_num_seqs=config.max_num_seqs, num_blocks=num_blocks)

    def _runner(self, num_blocks: int) -> Runner:
        config, device = self.config, self.model.vision.device
        return Runner(
            self.model,
            self.images,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            device=device,
            dtype=self.kv_dtype,
            gpu=self.gpu,
            overlap=config.overlap,
        )

    def _needed(self, gpu: Gpu, free: int) -> int:
        """Bytes of a GPU that keys and values may not take, found by computing the largest steps (and smaller ones, whose
        kernels no page is to wait for).

        Raises `ConfigError` where that leaves nothing.
        """
        config, text = self.config, self.model.config.text
        trial = self._runner(1)
        with spending(gpu, "computing the largest step", _LOWER_STEP):
            rows = min(config.max_step_tokens, max(GIVEN_ROWS, config.max_num_seqs * (1 + _MAX_DRAFT)))
            step = gpu.peak(
                lambda: trial.try_steps(
                    config.max_step_tokens, max(config.max_step_image_tokens, self._max_image_tokens), rows
                )
            )
            if config.cuda_graphs:  # recorded steps have memory of their own
                step += gpu.peak(trial.try_decoding)
        images = self.images.capacity_tokens * text.hidden_size * self.model.vision.dtype.itemsize
        if step + images >= free:
            raise ConfigError(
                f"{gpu.device} has {gigabytes(free)} free beside the model, and the largest step takes "
                f"{gigabytes(step + images)} of it; {_LOWER_STEP}"
            )
        return step + images

    def close(self) -> None:
        """End the thread that computes token masks."""
        self._mask_thread.shutdown()

    def tokenize(self, prompt: str | SequenceOf[int], images: SequenceOf[PreparedImage]) -> TokenizedPrompt:
        """Expand a prompt's image placeholders. Safe to call from any thread.

        Raises `RequestError` when placeholders and images do not match, or a token is not in the vocabulary.
        """
        config = self.model.config
        for image in images:
            (t, h, w), merge = image.grid, config.vision.spatial_merge_size
            whole = h % merge == w % merge == 0 and image.num_tokens == t * h * w // merge**2
            if not whole or image.patches.shape != (t * h * w, config.vision.patch_bytes):
                raise RequestError(
                    f"a prepared image has grid {image.grid}, {image.num_tokens} tokens and patches of shape "
                    f"{image.patches.shape}, which do not belong together in this model"
                )
            levels = (config.vision.in_channels, 256)
            typed = image.patches.dtype == np.uint8 and image.levels.dtype == np.float32
            if not typed or image.levels.shape != levels:
                raise RequestError(
                    f"a prepared image should have patches of uint8 and levels of float32 {list(levels)}, it has "
                    f"{image.patches.dtype} and {image.levels.dtype} {list(image.levels.shape)}"
                )
        counts = [image.num_tokens for image in images]
        if isinstance(prompt, str):
            token_ids, starts = self.prompter.encode(prompt, counts)
        else:
            token_ids, starts = self.prompter.expand(prompt, counts)
            vocab = config.text.vocab_size
            if not all(isinstance(token, int) and 0 <= token < vocab for token in token_ids):
                raise RequestError(
                    f"the prompt should hold token ids, integers inside the vocabulary of {vocab}"
                )
        return TokenizedPrompt(
            token_ids,
            [
                SequenceImage(
                    start,
                    image.num_tokens,
                    image.grid,
                    image.content_hash,
                    image.levels,
                    np.ascontiguousarray(image.patches),
                )
                for start, image in zip(starts, images, strict=True)
            ],
        )

    def add(
        self,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        max_new_tokens: int,
        priority: int = 0,
        page: PageTask | None = None,
        reference: SequenceOf[int] | None = None,
    ) -> Sequence:
        """Queue a request; `page` marks it as a page, `reference` is an output that is given and only to be scored.

        A reference is a draft that is always accepted: its tokens and their log-probabilities become the sequence's, several
        a step, and it ends with "stop". Raises `RequestError` if the prompt is empty or too long for the context or the KV
        budget, its guidance is none, or the reference is empty or does not fit.
        """
        if not isinstance(params, SamplingParams) or not isinstance(priority, int):
            raise RequestError("params should be SamplingParams and priority an integer")
        num_prompt = len(prompt.token_ids)
        pool = self.blocks.num_blocks * self.blocks.block_size
        if not num_prompt:
            raise RequestError("the prompt is empty")
        if num_prompt >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, the context holds {self.max_model_len} with at least one of output; "
                "use a smaller image or a larger max_model_len"
            )
        if num_prompt >= pool:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, the KV cache holds {pool}; raise kv_cache_bytes or use a smaller image"
            )
        if reference is not None and not 0 < len(reference) <= min(self.max_model_len, pool) - num_prompt:
            raise RequestError(
                f"the reference has {len(reference)} tokens after {num_prompt} of the prompt; it should have at least one, "
                f"and both together at most {min(self.max_model_len, pool)} (max_model_len, kv_cache_bytes)"
            )
        config = self.model.config
        max_new = params.max_new_tokens or max_new_tokens if reference is None else len(reference)
        positions, delta = mrope_positions(
            num_prompt,
            [(image.start, image.grid) for image in prompt.images],
            config.vision.spatial_merge_size,
        )
        control = self._control(params, page, reference)
        seq = Sequence(
            id=self._next_id,
            token_ids=prompt.token_ids,
            num_prompt=num_prompt,
            images=prompt.images,
            positions=positions,
            position_delta=delta,
            params=params,
            max_tokens=min(num_prompt + max_new, self.max_model_len, pool),
            stop_ids=frozenset()
            if reference or (params.ignore_eos and control.guide is None)
            else config.eos_token_ids,
            control=control,
            priority=priority,
            page=page,
            timeline=Timeline(arrived=time.perf_counter()),
        )
        self._next_id += 1
        self._append(seq, [] if seq.control.guide is None else seq.control.guide.forced())
        self.scheduler.add(seq)
        return seq

    def check_guidance(self, params: SamplingParams) -> None:
        """Raise `RequestError` for guidance that cannot be followed. Safe to call from any thread."""
        if params.guidance not in ("auto", "off"):
            self._guides.compile(params.guidance)  # type: ignore[arg-type]

    def _control(
        self, params: SamplingParams, page: PageTask | None, reference: SequenceOf[int] | None
    ) -> Control:
        if reference is not None:
            return Control(params, reference=reference)
        guide = guard = drafter = None
        if params.guidance not in ("auto", "off"):
            guide = self._guides.start(self._guides.compile(params.guidance))  # type: ignore[arg-type]
        if params.guard != "off" and not params.ignore_eos:
            guard = LoopDetector(self._pieces, None if page is None else page.expected_tokens)
        if params.drafts == "auto" and not params.stop:  # a stop string may end inside a draft
            page = page or PageTask()
            drafter = Drafter(
                vocabulary=self._pieces,
                texts=page.texts,
                index=self.drafts(page.salt),
                document=page.document,
                encode=self.prompter.encode_text,
            )
        return Control(params, guide=guide, guard=guard, drafter=drafter)

    def drafts(self, salt: str) -> DraftIndex:
        """Outputs of earlier pages of this salt. The few salts used last are remembered."""
        index = self._draft_indexes.setdefault(salt, DraftIndex())
        self._draft_indexes.move_to_end(salt)
        if len(self._draft_indexes) > _MAX_SALTS:
            self._draft_indexes.popitem(last=False)
        return index

    @property
    def ahead(self) -> bool:
        """Whether the device is at work on a step: what this thread does meanwhile costs no time."""
        return self._flight is not None

    def step(self) -> tuple[list[Sequence], list[Sequence]]:
        """Run one step. Returns the sequences that got tokens, and those of them (or others) that ended.

        On a GPU the next step is often launched before this one's tokens are read, so that all that follows from them is done
        while the device computes: between two calls a step is then under way, planned as if no sequence had ended or looped.
        """
        begun, pending = time.perf_counter(), list[tuple[Sequence, int]]()
        self._drop_if_idle()
        flight, self._flight = self._flight, None
        try:
            if flight is None:
                self._guess()
                flight = self._launch(early=False)
                if not flight.plan.work and self.scheduler.has_work:
                    raise AssertionError("live sequences, but nothing could be scheduled")
            tokens, masks_made = self._choose(flight)
            self._count(flight.plan)
            pending = self.scheduler.advance(flight.plan)
            if self._ahead and flight.simple and self._may_go_ahead():
                following = self._launch(early=True)
                self._flight = following if following.plan.work else None
            token_ids, logprobs = tokens()
            now = time.perf_counter()
            if self._flight is not None:
                self._flight.started = self._flight.clock = now
            places, used = len(self.scheduler.running), self.blocks.num_blocks - self.blocks.num_free
            self._time(flight, begun, masks_made, now)
            advanced = [seq for seq, _ in pending]
            lengths = [len(seq.token_ids) - 1 for seq in advanced]
            new = ((seq, token_ids[i], logprobs[i]) for seq, i in pending)
            reasons = dict(self.scheduler.settle(new, now))
        except BaseException:
            self._flight = self._known = None
            self.scheduler.abandon(pending)
            raise
        finished: list[Sequence] = []
        stats = self.stats
        for (seq, i), length in zip(pending, lengths, strict=True):
            if not all(map(isfinite, logprobs[i])):
                seq.error = seq.error or _NOT_FINITE
            reason = reasons.get(seq)
            if seq.error is None:
                try:
                    reason = self._advance(seq, flight.drafts[i], length, reason)
                    reason = reason and self._settle(seq, reason)
                except Exception as error:  # one sequence's surprise must not cost another
                    seq.error = sentence(error)
            if seq.error is not None:
                reason = "error"
            if reason is not None:
                self.scheduler.finish(seq, reason)
                seq.timeline.finished = now
                finished.append(seq)
                stats.finished += 1
                stats.output_tokens += len(seq.token_ids) - seq.num_prompt
                stats.discarded_tokens += seq.num_discarded
        self._drop_if_idle()
        ended = time.perf_counter()
        if self.gpu is not None:
            self._known = now if self.scheduler.has_work else None
        if self._flight is None:
            stats.bookkeeping_s += ended - now
        else:
            ended = now  # the rest is the next step's
        spent = ended - (flight.started if flight.early else begun)
        stats.place_seconds += places * spent
        stats.kv_block_seconds += used * spent
        stats.kv_peak_blocks = max(stats.kv_peak_blocks, used)
        return advanced, finished

    def _drop_if_idle(self) -> None:
        """Forget the step under way where nobody needs it any more; the device computes it to its end all the same."""
        if self._flight is not None and not any(work.holds for work in self._flight.plan.work):
            self._count(self._flight.plan)
            self._dropped.append(self._flight.plan)
            self._flight = None

    def _launch(self, *, early: bool) -> _Flight:
        """Plan a step and give it to the device. `early`: the tokens of the step before are not known."""
        plan = self.scheduler.schedule(time.perf_counter())
        wanting = list(plan.wanting())
        drafts = [work.seq.draft[: work.drafted] for work in wanting]
        masks: Future[npt.NDArray[np.int32]] | None = None
        beside = not early and sum(1 + len(draft) for draft in drafts) >= _ROWS_BESIDE
        if beside and any(work.seq.control.masked for work in wanting):
            masks = self._mask_thread.submit(self._fill_masks, wanting, drafts)
        images = [image for _, image in plan.encode + plan.ahead]
        self.stats.images += len(images)
        self.stats.image_tokens += sum(image.num_tokens for image in images)
        # Drafts are paid for by all that passes between two steps' tokens, planning included, where no step hides it.
        started, clock = time.perf_counter(), self._clock() if self._known is None else self._known
        with spending(self.gpu, "in a step", _LOWER_USE):
            logits = self.runner.execute(plan)
        self._encode_ahead(plan)
        return _Flight(plan, wanting, drafts, logits, masks, started, clock, early)

    def _encode_ahead(self, plan: StepPlan) -> None:
        """Encode images of waiting sequences beside the step."""
        try:
            self.runner.encode(plan.ahead)
        except torch.OutOfMemoryError:  # they can wait for their step, and must not cost those that run
            self.scheduler.encode_ahead = False
            self.scheduler.abandon([])
            if self.gpu is not None:
                self.gpu.tidy()
            warnings.warn(
                f"images are no longer encoded beside decoding: there was too little memory; {_LOWER_USE}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _choose(self, flight: _Flight) -> tuple[Callable[[], _Tokens], float]:
        """Have a step's tokens chosen; return what waits for them, and when their masks were made."""
        wanting, drafts, logits = flight.wanting, flight.drafts, flight.logits
        mask: Tensor | None = None
        if any(work.seq.control.masked for work in wanting):
            filled = self._fill_masks(wanting, drafts) if flight.masks is None else flight.masks.result()
            mask = to_device(torch.from_numpy(filled), logits.device)
        masks_made = time.perf_counter()
        wants = [
            Want(work.seq.control.sampling, work.seq.token_ids, draft, _given(work.seq, draft))
            for work, draft in zip(wanting, drafts, strict=True)
        ]
        greedy = self.model.decoder.kernels.greedy
        with spending(self.gpu, "choosing tokens", _LOWER_USE):
            if self.gpu is None or not self._ahead or not flight.simple:
                tokens = sample(logits, wants, greedy, mask)
                return lambda: tokens, masks_made
            chosen, logprobs = choose(
                logits,
                [want if work.wants else None for work, want in zip(wanting, wants, strict=True)],
                greedy,
                mask,
            )
            self.runner.keep(chosen)
            fetched = self.gpu.fetch(chosen, logprobs)

        def tokens_there() -> _Tokens:
            token_ids, logprobs = fetched()
            return token_ids[:, None].tolist(), logprobs[:, None].tolist()

        return tokens_there, masks_made

    def _may_go_ahead(self) -> bool:
        """Whether the next step can be planned before the tokens of this one are known: not where it would have drafts."""
        decoding: list[Sequence] = []
        for seq in self.scheduler.running:
            if seq.control.reference is not None:
                return False
            seq.draft = []  # what is left of one that found no room
            if len(seq.token_ids) - seq.num_computed == 1:
                decoding.append(seq)
        return not any(self._draft_lengths(decoding))

    def _time(self, flight: _Flight, begun: float, masks_made: float, now: float) -> None:
        """Book the seconds of a step whose tokens are there `now`."""
        stats, plan = self.stats, flight.plan
        encode_s, model_s = self.runner.seconds(plan)
        stats.encode_s += encode_s
        prompt = sum(max(0, min(count, seq.num_prompt - start)) for seq, start, count, _ in plan.work)
        share = prompt / total if (total := sum(work.num_tokens for work in plan.work)) else 1.0
        stats.prefill_s += share * model_s
        stats.decode_s += (1 - share) * model_s
        left = now - flight.started - encode_s - model_s
        for dropped in self._dropped:  # the device was busy with it before it came to this one
            wasted = min(sum(self.runner.seconds(dropped)), max(left, 0.0))
            stats.decode_s += wasted
            left -= wasted
        self._dropped.clear()
        if flight.early:  # masks were made while the device computed
            stats.bookkeeping_s += max(left, 0.0)
        else:
            # A GPU computes while masks are made: they count from where it was done.
            masks_s = min(max(masks_made - flight.started - encode_s - model_s, 0.0), max(left, 0.0))
            stats.masks_s += masks_s
            stats.sampling_s += max(left - masks_s, 0.0)
            stats.bookkeeping_s += flight.started - begun
        num_drafted = sum(map(len, flight.drafts))
        decodes = total == len(flight.wanting) + num_drafted
        if decodes and not plan.encode and all(work.seq.control.reference is None for work in flight.wanting):
            clock = self._clock() if self.gpu is None else now
            self.draft_budget.observe(len(flight.wanting), num_drafted, clock - flight.clock)

    def _count(self, plan: StepPlan) -> None:
        """Count what a plan computes, before its tokens are taken."""
        stats, total, prompt, again, prompt_again = self.stats, 0, 0, 0, 0
        for work in plan.work:
            seq, start, n, _ = work
            if not work.holds:
                stats.rejected_draft_tokens += n
                continue
            total += n
            if start < seq.num_prompt:
                prompt += min(n, seq.num_prompt - start)
            if start < seq.num_once_computed:
                again += min(n, seq.num_once_computed - start)
                prompt_again += max(0, min(start + n, seq.num_once_computed, seq.num_prompt) - start)
        stats.steps += 1
        stats.prefill_tokens += prompt - prompt_again
        stats.recompute_tokens += again
        stats.decode_tokens += total - prompt - again + prompt_again

    def _guess(self) -> None:
        """Give sequences that decode as many draft tokens as pay at the present load."""
        decoding: list[Sequence] = []
        rows = GIVEN_ROWS
        for seq in self.scheduler.running:
            if len(seq.token_ids) - seq.num_computed == 1:
                if seq.control.reference is None:
                    decoding.append(seq)
                else:
                    done = len(seq.token_ids) - seq.num_prompt
                    seq.draft = list(seq.control.reference[done : done + rows][:-1])
                    rows -= len(seq.draft)
        for seq, length in zip(decoding, self._draft_lengths(decoding), strict=True):
            room = seq.max_tokens - len(seq.token_ids) - 1
            seq.draft = []
            if length:
                with suppress(RequestError):  # the step's masks say so again
                    seq.draft = seq.control.draft(min(length, room))

    def _draft_lengths(self, decoding: list[Sequence]) -> list[int]:
        """How many draft tokens pay for each of these."""
        drafters = [seq.control.drafter for seq in decoding]
        return self.draft_budget.lengths(
            [0.0 if drafter is None else drafter.acceptance for drafter in drafters], _MAX_DRAFT
        )

    def _fill_masks(self, wanting: list[Work], drafts: list[list[int]]) -> npt.NDArray[np.int32]:
        """Which tokens the rows of this step may give: int32 `[rows, V / 32]`."""
        rows = sum(1 + len(draft) for draft in drafts)
        masks = np.full((rows, self._guides.num_words), -1, dtype=np.int32)
        first = 0
        for work, draft in zip(wanting, drafts, strict=True):
            seq, rows = work.seq, 1 + len(draft)
            if work.wants:
                try:
                    seq.control.fill_masks(seq.token_ids, draft, masks[first : first + rows])
                except Exception as error:  # a grammar beyond its limits costs its own sequence alone
                    seq.error = sentence(error)
            first += rows
        return masks

    def _advance(
        self, seq: Sequence, draft: list[int], length: int, reason: FinishReason | None
    ) -> FinishReason | None:
        """Take note of the tokens a sequence got beyond `length`; the reason, if it has come to its end."""
        control, seq.draft = seq.control, []
        if control.reference is not None:
            return None if reason is None else "stop"
        new = seq.token_ids[length:]
        if draft and control.drafter is not None:
            accepted = min(len(new) - 1, len(draft))
            control.num_drafted += len(draft)
            control.num_accepted += accepted
            self.stats.accepted_draft_tokens += accepted
            self.stats.rejected_draft_tokens += len(draft) - accepted
            self.stats.decode_tokens -= len(draft) - accepted
            control.drafter.feedback(len(draft), accepted)
        loop = control.extend(new[:-1] if reason == "stop" else new)
        if loop is not None:
            # Before anything else: what follows a loop, even the end token, must not depend on how many tokens a step gives.
            output = seq.output_ids
            tokens = control.rescue(loop, output)
            seq.num_discarded += loop.end - loop.start
            self.scheduler.rollback(seq, seq.num_prompt + loop.start)
            reason = "loop" if tokens is None else self._append(seq, tokens)
        if reason is None and control.guide is not None:
            reason = self._append(seq, control.guide.forced())
        if seq.params.stop and reason in (None, "length") and self._hit_stop_string(seq, length):
            reason = "stop"
        if reason in ("length", "loop") and control.guide is not None:
            seq.closing = control.guide.closing() or ""
        return reason

    def _append(self, seq: Sequence, token_ids: SequenceOf[int]) -> FinishReason | None:
        """Append tokens that are not the model's choice; the reason, if they end the sequence."""
        for i, token in enumerate(token_ids):
            seq.token_ids.append(token)
            seq.logprobs.append(nan)
            ends = token in seq.stop_ids
            if ends or len(seq.token_ids) >= seq.max_tokens:
                seq.control.extend(token_ids[: i if ends else i + 1])
                return "stop" if ends else "length"
        seq.control.extend(token_ids)
        return None

    def _settle(self, seq: Sequence, reason: FinishReason) -> FinishReason | None:
        """Judge a page that has come to its end; None if it ended badly and is generated once more.

        The new attempt is rolled back to the prompt, whose keys and values are still there, so it costs only output tokens, and
        it ends at its first loop. After the last attempt the best one becomes the sequence's; the reason returned is its own.
        """
        if seq.page is None:
            return reason
        attempt = self._attempt(seq, reason)
        seq.attempts.append(attempt)
        if attempt.verdict.ended_badly and len(seq.attempts) <= seq.params.max_retries:
            seq.num_discarded += len(attempt.token_ids)
            self.scheduler.rollback(seq, seq.num_prompt)
            seq.closing = ""
            seq.control.restart(
                replace(
                    seq.params,
                    temperature=max(seq.params.temperature, _RETRY_TEMPERATURE),
                    seed=(seq.params.seed or 0) + len(seq.attempts),
                    max_rescues=0,
                )
            )
            if seq.control.guide is not None:
                self._append(seq, seq.control.guide.forced())
            return None
        seq.best = best_attempt([attempt.verdict for attempt in seq.attempts])
        best = seq.attempts[seq.best]
        if best is not attempt:
            seq.num_discarded += len(attempt.token_ids) - len(best.token_ids)
            seq.token_ids[seq.num_prompt :] = best.token_ids
            seq.logprobs[:] = best.logprobs
            seq.closing = best.closing
        return best.verdict.finish_reason

    def _attempt(self, seq: Sequence, reason: FinishReason) -> FinishedAttempt:
        assert seq.page is not None
        output, raw = seq.output_ids, self.text_of(seq)
        num_chars = num_printed(parse_page(raw))
        verdict = Attempt(
            raw,
            reason,
            valid=seq.params.guidance != "page" or is_json_object(raw),
            confidence=confidence(self.pieces_of(output), seq.logprobs),
            mismatch=text_mismatch(num_chars, seq.page.num_glyphs, seq.page.num_rule_glyphs),
        )
        degenerate = is_degenerate(self.prompter.decode(output), reason)
        return FinishedAttempt(output, list(seq.logprobs), seq.closing, degenerate, verdict)

    def cancel(self, seq: Sequence) -> None:
        """End a sequence early; its blocks are free at once."""
        self.scheduler.cancel(seq)

    def text_of(self, seq: Sequence) -> str:
        """The sequence's output as text, cut before the first stop string, or completed where the grammar asks for more."""
        text = self.prompter.decode(seq.output_ids)
        if seq.closing:
            text = text.rstrip("\ufffd") + seq.closing  # a character that was cut
        cuts = [at for stop in seq.params.stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def pieces_of(self, token_ids: SequenceOf[int]) -> list[bytes]:
        """The bytes of each token; special tokens have none."""
        return [self._pieces[token] for token in token_ids]

    def _hit_stop_string(self, seq: Sequence, length: int) -> bool:
        # A character takes at most four byte-level tokens: a stop string that ended beyond `length` begins in this tail.
        tail = 4 * max(len(stop) for stop in seq.params.stop) + 4
        text = self.prompter.decode(seq.token_ids[max(seq.num_prompt, length - tail) :])
        return any(stop in text for stop in seq.params.stop)


def _given(seq: Sequence, draft: list[int]) -> SequenceOf[int] | None:
    """The next tokens of a sequence whose output is given: one more than its draft."""
    if (reference := seq.control.reference) is None:
        return None
    done = len(seq.token_ids) - seq.num_prompt
    return reference[done : done + 1 + len(draft)]
