"""How well the sample pages are read, by the metric of the DharmaOCR benchmark.

    python bench/score.py --dtype bfloat16

Reads the 36 clean and 12 hard pages of `bench/pages` with the embedded model and scores them against `truth.jsonl` in two ways:

raw     the model's output as it is, by the published evaluation: the values of the JSON in its own order; JSON that does not
        parse counts as it stands, braces and escapes included. Compare engines by this one.
record  the fields that pagemill writes (broken JSON mended), header, margin, text, footer, against those of the truth. The
        model's own card is scored like this: 0.829 and 5.4 % character errors on the clean pages, 0.185 on the hard ones.

Beside each stands what transformers wrote for the same pages (float32, greedy, at most 768 tokens: `reference_hf_fp32.jsonl`).

benchmark_score = (mean Levenshtein ratio + mean BLEU-4) / 2. CER, the character error rate, is the edit distance over the length
of the truth, mean over pages. A page is degenerate if the token cap cut it and its last 15 characters occur at least four times,
or if the engine's own guard stopped it; the rate depends on the cap.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import environment
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rapidfuzz.distance import Levenshtein

from pagemill import Engine, SamplingParams
from pagemill.decode.page import parse_page

GROUPS = {
    "clean": ("form", "legal", "prose"),
    "form": ("form",),
    "legal": ("legal",),
    "prose": ("prose",),
    "hard": ("hard",),
}
"""Rows of the table: the prefixes of the file names in each."""
_CARD_ORDER = ("header", "margin", "text", "footer")


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


def joined(fields: Mapping[str, str | None]) -> str:
    """Return header, margin, text and footer, those that are there, one after another."""
    return plain(json.dumps({name: fields.get(name) for name in _CARD_ORDER}))


def levenshtein_ratio(truth: str, read: str) -> float:
    """Return 1 - edit distance / length of the longer text; 0 where both are empty."""
    longest = max(len(truth), len(read))
    return 1 - Levenshtein.distance(truth, read) / longest if longest else 0.0


def bleu(truth: str, read: str) -> float:
    """Return BLEU of n-grams up to 4, uniform weights, smoothing method 1, words split at white space."""
    return float(sentence_bleu([truth.split()], read.split(), smoothing_function=SmoothingFunction().method1))


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


def score_page(file: str, truth: str, read: str, raw: str, finish_reason: str) -> PageScore:
    """Score the text `read` against `truth`, both plain; what the model wrote, `raw`, tells how it ended."""
    return PageScore(
        file,
        levenshtein_ratio(truth, read),
        bleu(truth, read),
        character_error_rate(truth, read),
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


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file beside the sample pages."""
    with open(environment.PAGES / name, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@dataclass(frozen=True)
class Answer:
    """What a model wrote for one page, and the fields read from it."""

    file: str
    raw: str
    finish_reason: str
    fields: Mapping[str, str | None]


def score_answers(answers: Iterable[Answer]) -> dict[str, list[PageScore]]:
    """Return the scores of all pages by either way, `raw` and `record`, against `truth.jsonl`."""
    truth = {row["file"]: row["truth"] for row in read_rows("truth.jsonl")}
    scores: dict[str, list[PageScore]] = {"raw": [], "record": []}
    for a in answers:
        t = truth[a.file]
        scores["raw"].append(score_page(a.file, plain(json.dumps(t)), plain(a.raw), a.raw, a.finish_reason))
        scores["record"].append(score_page(a.file, joined(t), joined(a.fields), a.raw, a.finish_reason))
    return scores


def transformers_answers() -> list[Answer]:
    """Return what transformers wrote for the sample pages."""
    return [
        Answer(
            row["file"],
            row["text"],
            "length" if row["hit_cap"] else "stop",
            parse_page(row["text"])._asdict(),
        )
        for row in read_rows("reference_hf_fp32.jsonl")
    ]


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--json", help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe("rapidfuzz", "nltk")
    files = [str(environment.PAGES / row["file"]) for row in read_rows("truth.jsonl")]
    answers: list[Answer] = []
    with Engine.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, kernels=args.kernels
    ) as engine:
        description = engine.describe()
        started = time.perf_counter()
        for page in engine.read(files, params=SamplingParams(max_new_tokens=args.max_new_tokens)):
            if page.error:
                raise SystemExit(page.error)
            answers.append(Answer(Path(page.source).name, page.raw, page.finish_reason, page.to_dict()))
        seconds = time.perf_counter() - started

    scores = score_answers(answers)
    groups = {way: by_group(some) for way, some in scores.items()}
    reference = {way: by_group(some) for way, some in score_answers(transformers_answers()).items()}
    environment.show(where)
    print(
        f"model: {args.model}, {description['dtype']}, {description['device']}, greedy, "
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
            "pages": {way: [asdict(s) for s in some] for way, some in scores.items()},
        }
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
