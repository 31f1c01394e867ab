"""PTX text to instructions: what Triton writes of it, for one kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.formats import FLOAT, UNSIGNED, Array, bits_of, is_type, numbers
from tests.emulator.memory import SHARED_BASE, Unsupported

if TYPE_CHECKING:
    from tests.emulator.warps import Warps

__all__ = [
    "Address",
    "Discard",
    "Immediate",
    "Instruction",
    "Module",
    "Operand",
    "Pair",
    "Register",
    "Symbol",
    "Vector",
]


@lru_cache(maxsize=4096)
def _constant(number: int, lanes: int, width: int) -> Array:
    """The same bits in every lane; not to be written to."""
    whole = np.full(lanes, number & ((1 << width) - 1), UNSIGNED[width])
    whole.flags.writeable = False
    return whole


class Operand:
    """What an instruction names; `bits` reads it for every lane."""

    def bits(self, warps: Warps, width: int) -> Array:
        raise Unsupported(f"not a value: {self}")

    def value(self, warps: Warps, kind: str) -> Array:
        """Read as numbers of a type."""
        return numbers(self.bits(warps, bits_of(kind)), kind)


@dataclass
class Register(Operand):
    name: str

    def bits(self, warps: Warps, width: int) -> Array:
        register = warps.registers[self.name]
        return register if register.dtype == UNSIGNED[width] else register.astype(UNSIGNED[width])


@dataclass
class Immediate(Operand):
    """An integer, or the bits of a float."""

    number: int

    def bits(self, warps: Warps, width: int) -> Array:
        return _constant(self.number if width > 1 else bool(self.number), warps.lanes, width)


@dataclass
class Decimal(Operand):
    """A float written as such."""

    number: float

    def value(self, warps: Warps, kind: str) -> Array:
        return np.full(warps.lanes, self.number, FLOAT[bits_of(kind)])


@dataclass
class Negated(Operand):
    predicate: Operand

    def bits(self, warps: Warps, width: int) -> Array:
        inverse: Array = ~self.predicate.bits(warps, 1)
        return inverse


@dataclass
class Special(Operand):
    name: str

    def bits(self, warps: Warps, width: int) -> Array:
        return np.broadcast_to(np.asarray(warps.special[self.name]), (warps.lanes,)).astype(UNSIGNED[width])


@dataclass
class Symbol(Operand):
    """The address of a variable, or a label."""

    name: str

    def bits(self, warps: Warps, width: int) -> Array:
        if self.name not in warps.module.symbols:
            raise Unsupported(f"address of {self.name}")
        return _constant(warps.module.symbols[self.name][1], warps.lanes, width)


@dataclass
class Vector(Operand):
    parts: list[Operand]

    def bits(self, warps: Warps, width: int) -> Array:
        each = width // len(self.parts)
        whole = np.zeros(warps.lanes, UNSIGNED[width])
        for i, part in enumerate(self.parts):
            whole |= part.bits(warps, each).astype(UNSIGNED[width]) << UNSIGNED[width](i * each)
        return whole


@dataclass
class Pair(Operand):
    """Two results: `first|second`."""

    first: Operand
    second: Operand


@dataclass
class Address(Operand):
    base: Operand
    offset: int

    def bits(self, warps: Warps, width: int) -> Array:
        base = self.base.bits(warps, width)
        return base + UNSIGNED[width](self.offset & ((1 << width) - 1)) if self.offset else base


@dataclass
class Discard(Operand):
    """`_`: nothing is kept."""


@dataclass
class Instruction:
    text: str
    op: str
    words: list[str]
    """The parts of its name behind the operation, types among them."""
    args: list[Operand]
    guard: str | None
    """The predicate that lets it run."""
    inverted: bool
    types: list[str] = field(init=False)
    count: int = 0
    """How often it ran."""

    def __post_init__(self) -> None:
        self.types = [word for word in self.words if is_type(word)]

    @property
    def name(self) -> str:
        return ".".join([self.op, *self.words])

    def one_of(self, *words: str) -> str:
        """The first of these words in the name."""
        for word in self.words:
            if word in words:
                return word
        raise Unsupported(f"unsupported: {self.text}")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    if "{" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return [*parts, part.strip()] if part.strip() else parts


_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])?)(?:\s*=\s*\{?([^}]*)\}?)?$"
)
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):|([^;]*);)")
"""A brace of a scope, a label, or a statement, in which braces hold vectors."""
_Scopes = list[dict[str, str]]


class Module:
    """One kernel of a PTX text: its parameters, registers, variables, instructions and labels."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", " ", text, flags=re.S))
        # Debug sections follow the kernel; these directives end without a semicolon.
        text = re.sub(r"^\s*\.(loc|file|version|target|address_size|pragma)\b[^\n]*$", "", text, flags=re.M)
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S)
        if not entry:
            raise Unsupported("no .entry in the PTX")
        self.params: list[tuple[str, int]] = []
        """Names and sizes in bytes."""
        for param in filter(str.strip, entry.group(2).split(",")):
            name = re.search(r"([\w$]+)(?:\[\d+\])?$", param.strip())
            kind = re.search(r"\.([busf]\d+)", param)
            assert name
            assert kind
            self.params.append((name.group(1), bits_of(kind.group(1)) // 8))
        self.registers: dict[str, int] = {}
        """Widths in bits."""
        self.of_width: dict[int, list[str]] = {}
        """Their names."""
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.symbols: dict[str, tuple[str, int]] = {}
        """Space and address of each variable."""
        self.shared = self.local = 0
        """Bytes of static shared memory, and of local memory of a thread."""
        self.constants: list[Array] = []
        for statement in text[: entry.start()].split(";"):
            self._variable(" ".join(statement.split()))
        self._body(text[entry.end() :])
        for register, width in self.registers.items():
            self.of_width.setdefault(width, []).append(register)

    def _variable(self, statement: str) -> None:
        found = _VARIABLE.search(statement)
        if not found:
            return
        space, _, kind, name, count, values = found.groups()
        each = bits_of(kind) // 8
        size = each * int(count[1:-1] or 0) if count else each
        if space == "shared":
            if size:
                self.shared = -(-self.shared // 16) * 16
            self.symbols[name] = space, SHARED_BASE + (self.shared if size else 0)
            self.shared += size
        elif space == "local":
            self.local = -(-self.local // 16) * 16
            self.symbols[name] = space, self.local
            self.local += size
        else:
            data = b"".join(
                (int(v, 0) & ((1 << 8 * each) - 1)).to_bytes(each, "little")
                for v in filter(str.strip, (values or "").split(","))
            )
            constant = np.frombuffer(data.ljust(size + 16, b"\0"), np.uint8).copy()
            self.constants.append(constant)
            self.symbols[name] = "global", constant.ctypes.data

    def _body(self, text: str) -> None:
        """Statements up to the kernel's closing brace; braces between them (inline assembly) are scopes of register names."""
        scopes: _Scopes = [{}]
        number = at = 0
        while found := _STATEMENT.match(text, at):
            at = found.end()
            brace, label, statement = found.groups()
            if brace == "{":
                scopes.append({})
                number += 1
            elif brace:
                scopes.pop()
                if not scopes:
                    return
            elif label:
                self.labels[label] = len(self.instructions)
            elif statement.startswith("."):
                self._declaration(" ".join(statement.split()), scopes, number)
            elif statement:
                self.instructions.append(self._instruction(" ".join(statement.split()), scopes))
        raise Unsupported("the kernel does not end")

    def _declaration(self, statement: str, scopes: _Scopes, number: int) -> None:
        found = re.match(r"\.reg\s*\.(\w+)\s+(.*)", statement)
        if not found:
            self._variable(statement)
            return
        width = bits_of(found.group(1))
        for name in _split(found.group(2)):
            if many := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name):
                self.registers |= {f"{many.group(1)}{i}": width for i in range(int(many.group(2)))}
            else:
                scopes[-1][name] = name if len(scopes) == 1 else f"{name}@{number}"
                self.registers[scopes[-1][name]] = width

    def _operand(self, text: str, scopes: _Scopes) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector([self._operand(part, scopes) for part in _split(text[1:-1])])
        if text.startswith("["):
            found = re.fullmatch(r"\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*", text[1:-1])
            if not found:
                raise Unsupported(f"address {text}")
            return Address(self._operand(found.group(1), scopes), int(found.group(2) or "0", 0))
        if text.startswith("!"):
            return Negated(self._operand(text[1:], scopes))
        if "|" in text:
            first, second = (self._operand(part, scopes) for part in text.split("|"))
            return Pair(first, second)
        name = self._resolved(text, scopes)
        if name in self.registers:
            return Register(name)
        if text == "_":
            return Discard()
        if text.startswith("%"):
            return Special(text[1:])
        if text[:2].lower() in ("0f", "0d") and len(text) in (10, 18):
            return Immediate(int(text[2:], 16))
        if re.match(r"-?\d", text):
            if "." in text or re.fullmatch(r"-?\d+e-?\d+", text):
                return Decimal(float(text))
            return Immediate(int(text.rstrip("U"), 0))
        return Symbol(text)

    @staticmethod
    def _resolved(name: str, scopes: _Scopes) -> str:
        if len(scopes) == 1:
            return name
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    def _instruction(self, text: str, scopes: _Scopes) -> Instruction:
        guard, inverted, rest = None, False, text
        if text.startswith("@"):
            predicate, rest = text[1:].split(None, 1)
            inverted, guard = predicate.startswith("!"), self._resolved(predicate.lstrip("!"), scopes)
        name, _, args = rest.partition(" ")
        op, *words = (word.split("::")[0] for word in name.split("."))  # shared::cta is shared
        return Instruction(text, op, words, [self._operand(a, scopes) for a in _split(args)], guard, inverted)


def parse_integer(operand: Operand, text: str) -> int:
    """A number that must be known when compiled."""
    if not isinstance(operand, Immediate):
        raise Unsupported(f"unsupported: {text}")
    return operand.number
