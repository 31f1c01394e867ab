"""The native functions called wrongly: a ValueError or TypeError, nothing written, no byte touched that is not theirs.

Arguments are DLPack capsules made by hand over memory between two pages that cannot be read or written, so that every
field can lie and every step over an end is a crash, whatever instruction makes it. An op that is missing from CASES fails
`test_every_function_that_takes_arrays_is_here`; a new one needs a function that makes a right call of it.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import inf, nan, prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pagemill._native as _native

HUGE = [-(2**63), -1, 2**31, 2**40, 2**62, 2**63 - 1]
WRONG_INTS = (*HUGE, 2**64, 0.5)
NOT_NUMBERS = ("x", None, 1j, [1])
CODES = {
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "int8": (0, 8),
    "uint8": (1, 8),
    "int32": (0, 32),
    "int64": (0, 64),
}
OTHERS = [(2, 16), (2, 64), (0, 16), (1, 32), (1, 64), (5, 64), (6, 8), (9, 250)]
STORED = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}


@dataclass(frozen=True)
class Arr:
    """An array argument of a right call, and what it is free to be."""

    values: np.ndarray
    dtype: str
    rows: bool = False  # only the last dimension has to be dense
    written: bool = False
    loose: tuple[int, ...] = ()  # dimensions that no other argument fixes
    also: tuple[str, ...] = ()  # further dtypes
    optional: bool = False
    bad: tuple[tuple[tuple[int, ...], int], ...] = ()  # (index, value) that must be refused


@dataclass(frozen=True)
class Number:
    """A scalar argument, other values that must be refused, and odd ones that need not be."""

    value: float
    bad: tuple[Any, ...] = ()
    odd: tuple[Any, ...] = ()


Call = dict[str, Arr | Number]
Draw = Callable[[st.SearchStrategy[Any]], Any]


# --- memory ---------------------------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE
ROOM = 16 * PAGE


class Memory:
    """ROOM bytes between two pages that must not be touched."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, ROOM + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + PAGE
        for page in (self.address - PAGE, self.address + ROOM):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
        self.bytes = np.frombuffer(self.map, np.uint8, ROOM, PAGE)

    def view(self, address: int, like: np.ndarray, strides: Sequence[int]) -> np.ndarray:
        """The array of the dtype and shape of `like` that stands at `address`; strides are in elements."""
        steps = [stride * like.itemsize for stride in strides]
        return np.ndarray(like.shape, like.dtype, self.map, address - self.address + PAGE, steps)


MEMORY = [Memory() for _ in range(9)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


@dataclass
class Claim:
    """What a capsule says of its memory."""

    address: int
    shape: list[int]
    strides: list[int] | None
    type: tuple[int, int]
    lanes: int = 1
    device: int = 1
    ndim: int | None = None
    byte_offset: int = 0
    no_shape: bool = False
    name: bytes | None = b"dltensor"
    version: int | None = None
    flags: int = 0
    kept: list[Any] = field(default_factory=list)

    def capsule(self) -> Any:
        shape = (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        strides = (ctypes.c_int64 * max(1, len(self.shape)))(*(self.strides or []))
        tensor = Tensor(
            self.address,
            (self.device, 0),
            len(self.shape) if self.ndim is None else self.ndim,
            *self.type,
            self.lanes,
            0 if self.no_shape else ctypes.addressof(shape),
            ctypes.addressof(strides) if self.strides is not None else 0,
            self.byte_offset,
        )
        name, held = self.name, tensor
        if self.version is not None:
            held, name = Versioned((self.version, 0), 0, 0, self.flags, tensor), b"dltensor_versioned"
        self.kept = [shape, strides, held, name]
        return new_capsule(ctypes.addressof(held), name, None)


def row_major(shape: Sequence[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def lay_out(draw: Draw, memory: Memory, arr: Arr, *, strided: bool) -> tuple[Claim, list[int]]:
    """Put the values down, against the guard before or the one behind; give the claim and true strides."""
    shape, dims = arr.values.shape, arr.values.ndim
    strides = row_major(shape)
    if strided and arr.rows and dims > 1:
        strides[-1], step = 1, shape[-1]
        for i in range(dims - 2, -1, -1):
            strides[i] = step + draw(st.integers(0, 3))
            step = strides[i] * shape[i]
    low, high = 0, 0 if arr.values.size else -1
    if strided and arr.rows and arr.values.size and dims > 1 and draw(st.booleans()):
        strides[0] = -strides[0]
    for size, stride in zip(shape, strides, strict=True):
        low += min(0, stride * (size - 1))
        high += max(0, stride * (size - 1))
    at_end = draw(st.booleans())
    first = ROOM - (high + 1 - low) * arr.values.itemsize if at_end else 0
    assert 0 <= first <= ROOM
    memory.bytes[:] = 0xA5
    address = memory.address + first - low * arr.values.itemsize
    if arr.values.size:
        memory.view(address, arr.values, strides)[...] = arr.values
    free = not strided or strides != row_major(shape) or draw(st.booleans())
    return Claim(address, list(shape), list(strides) if free else None, CODES[arr.dtype]), strides


# --- right calls ----------------------------------------------------------------------------------------------


def floats(dtype: str, *shape: int, **free: Any) -> Arr:
    values = np.random.default_rng(prod(shape)).standard_normal(shape).astype(np.float32)
    if dtype == "bfloat16":
        return Arr((values.view(np.uint32) >> 16).astype(np.uint16), dtype, **free)
    return Arr(values, dtype, **free)


def ints(dtype: str, values: Sequence[Any] | np.ndarray, shape: Sequence[int], **free: Any) -> Arr:
    return Arr(np.array(values, STORED[dtype]).reshape(shape), dtype, **free)


def out(dtype: str, *shape: int, **free: Any) -> Arr:
    return Arr(np.full(shape, 0x33, STORED[dtype]), dtype, written=True, **free)


def dtype_of(draw: Draw) -> str:
    return draw(st.sampled_from(["float32", "bfloat16"]))


def size(draw: Draw, *sizes: int) -> int:
    return draw(st.sampled_from(sizes))


def panels_shape(dtype: str, n: int, k: int) -> tuple[int, ...]:
    count = -(-n // 32)
    return (count, k, 32) if dtype == "float32" else (count, -(-k // 2), 32, 2)


def pack_panels(draw: Draw) -> Call:
    dtype, n, k = dtype_of(draw), size(draw, 1, 31, 32, 65), size(draw, 1, 2, 7)
    first = size(draw, 0, 32)
    shape = panels_shape(dtype, first + n, k)
    wrong = (-32, 1, 33, shape[0] * 32, 2**62, 2**63 - 32, *WRONG_INTS)
    return {
        # a bfloat16 panel holds pairs of columns
        "weight": floats(dtype, n, k, rows=True, loose=(0, 1)),
        "first": Number(first, wrong),
        "panels": replace(out(dtype, *shape), loose=(0,)),
    }


def result(draw: Draw, dtype: str, m: int, n: int) -> Call:
    """The last arguments of a linear layer: a bias, and where the result goes, which may be a gated half or a sum."""
    add, gated = draw(st.booleans()), draw(st.booleans())
    width = n // 2 if gated else n
    if add:
        target = floats(dtype, m, width, rows=True, written=True, loose=(1,))
    else:
        target = out(dtype, m, width, loose=(1,), also=("float32",))
    bias = floats("float32", -(-n // 32) * 32, optional=True)
    return {"bias": bias, "out": target, "add": Number(add), "gated": Number(gated)}


def linear(draw: Draw) -> Call:
    dtype, m = dtype_of(draw), size(draw, 0, 1, 2, 5, 13)
    n, k = size(draw, 2, 30, 32, 66), size(draw, 1, 2, 7, 33)
    return {
        "x": floats(dtype, m, k, rows=True),
        "in_features": Number(k, (0, k + 2, k - 2, *WRONG_INTS)),
        "panels": floats(dtype, *panels_shape(dtype, n, k)),
        **result(draw, dtype, m, n),
    }


def quantized(draw: Draw, n: int, k: int) -> tuple[Arr, Arr, Arr | None, int]:
    """Panels, scales, zeros and group of an int4 matrix, or of an int8 one, which has no zeros."""
    count, group = -(-n // 32), size(draw, 32, 64, 128)
    groups = -(-k // group)
    nibbles = draw(st.booleans())
    panels = ints(
        "uint8", np.arange(count * -(-k // (8 if nibbles else 4)) * 128) * 37 % 256, (count, -1, 32, 4)
    )
    if nibbles:
        zeros = ints("uint8", np.arange(count * groups * 32) % 16, (count, groups, 32))
        return panels, floats("float32", count, groups, 32), zeros, group
    return panels, floats("float32", count, 1, 32), None, group


def qlinear(draw: Draw) -> Call:
    dtype, m = dtype_of(draw), size(draw, 0, 1, 2, 5, 13)
    n, k = size(draw, 2, 30, 32, 66), size(draw, 1, 2, 7, 33, 70)
    panels, scales, zeros, group = quantized(draw, n, k)
    tail = result(draw, dtype, m, n)
    wide = dtype == "float32" and tail["add"] == Number(False)  # a float32 result serves x of either dtype
    return {
        "x": floats(dtype, m, k, rows=True, also=("bfloat16",) if wide else ()),
        "in_features": Number(k, (0, k + 8, 2**16 + 1, *WRONG_INTS)),
        "panels": panels,
        "scales": scales,
        "zeros": Number(None) if zeros is None else zeros,
        "group": Number(group, (0, 1, 33, *WRONG_INTS) if zeros is not None else ()),
        **tail,
    }


def pack_quantized(draw: Draw) -> Call:
    n, k, first = size(draw, 1, 31, 32, 65), size(draw, 1, 2, 7, 33, 70), size(draw, 0, 32)
    panels, scales, zeros, group = quantized(draw, first + n, k)
    wrong = (-32, 1, 33, panels.values.shape[0] * 32, 2**62, 2**63 - 32, *WRONG_INTS)
    return {
        "weight": floats(dtype_of(draw), n, k, rows=True, loose=(0, 1), also=("float32", "bfloat16")),
        "first": Number(first, wrong),
        "group": Number(group, (0, 1, 33, *WRONG_INTS) if zeros is not None else ()),
        "panels": replace(panels, written=True),
        "scales": replace(scales, written=True),
        "zeros": Number(None) if zeros is None else replace(zeros, written=True),
    }


def merge(draw: Draw, dtype: str, t: int, k: int) -> Call:
    """Image embeddings among the tokens', or none."""
    if draw(st.booleans()):
        return {"image_index": Number(None), "images": Number(None)}
    count = size(draw, 1, 3)
    bad = tuple(((0,), value) for value in (-2, count, 2**31 - 1, -(2**31)) if t)
    return {
        "image_index": ints("int32", np.arange(t) % (count + 1) - 1, [t], bad=bad),
        "images": floats(dtype, count, k, rows=True, loose=(0,)),
    }


def embed_int8(draw: Draw) -> Call:
    dtype = dtype_of(draw)
    t, n, k = size(draw, 0, 1, 5), size(draw, 1, 33, 64), size(draw, 1, 2, 7)
    count = -(-n // 32)
    bad = tuple(((0,), value) for value in (-1, n, n + 31, 2**63 - 1, -(2**63)) if t)
    return {
        "ids": ints("int64", np.arange(t) * 7 % n, [t], bad=bad),
        "panels": ints("uint8", np.arange(count * -(-k // 4) * 128) % 256, (count, -1, 32, 4)),
        "scales": floats("float32", count, 1, 32),
        "n": Number(n, (-1, n + 32, *WRONG_INTS)),
        **(merged := merge(draw, dtype, t, k)),
        "out": out(dtype, t, k, loose=(1,), also=("float32", "bfloat16"))
        if merged["images"] == Number(None)
        else out(dtype, t, k),
    }


def embed(draw: Draw) -> Call:
    dtype, t = dtype_of(draw), size(draw, 0, 1, 5)
    n, k = size(draw, 1, 33, 64), size(draw, 1, 2, 7)
    bad = tuple(((0,), value) for value in (-1, n, n + 31, 2**63 - 1, -(2**63)) if t)
    return {
        "ids": ints("int64", np.arange(t) * 7 % n, [t], bad=bad),
        "panels": floats(dtype, *panels_shape(dtype, n, k)),
        "n": Number(n, (-1, n + 32, *WRONG_INTS)),
        **(merged := merge(draw, dtype, t, k)),
        "out": out(dtype, t, k, loose=(1,) if merged["images"] == Number(None) else ()),
    }


def rms_norm(draw: Draw) -> Call:
    dtype, m, h = dtype_of(draw), size(draw, 0, 1, 3), size(draw, 0, 1, 15, 16, 37)
    return {
        "x": floats(dtype, m, h, rows=True),
        "weight": floats(dtype, h),
        "eps": Number(1e-6, (nan, -1.0), odd=(0.0, inf, 1e300)),
        "out": out(dtype, m, h),
    }


def swiglu(draw: Draw) -> Call:
    dtype, m, width = dtype_of(draw), size(draw, 0, 1, 3), size(draw, 0, 1, 15, 37)
    return {"gate_up": floats(dtype, m, 2 * width, rows=True), "out": out(dtype, m, width)}


def gelu(draw: Draw) -> Call:
    dtype, m, n = dtype_of(draw), size(draw, 0, 1, 3), size(draw, 0, 1, 15, 37)
    return {"x": floats(dtype, m, n), "out": out(dtype, m, n)}


def rotary(draw: Draw) -> Call:
    dtype, t, h, d = dtype_of(draw), size(draw, 0, 1, 3), size(draw, 0, 1, 2), size(draw, 2, 6, 32)
    return {
        "x": floats(dtype, t, h, d, rows=True, written=True, loose=(1,), also=("float32", "bfloat16")),
        "cos": floats("float32", t, d // 2),
        "sin": floats("float32", t, d // 2),
    }


def cache(draw: Draw, dtype: str, blocks: int, kv: int, d: int, block: int, **free: Any) -> tuple[Call, Call]:
    """A paged cache in the compute dtype or in int8, and its scales."""
    shapes = (blocks, kv, d, block), (blocks, kv, block, d)
    if draw(st.booleans()):
        none: Call = {"k_scale": Number(None), "v_scale": Number(None)}
        return {
            "k_cache": floats(dtype, *shapes[0], **free),
            "v_cache": floats(dtype, *shapes[1], **free),
        }, none
    codes = np.arange(blocks * kv * d * block) * 37 % 255 - 127
    scales = floats("float32", blocks, kv, block, **free)
    return (
        {
            "k_cache": ints("int8", codes, shapes[0], **free),
            "v_cache": ints("int8", codes, shapes[1], **free),
        },
        {"k_scale": scales, "v_scale": scales},
    )


def rotary_cache(draw: Draw) -> Call:
    dtype, t, heads, kv = dtype_of(draw), size(draw, 0, 1, 3), size(draw, 0, 2), size(draw, 1, 2)
    d, blocks, block = size(draw, 2, 6, 32), size(draw, 1, 3), size(draw, 4, 16)
    slots = np.random.default_rng(t).permutation(blocks * block)[:t] if draw(st.booleans()) else [-1] * t
    wrong = (-2, blocks * block, 2**63 - 1, -(2**63))
    caches, scales = cache(draw, dtype, blocks, kv, d, block, written=True)
    both = ("float32", "bfloat16") if isinstance(scales["k_scale"], Arr) else ()
    return {
        "qkv": floats(dtype, t, (heads + 2 * kv) * d, rows=True, written=True, also=both),
        "cos": floats("float32", t, d // 2),
        "sin": floats("float32", t, d // 2),
        "slots": ints("int64", slots, [t], bad=tuple(((0,), value) for value in wrong if t)),
        **caches,
        "heads": Number(heads, (heads + 1, *WRONG_INTS)),
        "kv_heads": Number(kv, (kv + 1, 0, *WRONG_INTS)),
        **scales,
    }


def mrope_angles(draw: Draw) -> Call:
    t, width, length = size(draw, 0, 1, 5), size(draw, 0, 1, 16), size(draw, 1, 9)
    positions = np.arange(3 * t) * 5 % length
    far = tuple(((axis, 0), value) for axis in range(3) for value in (-1, length, 2**62, -(2**63)) if t)
    turned = tuple(((0,), value) for value in (-1, 3, 2**62, -(2**63)) if width)
    return {
        "positions": ints("int64", positions, (3, t), bad=far),
        "axis": ints("int64", np.arange(width) % 3, [width], bad=turned),
        "cos": floats("float32", length, width),
        "sin": floats("float32", length, width),
        "cos_out": out("float32", t, width),
        "sin_out": out("float32", t, width),
    }


def pixel_values(draw: Draw) -> Call:
    dtype, channels, area = dtype_of(draw), size(draw, 1, 3), size(draw, 0, 1, 17)
    count, rows, moments = size(draw, 1, 4), size(draw, 0, 1, 3), size(draw, 1, 2)
    bad = tuple(((0,), value) for value in (-1, count, 2**62, -(2**63)) if rows)
    return {
        "patches": ints("uint8", np.arange(count * channels * area) * 37 % 256, (count, -1), loose=(0,))
        if area
        else ints("uint8", [], (count, 0), loose=(0,)),
        "order": ints("int64", np.arange(rows) * 5 % count, [rows], bad=bad),
        "levels": floats(dtype, channels, 256, loose=() if area else (0,)),
        "moments": Number(moments, (0, *WRONG_INTS, *((moments + 1, 2**63 // area) if area else ()))),
        "out": out(dtype, rows, channels * area * moments),
    }


def greedy(draw: Draw) -> Call:
    s, n = size(draw, 0, 1, 3), size(draw, 1, 31, 32, 33, 70)
    mask = np.random.default_rng(n).integers(-(2**31), 2**31, (s, -(-n // 32)))
    return {
        "logits": floats("float32", s, n, rows=True, loose=(1,)),
        "mask": ints("int32", mask, mask.shape, rows=True, optional=True),
        "token": out("int64", s),
        "logprob": out("float32", s),
    }


def paged_attention(draw: Draw) -> Call:
    dtype, kv, group = dtype_of(draw), size(draw, 1, 2), size(draw, 1, 3)
    d, block, columns = size(draw, 1, 8, 33, 64), size(draw, 1, 4, 16), 3
    room = block * columns
    counts = draw(st.lists(st.integers(0, min(3, room)), min_size=0, max_size=3))
    lens = [draw(st.integers(count, room)) for count in counts]
    blocks, t = 5, sum(counts)
    tables = np.arange(len(counts) * columns) * 3 % blocks
    starts = np.cumsum([0, *counts])
    used = [s for s, count in enumerate(counts) if count]
    cells = [((s, 0), value) for s in used for value in (-1, blocks, 2**31 - 1, -(2**31))]
    long = [((s,), value) for s in used for value in (counts[s] - 1, room + 1, -1, 2**31 - 1, -(2**31))]
    turned = [((i,), value) for i in range(len(starts)) for value in (-1, t + 1, 2**31 - 1, -(2**31))]
    caches, scales = cache(draw, dtype, blocks, kv, d, block)
    return {
        "q": floats(dtype, t, kv * group, d, rows=True),
        **caches,
        "block_tables": ints(
            "int32", tables, (len(counts), columns), rows=True, loose=(1,), bad=tuple(cells)
        ),
        "query_start": ints("int32", starts, [len(starts)], bad=tuple(turned)),
        "context_lens": ints("int32", lens, [len(lens)], bad=tuple(long)),
        "scale": Number(0.3, odd=(0.0, inf, -inf, nan, 1e300)),
        **scales,
        "out": out(dtype, t, kv * group, d),
    }


def varlen_attention(draw: Draw) -> Call:
    dtype, h, d = dtype_of(draw), size(draw, 0, 1, 2), size(draw, 1, 8, 33, 80)
    starts = np.cumsum([0, *draw(st.lists(st.sampled_from([0, 1, 15, 40]), max_size=2))])
    t = int(starts[-1])
    turned = [((i,), value) for i in range(len(starts)) for value in (-1, t + 1, 2**31 - 1, -(2**31))]
    return {
        "q": floats(dtype, t, h, d, rows=True),
        "k": floats(dtype, t, h, d, rows=True),
        "v": floats(dtype, t, h, d, rows=True),
        "cu_seqlens": ints("int32", starts, [len(starts)], loose=(0,), bad=tuple(turned)),
        "scale": Number(0.3, odd=(0.0, inf, -inf, nan, 1e300)),
        "out": out(dtype, t, h, d),
    }


CASES: dict[str, Callable[[Draw], Call]] = {
    case.__name__: case
    for case in (
        pack_panels,
        linear,
        qlinear,
        pack_quantized,
        embed,
        embed_int8,
        rms_norm,
        swiglu,
        gelu,
        rotary,
        rotary_cache,
        mrope_angles,
        pixel_values,
        greedy,
        paged_attention,
        varlen_attention,
    )
}


def test_every_function_that_takes_arrays_is_here() -> None:
    number = re.compile(
        r"typing\.Supports\w+( \| typing\.Supports\w+)*|int|float|bool|str|collections\.abc\.Callable"
    )
    takers = set()
    for name, function in vars(_native).items():
        if callable(function):
            arguments = (function.__doc__ or "(an: object)").splitlines()[0].rpartition(" -> ")[0]
            if not all(number.fullmatch(kind) for kind in re.findall(r"\w+: ([^,)=]+)", arguments)):
                takers.add(name)
    assert takers == {*CASES, "patchify"}


# --- calling --------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A call about to be made: what is passed, and where its arrays lie."""

    name: str
    call: Call
    claims: dict[str, Claim]
    strides: dict[str, list[int]]
    passed: dict[str, Any] = field(default_factory=dict)  # instead of the claim's capsule, or of the number

    def run(self) -> None:
        """Call. Whatever becomes of it, only the elements of outputs may change, and none if it is refused."""
        spots = dict(zip(self.claims, MEMORY, strict=False))
        before = {name: spots[name].bytes.copy() for name in self.claims}
        arguments = [
            self.passed[name]
            if name in self.passed
            else part.value
            if isinstance(part, Number)
            else self.claims[name].capsule()
            for name, part in self.call.items()
        ]
        refused = True
        try:
            getattr(_native, self.name)(*arguments)
            refused = False
        finally:
            for name in self.claims:
                part, memory = self.call[name], spots[name]
                assert isinstance(part, Arr)
                after = memory.bytes.copy()
                if part.written and not refused:
                    claim = self.claims[name]
                    for block in (before[name], after):
                        first = claim.address + claim.byte_offset - memory.address
                        steps = [stride * part.values.itemsize for stride in self.strides[name]]
                        if part.values.size:
                            np.ndarray(part.values.shape, part.values.dtype, block, first, steps)[...] = 0
                assert np.array_equal(before[name], after), f"{name}: bytes changed"

    def output(self, name: str) -> np.ndarray:
        """What the output holds."""
        part, memory = self.call[name], dict(zip(self.claims, MEMORY, strict=False))[name]
        assert isinstance(part, Arr)
        claim = self.claims[name]
        if not part.values.size:
            return part.values.copy()
        return memory.view(claim.address + claim.byte_offset, part.values, self.strides[name]).copy()


def make(draw: Draw, name: str, call: Call, *, strided: bool) -> Made:
    made = Made(name, call, {}, {})
    for memory, (argument, part) in zip(
        MEMORY, ((key, part) for key, part in call.items() if isinstance(part, Arr)), strict=False
    ):
        made.claims[argument], made.strides[argument] = lay_out(draw, memory, part, strided=strided)
    return made


def set_up(draw: Draw) -> None:
    _native.set_isa(draw(st.sampled_from([*_native.isas(), *_native.emulated_isas()])))


quick = settings(
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.mark.parametrize("name", CASES)
@settings(quick, max_examples=30)
@given(data=st.data())
def test_a_right_call_touches_its_outputs_alone(name: str, data: st.DataObject) -> None:
    """Whatever its strides, the guard beside it, and the kind of its capsule; and the result is that of dense arrays."""
    set_up(data.draw)
    call = CASES[name](data.draw)
    plain = make(data.draw, name, call, strided=False)
    for argument, part in call.items():
        if isinstance(part, Arr) and part.optional and data.draw(st.booleans()):
            plain.passed[argument] = None
    plain.run()
    outputs = [argument for argument, part in call.items() if isinstance(part, Arr) and part.written]
    wanted = {argument: plain.output(argument) for argument in outputs}
    other = make(data.draw, name, call, strided=True)
    other.passed = plain.passed
    for argument, claim in other.claims.items():
        claim.version = data.draw(st.sampled_from([None, 1]))
        claim.flags = 0 if argument in outputs else data.draw(st.integers(0, 1))
        moved = data.draw(st.integers(0, 8))
        claim.address, claim.byte_offset = claim.address - moved, moved
    other.run()
    for argument in outputs:
        assert wanted[argument].tobytes() == other.output(argument).tobytes(), argument


# --- wrong calls ----------------------------------------------------------------------------------------------


class Gives:
    """An object with `__dlpack__`, of any behaviour."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __dlpack__(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def another_object(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    things = [3, 1.5, "x", [[1.0]], object(), np.float32(1), Gives(3), Gives(None), Gives(ValueError("no"))]
    made.passed[name] = draw(st.sampled_from([*things, *([] if arr.optional else [None])]))
    return True


def another_capsule(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    """Of another name or version, or on another device."""
    claim = made.claims[name]
    match draw(st.integers(0, 2)):
        case 0:
            claim.name = draw(
                st.sampled_from([b"used_dltensor", b"used_dltensor_versioned", b"x", b"", None])
            )
        case 1:
            claim.version = draw(st.sampled_from([0, 2, 2**32 - 1]))
        case 2:
            claim.device = draw(st.sampled_from([-1, 0, 2, 3, 10, 13, 2**31 - 1]))
    return True


def another_dtype(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    claim = made.claims[name]
    if draw(st.booleans()):
        claim.lanes = draw(st.sampled_from([0, 2, 4, 65535]))
    else:
        known = [CODES[dtype] for dtype in CODES if dtype not in (arr.dtype, *arr.also)]
        claim.type = draw(st.sampled_from([*known, *OTHERS]))
    return True


def another_rank(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    claim, dims = made.claims[name], arr.values.ndim
    match draw(st.integers(0, 3)):
        case 0:
            claim.ndim = draw(st.sampled_from([-(2**31), -1, 7, 1000, 2**31 - 1]))
        case 1:
            claim.no_shape = True
        case 2:
            at = draw(st.integers(0, dims))
            claim.shape.insert(at, 1)
            claim.strides = None if claim.strides is None else [*claim.strides[:at], 1, *claim.strides[at:]]
        case 3:
            claim.shape = [prod(claim.shape)] if dims > 1 else []
            claim.strides = None
    return True


def another_size(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    claim = made.claims[name]
    tied = [i for i in range(arr.values.ndim) if i not in arr.loose]
    if not tied:
        return False
    at = draw(st.sampled_from(tied))
    now = claim.shape[at]
    claim.shape[at] = draw(st.sampled_from([v for v in (0, now + 1, now - 1, *HUGE) if v != now]))
    if draw(st.booleans()):
        claim.strides = None
    return True


def loose_size(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    """A size that nothing else fixes, over memory that it fits: right or wrong, only outputs change."""
    if not arr.loose or not arr.values.size:
        return False
    at = draw(st.sampled_from(arr.loose))
    claim = made.claims[name]
    claim.shape[at] = draw(st.integers(0, arr.values.shape[at]))
    if not arr.rows:
        made.strides[name] = row_major(claim.shape)
    claim.strides = made.strides[name]
    made.call = {**made.call, name: replace(arr, values=np.resize(arr.values, claim.shape))}
    return False


def another_stride(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    claim = made.claims[name]
    long = [i for i in range(arr.values.ndim) if arr.values.shape[i] > 1]
    if not long or not arr.values.size:
        return False
    at = draw(st.sampled_from(long))
    claim.strides = list(made.strides[name])
    free = arr.rows and at < arr.values.ndim - 1
    far = [-(2**63), -(2**62), 2**56, 2**62, 2**63 - 1]
    near = [claim.strides[at] + 1, -claim.strides[at], 2 * claim.strides[at]]
    zero = [0] if arr.written or not free else []
    claim.strides[at] = draw(st.sampled_from([*far, *zero, *([] if free else near)]))
    return True


def shared_elements(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    """Rows of an output that overlap each other."""
    shape = arr.values.shape
    if not (
        arr.written and arr.rows and len(shape) > 1 and shape[-1] > 1 and shape[-2] > 1 and arr.values.size
    ):
        return False
    claim = made.claims[name]
    claim.strides = [abs(stride) for stride in made.strides[name]]
    claim.strides[-2] = draw(st.integers(0, shape[-1] - 1))
    return True


def another_address(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    if not arr.values.size:
        return False
    claim, odd = made.claims[name], draw(st.integers(1, max(1, arr.values.itemsize - 1)))
    match draw(st.integers(0, 2 if arr.values.itemsize > 1 else 0)):
        case 0:
            claim.address = 0
        case 1:
            claim.address += odd
        case 2:
            claim.byte_offset = odd
    return True


def read_only(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    made.claims[name].version, made.claims[name].flags = 1, draw(st.sampled_from([1, 3, 2**64 - 1]))
    return arr.written


def bad_value(draw: Draw, made: Made, name: str, arr: Arr) -> bool:
    if not arr.bad:
        return False
    index, value = draw(st.sampled_from(arr.bad))
    memory = dict(zip(made.claims, MEMORY, strict=False))[name]
    memory.view(made.claims[name].address, arr.values, made.strides[name])[index] = value
    return True


WRONGS = (
    another_object,
    another_capsule,
    another_dtype,
    another_rank,
    another_size,
    loose_size,
    another_stride,
    shared_elements,
    another_address,
    read_only,
    bad_value,
)


@pytest.mark.parametrize("name", CASES)
@settings(quick, max_examples=150)
@given(data=st.data())
def test_a_wrong_call_is_refused(name: str, data: st.DataObject) -> None:
    set_up(data.draw)
    call = CASES[name](data.draw)
    # Strides belong to the claim only where they may be wrong: elsewhere rows are dense.
    made = make(data.draw, name, call, strided=False)
    argument = data.draw(st.sampled_from(list(call)), label="argument")
    part = call[argument]
    if isinstance(part, Number):
        label = "number"
        bad = part.bad + tuple(thing for thing in NOT_NUMBERS if thing != part.value)
        if isinstance(part.value, bool):  # pybind11 takes whatever has a truth value
            bad, part = (), replace(part, odd=(True, False, None))
        if not bad + part.odd:
            return
        at = data.draw(st.integers(0, len(bad + part.odd) - 1), label=label)
        made.passed[argument] = (bad + part.odd)[at]
        wrong = at < len(bad)
    else:
        change = data.draw(st.sampled_from(WRONGS), label="wrong")
        label = change.__name__
        wrong = change(data.draw, made, argument, part)
    if wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            made.run()
        if caught.type is ValueError and label != "another_object":
            assert re.match(r"[\w\[\]]+: expected .+, found .+", str(caught.value)), caught.value
    else:
        with suppress(ValueError):
            made.run()


@pytest.mark.parametrize("name", CASES)
@settings(quick, max_examples=4)
@given(data=st.data())
def test_an_output_shares_memory_with_no_other_argument(name: str, data: st.DataObject) -> None:
    call = CASES[name](data.draw)
    arrays = {argument: part for argument, part in call.items() if isinstance(part, Arr) and part.values.size}
    for one, other in combinations(arrays, 2):
        if not (arrays[one].written or arrays[other].written):
            continue
        made = make(data.draw, name, call, strided=False)
        inner, outer = sorted((one, other), key=lambda argument: arrays[argument].values.nbytes)
        room = arrays[outer].values.nbytes - arrays[inner].values.nbytes
        made.claims[inner].address = made.claims[outer].address + data.draw(st.integers(0, room // 8)) * 8
        with pytest.raises(ValueError, match=r"expected .+, found .+"):
            made.run()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 4, device="meta"),
        torch.ones(2, 4).to_sparse(),
        torch.ones(2, 4).to_mkldnn(),
        torch._efficientzerotensor((2, 4)),
    ],
    ids=["meta", "sparse", "mkldnn", "zero"],
)
def test_a_tensor_without_plain_memory_is_refused(tensor: torch.Tensor) -> None:
    """These come as objects, through the table of C functions of their type."""
    with pytest.raises(ValueError, match=r"x: expected .+, found .+"):
        _native.gelu(tensor, torch.empty(2, 4))
    with pytest.raises(ValueError, match=r"out: expected .+, found .+"):
        _native.gelu(torch.empty(2, 4), tensor)


# --- patchify, whose arrays are NumPy's -----------------------------------------------------------------------


def numpy_at(memory: Memory, values: np.ndarray, at_end: bool) -> np.ndarray:
    view = memory.view(
        memory.address + (ROOM - values.nbytes if at_end else 0), values, row_major(values.shape)
    )
    view[...] = values
    return view


@settings(quick, max_examples=100)
@given(data=st.data())
def test_patchify(data: st.DataObject) -> None:
    set_up(data.draw)
    draw = data.draw
    shape = draw(st.sampled_from([(1, 1, 3), (8, 8, 3), (5, 17, 3), (40, 9, 3)]))
    patch, merge = draw(st.sampled_from([(1, 1), (2, 2), (14, 2)]))
    unit = patch * merge
    rgb = numpy_at(MEMORY[0], np.full(shape, 7, np.uint8), draw(st.booleans()))
    call = [rgb, unit * draw(st.integers(1, 3)), unit * draw(st.integers(1, 3)), patch, merge]
    patches = _native.patchify(*call)
    assert patches.shape == (call[1] * call[2] // patch**2, 3 * patch**2)
    assert (patches == 7).all()
    at = draw(st.integers(0, 4))
    if at == 0:
        call[0] = draw(
            st.sampled_from(
                [
                    rgb[None],
                    rgb[0],
                    rgb[..., :-1],
                    np.repeat(rgb, 2, -1)[..., ::2],
                    rgb.astype(np.float64),
                    rgb.astype(np.int8),
                    rgb.astype(bool),
                    np.empty((0, *shape[1:]), np.uint8),
                    *(None, 3, "x", rgb.tolist(), Gives(3)),
                ]
            )
        )
    else:
        most = 2**20 + unit if at < 3 else 257
        call[at] = draw(
            st.sampled_from([0, most, *WRONG_INTS, *NOT_NUMBERS, *([unit + 1] if at < 3 < unit else [])])
        )
    with pytest.raises((ValueError, TypeError)):
        _native.patchify(*call)
