"""CUDA graphs of steps that only decode: a step's hundreds of kernels are given to the GPU by one call.

A graph does what it did when it was recorded, on the memory it was recorded on. So there is one for each of a ladder of batch
sizes, and a batch takes the next larger one. Its inputs lie in one buffer, which one copy renews. The places that are left over
hold a token that writes no key (slot -1) and reads one key of block 0, for nothing: nobody looks at its logits.

Graphs are recorded when the engine starts, the largest first: what they need is then taken before the first page comes, no page
waits for them, and the smaller ones live in the memory of the largest. Steps that do more than decode one token a sequence
(prefill, images, drafts) are not recorded: their shapes are too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagemill.gpu import Gpu
from pagemill.model.decoder import RaggedBatch
from pagemill.staging import Arrays, Layout, Staging


def ladder(most: int) -> list[int]:
    """Batch sizes with a graph of their own, up to `most`: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ... and `most` itself."""
    sizes = {1, 2, 4, 8, most}
    step = 16
    while step < most:
        sizes |= {step, step + step // 2}
        step *= 2
    return sorted(size for size in sizes if size <= most)


@dataclass(frozen=True)
class _Graph:
    """One size: how its inputs lie in the buffer, and what runs it."""

    layout: Layout
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one decoder and its KV cache. `run` takes a batch and returns its logits, float32 `[S, V]`."""

    def __init__(
        self,
        gpu: Gpu,
        staging: Staging,
        run: Callable[[RaggedBatch], Tensor],
        *,
        max_num_seqs: int,
        max_blocks: int,
        vocab_size: int,
    ) -> None:
        """`max_blocks` of a sequence: the width of the block tables. What `run` reads besides the batch must stay where it is."""
        self._staging, self._run = staging, run
        self._max_blocks = max_blocks
        sizes = ladder(max_num_seqs)
        layouts = [self._layout(size) for size in sizes]
        self._inputs = torch.empty(layouts[-1].num_bytes, dtype=torch.uint8, device=gpu.device)
        # One place for the logits of all: each graph's own would have to be kept apart, 0.6 MB a row.
        self._logits = torch.empty(max_num_seqs, vocab_size, device=gpu.device)
        self._graphs = dict[int, _Graph]()
        for size, layout in zip(reversed(sizes), reversed(layouts), strict=True):
            self._fill(layout, {}, 0)
            self._graphs[size] = _Graph(layout, gpu.capture(self._step(layout, size)))
        self._sizes = sizes

    def _layout(self, size: int) -> Layout:
        return Layout(
            {
                "token_ids": ((size,), np.int64),
                "positions": ((3, size), np.int64),
                "slots": ((size,), np.int64),
                "query_start": ((size + 1,), np.int32),
                "context_lens": ((size,), np.int32),
                "logit_rows": ((size,), np.int64),
                "block_tables": ((size, self._max_blocks), np.int32),
            }
        )

    def _step(self, layout: Layout, size: int) -> Callable[[], None]:
        # Tables of angles are as long as the context already: no position makes them grow.
        batch = RaggedBatch(**layout.tensors(self._inputs), max_position=0)

        def step() -> None:
            self._logits[:size] = self._run(batch)

        return step

    def _fill(self, layout: Layout, arrays: Arrays, count: int) -> None:
        """Bring the batch's `count` rows into the buffer, and rows of no sequence behind them."""
        memory = self._staging.memory(layout.num_bytes)
        to = layout.arrays(memory)
        to["query_start"][:] = np.arange(len(to["query_start"]))
        to["logit_rows"][:] = to["query_start"][:-1]
        for name, nothing in (("token_ids", 0), ("positions", 0), ("slots", -1), ("context_lens", 1)):
            if count:
                to[name][..., :count] = arrays[name]
            to[name][..., count:] = nothing
        tables = to["block_tables"]
        tables[count:, 0] = 0
        if count:  # columns beyond a sequence's own blocks are never read, whatever they hold
            tables[:count, : arrays["block_tables"].shape[1]] = arrays["block_tables"]
        self._staging.send(memory, self._inputs[: layout.num_bytes])

    @staticmethod
    def takes(arrays: Arrays) -> bool:
        """Whether each sequence of the batch computes one token, and wants the next: `arrays` are those of a `RaggedBatch`."""
        tokens = len(arrays["token_ids"])
        decodes = tokens == len(arrays["context_lens"]) == len(arrays["logit_rows"])
        return decodes and tokens > 0 and "image_index" not in arrays

    def __call__(self, arrays: Arrays) -> Tensor:
        """Logits float32 `[S, V]` of a batch that it `takes`. They are overwritten by the next call."""
        count = len(arrays["token_ids"])
        size = next(size for size in self._sizes if size >= count)
        graph = self._graphs[size]
        self._fill(graph.layout, arrays, count)
        graph.replay()
        return self._logits[:count]
