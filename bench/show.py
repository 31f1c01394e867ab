"""Show a few pages of a pagemill JSONL file, to be read by a person: `python bench/show.py out/demo.jsonl`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text


def panel(record: dict[str, Any], max_lines: int) -> Panel:
    """Return one page: header, text and the small parts, each in its own style."""
    parts: list[Text] = []
    for name, style in (("header", "cyan"), ("text", ""), ("margin", "magenta"), ("footer", "cyan")):
        lines = (record[name] or "").splitlines()
        if lines:
            more = [f"… {len(lines) - max_lines} more lines"] if len(lines) > max_lines else []
            parts.append(Text("\n".join(lines[:max_lines] + more), style))
    if record["error"]:
        parts.append(Text(record["error"], "red"))
    tokens = record["tokens"]
    return Panel(
        Group(*parts),
        title=Text(f"{Path(record['source']).name}, page {record['page']}: {record['status']}"),
        subtitle=f"{tokens['image']} image tokens in, {tokens['output']} tokens out",
        title_align="left",
        subtitle_align="right",
        width=100,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pages", type=int, default=4, help="how many, spread over the file (default 4)")
    parser.add_argument(
        "--lines", type=int, default=12, help="most lines of text to show of each (default 12)"
    )
    options = parser.parse_args()

    records = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: (record["source"], record["page"]))
    step = max(1, len(records) // options.pages)
    console = Console(highlight=False)
    for record in records[::step][: options.pages]:
        console.print(panel(record, options.lines))
    console.print(f"These are {min(options.pages, len(records))} of {len(records)} pages.")
    console.print(f"All of them, one JSON record a line: {options.file}", soft_wrap=True)


if __name__ == "__main__":
    main()
