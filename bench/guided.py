"""What guidance does to the sample pages and what it costs.

    python bench/guided.py --pages 36 --repeats 3

Reads the clean sample pages, and once the hard ones, without guidance, with the page's grammar in the order that the model
learned, and with the grammar that takes any order and missing keys, in turn, each with a fresh engine. Costs are processor
seconds of the whole process a page, one kernel thread, no drafts, since wall-clock time depends on what else runs; the ratio
is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import environment
from stages import stage_folder

from pagemill import Engine, PageResult, SamplingParams
from pagemill.decode.page import is_json_object
from pagemill.score import Truth, joined, read_truths, score_text

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "off": ("off", {}),
    "page, fixed order": ("page", {"key_order": "fixed", "optional_keys": False}),
    "page, any order": ("page", {"key_order": "any", "optional_keys": True}),
}


def read(folder: Path, guidance: str, files: list[str], dtype: str) -> tuple[list[PageResult], float, float]:
    """Return the pages, processor seconds and wall-clock seconds."""
    with Engine.from_pretrained(str(folder), dtype=dtype, max_num_seqs=16, num_threads=1) as engine:
        params = SamplingParams(guidance=guidance, max_retries=0, drafts="off")
        next(iter(engine.read(files[0], params=params)))  # first calls compile and grow tables
        cpu, wall = time.process_time(), time.perf_counter()
        pages = list(engine.read(files, params=params))
        return pages, time.process_time() - cpu, time.perf_counter() - wall


def score(pages: list[PageResult], truth: dict[str, Truth]) -> dict[str, float]:
    texts = [score_text(truth[Path(p.source).name].text, joined(p.to_dict())) for p in pages]
    return {
        "benchmark_score": statistics.fmean(text.benchmark_score for text in texts),
        "valid_json": statistics.fmean(is_json_object(p.raw) for p in pages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=36, help="clean pages to time (default 36)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    where = environment.describe("llguidance")
    environment.show(where)
    truth = {t.name: t for t in read_truths(environment.PAGES / "truth.jsonl")}
    files = [str(environment.PAGES / name) for name in sorted(truth)]
    clean = [f for f in files if "hard" not in f][: args.pages]
    hard = [f for f in files if "hard" in f]
    rows: dict[str, dict[str, Any]] = {way: {"cpu": [], "wall": []} for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(args.repeats):
            for way, (guidance, settings) in WAYS.items():
                folder = stage_folder("final", Path(temporary), **settings)
                pages, cpu, wall = read(folder, guidance, clean, args.dtype)
                rows[way]["cpu"].append(cpu / len(clean))
                rows[way]["wall"].append(len(clean) / wall)
                rows[way]["clean"] = score(pages, truth)
        for way, (guidance, settings) in WAYS.items():
            folder = stage_folder("final", Path(temporary), **settings)
            rows[way]["hard"] = score(read(folder, guidance, hard, args.dtype)[0], truth)
    base = statistics.median(rows["off"]["cpu"])
    print(
        f"\n{'guidance':20}{'CPU ms a page':>22}{'cost':>8}{'pages/s':>9}{'clean':>8}{'valid':>7}{'hard':>8}{'valid':>7}"
    )
    for way, row in rows.items():
        cpu = statistics.median(row["cpu"])
        row["cost"] = cpu / base - 1
        spread = f"{1e3 * cpu:.0f} ({1e3 * min(row['cpu']):.0f} to {1e3 * max(row['cpu']):.0f})"
        cells = [f"{row[group][name]:.4f}" if name != "valid_json" else f"{100 * row[group][name]:.0f} %"
                 for group in ("clean", "hard") for name in ("benchmark_score", "valid_json")]  # fmt: skip
        print(
            f"{way:20}{spread:>22}{100 * row['cost']:>+7.1f}%{statistics.median(row['wall']):>9.2f}"
            f"{cells[0]:>8}{cells[1]:>7}{cells[2]:>8}{cells[3]:>7}"
        )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"environment": where, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
