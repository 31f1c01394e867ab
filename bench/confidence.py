"""How well the verdict on a page ranks pages by their true error.

    python bench/confidence.py --stages final stage1 stage2 --json bench/results/confidence.json

Reads the 48 sample pages, the stress pages and the PDF pages with each stage of the embedded model (float32, greedy) and
compares the confidence of each page with its character error rate: AUROC of telling pages above a CER (10 %, and the median)
from the others, 0.5 being chance, and Spearman's rank correlation of 1 - confidence with CER. Beside the two numbers of a
record stand other ways to average the same probabilities. Then: how often ink against text speaks up, on the truth (it never
should) and on what was read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import environment
import numpy as np
import numpy.typing as npt
from stages import STAGES, stage_folder

from pagemill import Engine, Request, SamplingParams
from pagemill.decode.page import parse_page
from pagemill.decode.verdict import Confidence, confidence, num_printed, text_mismatch
from pagemill.pages.ink import PageInk, measure_ink
from pagemill.pages.source import list_pages, load_page
from pagemill.score import Reading, Truth, read_truths, score_page

FILES = ("truth.jsonl", "stress/truth.jsonl", "pdf_truth.jsonl")


def ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[group]
    return mean


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return the chance that a positive scores above a negative, ties counting half (Mann-Whitney); NaN without either."""
    is_positive = np.asarray(positive, bool)
    n = int(is_positive.sum())
    pairs = n * (len(is_positive) - n)
    return float((ranks(scores)[is_positive].sum() - n * (n + 1) / 2) / pairs) if pairs else float("nan")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the correlation of ranks; NaN where either side is constant."""
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


@dataclass
class Page:
    """One page as one stage read it."""

    stage: str
    name: str
    cer: float
    verdict: Confidence
    logprobs: npt.NDArray[np.float64]
    mismatch: str | None


def _window(width: int, page: Page) -> float:
    width = min(width, len(page.logprobs))
    means = np.convolve(page.logprobs, np.ones(width), "valid") / width
    return float(np.exp(min(means.min(), page.logprobs.mean())))


MEASURES: dict[str, Callable[[Page], float]] = {
    "mean (record)": lambda page: page.verdict.mean or 0.0,
    "worst (record)": lambda page: page.verdict.worst or 0.0,
    "field text": lambda page: page.verdict.fields.get("text", 0.0),
    "arithmetic mean": lambda page: float(np.exp(page.logprobs).mean()),
    "lowest token": lambda page: float(np.exp(page.logprobs.min())),
    "worst of 8": partial(_window, 8),
    "worst of 64": partial(_window, 64),
    "share above 0.9": lambda page: float((np.exp(page.logprobs) > 0.9).mean()),
}


def token_bytes(engine: Engine) -> Callable[[int], bytes]:
    """Return a function from token ids of a byte-level vocabulary to bytes; special tokens have none."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = engine.core.prompter.tokenizer
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return lambda i: b"" if i in special else bytes(byte[c] for c in tokenizer.id_to_token(i))


@dataclass
class Sample:
    """One page with its truth."""

    truth: Truth
    pixels: npt.NDArray[np.uint8]
    ink: PageInk


def samples(dpi: float) -> list[Sample]:
    found = []
    for file in FILES:
        folder = (environment.PAGES / file).parent
        for truth in read_truths(environment.PAGES / file):
            refs = list(list_pages(str(folder / truth.name)))
            pixels = load_page(refs[truth.page - 1], dpi)
            found.append(Sample(truth, pixels, measure_ink(pixels)))
    return found


def mismatch(fields: Sequence[str | None], ink: PageInk) -> str | None:
    return text_mismatch(num_printed(fields), ink.num_glyphs, ink.num_rule_glyphs)


def read_stage(stage: str, dtype: str, max_new_tokens: int, folder: Path) -> list[Page]:
    with Engine.from_pretrained(str(stage_folder(stage, folder)), dtype=dtype, num_threads=1) as engine:
        pages = samples(engine.dpi)
        piece = token_bytes(engine)
        outputs = engine.generate(
            [Request(engine.page_prompt, [page.pixels]) for page in pages],
            SamplingParams(max_new_tokens=max_new_tokens, logprobs=True),
        )
    found = []
    for page, output in zip(pages, outputs, strict=True):
        if output.error or output.logprobs is None:
            raise SystemExit(f"{page.truth.name}: {output.error}")
        fields = parse_page(output.text)
        reading = Reading(
            page.truth.name, page.truth.page, fields._asdict(), output.text, output.finish_reason
        )
        verdict = confidence([piece(i) for i in output.token_ids], output.logprobs)
        logprobs = np.array(output.logprobs)
        cer = score_page(page.truth, reading).fields.cer
        name = f"{page.truth.name} page {page.truth.page}"
        found.append(
            Page(stage, name, cer, verdict, logprobs[~np.isnan(logprobs)], mismatch(fields, page.ink))
        )
    return found


def ranking(pages: Sequence[Page]) -> dict[str, dict[str, float]]:
    """Return how well each measure finds the bad pages."""
    errors = [page.cer for page in pages]
    middle = median(errors)
    table = {}
    for name, measure in MEASURES.items():
        doubt = [1 - measure(page) for page in pages]
        table[name] = {
            "auroc, CER above 10 %": auroc(doubt, [e > 0.1 for e in errors]),
            "auroc, CER above the median": auroc(doubt, [e > middle for e in errors]),
            "spearman": spearman(doubt, errors),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["final"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--json", help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe()
    environment.show(where)
    with tempfile.TemporaryDirectory() as folder:
        by_stage = {
            stage: read_stage(stage, args.dtype, args.max_new_tokens, Path(folder)) for stage in args.stages
        }
    everything = [page for pages in by_stage.values() for page in pages]
    groups = by_stage | ({"all stages": everything} if len(by_stage) > 1 else {})
    # Bad and good pages of one model: the hard and stress pages are another kind, which a model may tell at once.
    groups |= {
        f"{stage}, clean pages": [page for page in pages if page.name.startswith(("form", "legal", "prose"))]
        for stage, pages in by_stage.items()
    }
    result: dict[str, Any] = {"environment": where, "max_new_tokens": args.max_new_tokens, "groups": {}}
    for group, pages in groups.items():
        table = ranking(pages)
        bad = sum(page.cer > 0.1 for page in pages)
        found = dict(Counter(page.mismatch for page in pages if page.mismatch))
        result["groups"][group] = {
            "pages": len(pages),
            "above 10 %": bad,
            "ranking": table,
            "mismatch": found,
        }
        print(
            f"\n{group}: {len(pages)} pages, {bad} with CER above 10 %, ink against text: {found or 'none'}"
        )
        names = list(next(iter(table.values())))
        print("".join([f"{'':18}", *(f"{name:>30}" for name in names)]))
        for measure, row in table.items():
            print("".join([f"{measure:18}", *(f"{row[name]:30.3f}" for name in names)]))

    on_truth = {}
    for page in samples(dpi=72):
        chars, glyphs = num_printed(page.truth.fields.values()), page.ink.num_glyphs
        verdict = mismatch(list(page.truth.fields.values()), page.ink)
        on_truth[f"{page.truth.name} page {page.truth.page}"] = (
            chars,
            glyphs,
            page.ink.num_rule_glyphs,
            verdict,
        )
    ratios = sorted((glyphs + 1) / (chars + 1) for chars, glyphs, _, _ in on_truth.values())
    tripped = {name: numbers for name, numbers in on_truth.items() if numbers[3]}
    print(
        f"\nglyphs for each character of the truth: {ratios[0]:.2f} to {ratios[-1]:.2f}; mismatched: {tripped or 'none'}"
    )
    result["truth"] = {"glyphs for each character": ratios, "mismatched": list(tripped)}
    result["pages"] = [
        {
            "stage": page.stage,
            "page": page.name,
            "cer": page.cer,
            "mean": page.verdict.mean,
            "worst": page.verdict.worst,
            "fields": page.verdict.fields,
            "mismatch": page.mismatch,
        }
        for page in everything
    ]
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
