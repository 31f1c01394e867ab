"""The engine's inside: requests in, one step at a time, finished sequences out. One thread drives it."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagemill.cache import BlockPool, ImageCache
from pagemill.config import EngineConfig
from pagemill.decode.sampler import SamplingParams, SamplingState
from pagemill.errors import ConfigError, RequestError
from pagemill.model.loader import Model
from pagemill.model.prompt import Prompter
from pagemill.model.rope import mrope_positions
from pagemill.pages.preprocess import PreparedImage
from pagemill.results import FinishReason
from pagemill.runner import Runner, block_bytes
from pagemill.scheduler import Scheduler
from pagemill.sequence import Sequence, SequenceImage, Timeline

_DEFAULT_MODEL_LEN = 32768


@dataclass
class TokenizedPrompt:
    """A prompt ready to be queued: tokens with placeholders expanded, and its images."""

    token_ids: list[int]
    images: list[SequenceImage]


class EngineCore:
    """Scheduler, cache and runner of one model on one device."""

    def __init__(self, model: Model, prompter: Prompter, config: EngineConfig, dtype: torch.dtype) -> None:
        text = model.config.text
        self.model, self.prompter, self.config = model, prompter, config
        self.max_model_len = config.max_model_len or min(text.max_position_embeddings, _DEFAULT_MODEL_LEN)
        if self.max_model_len > text.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {self.max_model_len} is beyond the model's {text.max_position_embeddings} positions"
            )
        per_block = block_bytes(text.num_layers, text.num_kv_heads, text.head_dim, config.block_size, dtype)
        free = _free_memory(model.vision.device)
        if config.kv_cache_bytes is not None and config.kv_cache_bytes > free:
            raise ConfigError(
                f"kv_cache_bytes {config.kv_cache_bytes} is more than the {free} bytes of free memory"
            )
        self.kv_cache_bytes = config.kv_cache_bytes or min(
            int(config.kv_cache_fraction * free),
            per_block * config.max_num_seqs * -(-self.max_model_len // config.block_size),
        )
        num_blocks = self.kv_cache_bytes // per_block
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes {self.kv_cache_bytes} is less than one KV block ({per_block} bytes)"
            )
        self.blocks = BlockPool(num_blocks, config.block_size, config.prefix_sharing)
        self.images: ImageCache[Tensor] = ImageCache(2 * config.max_step_image_tokens)
        self.scheduler = Scheduler(
            self.blocks,
            self.images,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
            max_step_image_tokens=config.max_step_image_tokens,
        )
        self.runner = Runner(
            model,
            self.images,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            device=model.vision.device,
            dtype=dtype,
        )
        self._next_id = 0
        self.num_steps = 0

    def tokenize(self, prompt: str | SequenceOf[int], images: SequenceOf[PreparedImage]) -> TokenizedPrompt:
        """Expand a prompt's image placeholders. Safe to call from any thread.

        Raises `RequestError` when placeholders and images do not match, or a token is not in the vocabulary.
        """
        config = self.model.config
        for image in images:
            (t, h, w), merge = image.grid, config.vision.spatial_merge_size
            whole = h % merge == w % merge == 0 and image.num_tokens == t * h * w // merge**2
            if not whole or image.patches.shape != (t * h * w, config.vision.patch_dim):
                raise RequestError(
                    f"a prepared image has grid {image.grid}, {image.num_tokens} tokens and patches of shape "
                    f"{image.patches.shape}, which do not belong together in this model"
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
                SequenceImage(start, image.num_tokens, image.grid, image.content_hash, image.patches)
                for start, image in zip(starts, images, strict=True)
            ],
        )

    def add(
        self, prompt: TokenizedPrompt, params: SamplingParams, max_new_tokens: int, priority: int = 0
    ) -> Sequence:
        """Queue a request. Raises `RequestError` if its prompt is empty or too long for the context or the KV budget."""
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
        config = self.model.config
        positions, delta = mrope_positions(
            num_prompt,
            [(image.start, image.grid) for image in prompt.images],
            config.vision.spatial_merge_size,
        )
        seq = Sequence(
            id=self._next_id,
            token_ids=prompt.token_ids,
            num_prompt=num_prompt,
            images=prompt.images,
            positions=positions,
            position_delta=delta,
            params=params,
            max_tokens=min(num_prompt + (params.max_new_tokens or max_new_tokens), self.max_model_len, pool),
            stop_ids=frozenset() if params.ignore_eos else config.eos_token_ids,
            sampling=SamplingState(params),
            priority=priority,
            timeline=Timeline(arrived=time.perf_counter()),
        )
        self._next_id += 1
        self.scheduler.add(seq)
        return seq

    def step(self) -> tuple[list[Sequence], list[Sequence]]:
        """Run one step. Returns the sequences that got a token, and those of them (or others) that ended."""
        plan = self.scheduler.schedule(time.perf_counter())
        if not plan.work and self.scheduler.has_work:
            raise AssertionError("live sequences, but nothing could be scheduled")
        token_ids, logprobs = self.runner.execute(plan)
        self.num_steps += 1
        now = time.perf_counter()
        advanced = [seq for seq, n in plan.work if seq.num_computed + n == len(seq.token_ids)]
        finished = self.scheduler.update(plan, token_ids, logprobs, now)
        for seq, logprob in zip(advanced, logprobs, strict=True):
            if logprob != logprob or logprob == float("-inf"):
                self._end(seq, "error", finished)
            elif seq.params.stop and seq.finish_reason in (None, "length") and self._hit_stop_string(seq):
                self._end(seq, "stop", finished)
        for seq in finished:
            seq.timeline.finished = now
        return advanced, finished

    def cancel(self, seq: Sequence) -> None:
        """End a sequence early; its blocks are free at once."""
        self.scheduler.cancel(seq)

    def text_of(self, seq: Sequence) -> str:
        """The sequence's output as text, cut before the first stop string."""
        text = self.prompter.decode(seq.output_ids)
        cuts = [at for stop in seq.params.stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def _end(self, seq: Sequence, reason: FinishReason, finished: list[Sequence]) -> None:
        if seq.finish_reason is None:
            self.scheduler.finish(seq, reason)
            finished.append(seq)
        seq.finish_reason = reason

    def _hit_stop_string(self, seq: Sequence) -> bool:
        # A character takes at most four byte-level tokens, so a stop string that has just ended lies in this tail.
        tail = 4 * max(len(stop) for stop in seq.params.stop) + 4
        text = self.prompter.decode(seq.token_ids[max(seq.num_prompt, len(seq.token_ids) - tail) :])
        return any(stop in text for stop in seq.params.stop)


def _free_memory(device: torch.device) -> int:
    """Bytes of memory that can be had now on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    # A container's own limit, control groups of version 2, then 1.
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not limited, or no such controller
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
    return max(free, 0)
