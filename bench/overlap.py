"""What of a GPU's time goes by between steps; what CUDA graphs, planning ahead and encoding images beside decoding do about it.

    python bench/make_checkpoint.py --preset 3b -o out/random-3b
    python bench/overlap.py --checkpoint out/random-3b --device cuda

One engine reads the sample pages in three ways, in turn: steps launched kernel by kernel, recorded steps (`cuda_graphs`), and
recorded steps planned ahead (`overlap`). Drafts are off and every page gets the same number of new tokens: all do the same work.
Medians of the rounds, and their range; a round before them is not counted. **idle** is the share of the engine's time in which
the device computed neither images nor the decoder: it chose tokens, or waited for the CPU. Pages that read otherwise than in the
first way are counted: with random weights a token may tip over in a batch of another size.

On a CPU there is nothing to overlap and the rows are alike, which is a check of this program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import environment
import numpy as np
from PIL import Image

from pagemill import Engine, Request, SamplingParams

WAYS = {"kernel by kernel": (False, False), "graphs": (True, False), "graphs, ahead": (True, True)}


def read(
    engine: Engine, requests: list[Request], params: SamplingParams
) -> tuple[dict[str, float], list[Any]]:
    """Answer the requests. Returns what was measured, and their tokens."""
    before, started = engine.stats(), time.perf_counter()
    outputs = engine.generate(requests, params)
    wall, stats = time.perf_counter() - started, engine.stats().since(before)
    if failed := [output.error for output in outputs if output.error]:
        raise SystemExit(f"a page failed: {failed[0]}")
    device = stats.encode_s + stats.prefill_s + stats.decode_s
    return {
        "pages/s": len(requests) / wall,
        "ms a step": 1e3 * stats.busy_s / stats.steps,
        "idle %": 100 * (1 - device / stats.busy_s),
        "waiting for images %": 100 * stats.encode_s / stats.busy_s,
    }, [output.token_ids for output in outputs]


def measure(
    engine: Engine, requests: list[Request], params: SamplingParams, rounds: int
) -> list[dict[str, Any]]:
    """Read the pages in every way, `rounds` times in turn, and return a row for each way."""
    core = engine.core
    graphs, on_gpu = core.runner._graphs, core.gpu is not None
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    first: list[Any] = []
    differ = dict.fromkeys(WAYS, 0)
    for number in range(rounds + 1):
        for name, (recorded, ahead) in WAYS.items():
            # Between two calls the engine's thread sleeps: one engine can be all of them, with the same memory.
            core.runner._graphs = graphs if recorded else None
            core._ahead = core.scheduler.encode_ahead = ahead and on_gpu
            numbers, tokens = read(engine, requests, params)
            first = first or tokens
            if number:
                found[name].append(numbers)
                differ[name] += sum(a != b for a, b in zip(first, tokens, strict=True))
    return [
        {"way": name, "differ": differ[name]}
        | {key: [f([row[key] for row in rows]) for f in (statistics.median, min, max)] for key in rows[0]}
        for name, rows in found.items()
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="pagemill-tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--pages", type=int, default=96, help="of the sample pages, over and over")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--guidance", default="off", choices=("off", "page"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    params = SamplingParams(
        max_new_tokens=asked.max_new_tokens, ignore_eos=True, drafts="off", guidance=asked.guidance
    )
    files = islice(cycle(sorted(environment.PAGES.glob("*.png"))), asked.pages)
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    result = {
        "environment": environment.describe("torch", "triton"),
        "asked": vars(asked) | {"json": None},
        "runs": [],
    }
    environment.show(result["environment"])
    for concurrency in asked.concurrency:
        with Engine.from_pretrained(
            asked.checkpoint,
            device=asked.device,
            quantize=asked.quantize,
            max_num_seqs=concurrency,
            prefix_sharing=False,
        ) as engine:
            requests = [
                Request(engine.page_prompt, [picture]) for picture in pictures[: max(8, 3 * concurrency)]
            ]
            rows = measure(engine, requests, params, asked.rounds)
        result["runs"].append({"concurrency": concurrency, "pages": len(requests), "rows": rows})
        print(
            f"\n{concurrency} at once, {len(requests)} pages of {asked.max_new_tokens} tokens, {asked.quantize}"
        )
        print("| way | pages/s | ms a step | idle % | waiting for images % | pages that differ |")
        print("| --- | --- | --- | --- | --- | --- |")
        for row in rows:
            cells = [
                f"{row[key][0]:.3g} ({row[key][1]:.3g} to {row[key][2]:.3g})"
                for key in ("pages/s", "ms a step", "idle %", "waiting for images %")
            ]
            print(f"| {row['way']} | {' | '.join(cells)} | {row['differ']} |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
