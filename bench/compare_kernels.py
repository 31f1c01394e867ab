"""Which op got slower between two runs of `pytest bench/kernels --benchmark-json=...`, beyond noise.

    python bench/compare_kernels.py RESULT.json
    python bench/compare_kernels.py OLD.json NEW.json

One file: the fraction of its limit that every op reaches. Two: an op is slower (or faster) if its fastest round moved by more
than the threshold, as other programs only ever add time, by more than the machine itself was disturbed around it, and its
middle half of rounds lies wholly beyond the old one's. Both runs measured their machine: an op's seconds are taken relative to
its limit in the same run, so that a slower clock is not the op's fault (`--absolute` compares seconds).

Exit code 0: nothing got slower. 1: something did, or an op of OLD is not in NEW. 2: a file cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path


class BadResult(Exception):
    """A file that is no result of the kernel benchmarks; one sentence."""


@dataclass(frozen=True)
class Op:
    """One benchmark of one run; seconds a call."""

    best: float
    median: float
    low: float
    high: float
    """The middle half of the rounds."""
    limit: float
    limited_by: str
    fraction: float
    disturbed: float = 1.0
    """Times that the machine itself took as long, around this op, as at its best in the run."""
    tflop_per_s: float = 0.0
    gb_per_s: float = 0.0
    device: str = ""
    """The name of a GPU."""

    def scaled(self, by: float) -> Op:
        """The same on a machine that takes `by` times as long."""
        seconds = [s * by for s in (self.best, self.median, self.low, self.high)]
        best, median, low, high = seconds
        return replace(self, best=best, median=median, low=low, high=high)


@dataclass(frozen=True)
class Change:
    """An op in both runs."""

    name: str
    old: Op
    new: Op
    """With its seconds as they would be on the old run's machine."""

    @property
    def ratio(self) -> float:
        """Above 1 the op got slower."""
        return self.new.best / self.old.best

    def slower(self, threshold: float) -> bool:
        return self.ratio > (1 + threshold) * self.new.disturbed and self.new.low > self.old.high

    def faster(self, threshold: float) -> bool:
        return self.ratio * (1 + threshold) * self.old.disturbed < 1 and self.new.high < self.old.low


def read(path: str) -> dict[str, Op]:
    """Read a result file. Raises `BadResult`."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]
        ops = {}
        for row in rows:
            stats, info = row["stats"], row["extra_info"]
            ops[str(row["name"])] = Op(
                *(float(stats[key]) for key in ("min", "median", "q1", "q3")),
                float(info["limit_s"]),
                str(info["limited_by"]),
                float(info["fraction"]),
                max(1.0, float(info["disturbed"])),
                float(info.get("tflop_per_s", 0)),
                float(info.get("gb_per_s", 0)),
                str(info.get("device", "")),
            )
    except OSError as error:
        raise BadResult(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError):
        raise BadResult(f"{path} is no result of pytest bench/kernels --benchmark-json.") from None
    if not ops or not all(op.best > 0 and op.limit > 0 for op in ops.values()):
        raise BadResult(f"{path} holds no benchmark: run pytest bench/kernels --benchmark-json={path}.")
    return ops


def compare(old: Mapping[str, Op], new: Mapping[str, Op], *, absolute: bool = False) -> list[Change]:
    """Pair the ops of both runs, the one that slowed most first. Raises `BadResult` if there is none in common."""
    changes = [
        Change(name, old[name], op if absolute else op.scaled(old[name].limit / op.limit))
        for name, op in new.items()
        if name in old
    ]
    if not changes:
        raise BadResult("the two runs have no op in common.")
    return sorted(changes, key=lambda change: -change.ratio)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def show(ops: Mapping[str, Op]) -> None:
    width = max(map(len, ops))
    head = f"{'':{width}}{'median':>10}{'limit':>10}  {'by':11}{'fraction':>9}{'disturbed':>11}"
    print(f"{head}{'TFLOP/s':>10}{'GB/s':>8}")
    for name, op in sorted(ops.items()):
        print(
            f"{name:{width}}{_time(op.median):>10}{_time(op.limit):>10}  {op.limited_by:11}{100 * op.fraction:7.0f} %"
            f"{op.disturbed:10.2f}x{op.tflop_per_s:10.3g}{op.gb_per_s:8.3g}"
        )


def show_changes(title: str, changes: list[Change]) -> None:
    width = max([len(title), *(len(change.name) for change in changes)])
    print(f"{title:{width}}{'old':>10}{'new':>10}{'times':>8}")
    for change in changes:
        new, old = _time(change.new.best), _time(change.old.best)
        print(f"{change.name:{width}}{old:>10}{new:>10}{change.ratio:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json", nargs="?")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="least change that matters (default 0.1)"
    )
    parser.add_argument("--absolute", action="store_true", help="compare seconds, not shares of the limits")
    args = parser.parse_args()
    try:
        if not args.threshold >= 0:
            raise BadResult(f"--threshold should be zero or more, got {args.threshold}.")
        old = read(args.old)
        if args.new is None:
            with suppress(BrokenPipeError):  # into head
                show(old)
            return
        new = read(args.new)
        changes = compare(old, new, absolute=args.absolute)
    except BadResult as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    slower = [c for c in changes if c.slower(args.threshold)]
    faster = [c for c in reversed(changes) if c.faster(args.threshold)]
    for title, found in (("slower", slower), ("faster", faster)):
        if found:
            show_changes(title, found)
    missing = sorted(set(old) - set(new))
    if missing:
        print(f"not in {args.new}: {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    drift = sorted(new[name].limit / op.limit for name, op in old.items() if name in new)[len(changes) // 2]
    print(
        f"{len(changes)} ops: {len(slower)} slower, {len(faster)} faster, by more than {100 * args.threshold:g} % and "
        f"beyond the spread of their rounds; the machine itself took {drift:.2f} times as long."
    )
    sys.exit(1 if slower or missing else 0)


if __name__ == "__main__":
    main()
