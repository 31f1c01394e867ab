"""Where a page's time goes: processor time of one thread, by stage and by op, over the sample pages.

Pages are prepared and read in one thread with one kernel thread; every stage and every op is timed with the thread's own
clock, so what other programs do on the machine hardly shows. An op's row is its kernel and the call of it (the clock itself
costs about half a microsecond a row and call). A stage's "rest" is what no row below it names.

    python bench/page_profile.py [--pages 24] [--batches 1,8,24] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagemill.decode.sampler import SamplingParams
from pagemill.engine import Engine
from pagemill.kernels import Kernels
from pagemill.pages import fit as fit_module
from pagemill.pages import preprocess as preprocess_module
from pagemill.pages.fit import FitOptions, fit_page
from pagemill.pages.ink import plausible_output_chars
from pagemill.pages.source import PageRef
from pagemill.sequence import PageTask, Sequence

SAMPLES = Path(__file__).parent / "pages"


class Clock:
    """Self time of named spans that nest: seconds and calls by name since the last `take`."""

    def __init__(self) -> None:
        self._stack: list[float] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        stack, now = self._stack, time.thread_time

        def timed(*args: Any, **kwargs: Any) -> Any:
            stack.append(0.0)
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                took = now() - began
                self.seconds[name] += took - stack.pop()
                self.calls[name] += 1
                if stack:
                    stack[-1] += took

        return timed

    def patch(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.wrap(name, getattr(owner, attribute)))

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        taken = dict(self.seconds), dict(self.calls)
        self.seconds.clear()
        self.calls.clear()
        return taken


_NO_OPS = ("pack_linear", "quantised_kv", "implementations", "capturable")
_OPS = [f.name for f in dataclasses.fields(Kernels) if f.name not in _NO_OPS]


def instrument(engine: Engine, clock: Clock) -> None:
    """Time the stages of a step and every op of the model."""
    core = engine.core
    for model, name in ((core.model.vision, "vision"), (core.model.decoder, "decoder")):
        ops = {op: clock.wrap(f"{name}: {op}", getattr(model.kernels, op)) for op in _OPS}
        model.kernels = dataclasses.replace(model.kernels, **ops)
    core.model.vision = clock.wrap("vision: rest", core.model.vision)  # type: ignore[assignment]
    decoder = core.model.decoder
    core.model.decoder = _Proxy(decoder, clock.wrap("decoder: rest", decoder))  # type: ignore[assignment]
    clock.patch(core.runner, "_lay_out", "step: layout")
    clock.patch(core.runner, "execute", "step: execute rest")
    clock.patch(core.scheduler, "schedule", "step: schedule")
    clock.patch(core.scheduler, "update", "step: update")
    clock.patch(core, "_guess", "step: drafts")
    clock.patch(core, "_fill_masks", "step: masks")
    clock.patch(core, "_advance", "step: advance")
    clock.patch(core, "_settle", "step: settle")
    core.step = clock.wrap("step: rest", core.step)  # type: ignore[method-assign]


class _Proxy:
    """A model whose call is timed and whose attributes are its own."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def prepare(engine: Engine, files: list[Path], clock: Clock) -> list[tuple[Any, Any]]:
    """Load, measure and patch every page; the clock has the parts."""
    options = FitOptions("auto", False, engine.profile.text_height)
    parts = {
        "load_page": (fit_module, "prepare: decode"),
        "measure_ink": (fit_module, "prepare: ink"),
        "is_pdf": (fit_module, "prepare: rest"),
        "patchify": (preprocess_module, "prepare: patchify"),
    }
    before = {name: getattr(module, name) for name, (module, _) in parts.items()}
    for name, (module, label) in parts.items():
        clock.patch(module, name, label)
    whole = clock.wrap("prepare: rest", fit_page)
    prepared = [whole(PageRef(str(file), 1), engine.dpi, options, engine.processor) for file in files]
    for name, (module, _) in parts.items():
        setattr(module, name, before[name])
    return prepared


def add(engine: Engine, file: Path, image: Any, ink: Any, clock: Clock, drafts: str) -> Sequence:
    """Queue one page as `Engine.read` does."""
    core, chars = engine.core, plausible_output_chars(ink)
    prompt = clock.wrap("prepare: prompt", core.tokenize)(engine.page_prompt, [image])
    task = PageTask(
        document=str(file),
        num_glyphs=ink.num_glyphs,
        num_rule_glyphs=ink.num_rule_glyphs,
        expected_tokens=chars // 2 + 64,
    )
    params = SamplingParams(guidance="page", drafts=drafts)  # type: ignore[arg-type]
    queue = clock.wrap("step: add", core.add)
    return queue(prompt, params, min(engine.max_new_tokens, chars + 64), 0, task)  # type: ignore[no-any-return]


def run(files: list[Path], batch: int, drafts: str, kernels: str) -> dict[str, Any]:
    """Read all pages at one concurrency. Seconds a page by row, and medians of decode steps with a full batch."""
    clock = Clock()
    with Engine.from_pretrained(num_threads=1, max_num_seqs=batch, kernels=kernels) as engine:
        instrument(engine, clock)
        core = engine.core
        prepare(engine, files[:2], clock)
        clock.take()
        prepared = prepare(engine, files, clock)
        total: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        steps: list[tuple[dict[str, float], dict[str, int]]] = []

        def collect() -> tuple[dict[str, float], dict[str, int]]:
            seconds, counts = clock.take()
            for row, value in seconds.items():
                total[row] += value
                calls[row] += counts[row]
            return seconds, counts

        for file, (image, ink) in zip(files, prepared, strict=True):
            if not ink.blank:
                add(engine, file, image, ink, clock, drafts)
        collect()
        tokens = 0
        while core.scheduler.has_work:
            before = core.stats.prefill_tokens, core.stats.images
            decoding = len(core.scheduler.running)
            _, finished = core.step()
            tokens += sum(len(seq.token_ids) - seq.num_prompt for seq in finished)
            seconds, counts = collect()
            pure = before == (core.stats.prefill_tokens, core.stats.images)
            if pure and decoding == batch:
                steps.append((seconds, counts))
    rows = sorted({row for seconds, _ in steps for row in seconds})
    return {
        "batch": batch,
        "pages": len(files),
        "output_tokens": tokens,
        "steps": core.stats.steps,
        "page_ms": {row: 1e3 * total[row] / len(files) for row in sorted(total)},
        "decode_steps": len(steps),
        "decode_us": {
            row: 1e6 * statistics.median(seconds.get(row, 0.0) for seconds, _ in steps) for row in rows
        },
        "decode_calls": {row: statistics.median(counts.get(row, 0) for _, counts in steps) for row in rows},
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the tables in Markdown."""
    heads = [f"batch {result['batch']}" for result in results]
    print("| ms of processor time a page | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    _rows([result["page_ms"] for result in results], [], 0.01)
    print("\n| us of a decode step, median | calls | " + " | ".join(heads) + " |")
    print("|---|---|" + "---|" * len(heads))
    _rows([result["decode_us"] for result in results], [results[-1]["decode_calls"]], 0.05)
    for result in results:
        print(
            f"\nbatch {result['batch']}: {result['pages']} pages, {result['output_tokens']} output tokens, "
            f"{result['steps']} steps, {result['decode_steps']} of them decoding with a full batch"
        )


def _rows(columns: list[dict[str, float]], counts: list[dict[str, float]], least: float) -> None:
    digits = 2 if not counts else 1
    names = sorted({name for column in columns for name in column}, key=lambda n: _order(n, columns))
    stages: dict[str, list[float]] = {}
    for column_number, column in enumerate(columns):
        for name, value in column.items():
            sums = stages.setdefault(name.partition(":")[0], [0.0] * len(columns))
            sums[column_number] += value
    shown: set[str] = set()
    for name in names:
        stage = name.partition(":")[0]
        if stage not in shown:
            shown.add(stage)
            cells = [f"**{value:.{digits}f}**" for value in stages[stage]]
            print(f"| **{stage}** | " + "| " * len(counts) + " | ".join(cells) + " |")
        values = [column.get(name, 0.0) for column in columns]
        if max(values) >= least:
            called = [f"{column.get(name, 0):.0f}" for column in counts]
            print(f"| {name} | " + " | ".join([*called, *(f"{value:.{digits}f}" for value in values)]) + " |")
    cells = [f"**{sum(column.values()):.{digits}f}**" for column in columns]
    print("| **total** | " + "| " * len(counts) + " | ".join(cells) + " |")


def _order(name: str, columns: list[dict[str, float]]) -> tuple[int, float]:
    stages = ("prepare", "vision", "decoder", "step")
    return stages.index(name.partition(":")[0]), -max(column.get(name, 0.0) for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=24)
    parser.add_argument("--batches", default="1,8,24")
    parser.add_argument("--drafts", choices=("auto", "off"), default="off")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args()
    files = sorted(SAMPLES.glob("*.png"))
    files = files[:: max(1, len(files) // options.pages)][: options.pages]
    results = [
        run(files, int(batch), options.drafts, options.kernels) for batch in options.batches.split(",")
    ]
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
