"""The checks of this folder fail where they must: kernels with a mistake in their source, and damaged PTX."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pagemill.kernels.gpu import attention, linear
from tests.emulator import test_attention, test_linear
from tests.emulator.memory import PtxError

Mutate = Callable[[ModuleType, str, str], ModuleType]
Caught = (AssertionError, PtxError)


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Mutate]:
    """A copy of a module of kernels in which each `right` of its source is `wrong`."""
    names = []

    def mutate(module: ModuleType, right: str, wrong: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        assert right in source
        path = tmp_path / f"mutated_{len(names)}.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        names.append(path.stem)
        copy = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(copy)
        return copy

    yield mutate
    for name in names:
        del sys.modules[name]


PRODUCTS = {
    "a row's scale left out": ("int8", "row_scale * tl.load", "tl.load"),
    "the nibbles swapped": ("int4", "(low, a,", "(high, a,"),
    "the zero point left out": ("int4", "(-128.0 - zero)", "(-128.0 - zero * 0)"),
    "two bytes' nibbles for four's": (
        "int4", "prmt.b32 b, l, 0x43434343, 0x4342;", "prmt.b32 b, l, 0x43434343, 0x4140;",
    ),
    "the scales of another group": ("int4", "at // GROUP * (N", "(at // GROUP // 2 * 2) * (N"),
    "a tail not masked": ("plain", "mask=rows & (whole + k < K)[None, :]", "mask=rows"),
    "columns that are not there stored": (
        "plain", "mask = (m[:, None] < M) & there[None, :]", "mask = (m[:, None] < M) & (n >= 0)[None, :]",
    ),
    "a range of inputs forgotten": ("plain", "for split in range(splits):", "for split in range(splits - 1):"),
    "the residual left out": ("plain", "if RESIDUAL:", "if RESIDUAL and GATED:"),
}  # fmt: skip
"""Scheme, and what stands where in `kernels/gpu/linear.py`."""


def check_product(scheme: str, module: ModuleType) -> None:
    test_linear.check(scheme, 3, 33, 520, False, True, group=64, module=module)


@pytest.mark.parametrize("mutation", PRODUCTS)
def test_wrong_product(mutated: Mutate, mutation: str) -> None:
    scheme, right, wrong = PRODUCTS[mutation]
    with pytest.raises(Caught):
        check_product(scheme, mutated(linear, right, wrong))


ATTENTION = {
    "a token sees the next": ("key[None, :] < visible[:, None]", "key[None, :] <= visible[:, None]"),
    "a token does not see itself": ("- count + first_token + 1 + tl", "- count + first_token + tl"),
    "masked one tile late": ("// TILE_N * TILE_N)\n\n", "// TILE_N * TILE_N + TILE_N)\n\n"),
    "a tile takes the blocks of the one before": (
        "block = tl.load(table + column, mask=key", "_ = tl.load(table + column, mask=key",
    ),
    "the old sums not rescaled": (
        "acc * rescale[:, None], input_precision=PRECISION)\n    return", "acc, input_precision=PRECISION)\n    return",
    ),
    "ranges merged without weights": ("weight = tl.exp2(lse - tl.max(lse, 0))", "weight = tl.exp2(0 * lse)"),
    "the wrong head of the group": ("token * q_token + member * q_head", "token * q_token + row // TOKENS * q_head"),
}  # fmt: skip
"""What stands where in `kernels/gpu/attention.py`."""


def check_attention(module: ModuleType, cache: torch.dtype = torch.bfloat16, columns: int = 32) -> None:
    test_attention.check([40, 200], [9, 3], 8, 1, cache=cache, columns=columns, module=module)


@pytest.mark.parametrize("mutation", ATTENTION)
def test_wrong_attention(mutated: Mutate, mutation: str) -> None:
    with pytest.raises(Caught):
        check_attention(mutated(attention, *ATTENTION[mutation]))


def test_wrong_attention_over_integers(mutated: Mutate) -> None:
    with pytest.raises(Caught):
        check_attention(
            mutated(attention, "score *= tl.load(k_scale", "score += 0 * tl.load(k_scale"), torch.int8
        )


def test_blocks_looked_up_beyond_the_context(mutated: Mutate) -> None:
    with pytest.raises(Caught):
        check_attention(mutated(attention, "mask=key + TILE_N < last", "mask=key < last"), columns=0)


def check_segments(module: ModuleType) -> None:
    test_attention.check_varlen([70, 9], 1, 80, module=module)


def test_a_segment_sees_the_next(mutated: Mutate) -> None:
    with pytest.raises(Caught):
        check_segments(mutated(attention, "(key < end) if MASKED", "(key < end + 1) if MASKED"))


def test_what_has_no_mistake_passes(mutated: Mutate) -> None:
    for scheme in ("plain", "int8", "int4"):
        check_product(scheme, linear)
    check_product("plain", mutated(linear, "splits", "splits"))
    check_attention(attention)
    check_attention(attention, torch.int8, 0)
    check_segments(attention)


def without(pattern: str, number: int = 0) -> Callable[[str], str]:
    """Take the instruction that is the `number`-th match of `pattern` out of a PTX text."""
    return replaced(pattern, "", number)


def replaced(pattern: str, by: str, number: int = 0) -> Callable[[str], str]:
    def damage(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        assert len(found) > number, f"{len(found)} of {pattern} in the PTX"
        at = found[number]
        return ptx[: at.start()] + at.expand(by) + ptx[at.end() :]

    return damage


BARRIER, PRODUCT = r"bar\.sync[^;]*;", r"mma\.sync[^;]*;"
PLAIN_DAMAGE: dict[str, Callable[[str], str]] = {
    **{f"barrier {i}": without(BARRIER, i) for i in range(4)},
    "the wait": without(r"cp\.async\.wait_group[^;]*;"),
    "a wait too weak": replaced(r"cp\.async\.wait_group(\s+)2;", r"cp.async.wait_group\g<1>3;"),
    "a product": without(PRODUCT, 5),
    "a load of fragments": replaced(
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.", "ldmatrix.sync.aligned.m8n8.x4.trans."
    ),
    "a commit": without(r"cp\.async\.commit_group;"),
}
ATTENTION_DAMAGE: dict[str, Callable[[str], str]] = {
    "a barrier": without(BARRIER, 1),
    "the wait": replaced(r"cp\.async\.wait_group[^;]*;", "cp.async.wait_group 3;"),
    "a product": without(PRODUCT, 40),
    "a load of values": replaced(r"\.x4\.trans\.", ".x4."),
}


def check_damaged_product(damage: Callable[[str], str]) -> None:
    test_linear.check("plain", 16, 32, 640, False, False, damage=damage, one_by_one=True)


def check_damaged_attention(damage: Callable[[str], str]) -> None:
    test_attention.check([200], [1], 16, 2, damage=damage, one_by_one=True)


@pytest.mark.parametrize("damage", PLAIN_DAMAGE)
def test_damaged_product(damage: str) -> None:
    with pytest.raises(Caught):
        check_damaged_product(PLAIN_DAMAGE[damage])


@pytest.mark.parametrize("damage", ATTENTION_DAMAGE)
def test_damaged_attention(damage: str) -> None:
    with pytest.raises(Caught):
        check_damaged_attention(ATTENTION_DAMAGE[damage])


def test_what_is_not_damaged_passes() -> None:
    check_damaged_product(str)
    check_damaged_attention(str)
