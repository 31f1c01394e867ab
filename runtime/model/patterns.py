"""Patterns of module names in a checkpoint's settings, matched in a time that no pattern can stretch.

A regular expression from a stranger can keep a backtracking matcher busy for years. This one follows all ways at once: for every
part of the pattern and every position of the name it computes once where the part can end, so that its work is bounded by the
product of their lengths. It knows what such lists are written in: literals, `.`, classes, escapes, groups, alternatives,
repeats, `^`, `$` and lookahead. Anything else (references, conditions, flags) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LONGEST, _LONGEST_NAME = 2000, 300
_MOST_REPEATS = 64
_DEEPEST = 20
_MOST_WORK = 10_000  # parts times positions of one name; what is written takes hundreds
_CLASSES = "dDwWsS"


@dataclass(frozen=True, eq=False)
class _Node:
    """A part of a pattern: `kind` char, any, start, end, both (sequence), either, repeat, ahead or not ahead."""

    kind: str
    parts: tuple[_Node, ...] = ()
    chars: re.Pattern[str] | None = None
    low: int = 0
    high: int | None = None


class Pattern:
    """A regular expression that is matched from the beginning of a name, as `re.match` does.

    Raises ValueError, made and in `match`, for what is refused. `work` counts what its matches took, about a microsecond each.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, at most {_LONGEST} are read")
        self._rest, self._at = pattern, 0
        self.work = 0
        self._root = self._either(0)
        if self._at < len(pattern):
            raise ValueError("its brackets are not balanced")

    def match(self, name: str) -> bool:
        """Whether the pattern matches a beginning of `name`."""
        if len(name) > _LONGEST_NAME:
            return False
        run = _Run(name)
        found = bool(run.ends(self._root, 0))
        self.work += len(run.found)
        return found

    # The grammar: alternatives of sequences of repeated atoms.

    def _peek(self) -> str:
        return self._rest[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._rest.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _either(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise ValueError("its groups are nested too deeply")
        parts = [self._sequence(depth)]
        while self._take("|"):
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else _Node("either", tuple(parts))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom(depth)))
        return _Node("both", tuple(parts))

    def _repeated(self, atom: _Node) -> _Node:
        bounds: tuple[int, int | None]
        if self._take("*"):
            bounds = 0, None
        elif self._take("+"):
            bounds = 1, None
        elif self._take("?"):
            bounds = 0, 1
        elif found := re.compile(r"\{(\d{1,4})(,?)(\d{0,4})\}").match(self._rest, self._at):
            self._at = found.end()
            low, comma, high = found.groups()
            bounds = int(low), int(high) if high else None if comma else int(low)
            if max(bounds[0], bounds[1] or 0) > _MOST_REPEATS:
                raise ValueError(f"it repeats a part more than {_MOST_REPEATS} times")
        else:
            return atom
        self._take("?")  # the shortest match first: no matter where only its existence is asked for
        if self._peek() in ("*", "+", "?") and self._peek():
            raise ValueError("it repeats a repeat")
        return _Node("repeat", (atom,), None, *bounds)

    def _atom(self, depth: int) -> _Node:
        if self._take("("):
            kind = ""
            if self._take("?"):
                for text, kind in (("=", "ahead"), ("!", "not ahead"), (":", "")):  # noqa: B007
                    if self._take(text):
                        break
                else:
                    raise ValueError("it has a group of a kind that is not supported")
            inner = self._either(depth + 1)
            if not self._take(")"):
                raise ValueError("its brackets are not balanced")
            return _Node(kind, (inner,)) if kind else inner
        for text, kind in ((".", "any"), ("^", "start"), ("$", "end")):
            if self._take(text):
                return _Node(kind)
        if self._peek() in ("*", "+", "?"):
            raise ValueError("it repeats nothing")
        if self._peek() == "[":
            found = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]").match(self._rest, self._at)
            if found is None:
                raise ValueError("its brackets are not balanced")
            return self._chars(found.group())
        if self._peek() == "\\":
            escaped = self._rest[self._at + 1 : self._at + 2]
            if not escaped or (escaped.isalnum() and escaped not in _CLASSES):
                raise ValueError(f"it has the escape \\{escaped}, which is not supported")
            return self._chars("\\" + escaped)
        return self._chars(self._peek(), literal=True)

    def _chars(self, text: str, literal: bool = False) -> _Node:
        self._at += len(text)
        try:
            return _Node("char", (), re.compile(re.escape(text) if literal else text))
        except re.error:
            raise ValueError(f"it has the class {text}, which makes no sense") from None


@dataclass
class _Run:
    """One name; where parts that begin at a position can end, found so far."""

    name: str
    found: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    def ends(self, node: _Node, start: int) -> frozenset[int]:
        key = (id(node), start)
        if key not in self.found:
            if len(self.found) >= _MOST_WORK:
                raise ValueError("it has too many repeats to be matched")
            self.found[key] = self._ends(node, start)
        return self.found[key]

    def _ends(self, node: _Node, start: int) -> frozenset[int]:
        here, none, kind = frozenset((start,)), frozenset[int](), node.kind
        if kind == "char":
            assert node.chars is not None
            return frozenset((start + 1,)) if node.chars.match(self.name[start : start + 1]) else none
        if kind == "any":
            return frozenset((start + 1,)) if start < len(self.name) else none
        if kind == "start":
            return here if start == 0 else none
        if kind == "end":
            return here if start == len(self.name) else none
        if kind == "either":
            return none.union(*(self.ends(part, start) for part in node.parts))
        if kind == "both":
            reached = here
            for part in node.parts:
                reached = none.union(*(self.ends(part, at) for at in reached))
            return reached
        if kind == "repeat":
            return self._repeat(node, start)
        return here if bool(self.ends(node.parts[0], start)) == (kind == "ahead") else none

    def _repeat(self, node: _Node, start: int) -> frozenset[int]:
        none, part = frozenset[int](), node.parts[0]
        reached = frozenset((start,))
        for _ in range(node.low):
            reached = none.union(*(self.ends(part, at) for at in reached))
        all_ends, new, count = set(reached), reached, node.low
        while new and (node.high is None or count < node.high):
            new = none.union(*(self.ends(part, at) for at in new)) - all_ends
            all_ends |= new
            count += 1
        return frozenset(all_ends)
