"""Register bits and the numbers they stand for, in the types of PTX."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["FLOAT", "SIGNED", "UNSIGNED", "Array", "bits_of", "is_float", "is_type", "numbers", "raw"]

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}
_FLOAT8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
_SAME_SIZE: dict[str, Any] = {
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{letter}{width}": kind for letter in "bu" for width, kind in UNSIGNED.items() if width > 1},
    **{f"s{width}": kind for width, kind in SIGNED.items()},
}  # fmt: skip
"""Types that numpy has."""
_TYPE = re.compile(r"(pred|[busf](8|16|32|64|128)|bf16|tf32|e4m3|e5m2)(x2)?")


def is_type(word: str) -> bool:
    """Whether a part of an instruction's name is a type."""
    return _TYPE.fullmatch(word) is not None


@lru_cache
def bits_of(kind: str) -> int:
    """Width of a type in bits; predicates have 1."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    return {"bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}.get(kind) or int(kind[1:])


def is_float(kind: str) -> bool:
    return kind[0] in "fe" or kind[:2] in ("bf", "tf")


@lru_cache
def _float8_values(kind: str) -> Array:
    return torch.arange(256, dtype=torch.uint8).view(_FLOAT8[kind][0]).float().numpy()


def numbers(bits: Array, kind: str) -> Array:
    """Register bits as numbers; a packed type's have a leading axis of two, the low half first."""
    if (known := _SAME_SIZE.get(kind)) is not None and bits.itemsize * 8 == bits_of(kind):
        return bits.view(known)
    if kind.endswith("x2"):
        half = bits_of(kind) // 2
        whole = bits.astype(UNSIGNED[2 * half])
        low = (whole & UNSIGNED[2 * half]((1 << half) - 1)).astype(UNSIGNED[half])
        high = (whole >> UNSIGNED[2 * half](half)).astype(UNSIGNED[half])
        return np.stack([numbers(low, kind[:-2]), numbers(high, kind[:-2])])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in _FLOAT8:
        return _float8_values(kind)[bits]
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "pred":
        return bits
    return bits.astype(UNSIGNED[bits_of(kind)]).view(_SAME_SIZE[kind])


def _odd(value: Array) -> Array:
    """float64 to float32, an inexact one to an odd last bit, so that rounding it again rounds once."""
    with np.errstate(all="ignore"):
        near = value.astype(np.float32)
        near = np.where(
            np.abs(near.astype(np.float64)) > np.abs(value), np.nextafter(near, np.float32(0)), near
        )
        inexact = near.astype(np.float64) != value
    return (near.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def _bf16(value: Array) -> Array:
    """To the nearest bfloat16, ties to even."""
    value = _odd(value) if value.dtype == np.float64 else np.ascontiguousarray(value, np.float32)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def raw(value: Array, kind: str) -> Array:
    """Numbers as register bits, rounded to the nearest; float8 saturates."""
    if (known := _SAME_SIZE.get(kind)) is not None and value.dtype == known:
        return value.view(UNSIGNED[value.itemsize * 8])
    if kind.endswith("x2"):
        half = bits_of(kind) // 2
        low, high = raw(value[0], kind[:-2]), raw(value[1], kind[:-2])
        word = UNSIGNED[2 * half]
        packed: Array = low.astype(word) | high.astype(word) << word(half)
        return packed
    if kind == "bf16":
        return _bf16(value)
    if kind in _FLOAT8:
        dtype, largest = _FLOAT8[kind]
        clipped = np.ascontiguousarray(np.clip(value, -largest, largest), np.float32)
        return torch.from_numpy(clipped).to(dtype).view(torch.uint8).numpy()
    if kind == "pred":
        return np.asarray(value, np.bool_)
    width = bits_of(kind)
    if kind[0] == "f" or kind == "tf32":
        return value.astype(FLOAT[width]).view(UNSIGNED[width])
    if value.dtype.kind in "iu":
        return value.astype(SIGNED[width] if kind[0] == "s" else UNSIGNED[width], copy=False).view(
            UNSIGNED[width]
        )
    return value.astype(np.int64).astype(UNSIGNED[width])
