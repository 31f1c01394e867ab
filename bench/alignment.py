"""How well alignment foretells quality: bits per character of the truth, before a token is generated, against what is then read.

    python bench/alignment.py --json bench/results/alignment.json

Every stage of the embedded model's training scores the truth of the sample pages (`Engine.score`, teacher-forced) and reads the
same pages as the model alone would: greedy, without guidance, guard and second attempts, at most 768 tokens, so that a page that
degenerates does. Then: Spearman's rank correlation of bits per character with benchmark_score and with the character error
rate, by page and by cell of stage and genre; and of degenerate pages, the chance that one has more bits than a page that is not
(AUROC). Intervals (95 %) are bootstraps over pages, a page's stages together. The genre `loop` is the stress pages, made of what
invites loops.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
from confidence import auroc, spearman
from stages import STAGES, stage_folder

from pagemill import Engine, SamplingParams
from pagemill.cost.compare import Pages, align, alignment_summary, select_pages
from pagemill.decode.page import FIELDS
from pagemill.score import Reading, score, summarize
from pagemill.stats import EngineStats

GENRES = ("prose", "legal", "form", "hard", "loop")
CLEAN = ("prose", "legal", "form")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One page as one stage sees it."""

    stage: str
    genre: str
    page: str
    bits_per_char: float
    benchmark_score: float
    cer: float
    degenerate: bool


def read_stage(
    stage: str, pages: Pages, dtype: str, max_new_tokens: int, folder: Path
) -> tuple[list[Point], dict[str, Any]]:
    """Return the stage's points, and its means over all pages and by genre."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens, guidance="off", guard="off", drafts="off", max_retries=0
    )
    with Engine.from_pretrained(str(stage_folder(stage, folder)), dtype=dtype) as engine:
        list(engine.read(pages.refs[0].source, params=params, salt="warm"))  # not timed
        before = engine.stats()
        aligned = align(engine, pages)
        scored = engine.stats()
        for one in aligned:
            if one.error:
                print(f"{stage}, left out: {Path(one.source).name}: {one.error}")
        fits = [i for i, one in enumerate(aligned) if not one.error]
        aligned = [aligned[i] for i in fits]
        pages = Pages([pages.refs[i] for i in fits], [pages.truths[i] for i in fits], 0)
        results = {
            (r.source, r.page): r
            for r in engine.read([p.source for p in pages.refs], params=params, salt="read")
        }
        seconds = {"scoring": busy(scored.since(before)), "reading": busy(engine.stats().since(scored))}
    if failed := [r.error for r in results.values() if r.error]:
        raise SystemExit(failed[0])
    readings = []
    for ref, truth in zip(pages.refs, pages.truths, strict=True):
        r = results[ref.source, ref.page]
        fields = {name: getattr(r, name) for name in FIELDS}
        readings.append(Reading(truth.name, truth.page, fields, r.raw, r.finish_reason, r.status))
    scores, _ = score(pages.truths, readings)
    points = [
        Point(
            stage,
            page.name.split("_")[0],
            page.name,
            one.bits_per_char or 0.0,
            page.fields.benchmark_score,
            page.fields.cer,
            page.degenerate,
        )
        for page, one in zip(scores, aligned, strict=True)
    ]
    cells = {}
    for genre in ("all", *GENRES):
        chosen = [i for i, point in enumerate(points) if genre in ("all", point.genre)]
        means = summarize([scores[i] for i in chosen])
        cells[genre] = {
            "pages": len(chosen),
            **alignment_summary([aligned[i] for i in chosen]),
            "benchmark_score": means["fields"]["benchmark_score"],
            "cer": means["fields"]["cer"],
            "degeneration_rate": means["degeneration_rate"],
        }
    return points, {"cells": cells, "seconds": seconds}


def busy(stats: EngineStats) -> dict[str, float]:
    """Seconds of the engine's thread: what both ways need, and what the answers took."""
    return {
        "vision": stats.encode_s,
        "prefill": stats.prefill_s,
        "answers": stats.decode_s + stats.sampling_s + stats.bookkeeping_s,
    }


def relations(points: Sequence[Point]) -> dict[str, float]:
    """How well bits per character rank pages, by what is read of them; NaN where there is nothing to rank."""
    bits = [point.bits_per_char for point in points]
    return {
        "benchmark_score": spearman(bits, [point.benchmark_score for point in points]),
        "cer": spearman(bits, [point.cer for point in points]),
        "degenerate": auroc(bits, [point.degenerate for point in points]),
    }


def with_intervals(points: Sequence[Point]) -> dict[str, dict[str, float | None]]:
    names = sorted({point.page for point in points})
    of_page = {name: [point for point in points if point.page == name] for name in names}
    random = np.random.default_rng(0)
    drawn = [
        relations(
            [point for i in random.integers(len(names), size=len(names)) for point in of_page[names[i]]]
        )
        for _ in range(_RESAMPLES)
    ]
    found = {}
    for name, value in relations(points).items():
        known = [sample[name] for sample in drawn if not math.isnan(sample[name])]
        low, high = np.quantile(known, (0.025, 0.975)) if known and not math.isnan(value) else (None, None)
        found[name] = {
            "value": None if math.isnan(value) else value,
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
        }
    return found


def by_cell(stages: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The rank correlation over cells of stage and genre."""
    cells = [stage["cells"][genre] for stage in stages.values() for genre in GENRES]
    bits = [cell["bits_per_char"]["value"] for cell in cells]
    found = {
        name: spearman(bits, [cell[name]["value"] for cell in cells])
        for name in ("benchmark_score", "cer", "degeneration_rate")
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def show(stages: dict[str, dict[str, Any]], tables: dict[str, Any], cells: dict[str, float | None]) -> None:
    def leaf(numbers: dict[str, float], scale: float = 1, digits: int = 3) -> str:
        if numbers["value"] is None:
            return "-"
        value, low, high = (f"{scale * numbers[key]:.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    heads = ("pages", "bits/char", "benchmark_score", "CER %", "degenerate %")
    print("".join([f"\n{'stage':8} {'genre':6}", f"{heads[0]:>6}", *(f"{head:>26}" for head in heads[1:])]))
    for stage, found in stages.items():
        for genre, cell in found["cells"].items():
            row = [
                leaf(cell["bits_per_char"]),
                leaf(cell["benchmark_score"]),
                leaf(cell["cer"], 100, 1),
                leaf(cell["degeneration_rate"], 100, 1),
            ]
            print("".join([f"{stage:8} {genre:6}{cell['pages']:6}", *(f"{text:>26}" for text in row)]))
    print(
        f"\nbits per character against ...{'benchmark_score, Spearman':>32}{'CER, Spearman':>28}{'degenerate, AUROC':>28}"
    )
    for name, table in tables.items():
        print("".join([f"{name:34}", *(f"{leaf(numbers):>28}" for numbers in table.values())]))
    said = ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in cells.items())
    print(f"{len(stages) * len(GENRES)} cells of stage and genre, Spearman: {said}")
    for stage, found in stages.items():
        for way, parts in found["seconds"].items():
            print(f"{stage}, {way}: {', '.join(f'{name} {s:.1f} s' for name, s in parts.items())}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--pages", type=int, help="of each genre; by default all")
    parser.add_argument("--json", type=Path, help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe("rapidfuzz")
    environment.show(where)
    refs, truths = [], []
    for genre in GENRES:
        folder_of_genre = environment.PAGES / "stress" if genre == "loop" else environment.PAGES
        files = sorted(str(file) for file in folder_of_genre.glob(f"{genre}_*.png"))[: args.pages]
        found = select_pages(files, str(folder_of_genre / "truth.jsonl"))
        refs += found.refs
        truths += found.truths
    pages = Pages(refs, truths, 0)
    points: list[Point] = []
    stages: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            seen, stages[stage] = read_stage(stage, pages, args.dtype, args.max_new_tokens, Path(folder))
            points += seen
    groups: dict[str, Callable[[Point], bool]] = {"all stages and genres": lambda _: True}
    groups |= {f"stage {stage}": lambda p, stage=stage: p.stage == stage for stage in args.stages}
    groups |= {f"{genre}, all stages": lambda p, genre=genre: p.genre == genre for genre in GENRES}
    groups |= {f"{args.stages[-1]}, clean pages": lambda p: p.stage == args.stages[-1] and p.genre in CLEAN}
    tables = {name: with_intervals([p for p in points if chosen(p)]) for name, chosen in groups.items()}
    cells = by_cell(stages)
    show(stages, tables, cells)
    if args.json:
        result = {
            "environment": where,
            "dtype": args.dtype,
            "max_new_tokens": args.max_new_tokens,
            "stages": stages,
            "by_page": tables,
            "by_cell": cells,
            "pages": [asdict(point) for point in points],
        }
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
