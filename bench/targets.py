"""What of the GPU path's targets is met: results of the kernel benchmarks and of `bench/overlap.py` against them.

    python bench/targets.py --kernels out/gpu-kernels.json --overlap out/gpu-overlap-none.json out/gpu-overlap-int4.json

A target holds for many cases and is met where the worst of them meets it: the table names that case, and has the best one's
number beside it. Shares are of what torch's matrix product, or a copy, reached in the same run. A product of int4 or fp8 weights
(medians; rounding x, or making weights plain, is in it) is held against that of bfloat16 on the same layer and rows, by Triton's
kernel or by torch, whichever is faster. "Not measured": a file or a case is not there, or the target is another card's.

Exit code 0: the table was printed, whatever is met. 2: a file is there and is no result.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from compare_kernels import BadResult, Op, read

Ops = Mapping[str, Op]
"""By shape, case and implementation: `3b-linear-down-int4-16-triton`."""
Numbers = dict[str, float]
"""By case."""


@dataclass(frozen=True)
class Target:
    """A number that every one of some cases should reach."""

    title: str
    wanted: float
    """At least; or at most, where the best is the lowest."""
    numbers: Callable[[Ops], Numbers]
    unit: str
    card: str = ""
    """What a GPU's name has in it, where the target is for that one alone."""


def _cases(ops: Ops, pattern: str) -> dict[str, Op]:
    """Of Triton's kernels, what matches, by shape and case."""
    named = {name.removesuffix("-triton"): op for name, op in ops.items() if name.endswith("-triton")}
    return {name: op for name, op in named.items() if re.fullmatch(pattern, name)}


def _fractions(pattern: str) -> Callable[[Ops], Numbers]:
    """Percent of the limit."""
    return lambda ops: {name: 100 * op.fraction for name, op in _cases(ops, pattern).items()}


def _times_as_fast(form: str, layer: str, rows: str) -> Callable[[Ops], Numbers]:
    """The seconds of bfloat16 over those of `form`."""

    def numbers(ops: Ops) -> Numbers:
        found = {}
        for name, op in _cases(ops, rf"\w+-linear-{layer}-{form}-{rows}").items():
            plain = name.replace(f"-{form}-", "-bf16-")
            both = [ops[f"{plain}-{by}"].median for by in ("triton", "reference") if f"{plain}-{by}" in ops]
            if both:
                found[name] = min(both) / op.median
        return found

    return numbers


_LANGUAGE = r"(?!vision)\w+"  # a layer: int4 is for those alone
_LONG = r"\w+-paged-bf16-1x(\d+)-of-\1"
_BATCHED = r"(16|64)x1-of-\d+"
TARGETS = [
    Target("long prefill attention, of the peak", 75, _fractions(_LONG), "%", "A100"),
    Target("long prefill attention, of the peak", 65, _fractions(_LONG), "%", "H100"),
    *(
        Target(f"paged decode from batch 16, {kind}", 85, _fractions(rf"\w+-paged-{kind}-{_BATCHED}"), "%")
        for kind in ("bf16", "int8", "fp8")
    ),
    Target("int4 over bf16, 1 and 16 rows", 3, _times_as_fast("int4", _LANGUAGE, "(1|16)"), "x"),
    Target("int4 over bf16, 4096 rows", 1, _times_as_fast("int4", _LANGUAGE, "4096"), "x"),
    Target("fp8 over bf16, 1024 rows and more", 1.6, _times_as_fast("fp8", r"\w+", r"\d{4,}"), "x"),
]
"""Of single kernels."""
GAP = 5.0
"""Percent, at most, of steps planned ahead that a GPU waits for the CPU."""
_WAY = "graphs, ahead"


def gpu_ops(ops: Ops) -> dict[str, Op]:
    """What a result file has of `bench/kernels/test_gpu.py`."""
    matches = ((re.fullmatch(r"test_op\[(.+)\]", name), op) for name, op in ops.items())
    return {match[1]: op for match, op in matches if match and op.device}


def read_gaps(path: str) -> Numbers:
    """Of a result file of `bench/overlap.py`, percent of a traced window that the device waited. Raises `BadResult`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [(run["concurrency"], row) for run in found["traced"] for row in run["rows"]]
        form = found["asked"]["quantize"]
        return {
            f"{form}, {concurrency} at once": float(row["gap %"])
            for concurrency, row in rows
            if row["way"] == _WAY and row["gap %"] is not None
        }
    except OSError as error:
        raise BadResult(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError):
        raise BadResult(f"{path} is no result of bench/overlap.py.") from None


def rows(ops: Ops, gaps: Numbers) -> list[list[str]]:
    """The table: target, wanted, worst, its case, best, and whether it is met."""
    found = []
    for target in TARGETS:
        title = f"{target.title}, {target.card}" if target.card else target.title
        here = {name: op for name, op in ops.items() if target.card in op.device}
        found.append(_row(title, target.wanted, target.numbers(here), target.unit))
    return [*found, _row("waiting for the CPU, steps planned ahead", GAP, gaps, "%", at_most=True)]


def _row(title: str, wanted: float, numbers: Numbers, unit: str, *, at_most: bool = False) -> list[str]:
    asked = f"{'<=' if at_most else '>='} {wanted:g} {unit}"
    if not numbers:
        return [title, asked, "", "", "", "not measured"]
    order = sorted(numbers, key=lambda name: numbers[name], reverse=at_most)
    worst, best = numbers[order[0]], numbers[order[-1]]
    met = worst <= wanted if at_most else worst >= wanted
    return [title, asked, f"{worst:.3g} {unit}", order[0], f"{best:.3g} {unit}", "met" if met else "NOT MET"]


def show(table: Iterable[list[str]]) -> None:
    """Print it, in columns."""
    lines = [["target", "wanted", "worst", "of", "best", ""], *table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", help="of pytest bench/kernels/test_gpu.py --benchmark-json=...")
    parser.add_argument("--overlap", nargs="*", default=[], help="of bench/overlap.py --json")
    asked = parser.parse_args()
    ops: dict[str, Op] = {}
    gaps: Numbers = {}
    try:
        for path in [asked.kernels, *asked.overlap]:
            if path is None or not Path(path).exists():
                continue
            if path == asked.kernels:
                ops = gpu_ops(read(path))
                what = ", ".join(sorted({op.device for op in ops.values()})) or "no GPU"
            else:
                gaps |= read_gaps(path)
                what = "pauses"
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(Path(path).stat().st_mtime))
            print(f"{path}, of {written}: {what}")
    except BadResult as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(rows(ops, gaps))


if __name__ == "__main__":
    main()
