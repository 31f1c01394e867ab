"""What alignment costs beside reading: `Engine.score` and `Engine.read` on the same pages, and the cost model for the 3B.

    python bench/alignment_cost.py            # prints the last section of bench/results/alignment.md

Measured: processor seconds of the engine's thread by stage, pagemill-tiny on one thread over the clean sample pages, so that
other programs disturb little. Pages are read greedily, without guidance, guard and drafts, and scored on their truth.

Modelled: a page of 1,518 image tokens and the 3B, read in a full batch (`predict`) and scored by the same `StepCost`: a step
computes up to 2,048 tokens, of which up to 256 are of given answers, each through the output layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import environment
from alignment import CLEAN, busy

import pagemill.core
import pagemill.runner
from pagemill import Engine, SamplingParams
from pagemill.core import GIVEN_ROWS
from pagemill.cost.compare import Pages, align, select_pages
from pagemill.cost.devices import reference
from pagemill.cost.model import PRECISIONS, SHAPES, PageStats, Shape, StepCost, predict

OUTPUTS = (256, 500, 1000)
PLACES = (32, 256)
STEP_TOKENS = 2048


def measure(pages: Pages, dtype: str, places: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds by stage, medians, of scoring and of reading; `places` pages at a time."""
    # The engine's clocks, by the processor time of its own thread.
    pagemill.core.time = pagemill.runner.time = SimpleNamespace(
        perf_counter=time.thread_time, thread_time=time.thread_time
    )
    params = SamplingParams(max_new_tokens=768, guidance="off", guard="off", drafts="off", max_retries=0)
    runs: dict[str, list[tuple[dict[str, float], int]]] = {"scoring": [], "reading": []}
    for _ in range(repeats):
        for way, times in runs.items():
            # An engine of its own, so that no page is found in a cache.
            with Engine.from_pretrained(dtype=dtype, num_threads=1, max_num_seqs=places) as engine:
                list(engine.read(pages.refs[0].source, params=params, salt="warm"))
                before = engine.stats()
                if way == "scoring":
                    errors = [one.error for one in align(engine, pages)]
                else:
                    sources = [ref.source for ref in pages.refs]
                    errors = [page.error for page in engine.read(sources, params=params, salt="read")]
                stats = engine.stats().since(before)
            if any(errors):
                raise SystemExit(next(filter(None, errors)))
            assert stats.images == len(pages.refs), "every page is encoded once"
            times.append((busy(stats), stats.output_tokens))
    return [
        {"places": places, "way": way, "tokens": times[0][1] / len(pages.refs)}
        | {
            stage: statistics.median(seconds[stage] for seconds, _ in times) / len(pages.refs)
            for stage in times[0][0]
        }
        for way, times in runs.items()
    ]


def scored(cost: StepCost, pages: PageStats) -> float:
    """Seconds of a device to score a page, beside many others."""
    prompt, answer = pages.prompt_tokens, pages.output_tokens
    steps = max((prompt + answer) / STEP_TOKENS, answer / GIVEN_ROWS)
    chunks = max(answer / GIVEN_ROWS, 1)
    attention = cost.chunk_s(0, prompt) + chunks * cost.chunk_s(prompt + answer / 2, answer / chunks)
    return (
        cost.vision_s([pages.image_tokens])
        + steps * (cost.matmul_s((prompt + answer) / steps, answer / steps) + cost.efficiency.step_s)
        + attention
        + answer * cost.efficiency.row_s
    )


def share(cost: StepCost, pages: PageStats, places: int) -> float:
    """Scoring's seconds as a share of reading's."""
    most = predict(cost, pages).concurrency
    return scored(cost, pages) / predict(cost, pages, min(places, most)).device_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--pages", type=int, help="of each genre; by default all")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    about = environment.lines(environment.describe())
    files = [
        str(f) for genre in CLEAN for f in sorted(environment.PAGES.glob(f"{genre}_*.png"))[: args.pages]
    ]
    pages = select_pages(files, str(environment.PAGES / "truth.jsonl"))
    print("## What it costs\n")
    print("  \n".join(about))
    print(
        f"\nProcessor milliseconds of the engine's thread a page: one thread, {args.dtype}, {len(files)} clean pages, medians "
        f"of {args.repeats}.\n\n| pages at a time | way | answer tokens | vision | prefill | answers | all | of reading |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for places in (1, 16):
        rows = measure(pages, args.dtype, places, args.repeats)
        whole = {row["way"]: sum(row[stage] for stage in ("vision", "prefill", "answers")) for row in rows}
        for row in rows:
            cells = [f"{1e3 * row[stage]:.0f}" for stage in ("vision", "prefill", "answers")]
            cells += [f"{1e3 * whole[row['way']]:.0f}", f"{100 * whole[row['way']] / whole['reading']:.0f} %"]
            print(f"| {places} | {row['way']} | {row['tokens']:.0f} | {' | '.join(cells)} |", flush=True)
    heads = [f"{n:,} tokens, {places}" for n in OUTPUTS for places in PLACES]
    print(
        "\nThe cost model for the 3B in bfloat16, 1,518 image tokens a page: scoring as a share of reading, by tokens of the "
        f"answer and pages at a time (or as many as fit).\n\n| GPU | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}"
    )
    for device in reference().gpus:
        cost = StepCost(Shape(SHAPES["3b"]), PRECISIONS["bfloat16"], device)
        shares = [
            share(cost, replace(PageStats(), output_tokens=n), places) for n in OUTPUTS for places in PLACES
        ]
        print(f"| {device.id} | {' | '.join(f'{100 * s:.0f} %' for s in shares)} |")


if __name__ == "__main__":
    main()
