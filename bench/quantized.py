"""What rounding weights, keys and values costs in quality: each form of the engine beside float32, on the sample pages.

    python bench/quantized.py --write

Every form reads the same 48 pages as `pagemill read` does, and scores their truth (`Engine.score`, teacher-forced): bits per
character, which sees small losses that a greedy answer hides or exaggerates. Differences are paired by page, with
bootstrap intervals (95 %). `same tokens` is the share of pages whose output is float32's to the last token.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
from score import TRUTH

from pagemill import Engine, SamplingParams
from pagemill.cost.compare import align, select_pages
from pagemill.decode.page import FIELDS
from pagemill.score import Reading, score

FORMS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, KV int8": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int8, KV int8": {"dtype": "bfloat16", "quantize": "int8", "kv_cache_dtype": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "int4, KV int8": {"dtype": "bfloat16", "quantize": "int4", "kv_cache_dtype": "int8"},
}
"""Name to engine options; the first is what the others are held against."""
RESULTS = Path(__file__).parent / "results"
_RESAMPLES = 10_000


@dataclass
class Form:
    """One form's numbers, a page each, in the order of the truth."""

    benchmark_score: list[float]
    cer: list[float]
    bits_per_char: list[float]
    outputs: list[str]


def measure(model: str, options: dict[str, str]) -> Form:
    """Read and score all sample pages with one form."""
    pages = select_pages([str(environment.PAGES / "*.png")], str(TRUTH))
    params = SamplingParams(max_new_tokens=768)
    with Engine.from_pretrained(model, **options) as engine:
        sources = [ref.source for ref in pages.refs]
        results = {r.source: r for r in engine.read(sources, params=params)}
        aligned = align(engine, pages)
    if failed := [r.error for r in (*results.values(), *aligned) if r.error]:
        raise SystemExit(failed[0])
    readings = []
    for ref, truth in zip(pages.refs, pages.truths, strict=True):
        r = results[ref.source]
        fields = {name: getattr(r, name) for name in FIELDS}
        readings.append(Reading(truth.name, truth.page, fields, r.raw, r.finish_reason, r.status))
    scores, _ = score(pages.truths, readings)
    return Form(
        [page.fields.benchmark_score for page in scores],
        [page.fields.cer for page in scores],
        [one.bits_per_char or 0.0 for one in aligned],
        [reading.raw or "" for reading in readings],
    )


def difference(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Mean of the differences by page, and its 95 % interval."""
    apart = np.subtract(values, base)
    picks = np.random.default_rng(0).integers(0, len(apart), (_RESAMPLES, len(apart)))
    low, high = np.percentile(apart[picks].mean(1), (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)


def row(name: str, form: Form, base: Form) -> dict[str, Any]:
    """One form's line of the table."""
    same = [a == b for a, b in zip(form.outputs, base.outputs, strict=True)]
    return {
        "form": name,
        "benchmark_score": float(np.mean(form.benchmark_score)),
        "score_difference": difference(form.benchmark_score, base.benchmark_score),
        "cer": float(np.mean(form.cer)),
        "bits_per_char": float(np.mean(form.bits_per_char)),
        "bits_difference": difference(form.bits_per_char, base.bits_per_char),
        "same_output": float(np.mean(same)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| form | benchmark_score | against float32 | CER | bits a character | against float32 | same output |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        score_by = "{:+.4f} ({:+.4f} to {:+.4f})".format(*r["score_difference"])
        bits_by = "{:+.4f} ({:+.4f} to {:+.4f})".format(*r["bits_difference"])
        lines.append(
            f"| {r['form']} | {r['benchmark_score']:.4f} | {score_by} | {100 * r['cer']:.1f} % | "
            f"{r['bits_per_char']:.4f} | {bits_by} | {100 * r['same_output']:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--write", action="store_true", help="into bench/results/quantized.{md,json}")
    args = parser.parse_args()
    base_name = next(iter(FORMS))
    base = measure(args.model, FORMS[base_name])
    rows = [row(base_name, base, base)]
    print(table(rows), flush=True)
    for name in args.forms:
        if name != base_name:
            rows.append(row(name, measure(args.model, FORMS[name]), base))
            print(table(rows).splitlines()[-1], flush=True)
    if args.write:
        where = environment.describe()
        text = [__doc__ or "", *environment.lines(where), "", table(rows), ""]
        (RESULTS / "quantized.md").write_text("\n".join(text), encoding="utf-8")
        result = {"environment": where, "rows": rows}
        (RESULTS / "quantized.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
