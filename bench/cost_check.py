"""The cost model and the simulator against this machine: calibrated on a few runs, held against others that they have not seen.

    python bench/cost_check.py --write

What is measured is processor time, on one thread, so that other programs on the machine disturb little. Device: multiply-adds a
second of the packed linear kernel, and the rate at which it reads weights that no cache holds. Efficiencies: a page's time is
linear in the inverse shares and in the seconds a step, a row and an image; they are fitted to the calibration runs by least
squares of relative errors, none below zero. Other precisions take the efficiencies of float32, and rates of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import environment
import numpy as np
import torch
from large import draw_page
from make_checkpoint import _TEXT, _VISION, write_checkpoint

from pagemill import Engine, Request, SamplingParams, kernels
from pagemill.cost.devices import Device, find_device, measured
from pagemill.cost.model import (
    GPU_EFFICIENCY,
    PRECISIONS,
    SHAPES,
    Efficiency,
    PageStats,
    Shape,
    StepCost,
    check_published,
    find_shape,
    predict,
)
from pagemill.cost.scenario import save_machine
from pagemill.cost.simulator import Degeneration, Settings, Workload, simulate

MID_TEXT = dict(
    _TEXT, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=2048, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
MID_VISION = dict(
    _VISION, depth=8, hidden_size=640, intermediate_size=1728, num_heads=8, fullatt_block_indexes=[3, 7], out_hidden_size=768
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A run: pages of one size, output lengths that scatter around a mean, so many at a time."""

    width: int
    height: int
    output: int
    concurrency: int
    pages: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}, {self.output} tokens, {self.concurrency} at a time"

    def outputs(self) -> list[int]:
        random = np.random.default_rng(self.output)
        return [max(int(self.output * r), 1) for r in np.exp(0.4 * random.standard_normal(self.pages) - 0.08)]


CALIBRATION = [
    Point(560, 784, 64, 8, 16), Point(560, 784, 200, 4, 8), Point(280, 392, 200, 16, 32), Point(784, 1120, 32, 2, 4),
    Point(280, 392, 24, 1, 8), Point(560, 784, 160, 16, 24),
]  # fmt: skip
UNSEEN = [
    Point(392, 560, 120, 8, 16), Point(672, 896, 150, 12, 18), Point(896, 1232, 90, 6, 8), Point(476, 644, 250, 24, 32),
    Point(336, 448, 60, 2, 12), Point(616, 868, 40, 4, 10),
]  # fmt: skip


def fastest(call: Any, repeats: int = 7) -> float:
    """Processor seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def measure_device(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of the packed linear kernel on many rows, and bytes a second on one row of weights beyond caches."""
    k = kernels.select("auto", torch.device("cpu"), dtype)
    weight = k.pack_linear(torch.randn(768, 768), None)
    rows = torch.randn(512, 768).to(dtype)
    flops = 2 * 512 * 768 * 768 / fastest(lambda: k.linear(rows, weight))
    large = k.pack_linear(torch.randn(8192, 8192), None)
    row = torch.randn(1, 8192).to(dtype)
    return flops, 8192 * 8192 * dtype.itemsize / fastest(lambda: k.linear(row, large))


def run(engine: Engine, point: Point, first: int = 0) -> dict[str, Any]:
    """Read a point's pages, drawn by seeds from `first` on; processor seconds, and what the pages held."""
    requests = [
        Request(
            engine.page_prompt,
            images=[draw_page(point.width, point.height, seed)],
            params=SamplingParams(max_new_tokens=output, ignore_eos=True, guard="off", drafts="off"),
        )
        for seed, output in enumerate(point.outputs(), first)
    ]
    before = engine.stats()
    start, wall = time.process_time(), time.perf_counter()
    outputs = engine.generate(requests)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    assert all(output.error is None for output in outputs), outputs[0].error
    tokens = outputs[0].tokens
    return {
        "seconds": seconds,
        "wall": wall,
        "image": tokens.image,
        "text": tokens.prompt - tokens.image,
        "outputs": [output.tokens.output for output in outputs],
        "steps": engine.stats().since(before).steps,
    }


def workload_of(found: dict[str, Any]) -> Workload:
    outputs = found["outputs"]
    return Workload(
        len(outputs),
        PageStats(found["image"], statistics.mean(outputs), found["text"], output_sigma=0.4),
        lengths=tuple((found["image"], output) for output in outputs),
        max_new_tokens=max(outputs),
    )


def simulated(found: dict[str, Any], point: Point, cost: StepCost) -> float:
    return simulate(workload_of(found), Settings(point.concurrency), cost).seconds


UNIT = Efficiency(1, 1, 1, 1, origin="measured limits")
KNOBS = ("matmul", "vision", "attention", "step_s", "row_s", "image_s", "prepare_s")


def turned(efficiency: Efficiency, knob: str, value: float) -> Efficiency:
    """With one inverse share (matrix products and reading together), or one number of seconds, at `value`."""
    if knob.endswith("_s"):
        return replace(efficiency, **{knob: value})
    changed = {knob: 1 / value}
    if knob == "matmul":
        changed["bandwidth"] = 1 / value
    return replace(efficiency, **changed)


def fit(runs: list[tuple[Point, dict[str, Any]]], shape: Shape, dtype: str, device: Device) -> Efficiency:
    """Efficiencies that explain the runs' seconds best."""
    precision = PRECISIONS[dtype]
    rows, wanted = [], []
    for point, found in runs:
        base = simulated(found, point, StepCost(shape, precision, device, UNIT))
        row = []
        for knob in KNOBS:
            by = 1e-3 if knob.endswith("_s") else 1.0
            value = by if knob.endswith("_s") else 2.0
            more = simulated(found, point, StepCost(shape, precision, device, turned(UNIT, knob, value)))
            row.append((more - base) / by)
        rows.append([x / found["seconds"] for x in row])
        wanted.append(1.0)
    a, free = np.array(rows), list(range(len(KNOBS)))
    while True:  # least squares, leaving out what would be negative
        solution = np.linalg.lstsq(a[:, free], np.array(wanted), rcond=None)[0]
        lowest = 2 / 3  # no share above the 1.5 that an efficiency may be
        bad = [i for i, x in zip(free, solution, strict=True) if x < 0]
        if not bad:
            break
        free.remove(min(bad, key=lambda i: solution[free.index(i)]))
    values = dict.fromkeys(KNOBS, 0.0) | {KNOBS[i]: float(x) for i, x in zip(free, solution, strict=True)}
    efficiency = replace(UNIT, origin=f"fitted to {len(runs)} runs")
    for knob, value in values.items():
        efficiency = turned(efficiency, knob, value if knob.endswith("_s") else max(value, lowest))
    return efficiency


def check(
    name: str, folder: str, dtypes: list[str], devices: dict[str, Device], scale: float
) -> tuple[list[dict[str, Any]], Efficiency]:
    """Calibrate in float32, then predict what was not seen, in every dtype."""
    shape, rows, efficiency = Shape(find_shape(folder)), [], UNIT
    for dtype in dtypes:
        runs: list[tuple[str, Point, dict[str, Any]]] = []
        points = [("calibration", p) for p in CALIBRATION if dtype == "float32"] + [
            ("unseen", p) for p in UNSEEN
        ]
        for use, full in points:
            point = replace(full, pages=max(int(full.pages * scale), 2))
            with Engine.from_pretrained(
                folder, dtype=dtype, num_threads=1, max_num_seqs=point.concurrency, prepare_threads=1,
                kv_cache_bytes=1 << 29,
            ) as engine:  # fmt: skip
                run(engine, replace(point, pages=1, output=4), first=1000)
                runs.append((use, point, run(engine, point)))
            print(f"{name} {dtype}: {point}: {runs[-1][2]['seconds']:.2f} s", flush=True)
        if dtype == "float32":
            efficiency = fit(
                [(p, f) for use, p, f in runs if use == "calibration"], shape, dtype, devices[dtype]
            )
            print(efficiency, flush=True)
        cost = StepCost(shape, PRECISIONS[dtype], devices[dtype], efficiency)
        for use, point, found in runs:
            guess = simulated(found, point, cost)
            steady = predict(cost, workload_of(found).stats, point.concurrency)
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "use": use,
                    "point": str(point),
                    "pages": point.pages,
                    "measured_s": found["seconds"],
                    "wall_s": found["wall"],
                    "steps": found["steps"],
                    "simulated_s": guess,
                    "simulator_error": guess / found["seconds"] - 1,
                    "closed_form_s": point.pages / steady.pages_per_s,
                    "closed_form_error": point.pages / steady.pages_per_s / found["seconds"] - 1,
                }
            )
            print(
                f"{use:12} {point}: {found['seconds']:.2f} s, simulator {100 * rows[-1]['simulator_error']:+.0f} %, "
                f"closed form {100 * rows[-1]['closed_form_error']:+.0f} %",
                flush=True,
            )
    return rows, efficiency


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--models", default="tiny,mid")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pages")
    parser.add_argument("--write", action="store_true", help="write bench/results/cost_check.json")
    args = parser.parse_args()
    about = environment.describe("numpy")
    environment.show(about)
    kernels.set_num_threads(1)
    torch.set_num_threads(1)
    dtypes, devices = args.dtypes.split(","), {}
    for dtype in dtypes:
        flops, bandwidth = measure_device(getattr(torch, dtype))
        rates = {dtype: flops}
        devices[dtype] = measured(
            "this-machine", flops=rates, bandwidth=bandwidth, memory=8e9, source="bench/cost_check.py"
        )
        print(f"{dtype}: {flops / 1e9:.1f} Gflop/s, {bandwidth / 1e9:.1f} GB/s, one thread")
    rows: list[dict[str, Any]] = []
    fitted: dict[str, Efficiency] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            where = "pagemill-tiny"
            if name == "mid":
                where = str(write_checkpoint(Path(folder), MID_TEXT, MID_VISION, dtype=torch.float32))
            found, efficiency = check(
                name, where, dtypes, devices, args.scale if name == "tiny" else args.scale / 2
            )
            rows += found
            fitted[name] = efficiency
    print("\n".join(summary(rows)))
    if args.write:
        folder_ = Path(__file__).parent / "results"
        result = {
            "environment": about,
            "devices": {d: {"flops": dict(v.flops), "bandwidth": v.bandwidth} for d, v in devices.items()},
            "efficiency": {name: asdict(efficiency) for name, efficiency in fitted.items()},
            "rows": rows,
        }
        (folder_ / "cost_check.json").write_text(json.dumps(result, indent=1))
        rates = {d: v.flops[d] for d, v in devices.items()}
        save_machine(
            str(folder_ / "machine.json"),
            replace(devices["float32"], flops=rates),
            next(iter(fitted.values())),
        )
        (folder_ / "cost.md").write_text("\n".join(report(about, devices, fitted, rows)) + "\n")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for key, what in (("simulator_error", "simulator"), ("closed_form_error", "closed form")):
        errors = [abs(row[key]) for row in rows if row["use"] == "unseen"]
        worst, middle = 100 * max(errors), 100 * statistics.median(errors)
        lines.append(
            f"{what}, {len(errors)} unseen runs: median error {middle:.1f} %, largest {worst:.1f} %.  "
        )
    return lines


def report(
    about: dict[str, str],
    devices: dict[str, Device],
    fitted: dict[str, Efficiency],
    rows: list[dict[str, Any]],
) -> list[str]:
    """The results page."""
    lines = ["# The cost model and the simulator, checked", ""]
    lines += [f"{name}: {value}  " for name, value in about.items()]
    lines += [
        "",
        "## Against this machine",
        "",
        "Processor seconds on one thread, pages and all. `bench/cost_check.py` says how; calibrated in float32 on the",
        "runs so marked, for each model. `mid` has random weights. The closed form is steady state: it knows of no",
        "beginning and no end of a batch, which is much of runs this short.",
        "",
    ]
    for dtype, device in devices.items():
        lines.append(f"- {dtype}: {device.flops[dtype] / 1e9:.0f} Gflop/s, {device.bandwidth / 1e9:.1f} GB/s")
    for name, e in fitted.items():
        lines.append(
            f"- {name}: matrix products {e.matmul:.2f} of that, vision tower {e.vision:.2f}, attention {e.attention:.2f}; "
            f"a step {1e3 * e.step_s:.2f} ms, a row {1e3 * e.row_s:.3f} ms, an image {1e3 * e.image_s:.1f} ms, "
            f"preparing a page {1e3 * e.prepare_s:.1f} ms"
        )
    lines += ["", *summary(rows), ""]
    lines += [
        "| model | dtype | pages | use | measured, s | simulator | closed form |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['dtype']} | {r['pages']} of {r['point']} | {r['use']} | {r['measured_s']:.2f} | "
        f"{100 * r['simulator_error']:+.1f} % | {100 * r['closed_form_error']:+.1f} % |"
        for r in rows
    ]
    lines += ["", "## Against published speeds", "", f"Efficiencies {GPU_EFFICIENCY.origin}.", ""]
    lines += [
        "| system | card | published, pages/s | predicted | ratio | hardware's limit | reached | assumed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in check_published():
        numbers = "– | – | – | –"
        if c.predicted and c.ratio and c.limit and c.share_of_limit:
            numbers = f"{c.predicted:.2f} | {c.ratio:.1f} | {c.limit:.1f} | {100 * c.share_of_limit:.0f} %"
        lines.append(
            f"| {c.row.system}, {c.row.engine} | {c.row.gpu} | {c.row.pages_per_s} | {numbers} | {c.note} |"
        )
    lines += ["", *loops()]
    return lines


def loops() -> list[str]:
    """The published batch with looping pages, and what a guard gives back."""
    cost = StepCost(Shape(SHAPES["7b"]), PRECISIONS["bfloat16"], find_device("l40s"))
    base = Workload(496, PageStats(1518, 620))
    lines = [
        "## The published batch with looping pages",
        "",
        "Published: Qwen2.5-VL-7B, 2.42 % of requests loop, 7.3 minutes instead of 4.2. Not published: card, pages, cap,",
        "concurrency. Taken here: the 496 pages and the cap of 8,192 tokens of the DharmaOCR benchmark (2.42 % are 12 of them),",
        "an L40S, bfloat16, 64 pages at once, 1,518 image and 620 output tokens a page, a loop found after 300 tokens, 80 % of",
        "rescued pages end well. Times of healthy pages are from their admission.",
        "",
        "| | minutes | pages/s | degenerate pages | tokens of loops | page, median and p95, s |",
        "|---|---|---|---|---|---|",
    ]
    tries: list[tuple[str, Degeneration]] = [("no page loops", Degeneration())]
    tries += [(f"guard: {guard}", Degeneration(0.0242, guard)) for guard in ("off", "stop", "rescue")]  # type: ignore[arg-type]
    for name, degeneration in tries:
        o = simulate(replace(base, degeneration=degeneration), Settings(64), cost)
        p50, p95 = np.percentile((o.finished - o.scheduled)[~o.looped], (50, 95))
        tokens = o.waste_tokens["degenerate"] + o.waste_tokens["discarded"]
        lines.append(
            f"| {name} | {o.seconds / 60:.1f} | {o.pages_per_s:.2f} | {int(o.degenerate.sum())} | {tokens:,} | "
            f"{p50:.0f}, {p95:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
