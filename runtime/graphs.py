"""CUDA graphs of steps that only decode: a step's hundreds of kernels are given to the GPU by one call.

A graph does what it did when it was recorded, on the memory it was recorded on. So there is one for each of a ladder of sizes, in
tokens, and a batch takes the next larger one. Its inputs lie in one buffer, which one copy renews. There are as many places for
sequences as for tokens: a sequence whose draft is verified has several tokens, and leaves places of sequences without any. Tokens
that are left over belong to sequences of their own, write no key (slot -1) and read one key of block 0, for nothing: nobody looks
at their logits.

Graphs are recorded when the engine starts, the largest first: what they need is then taken before the first page comes, no
page waits for them, and the smaller ones live in the memory of the largest. Prefill is not recorded: it has too many shapes,
and enough work for the GPU to hide its calls behind.
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
    """Numbers of tokens with a graph of their own, up to `most`: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ... and `most` itself."""
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
    """The graphs of one decoder and its KV cache. `run` takes a batch and returns its logits, float32 `[L, V]`."""

    def __init__(
        self,
        gpu: Gpu,
        staging: Staging,
        run: Callable[[RaggedBatch], Tensor],
        *,
        max_tokens: int,
        max_blocks: int,
        vocab_size: int,
    ) -> None:
        """Record steps of up to `max_tokens`; `max_blocks` of a sequence are the width of the block tables.

        What `run` reads besides the batch must stay where it is.
        """
        self._staging, self._run = staging, run
        self._max_blocks = max_blocks
        sizes = ladder(max_tokens)
        layouts = [self._layout(size) for size in sizes]
        self._inputs = torch.empty(layouts[-1].num_bytes, dtype=torch.uint8, device=gpu.device)
        # One place for the logits of all: each graph's own would have to be kept apart, 0.6 MB a row.
        self._logits = torch.empty(max_tokens, vocab_size, device=gpu.device)
        self._graphs = dict[int, _Graph]()
        for size, layout in zip(reversed(sizes), reversed(layouts), strict=True):
            self._fill(layout, size, None)
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

    def _fill(self, layout: Layout, size: int, arrays: Arrays | None) -> None:
        """Bring the batch into the buffer, and tokens of no sequence behind it."""
        memory = self._staging.memory(layout.num_bytes)
        to = layout.arrays(memory)
        tokens = sequences = 0
        to["query_start"][0] = 0
        if arrays is not None:
            tokens, sequences = len(arrays["token_ids"]), len(arrays["context_lens"])
            for name in ("token_ids", "positions", "slots"):
                to[name][..., :tokens] = arrays[name]
            to["query_start"][: sequences + 1] = arrays["query_start"]
            to["context_lens"][:sequences] = arrays["context_lens"]
            # Columns beyond a sequence's own blocks are never read, whatever they hold.
            to["block_tables"][:sequences, : arrays["block_tables"].shape[1]] = arrays["block_tables"]
        to["token_ids"][tokens:] = 0
        to["positions"][:, tokens:] = 0
        to["slots"][tokens:] = -1
        to["query_start"][sequences + 1 :] = np.minimum(tokens + np.arange(1, size - sequences + 1), size)
        to["context_lens"][sequences:] = 1
        to["block_tables"][sequences:, 0] = 0
        to["logit_rows"][:] = np.arange(size)
        self._staging.send(memory, self._inputs[: layout.num_bytes])

    def takes(self, arrays: Arrays) -> bool:
        """Whether a batch, the arrays of a `RaggedBatch`, has a graph: every token wants logits, and there are not too many."""
        tokens = len(arrays["token_ids"])
        return tokens == len(arrays["logit_rows"]) <= self._sizes[-1] and "image_index" not in arrays

    def __call__(self, arrays: Arrays) -> Tensor:
        """Logits float32 `[T, V]` of a batch that it `takes`. They are overwritten by the next call."""
        tokens = len(arrays["token_ids"])
        size = next(size for size in self._sizes if size >= tokens)
        graph = self._graphs[size]
        self._fill(graph.layout, size, arrays)
        graph.replay()
        return self._logits[:tokens]
