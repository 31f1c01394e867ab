"""Executes a step plan: encodes its images, lays the batch out as flat arrays, calls the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagemill.cache import ImageCache
from pagemill.errors import ConfigError
from pagemill.gpu import Gpu
from pagemill.graphs import DecodeGraphs, ladder
from pagemill.kernels import QUANTISED_KV, LayerCache, kv_scale_shape
from pagemill.model.decoder import RaggedBatch
from pagemill.model.loader import Model
from pagemill.model.rope import Grid
from pagemill.scheduler import StepPlan
from pagemill.sequence import Sequence, SequenceImage
from pagemill.staging import Arrays, Staging

_CPU_ENCODE_TOKENS = 512
"""Image tokens that go through the vision tower together on a CPU, or one larger image: more would leave the caches, and
their activations would be memory that the system maps and clears anew for every call."""


def block_bytes(
    model_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes that one KV block takes over all layers, keys and values; quantised ones have a float32 scale each."""
    scale = torch.float32.itemsize if dtype in QUANTISED_KV else 0
    return 2 * model_layers * num_kv_heads * block_size * (head_dim * dtype.itemsize + scale)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory. On the CPU the system gives a page at its first write: a budget costs nothing until it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    plain = {1: np.uint8, 2: np.uint16, 4: np.float32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=plain)).view(dtype)


class DeviceClock:
    """Marks moments in a device's work, and tells the seconds between two of them.

    A CPU's work is done when a call returns. A GPU's runs behind the calls: its marks are events, which the device passes when it
    comes to them. Ask for their seconds after something has waited for the work: then nothing waits for a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"

    def mark(self) -> Any:
        """Mark the moment after all work given to the device so far (on a GPU: to its current stream)."""
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Seconds from one mark to a later one; waits for the later one where the device has not come to it."""
        if not self._events:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


Embeddings = tuple[Tensor, Callable[[Tensor], None]]
"""An image's embeddings `[tokens, hidden]`, and what is to be called with them before they are read (`Gpu.beside`)."""


def _nothing(embeddings: Tensor) -> None:
    """What is there needs no waiting for."""


class Runner:
    """Owns the KV cache tensors (of `dtype`, quantised ones with scales) and the block-table array of running sequences."""

    def __init__(
        self,
        model: Model,
        images: ImageCache[Embeddings],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
        gpu: Gpu | None = None,
        overlap: bool = True,
    ) -> None:
        """`overlap`: a GPU encodes images on a stream of their own."""
        self.model, self.images, self.device, self.gpu = model, images, device, gpu
        self._beside = gpu if overlap else None
        self.block_size = block_size
        text = model.config.text
        shapes_of = model.decoder.kernels.kv_cache_shapes
        k_shape, v_shape = shapes_of(num_blocks, text.num_kv_heads, text.head_dim, block_size)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [(k_shape, dtype), (v_shape, dtype)]
        if dtype in QUANTISED_KV:
            shapes += 2 * [(kv_scale_shape(num_blocks, text.num_kv_heads, block_size), torch.float32)]
        try:
            self.kv_cache = [
                LayerCache(*(_zeros(shape, of, device) for shape, of in shapes))
                for _ in range(text.num_layers)
            ]
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise RuntimeError
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"a KV cache of {num_blocks} blocks cannot be allocated: {reason}") from None
        self.clock = DeviceClock(device)
        self._encode_tokens = _CPU_ENCODE_TOKENS if device.type == "cpu" else 1 << 30
        self._max_model_len = max_model_len
        if gpu is not None:
            # Tables of angles are whole from the start: a graph needs them to stay where they are.
            model.decoder.rope.tables(max_model_len - 1)
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._staging = None if gpu is None else Staging(gpu)
        self._graphs: DecodeGraphs | None = None
        self._recorded_tokens = max(2 * max_num_seqs, 32)  # room for drafts
        self._chosen: Tensor | None = None
        """The last step's new tokens, where the next may be launched before they are known: int64 `[max_num_seqs]`."""
        if gpu is not None:
            self._chosen = torch.zeros(max_num_seqs, dtype=torch.int64, device=gpu.device)

    def record_graphs(self) -> None:
        """Record the steps that only decode; nothing on a device without graphs, or with kernels that look at values."""
        if self.gpu is None or self._staging is None or not self.model.decoder.kernels.capturable:
            return
        self.model.settle()
        self._graphs = DecodeGraphs(
            self.gpu,
            self._staging,
            self._run,
            max_tokens=self._recorded_tokens,
            max_blocks=self._block_tables.shape[1],
            vocab_size=self.model.config.text.vocab_size,
        )

    def try_steps(self, tokens: int, image_tokens: int, logit_rows: int) -> None:
        """Compute steps up to this size for nothing, the largest first, so that every kernel is compiled and loaded once."""
        for size in reversed(ladder(tokens)):
            self.try_step(size, max(1, image_tokens * size // tokens), min(logit_rows, size))

    def try_step(self, tokens: int, image_tokens: int, logit_rows: int) -> None:
        """Compute a step of this size for nothing, an image of about so many tokens before it: no key is written."""
        vision = self.model.config.vision
        side = vision.spatial_merge_size * max(1, isqrt(image_tokens))
        patches = torch.zeros(side * side, vision.patch_bytes, dtype=torch.uint8)
        images = [(patches, torch.zeros(vision.in_channels, 256), (1, side, side))]
        ((image, join),) = self._see(images)
        join(image)
        starts = [*range(0, tokens, min(tokens, self._max_model_len)), tokens]
        arrays = self._empty_batch(np.array(starts, dtype=np.int32), logit_rows)
        rows = np.arange(tokens, dtype=np.int32)
        arrays["image_index"] = np.where(rows < len(image), rows, -1).astype(np.int32)
        logits = self._compute(arrays, image[:tokens])
        for mask in (None, torch.full((len(logits), -(-logits.shape[1] // 32)), -1, dtype=torch.int32)):
            self.model.decoder.kernels.greedy(logits, mask if mask is None else mask.to(logits.device))

    def try_decoding(self) -> None:
        """Compute the largest step that is recorded, for nothing."""
        most = self._recorded_tokens
        logits = torch.empty(most, self.model.config.text.vocab_size, device=self.device)  # as graphs have
        logits[:] = self._compute(self._empty_batch(np.arange(most + 1, dtype=np.int32), most), None)

    def _empty_batch(
        self, query_start: npt.NDArray[np.int32], logit_rows: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Arrays of a batch whose keys go nowhere and come from block 0. The last rows want logits."""
        tokens = int(query_start[-1])
        counts = np.diff(query_start)
        return {
            "token_ids": np.zeros(tokens, dtype=np.int64),
            "positions": np.zeros((3, tokens), dtype=np.int64),
            "slots": np.full(tokens, -1, dtype=np.int64),
            "query_start": query_start,
            "context_lens": counts,
            "block_tables": np.zeros((len(counts), self._block_tables.shape[1]), dtype=np.int32),
            "logit_rows": np.arange(tokens - logit_rows, tokens),
        }

    def execute(self, plan: StepPlan) -> Tensor:
        """Run one step. Returns logits float32 `[R, V]`: for each of `plan.wanting()` a row after its last token, and one
        after each token of its draft. A GPU computes them behind this call; they are overwritten by the next.
        """
        self.model.settle()
        begun = encoded = self.clock.mark()
        self.encode(plan.encode)
        if self._join_images(plan) or plan.encode:
            encoded = self.clock.mark()
        logits = self._decode(plan)
        plan.marks = begun, encoded, self.clock.mark()
        return logits

    def keep(self, token_ids: Tensor) -> None:
        """Keep a step's new tokens, int64 `[R]`, on the device: token -1 - r of a batch is then the r-th of them."""
        if self._chosen is None:
            raise AssertionError("a CPU's tokens are known when the next step is planned")
        self._chosen[: len(token_ids)] = token_ids.clamp(min=0)  # -1: no token was allowed

    def seconds(self, plan: StepPlan) -> tuple[float, float]:
        """Seconds that an executed step waited for its images, and that its decoder took, on the device's own clock.

        The images' are added to their pages' timelines. Call it when the step's tokens are there: before, it waits for them.
        """
        if plan.marks is None:
            return 0.0, 0.0
        begun, encoded, ended = plan.marks
        plan.marks = None
        images = self.clock.seconds(begun, encoded) if encoded is not begun else 0.0
        patches = sum(len(image.patches) for _, image in plan.encode)
        for seq, image in plan.encode:
            seq.timeline.vision += images * len(image.patches) / patches
        return images, self.clock.seconds(encoded, ended)

    def _decode(self, plan: StepPlan) -> Tensor:
        for source, destination in plan.copies:
            for layer in self.kv_cache:
                for tensor in layer:
                    if tensor is not None:
                        tensor[destination] = tensor[source]
        if not plan.work:
            return torch.empty(0, self.model.config.text.vocab_size)
        arrays, image_embeds = self._lay_out(plan)
        if self._graphs is not None and self._graphs.takes(arrays):
            return self._graphs(arrays)
        return self._compute(arrays, image_embeds)

    def _compute(self, arrays: Arrays, image_embeds: Tensor | None) -> Tensor:
        if self._staging is None:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            tensors = self._staging.bring(arrays)
        max_position = int(arrays["positions"].max())
        return self._run(RaggedBatch(**tensors, max_position=max_position, image_embeds=image_embeds))

    def _run(self, batch: RaggedBatch) -> Tensor:
        if self._chosen is not None:
            ids = batch.token_ids
            chosen = self._chosen[(-1 - ids).clamp(0, len(self._chosen) - 1)]
            batch = replace(batch, token_ids=torch.where(ids < 0, chosen, ids))
        return self.model.decoder(batch, self.kv_cache)

    def encode(self, encode: list[tuple[Sequence, SequenceImage]]) -> None:
        """Encode images for which the plan has reserved space; a GPU does it beside what it was given before."""
        while encode:
            count, tokens = 1, encode[0][1].num_tokens
            while count < len(encode) and tokens + encode[count][1].num_tokens <= self._encode_tokens:
                tokens += encode[count][1].num_tokens
                count += 1
            self._encode_together(encode[:count])
            encode = encode[count:]

    def _encode_together(self, encode: list[tuple[Sequence, SequenceImage]]) -> None:
        given = [
            (torch.from_numpy(image.patches), torch.tensor(image.levels), image.grid) for _, image in encode
        ]
        for (_, image), embeddings in zip(encode, self._see(given), strict=True):
            self.images.put(image.digest, embeddings)

    def _see(self, images: list[tuple[Tensor, Tensor, Grid]]) -> list[Embeddings]:
        """The vision tower's embeddings; a GPU computes them beside what it decodes."""
        if self._beside is None:
            return [(found, _nothing) for found in self.model.vision(images)]
        embeddings, join = self._beside.beside(lambda: self.model.vision(images))
        return [(found, join) for found in embeddings]

    def _join_images(self, plan: StepPlan) -> bool:
        """Make a GPU wait for the images that this step reads; False if there is nothing to wait for."""
        found = False
        if self._beside is None:
            return found
        for seq, start, count, _ in plan.work:
            if start < seq.num_prompt:
                for image in seq.images:
                    if image.start < start + count and start < image.end:
                        embeddings, join = self.images.get(image.digest)
                        join(embeddings)
                        found = True
        return found

    def _lay_out(self, plan: StepPlan) -> tuple[dict[str, npt.NDArray[Any]], Tensor | None]:
        """Flatten the plan's work: the arrays of a `RaggedBatch`, and its image embeddings.

        Per-token arrays are built from per-sequence ones without a Python loop over tokens.
        """
        work, block_size = plan.work, self.block_size
        token_ids: list[int] = []
        logit_rows: list[int] = []
        prefills: list[tuple[int, Sequence, int, int]] = []
        of_work: list[tuple[int, int, int, int]] = []
        first = 0
        for seq, start, n, _ in work:
            total = len(seq.token_ids)
            if n == 1:
                token_ids.append(seq.token_ids[start])
            else:
                token_ids += seq.token_ids[start : start + n]
                if start + n > total:
                    token_ids += seq.draft[: start + n - total]
            if start + n >= total:
                logit_rows += range(first + total - 1 - start, first + n)
            if start < seq.num_prompt:
                prefills.append((first, seq, start, n))
            if seq.num_synced != len(seq.block_table):
                new = seq.block_table[seq.num_synced :]
                self._block_tables[seq.row, seq.num_synced : seq.num_synced + len(new)] = new
                seq.num_synced = len(seq.block_table)
            of_work.append((start, n, seq.position_delta, seq.row))
            first += n

        starts, counts, deltas, rows = np.array(of_work, dtype=np.int64).T
        query_start = np.zeros(len(work) + 1, dtype=np.int32)
        counts.cumsum(out=query_start[1:])
        if first == len(work):  # one token each: a step that only decodes
            index, row, delta = starts, rows, deltas
        else:
            index = np.arange(first) + (starts - query_start[:-1]).repeat(counts)
            row, delta = rows.repeat(counts), deltas.repeat(counts)
        block, offset = np.divmod(index, block_size)
        slots = self._block_tables[row, block] * np.int64(block_size) + offset
        positions = np.empty((3, first), dtype=np.int64)
        positions[:] = index + delta
        image_embeds: list[Tensor] = []
        image_index = np.full(first if prefills else 0, -1, dtype=np.int32)
        images = 0
        for first, seq, start, n in prefills:
            end = min(start + n, seq.num_prompt)
            positions[:, first : first + end - start] = seq.positions[:, start:end]
            for image in seq.images:
                low, high = max(image.start, start), min(image.end, end)
                if low < high:
                    image_index[first + low - start : first + high - start] = np.arange(
                        images, images + high - low
                    )
                    embeddings, _ = self.images.get(image.digest)
                    image_embeds.append(embeddings[low - image.start : high - image.start])
                    images += high - low

        context_lens = (starts + counts).astype(np.int32)
        width = -(-int(context_lens.max()) // block_size)
        arrays: dict[str, npt.NDArray[Any]] = {
            "token_ids": np.array(token_ids, dtype=np.int64),
            "positions": positions,
            "slots": slots,
            "query_start": query_start,
            "context_lens": context_lens,
            "block_tables": self._block_tables[rows, :width],
            "logit_rows": np.array(logit_rows, dtype=np.int64),
        }
        if image_embeds:
            arrays["image_index"] = image_index
        return arrays, torch.cat(image_embeds) if image_embeds else None
