"""The kernels that a page of the 3B shape waits for, as fractions of what this processor can do, both measured in the same run.

    python bench/cpu_limits.py --json bench/results/cpu_limits.json      # prints the table
    python bench/cpu_limits.py --threads 1 --only skinny --forms bf16

The limits are the matrix products of torch in bfloat16 and int8 (oneDNN), and a sum over more memory than the caches hold. A
kernel's limit is the longer of its arithmetic at the peak and its bytes, each moved once, at that bandwidth; weights and caches
take turns with copies of themselves, so that no cache holds them. Rounds go over all kernels in turn, the limits are measured
again before and after every one, and a fraction is taken against these: the table has medians over the rounds, and the middle
half. With one thread it is processor time, which other programs hardly disturb, else wall clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # torch's threads would spin beside the native ones; read when it is loaded

import environment
import torch
from op_cases import SHAPES, Ops, Work, bandwidth, best_seconds, peak

from pagemill import kernels
from pagemill.kernels import Scheme

SHAPE = SHAPES["3b"]
GROUPS = ("wide", "skinny", "prefill", "vision", "decode")
_CACHE_BYTES = 128 << 20
"""More than the last cache holds."""
_LEAST_S = 5e-3
"""One timing is of as many calls as it takes to fill this."""


@dataclass(frozen=True)
class Form:
    """How weights are stored and multiplied."""

    scheme: Scheme
    bits: int
    group: int
    """Weights of one scale."""
    arithmetic: torch.dtype

    def weight_bytes(self, n: int, k: int) -> int:
        scales = 4 * n * -(-k // self.group) if self.bits < 16 else 0
        return n * k * self.bits // 8 + scales


FORMS = {
    "bf16": Form("plain", 16, 1, torch.bfloat16),
    "int8": Form("int8", 8, 1 << 30, torch.int8),
    "int4": Form("int4", 4, 128, torch.int8),
}


@dataclass(eq=False)
class Case:
    """One row of the table."""

    group: str
    name: str
    form: str
    work: Work
    arithmetic: torch.dtype
    aim: float | None = None
    """Least fraction of the limit."""
    seconds: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    compute_bound: list[bool] = field(default_factory=list)


def linear_cases(ops: Ops, forms: list[str], groups: list[str]) -> Iterator[Case]:
    for form_name in forms:
        form = FORMS[form_name]
        for layer, (n, k) in SHAPE.matrices().items():
            wide = "wide" in groups and layer != "head"
            skinny = "skinny" in groups and not layer.startswith("vision")  # pages are encoded whole
            if not (wide or skinny):
                continue
            size = form.weight_bytes(n, k)
            copies = -(-_CACHE_BYTES // size) if skinny else 1
            packed = [ops.pack(SHAPE, layer, scheme=form.scheme) for _ in range(copies)]
            for rows in ([1024] if wide else []) + ([1, 8, 32] if skinny else []):
                yield Case(
                    "wide" if rows == 1024 else "skinny",
                    f"{layer} {n} x {k}, {rows} rows",
                    form_name,
                    ops.linear(packed, rows, weight_bytes=size, out_float32=layer == "head"),
                    form.arithmetic,
                    0.85 if rows < 1024 else 0.8 if form_name == "bf16" else None,
                )


def attention_cases(ops: Ops, groups: list[str]) -> Iterator[Case]:
    def case(group: str, name: str, work: Work, aim: float, form: str = "bf16") -> Iterator[Case]:
        if group in groups:
            yield Case(group, name, form, work, torch.bfloat16, aim)

    yield from case("prefill", "1 x 1024 tokens", ops.paged_attention(SHAPE, 1, 1024, 1024), 0.5)
    yield from case("vision", "60 windows of 64 patches", ops.varlen_attention(SHAPE, 60, 64), 0.5)
    yield from case("vision", "page of 3848 patches", ops.varlen_attention(SHAPE, 1, 3848), 0.5)
    for sequences in (1, 8, 32):
        context = 1024
        copies = math.ceil(_CACHE_BYTES / (4 * sequences * context * SHAPE.kv_heads * SHAPE.head_dim))
        work = ops.paged_attention(SHAPE, sequences, 1, context, copies=copies)
        yield from case("decode", f"{sequences} x {context} tokens", work, 0.8)
        work = ops.paged_attention(SHAPE, sequences, 1, context, copies=2 * copies, kept=torch.int8)
        yield from case("decode", f"{sequences} x {context} tokens", work, 0.8, "KV int8")


@dataclass(frozen=True)
class Limits:
    """What the machine can do just now."""

    peak: dict[torch.dtype, float]
    bandwidth: float

    @classmethod
    def measure(cls, clock: Callable[[], float]) -> Limits:
        dtypes = (torch.bfloat16, torch.int8)
        return cls({dtype: peak(dtype, clock, size=2048) for dtype in dtypes}, bandwidth(clock))


def measure(cases: list[Case], rounds: int, clock: Callable[[], float]) -> list[Limits]:
    """Time every case in every round; the limits beside each."""
    limits = [Limits.measure(clock)]
    calls = {}
    for case in cases:
        case.work.call()
        calls[case] = max(1, math.ceil(_LEAST_S / best_seconds(case.work.call, clock, 2)))
    for _ in range(rounds):
        limits.append(Limits.measure(clock))
        for case in cases:

            def run(work: Work = case.work, times: int = calls[case]) -> None:
                for _ in range(times):
                    work.call()

            seconds = best_seconds(run, clock) / calls[case]
            limits.append(Limits.measure(clock))
            near = limits[-2:]
            arithmetic = case.work.flops / max(each.peak[case.arithmetic] for each in near)
            moving = case.work.moved / max(each.bandwidth for each in near)
            case.seconds.append(seconds)
            case.fractions.append(max(arithmetic, moving) / seconds)
            case.compute_bound.append(arithmetic > moving)
    return limits


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"q1": low, "median": middle, "q3": high}


def rows_of(cases: list[Case]) -> list[dict[str, Any]]:
    """Return every case as plain data."""
    plain = {(case.group, case.name): case.seconds for case in cases if case.form == "bf16"}
    rows = []
    for case in sorted(cases, key=lambda case: GROUPS.index(case.group)):
        compute_bound = statistics.mean(case.compute_bound) > 0.5
        row: dict[str, Any] = {
            "group": case.group,
            "name": case.name,
            "form": case.form,
            "seconds": quartiles(case.seconds),
            "fraction": quartiles(case.fractions),
            "limited_by": "arithmetic" if compute_bound else "bandwidth",
            # at 32 rows the arithmetic may be the limit, which the aim does not speak of
            "aim": None if case.group == "skinny" and compute_bound else case.aim,
        }
        if case.form != "bf16" and (base := plain.get((case.group, case.name))):
            row["times_bf16"] = quartiles([a / b for a, b in zip(base, case.seconds, strict=True)])
            row["aim_times_bf16"] = 1.6 if (case.group, case.form) == ("wide", "int8") else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| kernel | form | ms | limited by | of the limit | aim | times bf16 | aim |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]

    def percent(q: dict[str, float]) -> str:
        return f"{100 * q['median']:.0f} % ({100 * q['q1']:.0f} to {100 * q['q3']:.0f})"

    for row in rows:
        aim, met = row["aim"], row["aim"] is not None and row["fraction"]["median"] >= row["aim"]
        cells = [f"{row['group']}: {row['name']}", row["form"], f"{1e3 * row['seconds']['median']:.3g}"]
        cells += [row["limited_by"], percent(row["fraction"])]
        cells.append("" if aim is None else f"{100 * aim:.0f} %, {'met' if met else 'missed'}")
        if times := row.get("times_bf16"):
            cells.append(f"{times['median']:.2f} ({times['q1']:.2f} to {times['q3']:.2f})")
            aim = row["aim_times_bf16"]
            cells.append("" if aim is None else f"{aim:g}, {'met' if times['median'] >= aim else 'missed'}")
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds should be at least 1")
    kernels.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    where = environment.describe()
    environment.show(where)
    torch.manual_seed(0)
    with torch.inference_mode():
        ops = Ops(kernels.select("auto", torch.device("cpu"), torch.bfloat16), torch.bfloat16)
        cases = [*linear_cases(ops, args.forms, args.only), *attention_cases(ops, args.only)]
        limits = measure(cases, args.rounds, clock)
    rows = rows_of(cases)
    found = {
        "bf16_flops": quartiles([each.peak[torch.bfloat16] for each in limits]),
        "int8_ops": quartiles([each.peak[torch.int8] for each in limits]),
        "read_bytes_per_s": quartiles([each.bandwidth for each in limits]),
    }
    print(f"kernels: {ops.kernels.describe()['linear']}, threads: {args.threads}")
    for name, q in found.items():
        print(f"{name}: {q['median'] / 1e9:.0f} G/s ({q['q1'] / 1e9:.0f} to {q['q3'] / 1e9:.0f})")
    print("\n" + table(rows))
    if args.json:
        result = {
            "environment": where,
            "threads": args.threads,
            "clock": "processor" if args.threads == 1 else "wall",
            "rounds": args.rounds,
            "kernels": ops.kernels.describe(),
            "limits": found,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
