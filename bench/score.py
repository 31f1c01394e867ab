"""How well the sample pages are read, by the metric of the DharmaOCR benchmark.

    python bench/score.py --dtype bfloat16

Reads the 36 clean and 12 hard pages of `bench/pages` with the embedded model and scores them against `truth.jsonl` in two ways:

raw     the model's output as it is, by the published evaluation: the values of the JSON in its own order; JSON that does not
        parse counts as it stands, braces and escapes included. Compare engines by this one.
record  the fields that pagemill writes (broken JSON mended), header, margin, text, footer, against those of the truth. The
        model's own card is scored like this: 0.829 and 5.4 % character errors on the clean pages, 0.185 on the hard ones.

Beside each stands what transformers wrote for the same pages (float32, greedy, at most 768 tokens:
`reference_hf_fp32.jsonl`); with `--plain` pagemill reads them under the same conditions, without guidance, loop guard and
scaling.

The metric is `pagemill.score`; the rate of degenerate pages depends on the token cap.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import environment

from pagemill import Engine, SamplingParams
from pagemill.decode.page import FIELDS, parse_page
from pagemill.score import PageScore, Reading, read_truths, score, summarize

TRUTH = environment.PAGES / "truth.jsonl"
GROUPS = {
    "clean": ("form", "legal", "prose"),
    "form": ("form",),
    "legal": ("legal",),
    "prose": ("prose",),
    "hard": ("hard",),
}
"""Rows of the table: the prefixes of the file names in each."""
WAYS = {"raw": "raw", "record": "fields"}
"""Names of the two ways here, and in the metric."""


def by_group(scores: Iterable[PageScore], way: str) -> dict[str, dict[str, float]]:
    """Return the means over each group of the sample pages that has any, by one of `WAYS`; rates are fractions."""
    scores = list(scores)
    groups = {}
    for group, prefixes in GROUPS.items():
        some = [page for page in scores if page.name.split("_")[0] in prefixes]
        if some:
            means = summarize(some)
            metrics = means[WAYS[way]] | means
            names = ("benchmark_score", "levenshtein", "bleu", "cer", "degeneration_rate", "valid_json")
            groups[group] = {name: metrics[name]["value"] for name in names} | {"pages": len(some)}
    return groups


def score_samples(readings: Sequence[Reading]) -> list[PageScore]:
    """Score readings of the sample pages, each of which has to have one."""
    scores, problems = score(read_truths(TRUTH), readings)
    if problems:
        raise SystemExit(f"not simply scored: {len(problems)}, the first being {problems[0]}")
    return scores


def transformers_readings() -> list[Reading]:
    """Return what transformers wrote for the sample pages."""
    with open(environment.PAGES / "reference_hf_fp32.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [
        Reading(
            row["file"],
            1,
            parse_page(row["text"])._asdict(),
            row["text"],
            "length" if row["hit_cap"] else "stop",
        )
        for row in rows
    ]


def page_numbers(page: PageScore, way: str) -> dict[str, Any]:
    """Return one page's numbers, for the file of results."""
    text = getattr(page, WAYS[way])
    return {
        "file": page.name,
        "levenshtein": text.levenshtein,
        "bleu": text.bleu,
        "cer": text.cer,
        "degenerate": page.degenerate,
        "valid_json": page.valid_json,
    }


def print_table(
    title: str, groups: dict[str, dict[str, float]], reference: dict[str, dict[str, float]]
) -> None:
    print(f"\n{title}")
    names = ("benchmark_score", "Levenshtein", "BLEU", "CER", "degenerate", "valid JSON", "pages")
    print("".join([f"{'':20}", *(f"{name:>16}" for name in names)]))
    rows = groups | {f"transformers, {group}": reference[group] for group in ("clean", "hard")}
    for group, row in rows.items():
        cells = [
            *(f"{row[name]:.3f}" for name in ("benchmark_score", "levenshtein", "bleu")),
            *(f"{100 * row[name]:.1f} %" for name in ("cer", "degeneration_rate", "valid_json")),
            f"{row['pages']:.0f}",
        ]
        print("".join([f"{group:20}", *(f"{cell:>16}" for cell in cells)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "reference", "native", "triton"], default="auto")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument(
        "--plain", action="store_true", help="no guidance, guard or scaling, as transformers read the pages"
    )
    parser.add_argument("--json", help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe("rapidfuzz")
    files = [str(environment.PAGES / truth.name) for truth in read_truths(TRUTH)]
    readings: list[Reading] = []
    options = {name: getattr(args, name) for name in ("device", "dtype", "kernels", "kv_cache_dtype")}
    with Engine.from_pretrained(args.model, **options) as engine:
        description = engine.describe()
        started = time.perf_counter()
        params = SamplingParams(max_new_tokens=args.max_new_tokens)
        if args.plain:
            params = replace(params, guidance="off", guard="off", max_retries=0)
        for page in engine.read(files, params=params, resolution="full" if args.plain else "auto"):
            if page.error:
                raise SystemExit(page.error)
            fields = {name: getattr(page, name) for name in FIELDS}
            readings.append(
                Reading(Path(page.source).name, page.page, fields, page.raw, page.finish_reason, page.status)
            )
        seconds = time.perf_counter() - started

    scores = score_samples(readings)
    groups = {way: by_group(scores, way) for way in WAYS}
    reference_scores = score_samples(transformers_readings())
    reference = {way: by_group(reference_scores, way) for way in WAYS}
    environment.show(where)
    print(
        f"model: {args.model}, {description['dtype']}, KV {description['kv_cache_dtype']}, "
        f"{description['device']}, greedy, "
        f"at most {args.max_new_tokens} new tokens"
    )
    print(f"read {len(files)} pages in {seconds:.1f} s")
    print_table("raw: the model's output as it is, published metric", groups["raw"], reference["raw"])
    print_table("record: header, margin, text, footer as written", groups["record"], reference["record"])
    if args.json:
        result = {
            "environment": where,
            "engine": description,
            "max_new_tokens": args.max_new_tokens,
            "seconds": seconds,
            "groups": groups,
            "transformers": reference,
            "pages": {way: [page_numbers(page, way) for page in scores] for way in WAYS},
        }
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
