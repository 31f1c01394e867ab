"""What of a GPU's time goes by between steps; what CUDA graphs, planning ahead and encoding images beside decoding do about it.

    python bench/make_checkpoint.py --preset 3b -o out/random-3b
    python bench/overlap.py --checkpoint out/random-3b --device cuda

One engine reads the sample pages in three ways, in turn: steps launched kernel by kernel, recorded steps (`cuda_graphs`), and
recorded steps planned ahead (`overlap`). Drafts are off and every page gets the same number of new tokens: all do the same work.
Medians of the rounds, and their range; a round before them is not counted. The columns:

- **pages/s**, **ms a step**: of the whole round, pictures and prompts included.
- **idle %**: the share of the engine's time that is outside the device's marks around images and decoder. The marks begin before
  a step's arrays are laid out and copied, and pauses between kernels lie inside: what the CPU takes there is not in it.
- **waiting for images %**: the share in which images were encoded, and no token computed.
- **busy %**, on a GPU: after the rounds, how much of a window of steps that only decode the device spent in kernels, by
  torch.profiler (CUPTI): the union of the kernels' times over the time from the first one's start to the last one's end.
- **gap %**, on a GPU: the pauses of that window that are longer than 5 us. Shorter ones are between two kernels of a graph, or
  queued ones, and no CPU has a part in them. Copies are pauses. Tracing makes pauses longer: busy is at least, and gap at most,
  what is there without it. "-": the window did not fit between the last page's first token and the first page's last, or CUPTI
  gave no kernels (a driver may keep them for administrators).
- **pages that differ** from what they were in the first way: with random weights a token may tip over in a batch of another size.

On a CPU there is nothing to overlap and the rows are alike, which is a check of this program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from math import inf
from pathlib import Path
from typing import Any

import environment
import numpy as np
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from pagemill import Engine, Request, SamplingParams

_WARMUP, _TRACED = 4, 32  # steps
_BRIDGE = 5.0  # microseconds
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


def covered(intervals: Iterable[tuple[float, float]], bridge: float = 0.0) -> float:
    """How long the union of intervals (start, end) is, with the pauses in it that are no longer than `bridge`."""
    total, reached = 0.0, -inf
    for start, end in sorted(intervals):
        begun = reached if start <= reached + bridge else start
        total += max(end - begun, 0.0)
        reached = max(reached, end)
    return total


def kernel_times(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Start and end of the device's kernels, microseconds, among torch.profiler's events: no copies, no marks of the host."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset", "ProfilerStep"))
    ]


def shares(kernels: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Percent of the time from the first kernel's start to the last one's end: in kernels, and in pauses that a CPU made."""
    if not kernels:
        return {"busy %": None, "gap %": None}
    window = max(end for _, end in kernels) - min(start for start, _ in kernels)
    return {
        "busy %": 100 * covered(kernels) / window,
        "gap %": 100 * (1 - covered(kernels, _BRIDGE) / window),
    }


def trace(
    engine: Engine,
    requests: list[Request],
    params: SamplingParams,
    activity: ProfilerActivity = ProfilerActivity.CUDA,
) -> Iterable[Any]:
    """Answer the requests, all at once. Returns torch.profiler's events of some steps in a row between the last page's first
    token and the first page's last; none where there are too few."""
    core, begun, running = engine.core, set[int](), None
    with profile(activities=[activity]):
        pass  # its first start is slow, and belongs in the thread that loaded torch
    plan = schedule(wait=0, warmup=_WARMUP, active=_TRACED, repeat=1)
    profiler = profile(activities=[activity], schedule=plan)

    def step() -> Any:  # all in the engine's thread: the profiler is its
        nonlocal running
        advanced, finished = type(core).step(core)
        begun.update(seq.id for seq in advanced)
        if finished:
            if running:
                profiler.stop()
            running = False
        elif running:
            profiler.step()
        elif running is None and len(begun) == len(requests):
            profiler.start()
            running = True
        return advanced, finished

    core.step = step  # type: ignore[method-assign]
    try:
        outputs = engine.generate(requests, params)
    finally:
        del core.step
    if failed := [output.error for output in outputs if output.error]:
        raise SystemExit(f"a page failed: {failed[0]}")
    return profiler.events() if profiler.step_num >= _WARMUP + _TRACED else []


def measure(
    engine: Engine, requests: list[Request], params: SamplingParams, rounds: int
) -> list[dict[str, Any]]:
    """Read the pages in every way, `rounds` times in turn, then on a GPU trace a window of each. Returns a row for each way."""
    core = engine.core
    graphs, on_gpu = core.runner._graphs, core.gpu is not None

    def take(way: str) -> None:
        # Between two calls the engine's thread sleeps: one engine can be all of them, with the same memory.
        recorded, ahead = WAYS[way]
        core.runner._graphs = graphs if recorded else None
        core._ahead = core.scheduler.encode_ahead = ahead and on_gpu

    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    first: list[Any] = []
    differ = dict.fromkeys(WAYS, 0)
    for number in range(rounds + 1):
        for name in WAYS:
            take(name)
            numbers, tokens = read(engine, requests, params)
            first = first or tokens
            if number:
                found[name].append(numbers)
                differ[name] += sum(a != b for a, b in zip(first, tokens, strict=True))
    rows: list[dict[str, Any]] = [
        {"way": name, "differ": differ[name]}
        | {key: [f([row[key] for row in rows]) for f in (statistics.median, min, max)] for key in rows[0]}
        for name, rows in found.items()
    ]
    for row in rows if on_gpu else []:
        take(row["way"])
        row |= shares(kernel_times(trace(engine, requests[: core.config.max_num_seqs], params)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    keys = [key for key in rows[0] if key not in ("way", "differ")]
    lines = [f"| way | {' | '.join(keys)} | pages that differ |", "| --- " * (len(keys) + 2) + "|"]
    for row in rows:
        cells = [_cell(row[key]) for key in keys]
        lines.append(f"| {row['way']} | {' | '.join(cells)} | {row['differ']} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        median, least, most = value
        return f"{median:.3g} ({least:.3g} to {most:.3g})"
    return "-" if value is None else f"{value:.3g}"


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
    # As torch sets them for its own graphs: CUPTI that was closed does not trace recorded steps again without crashing.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
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
        print(table(rows), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
