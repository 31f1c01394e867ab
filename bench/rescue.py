"""What loops cost, and what stopping, rescuing and retrying them gives back.

    python bench/rescue.py --json bench/results/rescue.json

Reads the hard and the stress pages of `bench/pages` with every stage of the model, and with the weakest one rounded to 3 bits a
weight (it loops more), under four policies:

off           no guard: one global cap of tokens
stop          a loop ends the page
rescue        a loop is rolled back and suppressed, at most `max_rescues` times
retry         rescue, and a page that ended badly is read once more (what `pagemill read` does)

Where `stop` found no loop, `rescue` does the same work for the same output, and so does `retry` where `rescue` did not end badly:
those pages are not read again, their numbers are copied. Pages are read one at a time on one thread, and a page's cost is the
processor time of the whole process from opening the file to its record: on a busy machine that is what can be trusted. Drafts are
on, but only from the page itself: the index of earlier pages is emptied before each. The cap, 3,000 tokens, is the most that the
miniature's 4,096 positions leave on a stress page. Degenerate is a page by the published rule, or one that the guard ended.
Looping is, for all four policies, a page that is degenerate with the guard off or that the policy `stop` ended.

The mix is computed, not read: of 1,000 pages 24 (the published share, 2.4 %) cost what this model's looping pages cost on average
under the policy, the others what the final model's clean pages cost. 2.4 % is also the share of time that these pages would have
if they were pages like any other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import environment
from loop_set import rounded
from stages import stage_folder

from pagemill import Engine, SamplingParams
from pagemill.decode.page import FIELDS
from pagemill.score import Reading, Truth, read_truths, score_page

POLICIES: dict[str, dict[str, Any]] = {
    "off": dict(guard="off", max_retries=0),
    "stop": dict(guard="stop", max_retries=0),
    "rescue": dict(guard="rescue", max_retries=0),
    "retry": dict(guard="rescue", max_retries=1),
}
MODELS: dict[str, tuple[str, int | None]] = {
    "final": ("final", None),
    "stage2": ("stage2", None),
    "stage1": ("stage1", None),
    "stage1, 3 bits": ("stage1", 3),
}
LOOPING_SHARE = 0.024


@dataclass(frozen=True)
class PageRun:
    """One page, read once under one policy."""

    model: str
    policy: str
    group: str
    page: str
    score: float
    degenerate: bool
    valid_json: bool
    finish_reason: str
    loops: int
    ended: int
    """Loops that ended the page, or an attempt at it."""
    attempts: int
    mismatch: str | None
    output: int
    discarded: int
    cpu: float
    """Seconds."""


def pages_of(group: str) -> list[tuple[Path, Truth]]:
    """Return the pages of a group (clean: every third of them, hard, stress) with their truths."""
    folder = environment.PAGES / "stress" if group == "stress" else environment.PAGES
    truths = read_truths(folder / "truth.jsonl")
    pages = [(folder / truth.name, truth) for truth in truths]
    if group == "stress":
        return pages
    hard = [page for page in pages if page[1].name.startswith("hard")]
    return hard if group == "hard" else [page for page in pages if page not in hard][::3]


def same(before: PageRun, policy: str) -> bool:
    """Tell whether a policy does just what the one before it did."""
    if policy == "rescue":
        return before.policy == "stop" and not before.loops
    ended_badly = before.finish_reason == "loop" or (before.finish_reason == "stop" and before.mismatch)
    return policy == "retry" and before.policy == "rescue" and not ended_badly


def read_group(
    engine: Engine, model: str, policy: str, group: str, cap: int, before: dict[str, PageRun]
) -> list[PageRun]:
    """Read the pages of a group one after the other; `before` are the runs of the policy before, by page."""
    params = SamplingParams(max_new_tokens=cap if policy == "off" else None, **POLICIES[policy])
    runs = []
    for path, truth in pages_of(group):
        known = before.get(truth.name)
        if known is not None and same(known, policy):
            runs.append(replace(known, policy=policy))
            continue
        started = time.process_time()
        (page,) = engine.read(str(path), params=params, salt=f"{model} {policy} {truth.name}")
        cpu = time.process_time() - started
        if page.error:
            raise SystemExit(page.error)
        fields = {name: getattr(page, name) for name in FIELDS}
        reading = Reading(truth.name, 1, fields, page.raw, page.finish_reason, page.status)
        scored = score_page(truth, reading)
        runs.append(
            PageRun(
                model=model, policy=policy, group=group, page=truth.name,
                score=(scored.fields.levenshtein + scored.fields.bleu) / 2,
                degenerate=scored.degenerate, valid_json=bool(scored.valid_json), finish_reason=page.finish_reason,
                loops=len(page.loops), ended=sum(loop.action == "end" for loop in page.loops),
                attempts=page.attempts, mismatch=page.mismatch,
                output=page.tokens.output, discarded=page.tokens.discarded, cpu=cpu,
            )
        )  # fmt: skip
    return runs


def looping(runs: Sequence[PageRun]) -> set[tuple[str, str, str]]:
    """Return the looping pages as (model, group, page)."""
    return {(r.model, r.group, r.page) for r in runs if r.degenerate and r.policy in ("off", "stop")}


def summarize(runs: Sequence[PageRun]) -> list[dict[str, Any]]:
    """Return a row for each model, group and policy."""
    rows = []
    loop_pages = looping(runs)
    for key in dict.fromkeys((r.model, r.group, r.policy) for r in runs):
        some = [r for r in runs if (r.model, r.group, r.policy) == key]
        cpu = sum(r.cpu for r in some)
        rows.append(
            dict(
                model=key[0], group=key[1], policy=key[2], pages=len(some),
                benchmark_score=sum(r.score for r in some) / len(some),
                degenerate=sum(r.degenerate for r in some), invalid=sum(not r.valid_json for r in some),
                looping=sum((r.model, r.group, r.page) in loop_pages for r in some),
                loops=sum(r.loops for r in some), rescued=sum(r.loops - r.ended for r in some),
                retried=sum(r.attempts - 1 for r in some),
                output=sum(r.output for r in some), discarded=sum(r.discarded for r in some), cpu=cpu,
                share_degenerate=sum(r.cpu for r in some if r.degenerate) / cpu,
            )
        )  # fmt: skip
    return rows


def mix(runs: Sequence[PageRun]) -> list[dict[str, Any]]:
    """Return, for each model with looping pages and each policy, what they would take of a production mix."""
    loop_pages = looping(runs)
    rows = []
    for model, policy in dict.fromkeys((r.model, r.policy) for r in runs):
        clean = [r.cpu for r in runs if r.group == "clean" and r.model == "final" and r.policy == policy]
        some = [
            r
            for r in runs
            if r.policy == policy and r.model == model and (r.model, r.group, r.page) in loop_pages
        ]
        if not some or not clean:
            continue
        healthy = (1 - LOOPING_SHARE) * sum(clean) / len(clean)
        cost = LOOPING_SHARE * sum(r.cpu for r in some) / len(some)
        still = LOOPING_SHARE * sum(r.cpu for r in some if r.degenerate) / len(some)
        rows.append(
            dict(
                model=model, policy=policy, looping=len(some), degenerate=sum(r.degenerate for r in some),
                seconds_looping=sum(r.cpu for r in some) / len(some), seconds_clean=sum(clean) / len(clean),
                share_looping=cost / (cost + healthy), share_degenerate=still / (cost + healthy),
                score=sum(r.score for r in some) / len(some),
            )
        )  # fmt: skip
    return rows


def table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown; `columns` are titles and formats, by key."""
    lines = [" | ".join(name for name in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(format(row[key], form) for key, form in columns.items()) for row in rows]
    return "\n".join(f"| {line.replace('_', ' ')} |" for line in lines)


PAGES_TABLE = dict(
    model="", group="", policy="", pages="", benchmark_score=".4f", looping="", degenerate="", loops="", rescued="",
    retried="", output=",", discarded=",", cpu=".1f", share_degenerate=".1%",
)  # fmt: skip
MIX_TABLE = dict(
    model="", policy="", looping="", degenerate="", score=".4f", seconds_looping=".2f", seconds_clean=".2f",
    share_looping=".1%", share_degenerate=".1%",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--max-new-tokens", type=int, default=3000)
    parser.add_argument("--json", help="write the numbers, and those of every page, to this file")
    args = parser.parse_args()

    where = environment.describe()
    runs: list[PageRun] = []
    with TemporaryDirectory() as scratch:
        for model in args.models:
            stage, bits = MODELS[model]
            folder = stage_folder(stage, Path(scratch))
            if bits:
                folder = rounded(folder, bits, Path(scratch) / f"{stage}-{bits}")
            with Engine.from_pretrained(
                str(folder), dtype="bfloat16", num_threads=1, max_num_seqs=1, prepare_threads=1
            ) as engine:
                engine.max_new_tokens = args.max_new_tokens
                for group in ("clean", "hard", "stress") if model == "final" else ("hard", "stress"):
                    before: dict[str, PageRun] = {}
                    for policy in args.policies:
                        new = read_group(engine, model, policy, group, args.max_new_tokens, before)
                        runs, before = runs + new, {run.page: run for run in new}
                        print(model, group, policy, flush=True)
    rows, mixed = summarize(runs), mix(runs)
    environment.show(where)
    print(f"greedy, bfloat16, at most {args.max_new_tokens} new tokens\n")
    print(table(PAGES_TABLE, rows), "\n")
    print(table(MIX_TABLE, mixed))
    if args.json:
        result = {
            "environment": where,
            "max_new_tokens": args.max_new_tokens,
            "rows": rows,
            "mix": mixed,
            "pages": [asdict(run) for run in runs],
        }
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
