"""How well the sample pages are read, by the metric of the DharmaOCR benchmark.

    python bench/score.py --dtype bfloat16

Reads the 36 clean and 12 hard pages of `bench/pages` with the embedded model and scores them against `truth.jsonl`, twice: the
model's raw output, as the published evaluation does (the numbers to compare with other engines), and the record that pagemill
writes, where broken JSON has been mended.

benchmark_score = (mean Levenshtein ratio + mean BLEU-4) / 2. CER, the character error rate, is the edit distance over the length of
the truth, mean over pages. A page is degenerate if the token cap cut it and its last 15 characters occur at least four times, or if
the engine's own guard stopped it; the rate depends on the cap.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rapidfuzz.distance import Levenshtein

import environment

GROUPS = {"clean": ("form", "legal", "prose"), "form": ("form",), "legal": ("legal",), "prose": ("prose",), "hard": ("hard",)}
"""Rows of the table: the prefixes of the file names in each."""
_RECORD_FIELDS = ("header", "margin", "footer", "text")  # in the record's own order


def plain(x: object) -> str:
    """Return the text of a page: the values of a JSON object in its own order, one a line; of anything else, itself.

    Values that are null or blank are left out. The same function serves the truth and the prediction.
    """
    try:
        value = json.loads(str(x))
    except (json.JSONDecodeError, TypeError, RecursionError):
        return str(x)
    if isinstance(value, dict):
        return "\n".join(str(v) for v in value.values() if v is not None and str(v).strip())
    return str(x)


def levenshtein_ratio(truth: str, read: str) -> float:
    """Return 1 - edit distance / length of the longer text; 0 where both are empty."""
    longest = max(len(truth), len(read))
    return 1 - Levenshtein.distance(truth, read) / longest if longest else 0.0


def bleu(truth: str, read: str) -> float:
    """Return BLEU of n-grams up to 4, uniform weights, smoothing method 1, words split at white space."""
    return float(
        sentence_bleu([truth.split()], read.split(), smoothing_function=SmoothingFunction().method1)
    )


def character_error_rate(truth: str, read: str) -> float:
    """Return edit distance / length of the truth; where that is empty, 0 for an empty reading and else 1."""
    return Levenshtein.distance(truth, read) / len(truth) if truth else float(bool(read))


def is_degenerate(raw: str, finish_reason: str) -> bool:
    """Tell whether a page ran into repetition: the published offline rule, or the engine's guard stopped it."""
    cut = finish_reason == "length" and len(raw) >= 15 and raw.count(raw[-15:]) >= 4
    return cut or finish_reason == "loop"


def is_json_object(raw: str) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


@dataclass(frozen=True)
class PageScore:
    """One page against its truth."""

    file: str
    levenshtein: float
    bleu: float
    cer: float
    degenerate: bool
    valid_json: bool


def score_page(file: str, truth: object, raw: str, finish_reason: str) -> PageScore:
    """Score one output; `truth` is the JSON text of the page or its plain text."""
    expected, read = plain(truth), plain(raw)
    return PageScore(
        file,
        levenshtein_ratio(expected, read),
        bleu(expected, read),
        character_error_rate(expected, read),
        is_degenerate(raw, finish_reason),
        is_json_object(raw),
    )


def summarize(scores: Sequence[PageScore]) -> dict[str, float]:
    """Return the means over pages; rates are fractions. Raises ValueError for no pages."""
    if not scores:
        raise ValueError("there are no pages to score")
    lev, bleu4 = fmean(s.levenshtein for s in scores), fmean(s.bleu for s in scores)
    return {
        "benchmark_score": (lev + bleu4) / 2,
        "levenshtein": lev,
        "bleu": bleu4,
        "cer": fmean(s.cer for s in scores),
        "degeneration_rate": fmean(s.degenerate for s in scores),
        "valid_json": fmean(s.valid_json for s in scores),
        "pages": len(scores),
    }


def by_group(scores: Iterable[PageScore]) -> dict[str, dict[str, float]]:
    """Return the summary of each group of the sample pages that has any."""
    scores = list(scores)
    members = {
        group: [s for s in scores if s.file.split("_")[0] in prefixes] for group, prefixes in GROUPS.items()
    }
    return {group: summarize(some) for group, some in members.items() if some}


def read_truth() -> dict[str, str]:
    """Return file name to the truth as JSON text, of the sample pages."""
    with open(environment.PAGES / "truth.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return {row["file"]: json.dumps(row["truth"], ensure_ascii=False) for row in rows}


def print_table(title: str, groups: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    names = ("benchmark_score", "Levenshtein", "BLEU", "CER", "degenerate", "valid JSON", "pages")
    print("".join([f"{'group':8}", *(f"{name:>16}" for name in names)]))
    for group, row in groups.items():
        cells = [
            *(f"{row[name]:.3f}" for name in ("benchmark_score", "levenshtein", "bleu")),
            *(f"{100 * row[name]:.1f} %" for name in ("cer", "degeneration_rate", "valid_json")),
            f"{row['pages']:.0f}",
        ]
        print("".join([f"{group:8}", *(f"{cell:>16}" for cell in cells)]))


def main() -> None:
    from pagemill import Engine, SamplingParams

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "reference", "native", "triton"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--json", help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe("rapidfuzz", "nltk")
    truth = read_truth()
    raw_scores: list[PageScore] = []
    record_scores: list[PageScore] = []
    options = {"device": args.device, "dtype": args.dtype, "kernels": args.kernels}
    with Engine.from_pretrained(args.model, **options) as engine:
        engine_options = engine.describe()
        started = time.perf_counter()
        params = SamplingParams(max_new_tokens=args.max_new_tokens)
        for page in engine.read([str(environment.PAGES / file) for file in truth], params=params):
            if page.error:
                raise SystemExit(f"{page.source}: {page.error}")
            file = page.source.rsplit("/", 1)[-1]
            raw_scores.append(score_page(file, truth[file], page.raw, page.finish_reason))
            record = json.dumps({name: getattr(page, name) for name in _RECORD_FIELDS}, ensure_ascii=False)
            # The record is always JSON; whether the page ran away is a matter of what the model wrote.
            scored = asdict(score_page(file, truth[file], record, page.finish_reason))
            record_scores.append(PageScore(**{**scored, "degenerate": raw_scores[-1].degenerate}))
        seconds = time.perf_counter() - started

    raw_groups, record_groups = by_group(raw_scores), by_group(record_scores)
    environment.show(where)
    print(f"{args.model}, {engine_options['dtype']}, {engine_options['device']}, greedy, at most {args.max_new_tokens} new tokens")
    print(f"{len(truth)} pages in {seconds:.1f} s")
    print_table("raw output of the model (compare this one)", raw_groups)
    print_table("record written by pagemill (header, margin, footer, text)", record_groups)
    if args.json:
        result: dict[str, Any] = {
            "environment": where,
            "engine": engine_options,
            "max_new_tokens": args.max_new_tokens,
            "seconds": seconds,
            "raw": raw_groups,
            "record": record_groups,
            "pages": {"raw": [asdict(s) for s in raw_scores], "record": [asdict(s) for s in record_scores]},
        }
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()
