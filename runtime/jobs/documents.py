"""Finished pages as one document: a JSON array, Markdown, or plain text with a form feed between pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pagemill.errors import printable
from pagemill.files import written_whole

Record = dict[str, Any]


def write_atomically(path: Path, chunks: Iterable[str]) -> None:
    """Write a document whole or not at all (`written_whole`). Raises OSError."""
    with written_whole(path) as beside, open(beside, "wb") as file:
        for chunk in chunks:
            file.write(chunk.encode("utf-8", "backslashreplace"))


def as_json(records: Iterable[Record]) -> Iterator[str]:
    """Yield a JSON array of the records, one record a line."""
    before = "[\n"
    for record in records:
        yield before + json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def as_markdown(records: Iterable[Record]) -> Iterator[str]:
    """Yield Markdown: a heading a source, a heading a page, the text as the model wrote it.

    Header, margin and footer are quoted and labelled; what went wrong with a page is a quote too.
    """
    source: str | None = None
    for record in records:
        if record["source"] != source:
            if source is not None:
                yield "\n"
            source = record["source"]
            yield f"# {printable(record['source'])}\n"
        yield f"\n## Page {record['page']}\n"
        if record["status"] == "error":
            yield "\n" + _quote("error", printable(record["error"] or "unknown"))
            continue
        if record["status"] == "degenerate":
            yield "\n" + _quote("warning", "the model fell into repetition on this page")
        for name in ("header", "margin"):
            if record[name]:
                yield "\n" + _quote(name, record[name])
        if record["text"]:
            yield "\n" + record["text"].strip("\n") + "\n"
        if record["footer"]:
            yield "\n" + _quote("footer", record["footer"])


def _quote(label: str, text: str) -> str:
    first, *rest = text.strip().split("\n")
    return "".join(f"> {line}\n" for line in [f"*{label}:* {first}", *rest])


def as_text(records: Iterable[Record]) -> Iterator[str]:
    """Yield plain text: header, text, margin and footer of each page; form feeds only between pages."""
    between = ""
    for record in records:
        if record["status"] == "error":
            page = f"{record['source']}, page {record['page']}"
            blocks = [printable(f"[{page} was not read: {record['error'] or 'unknown'}]")]
        else:
            blocks = [record[name] for name in ("header", "text", "margin", "footer") if record[name]]
        yield between + "\n\n".join(block.replace("\f", "\n").strip("\n") for block in blocks) + "\n"
        between = "\f"


RENDERERS = {"json": as_json, "md": as_markdown, "txt": as_text}
