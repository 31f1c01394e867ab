"""What the CPU does in a step, for pages under guidance and the loop guard: masks, plan, layout, all that follows from a token.

    python bench/host_step.py

On a GPU this is what has to hide behind the device (`EngineCore.step`). The model is replaced by random logits, so that pages
write random text in their JSON's form; choosing tokens is the device's, and not counted. Milliseconds of the engine's thread in a
step that only decodes, without drafts: median, 20th and 80th percentile, by the number of pages at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import environment
import numpy as np
import torch
from PIL import Image

from pagemill import Engine, SamplingParams
from pagemill.sequence import PageTask


def measure(num_seqs: int, steps: int) -> list[float]:
    """Return the milliseconds of each of `steps` steps."""
    engine = Engine.from_pretrained(max_num_seqs=num_seqs, kv_cache_bytes=1 << 30, num_threads=1)
    core, vocabulary = engine.core, engine.core.model.config.text.vocab_size
    engine.close()  # its thread; the core stays usable, but for its second thread, which makes masks beside the model
    core._mask_thread.submit = _at_once  # type: ignore[method-assign, assignment]
    page = engine.processor.prepare(np.asarray(Image.open(environment.PAGES / "form_24.png").convert("RGB")))
    embeddings = torch.empty(page.num_tokens, core.model.config.text.hidden_size), print
    core.images.get = lambda key: embeddings  # type: ignore[method-assign]
    logits = torch.randn(2 * num_seqs + 97, vocabulary, generator=torch.Generator().manual_seed(0))
    device, offset = 0.0, 0

    def execute(plan):  # type: ignore[no-untyped-def]
        nonlocal offset
        core.runner._lay_out(plan)
        offset = (offset + 7) % (num_seqs + 97)  # other numbers in every step
        return logits[offset : offset + sum(1 for _ in plan.wanting())]

    greedy = core.model.decoder.kernels.greedy

    def timed(rows, mask=None):  # type: ignore[no-untyped-def]
        nonlocal device
        started = time.thread_time()
        found = greedy(rows, mask)
        device += time.thread_time() - started
        return found

    core.runner.execute = execute  # type: ignore[method-assign]
    object.__setattr__(core.model.decoder.kernels, "greedy", timed)
    params = SamplingParams(guidance="page", drafts="off", max_new_tokens=4096)
    found: list[float] = []
    while len(found) < steps:
        for _ in range(num_seqs - len(core.scheduler.running) - core.scheduler.num_waiting):
            core.add(core.tokenize(engine.page_prompt, [page]), params, 4096, page=PageTask())
        device, started = 0.0, time.thread_time()
        before = core.stats.prefill_tokens
        core.step()
        spent = time.thread_time() - started - device
        if core.stats.prefill_tokens == before:
            found.append(1e3 * spent)
    return found


def _at_once(run, *given):  # type: ignore[no-untyped-def]
    """A future that is there: beside an empty model, a second thread would only wait for this one."""
    from concurrent.futures import Future

    future: Future[object] = Future()
    future.set_result(run(*given))
    return future


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = {"environment": environment.describe("torch", "llguidance"), "milliseconds": {}}
    environment.show(result["environment"])
    for count in asked.sequences:
        quantiles = statistics.quantiles(measure(count, asked.steps), n=10)
        row = dict(p20=quantiles[1], median=quantiles[4], p80=quantiles[7])
        result["milliseconds"][str(count)] = row
        print(
            f"{count:4} pages: {row['median']:.2f} ms a step   (p20 {row['p20']:.2f}, p80 {row['p80']:.2f})"
        )
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
