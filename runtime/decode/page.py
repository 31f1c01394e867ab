"""The model's answer to a page's fields, where each stands in it, and the published rule for a degenerate page."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

FIELDS = ("header", "margin", "footer", "text")
_KEY = re.compile(r'(?<=[{,\s])"(header|margin|footer|text)"\s*:\s*', re.ASCII)
_BLANK = " \t\n\r"
_SPACE = re.compile(f"[{_BLANK}]*")
_DECODER = json.JSONDecoder(strict=False)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class PageFields(NamedTuple):
    """What a page says, by place; None is a field that the model left out or found empty of text."""

    header: str | None
    margin: str | None
    footer: str | None
    text: str | None


def parse_page(raw: str) -> PageFields:
    """Read the model's JSON answer tolerantly: any key order, keys missing or null, and broken JSON.

    Broken JSON (cut by the token cap, a quotation mark not escaped) gives each field up to where the next key begins. Output that
    is no such JSON at all (a Markdown model) is the page's text.
    """
    try:
        value = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return _salvage(raw)
    if not isinstance(value, dict) or not any(name in value for name in FIELDS):
        return PageFields(None, None, None, raw)
    return PageFields(*(_as_text(value.get(name)) for name in FIELDS))


def field_spans(raw: str) -> dict[str, tuple[int, int]]:
    """Return where each field's value stands in `raw`: (start, end) in characters, quotation marks left out.

    Follows `parse_page`, broken JSON included; a field that is null or missing has no span. The JSON around the values
    is ASCII, so the spans in UTF-8 bytes are those of the bytes decoded as Latin-1.
    """
    try:
        spans = _value_spans(raw)
    except (ValueError, RecursionError):
        spans = _salvaged_spans(raw)
    found = {name: span for name, span in spans.items() if name in FIELDS}
    if not found:
        return {"text": (0, len(raw))}
    return {name: span for name, span in found.items() if span is not None}


def is_json_object(raw: str) -> bool:
    """Tell whether the answer is one JSON object, whatever is in it."""
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def is_degenerate(raw: str, finish_reason: str | None) -> bool:
    """The offline rule of the published evaluation: cut by the cap, and the last 15 characters occur four times.

    A page that the loop guard stopped is degenerate too. `raw` is what the model wrote: without any closing that a
    grammar added.
    """
    if finish_reason == "loop":
        return True
    return finish_reason == "length" and len(raw) >= 15 and raw.count(raw[-15:]) >= 4


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    return _whole(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _salvage(raw: str) -> PageFields:
    spans = _salvaged_spans(raw)
    if not spans:
        return PageFields(None, None, None, raw)
    found = {name: span and _unescape(raw[slice(*span)]) for name, span in spans.items()}
    return PageFields(*(found.get(name) for name in FIELDS))


def _value_spans(raw: str) -> dict[str, tuple[int, int] | None]:
    """Spans of the values of a JSON object, by key; none where `raw` is other JSON. Raises ValueError for broken JSON."""

    def after(at: int, mark: str) -> int:
        at = skip(at)
        if not raw.startswith(mark, at):
            raise ValueError
        return at + len(mark)

    def skip(at: int) -> int:
        return _SPACE.match(raw, at).end()  # type: ignore[union-attr]  # it matches everywhere

    def value(at: int) -> tuple[object, int]:
        return _DECODER.raw_decode(raw, skip(at))

    spans: dict[str, tuple[int, int] | None] = {}
    at = skip(0)
    if not raw.startswith("{", at):
        after(value(at)[1], "")
        return spans
    at = skip(at + 1)
    more = not raw.startswith("}", at)
    while more:
        key, at = value(at)
        if not isinstance(key, str):
            raise ValueError
        start = skip(after(at, ":"))
        found, at = value(start)
        inside = (start + 1, at - 1) if isinstance(found, str) else (start, at)
        spans[key] = None if found is None else inside
        at = skip(at)
        more = raw.startswith(",", at)
        at += more
    if skip(after(at, "}")) != len(raw):
        raise ValueError
    return spans


def _salvaged_spans(raw: str) -> dict[str, tuple[int, int] | None]:
    """Spans of the fields of broken JSON, each up to where the next key begins; none where `raw` has no keys."""
    keys = list(_KEY.finditer(raw)) if raw.lstrip().startswith("{") else []
    ends = [key.start() for key in keys[1:]] + [len(raw)]
    spans: dict[str, tuple[int, int] | None] = {}
    for key, end in zip(keys, ends[: len(keys)], strict=True):
        value = raw[key.end() : end].rstrip(_BLANK)
        value = value.removesuffix("}" if end == len(raw) else ",").rstrip(_BLANK)
        if not value.startswith('"'):
            spans.setdefault(key[1], None)
            continue
        start, end = key.end() + 1, key.end() + len(value)
        before = value[1:-1]
        escaped = (len(before) - len(before.rstrip("\\"))) % 2
        if len(value) > 1 and value.endswith('"') and not escaped:
            end -= 1
        spans.setdefault(key[1], (start, end))
    return spans


def _unescape(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPES.get(code, code)

    return _whole(_ESCAPE.sub(one, text))


def _whole(text: str) -> str:
    """Join pairs of surrogate escapes, and replace half a pair, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
