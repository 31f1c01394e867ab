"""pagemill and the engines that people would use instead, on one workload: pages of the 3B shape on this machine's processor.

    bench/peers/install.sh FOLDER; bench/peers/weights.sh FOLDER         # once: bench/peers/README.md
    python bench/compare_peers.py FOLDER -o out/peers.json               # every engine in turn
    python bench/compare_peers.py FOLDER -o out/peers.json vllm-bf16 --runs 4x64
    python bench/compare_peers.py -o out/peers.json                      # only the table of what was measured

Every engine runs in a fresh process of its own environment, one after another, `--rounds` times over. What it measured is added
to the result file when its process ends, so that a comparison can be interrupted; the table gives medians over all in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import environment
from large import draw_page
from PIL import Image

ENGINES = (
    "pagemill-bf16", "pagemill-int8", "pagemill-int4", "transformers-bf16", "vllm-bf16",
    "openvino-int8", "openvino-int4", "llamacpp-q8_0", "llamacpp-q4_0",
)  # fmt: skip
PAGE_PX = (728, 1036)
PAGES = 64
_AIMS = (("bf16", "bf16", 1.3), ("int8", "", 2.0), ("int4", "", 2.5))
"""A form of pagemill, the form of the peers it is held against ("" is any), and the aimed ratio of pages a second at once."""
_RUN = Path(__file__).parent / "peers" / "run.py"


def draw_pages(folder: Path) -> None:
    """Write the pages that every engine reads, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(PAGES):
        if not (file := folder / f"{seed:02}.png").exists():
            Image.fromarray(draw_page(*PAGE_PX, seed)).save(file)


def run(engine: str, folder: Path, runs: list[str], limit_s: float) -> list[dict[str, Any]]:
    """Measure one engine in a process of its own; the runs that it finished. Its messages go to FOLDER/logs."""
    kind = engine.partition("-")[0]
    venv = folder / kind
    python = sys.executable if kind == "pagemill" else str(venv / "bin" / "python")
    env = dict(os.environ)
    if kind == "vllm":  # its manual asks for these two
        libraries = [*venv.glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        env["LD_PRELOAD"] = ":".join(map(str, libraries))
    log = folder / "logs" / f"{engine}.log"
    log.parent.mkdir(exist_ok=True)
    command = [python, str(_RUN), engine, str(folder), *runs]
    with log.open("a", encoding="utf-8") as messages:
        try:
            child = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=messages, text=True, env=env, timeout=limit_s
            )
            output, problem = child.stdout, f"exit code {child.returncode}" if child.returncode else ""
        except subprocess.TimeoutExpired as late:
            output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            problem = f"stopped after {limit_s:g} s"
        except OSError as error:
            output, problem = "", str(error)
    if problem:
        print(f"{engine}: {problem}, see {log}", file=sys.stderr)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"engine"')]


def table(runs: list[dict[str, Any]]) -> str:
    """Return medians as Markdown, with the slowest and fastest where there are several, and how the aims were met."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = defaultdict(list)
    for one in runs:
        groups[one["pages"], one["new_tokens"], one["engine"]].append(one)

    def median(rows: list[dict[str, Any]], key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return statistics.median(values) if values else None

    def cell(rows: list[dict[str, Any]], key: str, digits: int) -> str:
        middle = median(rows, key)
        return "" if middle is None else f"{middle:.{digits}f}"

    lines = [
        "| engine | pages at once | new tokens | pages/s | first token, s | decode tokens/s | peak, GB | load, s | busy | runs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (pages, tokens, engine), rows in sorted(
        groups.items(),
        key=lambda item: (*item[0][:2], ENGINES.index(item[0][2]) if item[0][2] in ENGINES else 99),
    ):
        speeds = [row["pages_per_s"] for row in rows]
        spread = f" ({min(speeds):.4f} to {max(speeds):.4f})" if len(rows) > 1 else ""
        lines.append(
            f"| {engine} | {pages} | {tokens} | {cell(rows, 'pages_per_s', 4)}{spread} | {cell(rows, 'first_token_s', 1)} | "
            f"{cell(rows, 'decode_tokens_per_s', 2)} | {cell(rows, 'peak_gb', 2)} | {cell(rows, 'load_s', 1)} | "
            f"{cell(rows, 'busy', 2)} | {len(rows)} |"
        )
    lines.append("")
    speed = {key: median(rows, "pages_per_s") or 0.0 for key, rows in groups.items()}
    for pages, tokens in sorted({key[:2] for key in groups}):
        for form, against, aim in _AIMS:
            ours = speed.get((pages, tokens, f"pagemill-{form}"))
            peers = {
                key[2]: value
                for key, value in speed.items()
                if key[:2] == (pages, tokens)
                and not key[2].startswith("pagemill")
                and key[2].endswith(against)
            }
            if ours and peers:
                best = max(peers, key=lambda name: peers[name])
                aimed = f" (aim: {aim:g})" if pages > 1 else ""
                lines.append(
                    f"- {pages} x {tokens} tokens: pagemill {form} reads {ours / peers[best]:.2f} times the pages of {best}, "
                    f"the best {against + ' ' if against else ''}peer{aimed}."
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="made by bench/peers/install.sh and weights.sh")
    parser.add_argument("engines", nargs="*", default=ENGINES, help=f"default: {' '.join(ENGINES)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result file, added to")
    parser.add_argument("--runs", nargs="+", default=["1x256", "8x256"], metavar="PAGESxTOKENS")
    parser.add_argument("--rounds", type=int, default=1, help="times that every engine runs (default 1)")
    parser.add_argument(
        "--limit", type=float, default=3600, help="most seconds of one engine's process (default 3600)"
    )
    args = parser.parse_intermixed_args()
    result: dict[str, Any] = {"environment": environment.describe(), "runs": []}
    if args.output.exists():
        result = json.loads(args.output.read_text(encoding="utf-8"))
    if args.folder is not None:
        draw_pages(args.folder / "pages")
        for _ in range(args.rounds):
            for engine in args.engines:
                for one in run(engine, args.folder, args.runs, args.limit):
                    result["runs"].append(one)
                    print(json.dumps({k: v for k, v in one.items() if k != "about"}), file=sys.stderr)
                args.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    environment.show(result["environment"])
    print("\n" + table(result["runs"]))


if __name__ == "__main__":
    main()
