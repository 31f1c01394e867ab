"""Synthetic result files in the shared format of `pagemill bench`, for tests and for looking at the report.

Every number is made up by a small queueing toy, seeded: no machine was measured.
`python tests/cost/make_results.py DIR` writes them.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "date": "2026-11-20T10:00:00+00:00",
    "command": "pagemill bench samples --sweep concurrency=1,2,4,8,16 --truth truth.jsonl --seed 0",
    "machine": "a synthetic processor (no machine was measured)",
    "cores": 16,
    "versions": {"pagemill": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    "flags": {"omp_wait_policy": "passive"},
    "seed": 0,
}
WORKLOAD = {
    "kind": "folder",
    "pages": 120,
    "source": "synthetic pages",
    "image_tokens": {"mean": 612, "p95": 990},
}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, round(p / 100 * len(ordered)))] for p in (50, 95, 99)}


def run(
    name: str,
    *,
    concurrency: int = 8,
    speed: float = 1.0,
    score: float | None = 0.94,
    degeneration: float = 0.02,
    usd_per_hour: float | None = 0.714,
    pages: int = 120,
    seed: int = 0,
    bits: float | None = None,
    timeline: bool = True,
) -> dict[str, Any]:
    """One run: pages in `concurrency` lanes, each slower the fuller the batch."""
    rng = random.Random(f"{name}{concurrency}{seed}")
    step = (0.012 + 0.0005 * concurrency) / speed
    free, rows, output, lost = [0.0] * concurrency, [], 0, 0
    for page in range(pages):
        lane = min(range(concurrency), key=free.__getitem__)
        scheduled = free[lane]
        prefill = rng.uniform(0.08, 0.3) * (1 + concurrency / 24) / speed
        looping = rng.random() < degeneration
        tokens = 1400 if looping else int(rng.lognormvariate(5.2, 0.5))
        finished = scheduled + prefill + tokens * step
        free[lane] = finished
        output += tokens
        lost += tokens if looping else 0
        broken = page == 57
        rows.append(
            {
                "source": f"scans/{page // 12:02d}/letter_{page:03d}.png",
                "page": 1,
                "arrived": 0.0,
                "scheduled": round(scheduled, 4),
                "first_token": None if broken else round(scheduled + prefill, 4),
                "finished": round(scheduled + 0.01 if broken else finished, 4),
                "status": "error" if broken else "degenerate" if looping else "ok",
                "loops": 3 if looping else 0,
            }
        )
    seconds = max(free)
    pages_per_s = pages / seconds
    per_million = None if usd_per_hour is None else usd_per_hour / 3600 / pages_per_s * 1e6
    stage = {"prepare": 0.03, "vision": 0.34, "prefill": 0.22, "decode": 0.5, "guidance": 0.035, "idle": 0.06}
    total = sum(stage.values()) - stage["prepare"]  # it runs beside the others
    return {
        "name": name,
        "settings": {"concurrency": concurrency, "dtype": "bfloat16", "guard": "rescue"},
        "pages": pages,
        "seconds": seconds,
        "pages_per_s": pages_per_s,
        "tokens_per_s": {"prompt": 640 * pages_per_s, "output": output / seconds},
        "latency_s": {
            "ttft": percentiles([r["first_token"] - r["arrived"] for r in rows if r["first_token"]]),
            "tpot": percentiles([step * rng.uniform(0.9, 1.3) for _ in rows]),
            "page": percentiles([r["finished"] - r["scheduled"] for r in rows]),
        },
        "stage_s_per_page": {k: v / total * rng.uniform(0.9, 1.1) / pages_per_s for k, v in stage.items()},
        "occupancy": min(1.0, 0.97 - 0.004 * concurrency),
        "kv_use": {"mean": min(1.0, 0.04 * concurrency), "peak": min(1.0, 0.055 * concurrency)},
        "waste_tokens": {
            "degenerate": lost,
            "discarded": 40 + 3 * concurrency,
            "padding": 0,
            "recompute": 12 * concurrency,
            "rejected_drafts": int(output * 0.05),
        },
        "peak_memory_bytes": int(5.1e8 + 1.1e7 * concurrency),
        "energy_j": 48.0 * seconds,
        "usd_per_page": None if per_million is None else per_million / 1e6,
        "usd_per_million_pages": per_million,
        "quality": None
        if score is None
        else {
            "benchmark_score": score,
            "low": score - 0.016,
            "high": min(1.0, score + 0.012),
            "cer": (1 - score) / 3,
            "degeneration_rate": sum(r["status"] == "degenerate" for r in rows) / pages,
            "bits_per_char": bits,
            **({} if bits is None else {"bits_per_char_low": 0.8 * bits, "bits_per_char_high": 1.25 * bits}),
        },
        "alignment": None
        if bits is None
        else {
            "bits_per_char": {"value": bits, "low": 0.8 * bits, "high": 1.25 * bits, "pages": pages},
            "by_field": {
                name: {"value": bits * factor, "pages": pages}
                for name, factor in (("header", 0.7), ("text", 1.05))
            },
        },
        "error": None,
        "timeline": rows if timeline else [],
    }


def document(
    kind: str, runs: list[dict[str, Any]], usd_per_hour: float | None = 0.714, **more: Any
) -> dict[str, Any]:
    """One result file."""
    return {
        "schema": "pagemill-bench/1",
        "kind": kind,
        "environment": ENVIRONMENT,
        "model": "pagemill-tiny",
        "engine": {
            "dtype": "bfloat16",
            "kernels": {"linear": "native", "attention": "native"},
            "threads": 16,
        },
        "workload": WORKLOAD,
        "price": None
        if usd_per_hour is None
        else {
            "usd_per_hour": usd_per_hour,
            "source": "aws c7i.4xlarge on-demand us-east-1, 2026 (third-party table)",
        },
        "runs": runs,
        **more,
    }


def sweep() -> dict[str, Any]:
    """`pagemill bench --sweep concurrency=...`."""
    return document(
        "bench",
        [
            run(f"tiny, concurrency {c}", concurrency=c, score=0.941, pages=400, degeneration=0.012)
            for c in (1, 2, 4, 8, 16, 32)
        ],
    )


def compared() -> dict[str, Any]:
    """`pagemill compare`: engines of other makers give no stages and no cache use."""
    runs = [
        run("pagemill-tiny", concurrency=16, score=0.943, bits=0.20, seed=1),
        run("tiny, stage 2", concurrency=16, score=0.871, bits=0.48, degeneration=0.05, seed=2),
        run("tiny, stage 1", concurrency=16, score=0.702, bits=1.05, degeneration=0.12, seed=3),
        run(
            "Tesseract 5 (por)",
            concurrency=16,
            score=0.764,
            speed=3.1,
            degeneration=0.0,
            seed=4,
            timeline=False,
        ),
        run("RapidOCR", concurrency=16, score=0.611, speed=1.6, degeneration=0.0, seed=5, timeline=False),
        run(
            "served 3B (endpoint)",
            concurrency=16,
            score=0.949,
            speed=0.22,
            degeneration=0.01,
            seed=6,
            bits=0.17,
        ),
    ]
    for row in runs[3:]:
        for key in ("stage_s_per_page", "occupancy", "kv_use", "waste_tokens", "energy_j"):
            row[key] = None
    return document("compare", runs)


def simulated() -> dict[str, Any]:
    """What the simulator says of a card."""
    runs = [
        run(f"L4, concurrency {c}", concurrency=c, score=0.911, speed=4.0, usd_per_hour=0.44, pages=600)
        for c in (16, 64)
    ]
    return document("simulation", runs, usd_per_hour=0.44, model="DharmaOCR-Lite (shape)")


def write(folder: Path) -> list[str]:
    """Write all of them; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (("sweep", sweep), ("compare", compared), ("simulation", simulated)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(make()), encoding="utf-8")
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    print("\n".join(write(Path(sys.argv[1]))))
