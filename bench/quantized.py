"""What rounding weights, keys and values costs in quality: each form of the engine beside float32, on the sample pages.

    python bench/quantized.py --write

Every form reads the same 48 pages as `pagemill read` does, and scores their truth (`Engine.score`, teacher-forced): bits per
character, which sees small losses that a greedy answer hides or exaggerates. Along float32's own answers, token by token: the
Kullback-Leibler divergence of the form's distribution from float32's in bits, and the share of tokens where both prefer the
same one.
Differences are paired by page, with bootstrap intervals (95 %).

`--quantize` forms are rounded while they are loaded, and know no pages. Made ones are checkpoints of `pagemill quantize`, made
twice: calibrated on every second page, with its truth, and read on the others, so that no page is read by what it calibrated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from score import TRUTH
from torch import Tensor

from pagemill import Engine, SamplingParams, core
from pagemill.cost.compare import Pages, align, select_pages
from pagemill.decode.page import FIELDS
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint
from pagemill.quantize import calibrate
from pagemill.quantize.make import Job, make
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
MADE = {"made int8": "int8", "made fp8": "fp8", "made int4-awq": "int4-awq", "made mixed": "mixed"}
"""Name to the scheme of `pagemill quantize`."""
RESULTS = Path(__file__).parent / "results"
_RESAMPLES = 10_000


@dataclass
class Form:
    """One form's numbers, a page each, in the order of the truth."""

    benchmark_score: list[float] = field(default_factory=list)
    cer: list[float] = field(default_factory=list)
    bits_per_char: list[float] = field(default_factory=list)
    degenerate: list[bool] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """Log-probabilities along float32's answer, float32 `[tokens, vocabulary]`."""


def halves(pages: Pages) -> list[Pages]:
    """Every second page, and the others."""
    return [Pages(pages.refs[i::2], pages.truths[i::2], 0) for i in range(2)]


def along(engine: Engine, pages: Pages, answers: list[str]) -> list[Tensor]:
    """Log-probabilities of every next token along answers, a page each."""
    found: list[Tensor] = []
    kept: list[Tensor] = []
    original = core.sample

    def keep(logits: Tensor, *given: Any) -> Any:
        kept.append(logits.float().log_softmax(-1))
        return original(logits, *given)

    core.sample = keep  # type: ignore[assignment]
    try:
        for ref, answer in zip(pages.refs, answers, strict=True):
            kept.clear()
            (one,) = engine.score([ref], [answer])
            if one.error:
                raise SystemExit(one.error)
            found.append(torch.cat(kept))
    finally:
        core.sample = original
    return found


def measure(model: str, options: dict[str, str], pages: Pages, answers: list[str] | None) -> Form:
    """Read and score pages with one form; `answers` are float32's (None: this is it)."""
    params = SamplingParams(max_new_tokens=768)
    with Engine.from_pretrained(model, **options) as engine:
        sources = [ref.source for ref in pages.refs]
        results = {r.source: r for r in engine.read(sources, params=params)}
        aligned = align(engine, pages)
        if failed := [r.error for r in (*results.values(), *aligned) if r.error]:
            raise SystemExit(failed[0])
        outputs = [results[source].raw or "" for source in sources]
        logits = along(engine, pages, answers or outputs)
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
        [results[source].status == "degenerate" for source in sources],
        outputs,
        logits,
    )


def measure_made(model: str, scheme: str, pages: Pages, answers: list[str]) -> Form:
    """The same of checkpoints of `pagemill quantize`, each half of the pages with the one calibrated on the other."""
    both = halves(pages)
    texts = [answers[i::2] for i in range(2)]
    folder = find_checkpoint(model)
    config = read_config(folder)
    forms = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(2):
            mine, other = both[i], both[1 - i]
            known = [{name: truth.fields[name] for name in truth.order} for truth in other.truths]
            prepared = calibrate.prepare(model, folder, config, other.refs, known)
            out = Path(scratch) / f"{scheme}-{i}"
            make(Job(folder, config, out, scheme), prepared, {})  # type: ignore[arg-type]
            forms.append(measure(str(out), {"dtype": "bfloat16"}, mine, texts[i]))
    whole = Form()
    for at in range(len(pages.refs)):
        for name in ("benchmark_score", "cer", "bits_per_char", "degenerate", "outputs", "logits"):
            getattr(whole, name).append(getattr(forms[at % 2], name)[at // 2])
    return whole


def difference(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Mean of the differences by page, and its 95 % interval."""
    apart = np.subtract(values, base)
    picks = np.random.default_rng(0).integers(0, len(apart), (_RESAMPLES, len(apart)))
    low, high = np.percentile(apart[picks].mean(1), (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)


def row(name: str, form: Form, base: Form) -> dict[str, Any]:
    """One form's line of the table."""
    apart = [(p.exp() * (p - q)).sum(-1) / np.log(2) for p, q in zip(base.logits, form.logits, strict=True)]
    alike = [p.argmax(-1) == q.argmax(-1) for p, q in zip(base.logits, form.logits, strict=True)]
    return {
        "form": name,
        "benchmark_score": float(np.mean(form.benchmark_score)),
        "score_difference": difference(form.benchmark_score, base.benchmark_score),
        "cer": float(np.mean(form.cer)),
        "degenerate": float(np.mean(form.degenerate)),
        "bits_per_char": float(np.mean(form.bits_per_char)),
        "bits_difference": difference(form.bits_per_char, base.bits_per_char),
        "kl_bits": torch.cat(apart).mean().item(),
        "agreement": torch.cat(alike).float().mean().item(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| form | benchmark_score | against float32 | CER | degenerate | bits a character | against float32 | KL, bits a token "
        "| same token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        score_by = "{:+.4f} ({:+.4f} to {:+.4f})".format(*r["score_difference"])
        bits_by = "{:+.4f} ({:+.4f} to {:+.4f})".format(*r["bits_difference"])
        lines.append(
            f"| {r['form']} | {r['benchmark_score']:.4f} | {score_by} | {100 * r['cer']:.1f} % | {100 * r['degenerate']:.0f} % | "
            f"{r['bits_per_char']:.4f} | {bits_by} | {r['kl_bits']:.5f} | {100 * r['agreement']:.2f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny")
    parser.add_argument("--forms", nargs="+", choices=[*FORMS, *MADE], default=[*FORMS, *MADE])
    parser.add_argument("--write", action="store_true", help="into bench/results/quantized.{md,json}")
    args = parser.parse_args()
    base_name = next(iter(FORMS))
    pages = select_pages([str(environment.PAGES / "*.png")], str(TRUTH))
    base = measure(args.model, FORMS[base_name], pages, None)
    rows = [row(base_name, base, base)]
    print(table(rows), flush=True)
    for name in args.forms:
        if name != base_name:
            if name in MADE:
                form = measure_made(args.model, MADE[name], pages, base.outputs)
            else:
                form = measure(args.model, FORMS[name], pages, base.outputs)
            rows.append(row(name, form, base))
            print(table(rows).splitlines()[-1], flush=True)
    if args.write:
        where = environment.describe()
        text = [__doc__ or "", *environment.lines(where), "", table(rows), ""]
        (RESULTS / "quantized.md").write_text("\n".join(text), encoding="utf-8")
        result = {"environment": where, "rows": rows}
        (RESULTS / "quantized.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
