"""How well repetition loops are found: detection rate, false alarms, tokens spent before detection, and time a token.

    python bench/loops.py [--write]

Runs `LoopDetector` over the labelled set (`bench/loop_set.py` says how it was made), not knowing how long the page is and then
with `expected_tokens` at 1.5 times the tokens of the page's true answer. `--write` puts the report into
`bench/results/loops.md`, `--errors` lists the rows judged wrongly.

Tokens spent are counted from where the second instance of the body begins to where the loop is found: what a rollback discards.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import environment
from loop_set import Row, load, tokenizer

from pagemill.decode.loops import Loop, LoopDetector, token_pieces

RESULT = Path(__file__).parent / "results" / "loops.md"
MARGIN = 1.5
"""How far above the truth a page's expected length is put."""

NOTES = """`bench/loop_set.py` says how the rows were made and labelled. Tokens spent are what a rollback to the second instance
discards. Known: `expected_tokens` is 1.5 times the page's true answer. Cells in one long line are then let go on for longer
within that length (`JOINED_LINES`), because a page may really hold them (`page`: the stress pages of "sim sim sim" and "a a a");
what this misses are loops of short words that ended by themselves after 200 to 500 tokens. Not known: rows of numbers and
counting lines are let go on for 72 lines, which is where the p90 comes from. Time is processor time on a busy machine; a check
comes every eighth token, in all 256 sequences at once.
"""


@dataclass(frozen=True)
class Outcome:
    """What the detector said of one row; `spent` is None where nothing was found, negative before the loop began."""

    row: Row
    loop: Loop | None
    spent: int | None


def run(rows: Iterable[Row], pieces: Sequence[bytes], know_length: bool) -> list[Outcome]:
    """Push each row's tokens until a loop is found."""
    outcomes = []
    for row in rows:
        detector = LoopDetector(pieces, int(MARGIN * row.page_tokens) + 1 if know_length else None)
        loop = next((found for token in row.tokens if (found := detector.push(token)) is not None), None)
        outcomes.append(Outcome(row, loop, None if loop is None else loop.end - (row.start or 0)))
    return outcomes


def detected(outcomes: Iterable[Outcome]) -> list[int]:
    """Return the tokens spent on each loop that was found, and not before it began."""
    return sorted(o.spent for o in outcomes if o.row.label == "loop" and o.spent is not None and o.spent > 0)


def false_alarms(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the legitimate rows that were called loops, and the loops that were called before they began."""
    return [
        o
        for o in outcomes
        if o.spent is not None and (o.row.label == "legitimate" or (o.row.label == "loop" and o.spent <= 0))
    ]


def quantile(values: Sequence[int], q: float) -> str:
    return str(values[min(int(q * len(values)), len(values) - 1)]) if values else ""


def summary(name: str, outcomes: list[Outcome]) -> str:
    loops = [o for o in outcomes if o.row.label == "loop"]
    legitimate = [o for o in outcomes if o.row.label == "legitimate"]
    found, alarms = detected(loops), false_alarms(outcomes)
    return (
        f"| {name} | {len(loops)} | {len(found)} ({len(found) / max(len(loops), 1):.1%}) | {quantile(found, 0.5)} "
        f"| {quantile(found, 0.9)} | {len(legitimate)} | {len(alarms)} ({len(alarms) / max(len(legitimate), 1):.1%}) |"
    )


def report(rows: list[Row], pieces: Sequence[bytes]) -> str:
    out = io.StringIO()

    def line(text: str = "") -> None:
        print(text, file=out)

    both = {know: run(rows, pieces, know) for know in (False, True)}
    for know, outcomes in both.items():
        line(f"## {'Length of the page known' if know else 'Length of the page not known'}\n")
        line("| rows | loops | found | spent, median | spent, p90 | legitimate | false alarms |")
        line("|---|---|---|---|---|---|---|")
        line(summary("all", outcomes))
        for name, held_out in (("looked at", False), ("held out", True)):
            line(summary(name, [o for o in outcomes if o.row.held_out == held_out]))
        for name, real in (("real outputs", True), ("constructed", False)):
            line(summary(name, [o for o in outcomes if o.row.source.startswith("real") == real]))
        line()
        for label in ("brief", "page"):
            aside = [o for o in outcomes if o.row.label == label]
            line(
                f"Kept apart, `{label}`: {sum(o.loop is not None for o in aside)} of {len(aside)} called loops.  "
            )
        line()

    line("## By kind, length not known / known\n")
    line("| loops | n | found | spent, median | spent, p90 |")
    line("|---|---|---|---|---|")
    for kind, groups in by_kind(both, "loop").items():
        found = [detected(g) for g in groups]
        line(
            f"| {kind} | {len(groups[0])} | {' / '.join(str(len(f)) for f in found)} "
            f"| {' / '.join(quantile(f, 0.5) for f in found)} | {' / '.join(quantile(f, 0.9) for f in found)} |"
        )
    line("\n| legitimate | n | median tokens | called loops |")
    line("|---|---|---|---|")
    for kind, groups in by_kind(both, "legitimate").items():
        alarms = " / ".join(str(len(false_alarms(g))) for g in groups)
        line(
            f"| {kind} | {len(groups[0])} | {statistics.median(len(o.row.tokens) for o in groups[0]):.0f} | {alarms} |"
        )
    return out.getvalue()


def by_kind(both: dict[bool, list[Outcome]], label: str) -> dict[str, list[list[Outcome]]]:
    """Return, for every kind of rows with `label`, its outcomes under each condition."""
    groups: dict[str, list[list[Outcome]]] = defaultdict(lambda: [[] for _ in both])
    for i, outcomes in enumerate(both.values()):
        for o in outcomes:
            if o.row.label == label:
                kind = o.row.kind
                if o.row.source.startswith("real") and label == "loop":
                    kind = "real output"
                groups[kind][i].append(o)
    return dict(sorted(groups.items()))


def timing(rows: list[Row], pieces: Sequence[bytes], at_once: int = 256, steps: int = 1000) -> str:
    """Processor time a push: every row by itself, and `at_once` detectors taking turns."""

    def one(tokens: Sequence[int]) -> float:
        detector = LoopDetector(pieces)
        began = time.thread_time()
        for token in tokens:
            detector.push(token)
        return (time.thread_time() - began) / len(tokens) * 1e6

    lines = []
    for label in ("legitimate", "loop"):
        each = sorted(one(r.tokens) for r in rows if r.label == label and len(r.tokens) >= 200)
        lines.append(
            f"| {label} rows, whole | {statistics.median(each):.2f} | {each[int(0.9 * len(each))]:.2f} | {each[-1]:.2f} |"
        )
    chosen = ([r for r in rows if len(r.tokens) >= steps] * at_once)[:at_once]
    detectors = [LoopDetector(pieces) for _ in chosen]
    each = []
    for i in range(steps):
        began = time.thread_time()
        for detector, r in zip(detectors, chosen, strict=True):
            detector.push(r.tokens[i])
        each.append((time.thread_time() - began) / at_once * 1e6)
    each.sort()
    lines.append(
        f"| {at_once} sequences in turn, a step's mean | {statistics.median(each):.2f} | {each[int(0.9 * len(each))]:.2f} "
        f"| {each[-1]:.2f} |"
    )
    head = "## Time\n\n| microseconds a token | median | p90 | worst |\n|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument(
        "--errors", action="store_true", help="list misses and false alarms of rows not held out"
    )
    args = parser.parse_args()
    rows, tiny = load(), tokenizer()
    pieces = token_pieces(tiny, 2048)
    where = "  \n".join(environment.lines(environment.describe("tokenizers")))
    text = f"# Loop detection\n\n{where}\n\n{NOTES}\n{report(rows, pieces)}\n{timing(rows, pieces)}"
    print(text)
    if args.write:
        RESULT.write_text(text)
    if args.errors:
        for o in run([r for r in rows if not r.held_out], pieces, False):
            alarm = bool(false_alarms([o]))
            if alarm or (o.row.label == "loop" and not detected([o])):
                print(
                    "ALARM" if alarm else "MISSED",
                    o.row.kind,
                    o.row.source,
                    len(o.row.tokens),
                    o.row.start,
                    o.loop,
                )
                print("    ", repr(tiny.decode(o.row.tokens)[-300:]))


if __name__ == "__main__":
    main()
