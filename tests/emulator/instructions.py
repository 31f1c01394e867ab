"""What each PTX instruction does to the lanes that execute it: `EXECUTE`, by operation."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tests.emulator.formats import SIGNED, UNSIGNED, Array, bits_of, is_float, numbers, raw
from tests.emulator.memory import GlobalMemory, PtxError, Unsupported, Window
from tests.emulator.ptx import (
    Address,
    Discard,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
    parse_integer,
)

if TYPE_CHECKING:
    from tests.emulator.warps import Warps

__all__ = ["EXECUTE", "Branch", "Mask", "unsupported"]

Mask = Array | None
"""Lanes that take part; None: all."""
Branch = int | Literal["barrier", "end"] | None
"""Where the lanes go on; None: at the next instruction."""
_Execute = Callable[["Warps", Instruction, Mask], Branch]

EXECUTE: dict[str, _Execute] = {}
_LOW32 = np.uint64(0xFFFFFFFF)


def _executes(*ops: str) -> Callable[[_Execute], _Execute]:
    def remember(execute: _Execute) -> _Execute:
        EXECUTE.update(dict.fromkeys(ops, execute))
        return execute

    return remember


def _chosen(array: Array, mask: Mask) -> Array:
    return array if mask is None else array[mask]


def _parts(operand: Operand) -> list[Operand]:
    return operand.parts if isinstance(operand, Vector) else [operand]


def unsupported(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    raise Unsupported(f"unsupported: {ins.text}")


# Control


@_executes("bra")
def _branch(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    target = ins.args[0]
    assert isinstance(target, Symbol)
    return warps.module.labels[target.name]


@_executes("ret", "exit")
def _end(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    return "end"


@_executes("bar", "barrier")
def _barrier(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    if ins.words[0] == "warp":
        return None
    if mask is not None and (mask != warps.alive).any():
        raise PtxError(f"barrier in divergent code: {ins.text}")
    return "barrier"


@_executes("trap")
def _trap(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    raise PtxError("a device assertion failed")


@_executes("membar", "fence", "prefetch")
def _nothing(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    return None


# Memory


@_executes("mov")
def _move(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    warps.put(ins.args[0], ins.args[1].bits(warps, bits_of(ins.types[-1])), mask)
    return None


@_executes("cvta")
def _generic_address(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    warps.put(ins.args[0], ins.args[-1].bits(warps, 64), mask)
    return None


@_executes("createpolicy")
def _policy(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    warps.put(ins.args[0], np.zeros(warps.lanes, np.uint64), mask)
    return None


def _memory(
    warps: Warps, ins: Instruction, address: Operand, mask: Mask
) -> tuple[GlobalMemory | Window, Array]:
    """The memory that an instruction goes to, and the addresses there of the lanes in `mask`."""
    assert isinstance(address, Address)
    at = address.bits(warps, 64)
    symbol = address.base.name if isinstance(address.base, Symbol) else ""
    if "shared" in ins.words or warps.module.symbols.get(symbol, ("",))[0] == "shared":
        return warps.block.shared, _chosen(at & _LOW32, mask)
    if "local" in ins.words:
        lane = np.arange(warps.lanes, dtype=np.uint64)
        return warps.local, _chosen(at + lane * np.uint64(warps.module.local), mask)
    return warps.block.global_memory, _chosen(at, mask)


def _vector_width(ins: Instruction) -> int:
    return next((int(word[1:]) for word in ins.words if word in ("v2", "v4", "v8")), 1)


@_executes("ld")
def _load(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind = ins.types[-1]
    size = bits_of(kind) // 8
    target, address = ins.args
    if "param" in ins.words:
        assert isinstance(address, Address)
        assert isinstance(address.base, Symbol)
        value = warps.block.params[address.base.name] >> 8 * address.offset & ((1 << 8 * size) - 1)
        warps.put(target, np.full(warps.lanes, value, UNSIGNED[8 * size]), mask)
        return None
    memory, at = _memory(warps, ins, address, mask)
    data = memory.load(at, size * _vector_width(ins), ins.text)
    for i, part in enumerate(_parts(target)):
        if isinstance(part, Discard):
            continue
        assert isinstance(part, Register)
        register = warps.registers[part.name]
        bits = np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(UNSIGNED[8 * size])[:, 0]
        wide = register.itemsize * 8
        if kind[0] == "s" and wide > 8 * size:
            bits = bits.view(SIGNED[8 * size]).astype(SIGNED[wide]).view(UNSIGNED[wide])
        register[slice(None) if mask is None else mask] = bits
    return None


@_executes("st")
def _store(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    size = bits_of(ins.types[-1]) // 8
    memory, at = _memory(warps, ins, ins.args[0], mask)
    columns = [
        np.ascontiguousarray(_chosen(part.bits(warps, 8 * size), mask)).view(np.uint8).reshape(-1, size)
        for part in _parts(ins.args[1])
    ]
    memory.store(at, np.concatenate(columns, 1), ins.text)
    return None


@_executes("cp")
def _copy_async(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    """The source is read at once, the destination holds poison until its group is waited for."""
    if ins.words[:2] == ["async", "commit_group"]:
        warps.groups.append(warps.pending)
        warps.pending = []
    elif ins.words[:2] == ["async", "wait_group"]:
        warps.land(parse_integer(ins.args[0], ins.text))
    elif ins.words[:2] == ["async", "wait_all"]:
        warps.groups.append(warps.pending)
        warps.pending = []
        warps.land(0)
    elif ins.words[:1] == ["async"] and "bulk" not in ins.words:
        size = parse_integer(ins.args[2], ins.text)
        to = _chosen(ins.args[0].bits(warps, 64) & _LOW32, mask)
        source = _chosen(ins.args[1].bits(warps, 64), mask)
        sizes = np.full(len(source), size, np.uint32)
        if len(ins.args) > 3 and not isinstance(ins.args[3], Discard):
            sizes = _chosen(ins.args[3].bits(warps, 32), mask)
        data = np.zeros((len(source), size), np.uint8)  # what a shorter source leaves is zero
        for given in set(sizes.tolist()) - {0}:
            of = sizes == given
            data[of, :given] = warps.block.global_memory.load(source[of], given, ins.text)
        warps.block.shared.poison(to, size, ins.text)
        warps.pending.append((to, data))
    else:
        raise Unsupported(f"unsupported: {ins.text}")
    return None


@_executes("ldmatrix")
def _load_matrix(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    if mask is not None or "b16" not in ins.words:
        raise Unsupported(f"unsupported: {ins.text}")
    at = (ins.args[1].bits(warps, 64) & _LOW32).reshape(-1, 32)
    for i, target in enumerate(_parts(ins.args[0])):
        rows = warps.block.shared.load(at[:, 8 * i : 8 * i + 8].reshape(-1), 16, ins.text)
        matrices = rows.view(np.uint16).reshape(-1, 8, 8)
        if "trans" in ins.words:
            matrices = matrices.transpose(0, 2, 1)
        warps.put(target, np.ascontiguousarray(matrices).reshape(-1, 32, 2).view(np.uint32).reshape(-1), None)
    return None


@_executes("atom", "red")
def _atomic(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind = ins.types[-1]
    size = bits_of(kind) // 8
    address, operand = ins.args[-2:]
    memory, at = _memory(warps, ins, address, None)
    name = ins.one_of("add", "min", "max", "and", "or", "xor", "exch")
    combine: Callable[[Array, Array], Array] = {
        "add": np.add, "min": np.minimum, "max": np.maximum, **_BITWISE, "exch": lambda old, new: new,
    }[name]  # fmt: skip
    value = operand.value(warps, kind)
    before = np.zeros_like(value)
    for i in range(warps.lanes) if mask is None else np.nonzero(mask)[0]:
        lane = slice(i, i + 1)
        old = numbers(memory.load(at[lane], size, ins.text).view(UNSIGNED[8 * size])[:, 0], kind)
        new = raw(np.asarray(combine(old, value[..., lane])), kind)
        memory.store(at[lane], np.ascontiguousarray(new).view(np.uint8).reshape(1, size), ins.text)
        before[..., lane] = old
    if ins.op == "atom":
        warps.put(ins.args[0], raw(before, kind), mask)
    return None


# Comparison, selection, conversion

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_BITWISE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ROUND: dict[str, Callable[[Array], Array]] = {
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
    "rni": np.rint,
}


@_executes("setp")
def _compare(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind, how = ins.types[-1], ins.words[0]
    a, b = (arg.value(warps, kind) for arg in ins.args[1:3])
    if is_float(kind):
        nan = np.isnan(a) | np.isnan(b)
        if how in ("num", "nan"):
            result = nan if how == "nan" else ~nan
        elif how in _COMPARE:
            result = _COMPARE[how](a, b) & ~nan
        else:
            result = _COMPARE[how[:-1]](a, b) | nan  # equ, ltu, ...: true of unordered operands
    else:
        result = _COMPARE[how](a, b)
    if ins.words[1] in _BITWISE:
        result = _BITWISE[ins.words[1]](result, ins.args[3].bits(warps, 1))
    if isinstance(ins.args[0], Pair):
        warps.put(ins.args[0].first, result, mask)
        warps.put(ins.args[0].second, ~result, mask)
    else:
        warps.put(ins.args[0], result, mask)
    return None


@_executes("selp")
def _select(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    width = bits_of(ins.types[-1])
    yes, no, which = (
        ins.args[1].bits(warps, width),
        ins.args[2].bits(warps, width),
        ins.args[3].bits(warps, 1),
    )
    warps.put(ins.args[0], np.where(which, yes, no), mask)
    return None


def _clipped(value: Array, kind: str) -> Array:
    width = bits_of(kind)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    return np.clip(value, low, high)


@_executes("cvt")
def _convert(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    to, of = ins.types[-2:]
    if to.endswith("x2") and not of.endswith("x2"):
        # The first source is the upper half.
        value = np.stack([ins.args[2].value(warps, of), ins.args[1].value(warps, of)]).astype(np.float32)
        warps.put(ins.args[0], raw(np.maximum(value, 0) if "relu" in ins.words else value, to), mask)
        return None
    value = ins.args[1].value(warps, of)
    rounding = next((_ROUND[word] for word in ins.words if word in _ROUND), None)
    if is_float(to):
        if rounding and is_float(of):
            value = rounding(value)
        if "sat" in ins.words:
            value = np.clip(value, 0, 1)
        if to == "tf32":
            bits = (raw(value, "f32") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        else:
            bits = raw(value if is_float(of) else value.astype(np.float64), to)
    elif is_float(of):
        whole = (rounding or np.trunc)(value.astype(np.float64))
        whole = np.where(np.isnan(whole), 0, _clipped(whole, to))
        width = bits_of(to)
        if width == 64:  # the largest are no float64
            bits = np.array([int(v) & ((1 << width) - 1) for v in whole], UNSIGNED[width])
        else:
            bits = whole.astype(np.int64).astype(UNSIGNED[width])
    else:
        if "sat" in ins.words:
            value = _clipped(value.astype(np.int64), to)
        target = ins.args[0]
        assert isinstance(target, Register)
        wide = warps.registers[target.name].itemsize * 8  # a narrow result is extended
        kinds = SIGNED if to[0] == "s" else UNSIGNED
        bits = value.astype(kinds[bits_of(to)]).astype(kinds[wide]).view(UNSIGNED[wide])
    warps.put(ins.args[0], bits, mask)
    return None


# Bits


@_executes("and", "or", "xor", "not")
def _bitwise(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    operands = [arg.bits(warps, bits_of(ins.types[-1])) for arg in ins.args[1:]]
    warps.put(ins.args[0], ~operands[0] if ins.op == "not" else _BITWISE[ins.op](*operands), mask)
    return None


@_executes("lop3")
def _table_of_three(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    a, b, c = (arg.bits(warps, 32) for arg in ins.args[1:4])
    table = parse_integer(ins.args[4], ins.text)
    out = np.zeros(warps.lanes, np.uint32)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    warps.put(ins.args[0], out, mask)
    return None


@_executes("shl", "shr")
def _shift(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind = ins.types[-1]
    width = bits_of(kind)
    bits, count = ins.args[1].bits(warps, width), ins.args[2].bits(warps, 32)
    by = np.minimum(count, width - 1).astype(UNSIGNED[width])
    if kind[0] == "s":
        out = (bits.view(SIGNED[width]) >> by.view(SIGNED[width])).view(UNSIGNED[width])
    else:
        out = np.where(count >= width, UNSIGNED[width](0), bits << by if ins.op == "shl" else bits >> by)
    warps.put(ins.args[0], out, mask)
    return None


def _pair_of_words(warps: Warps, ins: Instruction) -> Array:
    low, high = (arg.bits(warps, 32).astype(np.uint64) for arg in ins.args[1:3])
    return low | high << np.uint64(32)


@_executes("shf")
def _funnel_shift(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    count = ins.args[3].bits(warps, 32).astype(np.uint64)
    count = np.minimum(count, np.uint64(32)) if "clamp" in ins.words else count & np.uint64(31)
    pair = _pair_of_words(warps, ins)
    out = (pair << count) >> np.uint64(32) if "l" in ins.words else pair >> count
    warps.put(ins.args[0], out.astype(np.uint32), mask)
    return None


@_executes("prmt")
def _permute_bytes(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    if ins.words != ["b32"]:
        raise Unsupported(f"unsupported: {ins.text}")
    if isinstance(ins.args[3], Immediate) and not ins.args[3].number & 0x8888:
        pair = _pair_of_words(warps, ins).view(np.uint8).reshape(-1, 8)
        chosen = [ins.args[3].number >> 4 * i & 7 for i in range(4)]
        warps.put(ins.args[0], pair[:, chosen].reshape(-1).view(np.uint32), mask)
        return None
    pair, selector = _pair_of_words(warps, ins), ins.args[3].bits(warps, 32).astype(np.uint64)
    out = np.zeros(warps.lanes, np.uint64)
    for i in range(4):
        which = selector >> np.uint64(4 * i)
        byte = pair >> ((which & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(which & np.uint64(8), sign, byte) << np.uint64(8 * i)
    warps.put(ins.args[0], out.astype(np.uint32), mask)
    return None


@_executes("bfe", "bfi")
def _bit_field(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind = ins.types[-1]
    width = bits_of(kind)
    everything = (1 << width) - 1
    operands = [
        arg.bits(warps, width if i < len(ins.args) - 3 else 32).tolist() for i, arg in enumerate(ins.args[1:])
    ]
    out = []
    for *values, first, count in zip(*operands, strict=True):
        first, count = first & 255, min(count & 255, width)
        field = (1 << count) - 1
        if ins.op == "bfi":
            out.append((values[1] & ~(field << first) | (values[0] & field) << first) & everything)
            continue
        found = values[0] >> first & field if first < width else 0
        if kind[0] == "s" and count and values[0] >> min(first + count - 1, width - 1) & 1:
            found |= everything & ~field
        out.append(found)
    warps.put(ins.args[0], np.array(out, UNSIGNED[width]), mask)
    return None


@_executes("popc", "clz", "brev", "bfind")
def _count_bits(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    width = bits_of(ins.types[-1])
    count: Callable[[int], int] = {
        "popc": lambda v: v.bit_count(),
        "clz": lambda v: width - v.bit_length(),
        "brev": lambda v: int(f"{v:0{width}b}"[::-1], 2),
        "bfind": lambda v: (v.bit_length() - 1) & 0xFFFFFFFF,
    }[ins.op]
    found = [count(v) for v in ins.args[1].bits(warps, width).tolist()]
    warps.put(ins.args[0], np.array(found, UNSIGNED[width if ins.op == "brev" else 32]), mask)
    return None


# Arithmetic

_ARITHMETIC: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _float_arithmetic(ins: Instruction, kind: str, v: list[Array]) -> Array:
    """In float64 where one rounding is wanted of two operations."""
    if ins.op in ("fma", "mad"):
        return v[0].astype(np.float64) * v[1].astype(np.float64) + v[2]
    if ins.op in _ARITHMETIC:
        if kind in ("f32", "f64"):
            return _ARITHMETIC[ins.op](*v)
        return _ARITHMETIC[ins.op](*(a.astype(np.float64) for a in v))
    if ins.op == "div":
        return v[0] / v[1]
    if ins.op in ("min", "max"):
        out = v[0]
        for a in v[1:]:
            both = (np.fmin if ins.op == "min" else np.fmax)(out, a)
            out = (
                np.where(np.isnan(out) | np.isnan(a), np.float32(np.nan), both)
                if "NaN" in ins.words
                else both
            )
        return out
    if ins.op == "neg":
        return -v[0]
    if ins.op == "abs":
        return np.abs(v[0])
    if ins.op == "copysign":
        return np.copysign(v[1], v[0])
    raise Unsupported(f"unsupported: {ins.text}")


def _wide_product(ins: Instruction, kind: str, v: list[Array]) -> Array:
    """Bits of a whole product of two numbers, or of its upper half."""
    width = bits_of(kind)
    if width == 64:
        high = [int(a) * int(b) >> 64 & (2**64 - 1) for a, b in zip(v[0], v[1], strict=True)]
        return np.array(high, np.uint64)
    kinds = SIGNED if kind[0] == "s" else UNSIGNED
    product = v[0].astype(kinds[2 * width]) * v[1].astype(kinds[2 * width])
    if "wide" in ins.words:
        return product.view(UNSIGNED[2 * width])
    return (product >> kinds[2 * width](width)).astype(kinds[width]).view(UNSIGNED[width])


def _divided(a: Array, b: Array, kind: str) -> tuple[Array, Array]:
    """Quotient towards zero, and remainder."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    if kind[0] == "s":
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(quotient.dtype)
    return quotient, a - quotient * b


@_executes("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "copysign")
def _arithmetic(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    kind = ins.types[-1]
    if is_float(kind):
        out = _float_arithmetic(ins, kind, [arg.value(warps, kind) for arg in ins.args[1:]])
        if "sat" in ins.words:
            out = np.clip(out, 0, 1)
        # float64 goes to bits with one rounding
        warps.put(ins.args[0], raw(out, kind), mask)
        return None
    if kind.endswith("x2"):
        raise Unsupported(f"unsupported: {ins.text}")
    v = [arg.value(warps, kind) for arg in ins.args[1:3]]
    if "wide" in ins.words or "hi" in ins.words:
        bits = _wide_product(ins, kind, v)
        if ins.op == "mad":
            bits = bits + ins.args[3].bits(warps, bits.itemsize * 8)
        warps.put(ins.args[0], bits, mask)
        return None
    if ins.op == "mad":
        out = v[0] * v[1] + ins.args[3].value(warps, kind)
    elif ins.op in _ARITHMETIC:
        out = _ARITHMETIC[ins.op](*v)
    elif ins.op in ("min", "max"):
        out = (np.minimum if ins.op == "min" else np.maximum)(v[0], v[1])
    elif ins.op in ("neg", "abs"):
        out = -v[0] if ins.op == "neg" else np.abs(v[0])
    elif ins.op in ("div", "rem"):
        out = _divided(v[0], v[1], kind)[ins.op == "rem"]
    else:
        raise Unsupported(f"unsupported: {ins.text}")
    warps.put(ins.args[0], raw(out, kind), mask)
    return None


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt, "rsqrt": lambda v: 1 / np.sqrt(v), "rcp": lambda v: 1 / v, "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@_executes(*_FUNCTIONS)
def _function(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    """Exact, but for the last rounding; a GPU's approximations are not."""
    kind = ins.types[-1]
    out = _FUNCTIONS[ins.op](ins.args[1].value(warps, kind).astype(np.float64))
    if "ftz" in ins.words:
        out = np.where(np.abs(out) < 2.0**-126, 0.0, out)
    warps.put(ins.args[0], raw(out, kind), mask)
    return None


# Between lanes


@_executes("shfl")
def _shuffle(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    value = ins.args[1].bits(warps, 32).reshape(-1, 32)
    by, control = (arg.bits(warps, 32).astype(np.int64) for arg in ins.args[2:4])
    lane, segment, clamp, by = warps.lane, control >> 8 & 31, control & 31, by & 31
    lowest = lane & segment
    limit = lowest | (clamp & ~segment)
    mode = ins.one_of("bfly", "up", "down", "idx")
    source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": lowest | (by & ~segment)}[mode]
    inside = source >= limit if mode == "up" else source <= limit
    source = np.where(inside, source, lane)
    warp = np.arange(warps.lanes) // 32
    if mask is not None and (mask & ~mask.reshape(-1, 32)[warp, source]).any():
        raise PtxError(f"reads a lane that does not take part: {ins.text}")
    warps.put(ins.args[0], value[warp, source], mask)
    if isinstance(ins.args[0], Pair):
        warps.put(ins.args[0].second, inside, mask)
    return None


@_executes("vote", "redux")
def _collect(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    there = np.ones((warps.lanes // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
    if ins.op == "redux":
        combine: Callable[[Array], Any] = {
            "add": np.sum, "min": np.min, "max": np.max, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
            "xor": np.bitwise_xor.reduce,
        }[ins.one_of("add", "min", "max", "and", "or", "xor")]  # fmt: skip
        value = ins.args[1].value(warps, ins.types[-1]).reshape(-1, 32)
        found = [int(combine(v[t])) & 0xFFFFFFFF if t.any() else 0 for v, t in zip(value, there, strict=True)]
        warps.put(ins.args[0], np.repeat(np.array(found, np.uint32), 32), mask)
        return None
    vote = ins.args[1].bits(warps, 1).reshape(-1, 32) & there
    if "ballot" in ins.words:
        ballots = (vote * (1 << np.arange(32))).sum(1).astype(np.uint32)
        warps.put(ins.args[0], np.repeat(ballots, 32), mask)
    else:
        result = vote.any(1) if ins.one_of("any", "all") == "any" else (vote | ~there).all(1)
        warps.put(ins.args[0], np.repeat(result, 32), mask)
    return None


@lru_cache
def _fragments(depth: int, each: int) -> tuple[Array, Array, Array]:
    """Where the elements of A `[16, depth]`, B `[depth, 8]` and of the registers of D lie.

    A's and B's in a warp's registers, counted [register, lane, of a register's `each` numbers]; D's in its `[16, 8]`.
    """
    row, column, of = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4, np.arange(each)
    left, right = np.zeros((16, depth), np.int64), np.zeros((depth, 8), np.int64)
    for i in range(16 * depth // (32 * each)):
        at = np.arange(i * 32 * each, (i + 1) * 32 * each).reshape(32, each)
        left[row + 8 * (i % 2), column * each + of + 4 * each * (i // 2)] = at
    for i in range(8 * depth // (32 * each)):
        at = np.arange(i * 32 * each, (i + 1) * 32 * each).reshape(32, each)
        right[column * each + of + 4 * each * i, row] = at
    result = [(row + 8 * (i // 2)) * 8 + column * 2 + i % 2 for i in range(4)]
    return left, right, np.concatenate(result).reshape(-1)


@_executes("mma")
def _matrix_product(warps: Warps, ins: Instruction, mask: Mask) -> Branch:
    """`mma.sync.m16n8k*`, row by column; summed in float64 and rounded once, or exact in integers."""
    shape = re.search(r"m16n8k(\d+)\.row\.col", ins.text)
    if mask is not None or shape is None:
        raise Unsupported(f"unsupported or in divergent code: {ins.text}")
    depth = int(shape.group(1))
    result_type, a_type, b_type, c_type = ins.types[-4:]
    d, a, b, c = (_parts(arg) for arg in ins.args)
    each = 32 // bits_of(a_type)
    if len(a) * each * 32 != 16 * depth or len(b) * each * 32 != 8 * depth or "f16" in (result_type, c_type):
        raise Unsupported(f"unsupported: {ins.text}")
    left_at, right_at, result_at = _fragments(depth, each)
    count = warps.lanes // 32

    def matrices(registers: list[Operand], kind: str, at: Array) -> Array:
        """`[warps, *at.shape]`."""
        bits = np.stack([register.bits(warps, 32).reshape(count, 32) for register in registers], 1)
        found = numbers(bits.view(UNSIGNED[32 // each]), kind).astype(np.float64)
        return found.reshape(count, -1)[:, at]

    product = matrices(a, a_type, left_at) @ matrices(b, b_type, right_at)
    parts = product.reshape(count, 128)[:, result_at].reshape(count, 4, 32)
    for i in range(4):
        total = parts[:, i].reshape(-1) + c[i].value(warps, c_type)
        warps.put(d[i], raw(total, result_type), None)
    return None
