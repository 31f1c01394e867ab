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
- **pages that differ** from what they were in the first way: with random weights a token may tip over in a batch of another size.

On a GPU a second table follows, once all else is measured (a tracer that was attached once may slow down what follows). As many
pages as there are places are read in each way, and torch.profiler (CUPTI) traces some steps that only decode:

- **busy %**: the union of the kernels' times over the time from the first one's start to the last one's end. No copies.
- **gap %**: the pauses in it that are longer than 5 us, copies included. Shorter ones are between two kernels of a graph, or of
  a queue, and no CPU has a part in them. Tracing makes pauses longer: busy is at least, gap at most, what is there without it.
- **kernels a step**, **ms of kernels a step**: about the same in all ways, or else the trace is incomplete and says nothing.

"-": the window did not fit between the last page's first token and the first page's last, or CUPTI gave no kernels.

On a CPU there is nothing to overlap and the rows are alike, which is a check of this program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from math import inf
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
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
    """Of traced kernels: the columns of the second table, None where there are no kernels."""
    if not kernels:
        return dict.fromkeys(("busy %", "gap %", "kernels a step", "ms of kernels a step"))
    window = max(end for _, end in kernels) - min(start for start, _ in kernels)
    busy = covered(kernels)
    return {
        "busy %": 100 * busy / window,
        "gap %": 100 * (1 - covered(kernels, _BRIDGE) / window),
        "kernels a step": len(kernels) / _TRACED,
        "ms of kernels a step": busy / 1e3 / _TRACED,
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
    plan = schedule(wait=0, warmup=_WARMUP, active=_TRACED, repeat=1)
    profiler = profile(activities=[activity], schedule=plan)

    def step() -> Any:
        # The profiler is the thread's that starts it. libkineto reports an error for any but the one that loaded torch; all that
        # it then leaves undone is for another maker's devices.
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


def in_every_way(engine: Engine) -> Iterator[str]:
    """Set an engine to the ways in turn. Between two calls its thread sleeps: one can be all of them, with the same memory."""
    core = engine.core
    graphs, on_gpu = core.runner._graphs, core.gpu is not None
    for name, (recorded, ahead) in WAYS.items():
        core.runner._graphs = graphs if recorded else None
        core._ahead = core.scheduler.encode_ahead = ahead and on_gpu
        yield name


def measure(
    engine: Engine, requests: list[Request], params: SamplingParams, rounds: int
) -> list[dict[str, Any]]:
    """Read the pages in every way, `rounds` times in turn, and return a row for each way."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    first: list[Any] = []
    differ = dict.fromkeys(WAYS, 0)
    for number in range(rounds + 1):
        for name in in_every_way(engine):
            numbers, tokens = read(engine, requests, params)
            first = first or tokens
            if number:
                found[name].append(numbers)
                differ[name] += sum(a != b for a, b in zip(first, tokens, strict=True))
    return [
        {"way": name}
        | {key: [f([row[key] for row in rows]) for f in (statistics.median, min, max)] for key in rows[0]}
        | {"pages that differ": differ[name]}
        for name, rows in found.items()
    ]


def measure_traced(engine: Engine, requests: list[Request], params: SamplingParams) -> list[dict[str, Any]]:
    """Read the pages, all at once, in every way; return a row of what the device did for each."""
    return [
        {"way": name} | shares(kernel_times(trace(engine, requests, params))) for name in in_every_way(engine)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        median, least, most = value
        return f"{median:.3g} ({least:.3g} to {most:.3g})"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


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
    result: dict[str, Any] = {
        "environment": environment.describe("torch", "triton"),
        "asked": vars(asked) | {"json": None},
        "runs": [],
        "traced": [],
    }
    environment.show(result["environment"])

    def engine_of(concurrency: int) -> Engine:
        return Engine.from_pretrained(
            asked.checkpoint,
            device=asked.device,
            quantize=asked.quantize,
            max_num_seqs=concurrency,
            prefix_sharing=False,
        )

    def note(concurrency: int, pages: int, kind: str, rows: list[dict[str, Any]]) -> None:
        print(f"\n{concurrency} at once, {pages} pages of {asked.max_new_tokens} tokens, {asked.quantize}")
        print(table(rows), flush=True)
        result[kind].append({"concurrency": concurrency, "pages": pages, "rows": rows})
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n")

    for concurrency in asked.concurrency:
        with engine_of(concurrency) as engine:
            on_gpu = engine.core.gpu is not None
            several = pictures[: max(8, 3 * concurrency)]
            requests = [Request(engine.page_prompt, [picture]) for picture in several]
            note(concurrency, len(requests), "runs", measure(engine, requests, params, asked.rounds))
    if not on_gpu:
        return
    if tuple(map(int, (torch.version.cuda or "99.0").split("."))) < (12, 6):
        # As torch does for its own graphs: there, CUPTI that was closed crashes when it is to trace recorded steps again.
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    for concurrency in asked.concurrency:
        with engine_of(concurrency) as engine:
            requests = [Request(engine.page_prompt, [picture]) for picture in pictures[:concurrency]]
            note(concurrency, len(requests), "traced", measure_traced(engine, requests, params))


if __name__ == "__main__":
    main()
