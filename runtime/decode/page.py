"""The model's answer to a page's fields, and the published rule for a degenerate page."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

FIELDS = ("header", "margin", "footer", "text")
_KEY = re.compile(r'(?<=[{,\s])"(header|margin|footer|text)"\s*:\s*')
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


def is_degenerate(raw: str, finish_reason: str | None) -> bool:
    """The offline rule of the published evaluation: cut by the cap, and the last 15 characters occur four times."""
    return finish_reason == "length" and len(raw) >= 15 and raw.count(raw[-15:]) >= 4


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    return _whole(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _salvage(raw: str) -> PageFields:
    if not raw.lstrip().startswith("{"):
        return PageFields(None, None, None, raw)
    keys = list(_KEY.finditer(raw))
    if not keys:
        return PageFields(None, None, None, raw)
    ends = [key.start() for key in keys[1:]] + [len(raw)]
    found: dict[str, str | None] = {}
    for key, end in zip(keys, ends, strict=True):
        value = raw[key.end() : end].strip()
        value = value.removesuffix("}" if end == len(raw) else ",").rstrip()
        if value.startswith('"'):
            value = value[1:]
            if value.endswith('"') and not value.endswith('\\"'):
                value = value[:-1]
            found.setdefault(key[1], _unescape(value))
        else:
            found.setdefault(key[1], None)
    return PageFields(*(found.get(name) for name in FIELDS))


def _unescape(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPES.get(code, code)

    return _whole(_ESCAPE.sub(one, text))


def _whole(text: str) -> str:
    """Join pairs of surrogate escapes, and replace half a pair, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
