"""Everything that is to be checked and measured on a GPU box, in one go: `make bench-gpu` writes `out/gpu.md`.

    python bench/gpu_report.py [-o out/gpu.md] [--checkpoint out/random-3b] [--only NAME ...]

In turn: the kernels' tests on the device (`tests/gpu`: against float64, in bfloat16 too), the kernel benchmarks, the machine
code of every configuration (`bench/codegen.py`), pages/s with a random checkpoint of the 3B's shape, what goes by between its
steps (`bench/overlap.py`), and which targets all this meets (`bench/targets.py`). Each is a section of the report, which is
written again after every one. A command that fails does not keep the others from running.

Exit code 0: all went well. 1: a command failed. 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_LINES = 2000  # of a command's output that the report keeps, the last ones: tables whole, and not what loops over an error


@dataclass(frozen=True)
class Step:
    """One section of the report."""

    name: str
    title: str
    commands: list[list[str]]
    """Run in turn, until one fails."""
    timeout: float
    """Seconds for each command."""


def steps(out: Path, checkpoint: Path) -> list[Step]:
    """What is run, in order; files go beside the report `out`."""
    python, folder = sys.executable, out.parent
    kernels, pages = str(folder / "gpu-kernels.json"), str(folder / "gpu-pages.json")
    make = [python, "bench/make_checkpoint.py", "--preset", "3b", "-o", str(checkpoint)]
    read = [python, "-m", "pagemill", "bench", "--model", str(checkpoint), "--device", "cuda", "--pages", "192",
            "--max-new-tokens", "512", "--guidance", "off", "--guard", "off", "--drafts", "off",
            "--sweep", "concurrency=1,16,64", "--sweep", "quantize=none,int8,int4", "-o", pages]  # fmt: skip

    forms = "none", "int4"
    overlaps = [str(folder / f"gpu-overlap-{form}.json") for form in forms]
    overlap = [
        [python, "bench/overlap.py", "--checkpoint", str(checkpoint), "--quantize", form, "--json", file]
        for form, file in zip(forms, overlaps, strict=True)
    ]

    return [
        Step("tests", "Kernels against float64 on the device", [[python, "-m", "pytest", "tests/gpu"]], 3600),
        Step(
            "kernels",
            "Kernels as fractions of the measured limit",
            [
                [python, "-m", "pytest", "bench/kernels/test_gpu.py", f"--benchmark-json={kernels}"],
                [python, "bench/compare_kernels.py", kernels],
            ],
            7200,
        ),
        Step(
            "codegen",
            "Machine code: codegen.md beside this file",
            [[python, "bench/codegen.py", "--output", str(folder)]],
            3600,
        ),
        Step(
            "pages",
            "Pages a second, random weights of the 3B's shape",
            ([] if (checkpoint / "config.json").exists() else [make]) + [read],
            7200,
        ),
        Step(
            "overlap",
            "What goes by between steps: recorded, planned ahead",
            overlap,
            3600,
        ),
        Step(
            "targets",
            "Targets, met or not",
            [[python, "bench/targets.py", "--kernels", kernels, "--overlap", *overlaps]],
            60,
        ),
    ]


def run(step: Step) -> tuple[bool, str]:
    """Run a step's commands; return whether all went well, and its section of the report."""
    section, good = [f"## {step.title}", ""], True
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for command in step.commands:
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=step.timeout,
            )
            output, ended = done.stdout, f"exit code {done.returncode}"
            good = done.returncode == 0
        except subprocess.TimeoutExpired as expired:
            written = expired.stdout or b""
            output = written.decode(errors="replace") if isinstance(written, bytes) else written
            ended, good = f"ended after {step.timeout:.0f} s", False
        lines = output.rstrip().splitlines()
        seconds = time.monotonic() - started
        shown = shlex.join(["python" if word == sys.executable else word for word in command])
        section += [f"`{shown}`: {'ok' if good else '**FAILED**'}, {ended}, {seconds:.0f} s", "", "````text"]
        section += [f"({len(lines) - _LINES} lines before)"] * (len(lines) > _LINES)
        section += [*lines[-_LINES:], "````", ""]
        if not good:
            break
    return good, "\n".join(section)


def heading() -> str:
    """What was measured, and on what."""
    device = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# pagemill on a GPU",
        "",
        f"- {device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 1e9:.1f} GB, "
        f"{device.multi_processor_count} multiprocessors; {torch.cuda.device_count()} of them",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}, pagemill {commit or 'unknown'}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "out" / "gpu.md")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ROOT / "out" / "random-3b",
        help="made by the step pages if it is not there",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="names of steps: tests, kernels, codegen, pages, overlap, targets",
    )
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu needs a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    output = asked.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in steps(output, asked.checkpoint.resolve()) if not asked.only or s.name in asked.only]
    sections, all_good = [heading()], True
    for step in chosen:
        print(f"{step.title} ...", flush=True)
        good, section = run(step)
        print("  ok" if good else "  FAILED", flush=True)
        all_good &= good
        sections.append(section)
        output.write_text("\n".join(sections))
    print(f"the report: {output}")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
