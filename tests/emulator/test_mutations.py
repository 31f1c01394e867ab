"""The checks of this folder fail where they must: kernels with a mistake in their source, and damaged PTX.

What is damaged is looked for first: a mistake that could not be made is not taken for one that was found.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pagemill.kernels.gpu import attention, linear
from tests.emulator import test_attention, test_linear
from tests.emulator.conftest import Mismatch
from tests.emulator.memory import PtxError, Unsupported

Mutate = Callable[[ModuleType, str, str], ModuleType]
Caught = (Mismatch, PtxError)
"""A mistake is found by a number or by the emulator. Any other exception fails the test, `NotApplied` above all."""


class NotApplied(Exception):
    """What was to be damaged is not there."""


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Mutate]:
    """A copy of a module of kernels in which each `right` of its source is `wrong`. NotApplied where there is none."""
    names = []

    def mutate(module: ModuleType, right: str, wrong: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        if right not in source:
            raise NotApplied(f"{right!r} is not in {module.__name__}")
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
    "a tail not masked": ("plain", "mask=rows & (here + k < K)[None, :]", "mask=rows"),
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
    module = mutated(linear, right, wrong)
    with pytest.raises(Caught):
        check_product(scheme, module)


ATTENTION = {
    "a token sees the next": ("key[None, :] < visible[:, None]", "key[None, :] <= visible[:, None]"),
    "a token does not see itself": ("- count + first_token + 1 + tl", "- count + first_token + tl"),
    "masked one tile late": ("// TILE_N * TILE_N)\n\n", "// TILE_N * TILE_N + TILE_N)\n\n"),
    "a tile takes the blocks of the one before": (
        "block = tl.load(table + column, mask=key", "_ = tl.load(table + column, mask=key",
    ),
    "the old sums not rescaled": (
        "v.to(q.dtype), acc * rescale[:, None]", "v.to(q.dtype), acc",
    ),
    "ranges merged without weights": ("weight = tl.exp2(lse - tl.max(lse, 0))", "weight = tl.exp2(0 * lse)"),
    "the wrong head of the group": ("token * q_token + member * q_head", "token * q_token + row // TOKENS * q_head"),
}  # fmt: skip
"""What stands where in `kernels/gpu/attention.py`."""


def check_attention(module: ModuleType, cache: torch.dtype = torch.bfloat16, columns: int = 32) -> None:
    test_attention.check([40, 200], [9, 3], 8, 1, cache=cache, columns=columns, module=module)


@pytest.mark.parametrize("mutation", ATTENTION)
def test_wrong_attention(mutated: Mutate, mutation: str) -> None:
    module = mutated(attention, *ATTENTION[mutation])
    with pytest.raises(Caught):
        check_attention(module)


def test_wrong_attention_over_integers(mutated: Mutate) -> None:
    module = mutated(attention, "score *= tl.load(k_scale", "score += 0 * tl.load(k_scale")
    with pytest.raises(Caught):
        check_attention(module, torch.int8)


def test_blocks_looked_up_beyond_the_context(mutated: Mutate) -> None:
    with pytest.raises(Caught):
        check_attention(mutated(attention, "mask=key + TILE_N < last", "mask=key < last"), columns=0)


def check_segments(module: ModuleType) -> None:
    test_attention.check_varlen([70, 9], 1, 80, module=module)


def test_a_segment_sees_the_next(mutated: Mutate) -> None:
    module = mutated(attention, "(key < end) if MASKED", "(key < end + 1) if MASKED")
    with pytest.raises(Caught):
        check_segments(module)


def test_what_has_no_mistake_passes(mutated: Mutate) -> None:
    for scheme in ("plain", "int8", "int4"):
        check_product(scheme, linear)
    check_product("plain", mutated(linear, "splits", "splits"))
    check_attention(attention)
    check_attention(attention, torch.int8, 0)
    check_segments(attention)


Check = Callable[[Callable[[str], str]], object]
"""Run and compare kernels whose PTX goes through a function first."""


def check_ptx_of_product(damage: Callable[[str], str]) -> None:
    """A whole tile of features; two ranges of inputs, each long enough for every stage of the pipeline to be used again."""
    test_linear.check("plain", 16, 64, 640, False, False, damage=damage, one_by_one=True)


def check_ptx_of_attention(damage: Callable[[str], str]) -> None:
    """Three whole tiles of keys, and one that lacks a key."""
    test_attention.check([255], [1], 16, 2, damage=damage, one_by_one=True)


@lru_cache
def ptx_of(check: Check, kernel: str) -> str:
    """The PTX of a kernel, which passes `check` as it is. NotApplied where it does not run."""
    texts = {}

    def keep(ptx: str) -> str:
        entry = re.search(r"\.entry\s+(\w+)", ptx)
        assert entry
        texts[entry[1]] = ptx
        return ptx

    check(keep)
    if kernel not in texts:
        raise NotApplied(f"{kernel} does not run, but {', '.join(texts)}")
    return texts[kernel]


def damaged(
    ptx: str, pattern: str, by: str | Callable[[re.Match[str]], str] = "", which: slice = slice(None)
) -> str:
    """A PTX text with `by` for those matches of `pattern`. NotApplied where that changes nothing."""
    changed = ptx
    for at in reversed(list(re.finditer(pattern, ptx))[which]):
        changed = (
            changed[: at.start()] + (at.expand(by) if isinstance(by, str) else by(at)) + changed[at.end() :]
        )
    if changed == ptx:
        raise NotApplied(f"{pattern} {which} in the PTX")
    return changed


def survives(check: Check, ptx: str, instead: str) -> bool:
    """Whether `check` finds nothing wrong where `instead` runs for `ptx`. A wild address is no find: it is one by luck."""
    try:
        check(lambda text: instead if text == ptx else text)
    except Mismatch:
        return False
    except PtxError as error:
        if not str(error).startswith("race"):
            raise
        return False
    return True


BARRIER, PRODUCT, COMMIT = r"bar\.sync[^;]*;", r"mma\.sync[^;]*;", r"cp\.async\.commit_group\s*;"
LOAD, TURNED = r"(ldmatrix[^;]*\.x4)(?!\.trans)", r"(ldmatrix[^;]*\.x4)\.trans"
WAIT = r"(cp\.async\.wait_group\s+)(\d+)\s*;"


def one_more(wait: re.Match[str]) -> str:
    return f"{wait[1]}{int(wait[2]) + 1};"


EACH_OF_PRODUCT = {
    # The second stands at the head of the loop. Between it and the one before, nobody touches shared memory.
    "barrier": (BARRIER, "", {1}),
    "product": (PRODUCT, "", set()),
    "load of fragments": (LOAD, r"\1.trans", set()),
    # Without the first, two groups become one. Waits count from the last group: they let no less land.
    "commit": (COMMIT, "", {0}),
}
"""Instructions, what each of them is replaced by in turn, and those that are not missed."""


@pytest.mark.parametrize("kind", EACH_OF_PRODUCT)
def test_each_instruction_of_a_product(kind: str) -> None:
    pattern, by, idle = EACH_OF_PRODUCT[kind]
    ptx = ptx_of(check_ptx_of_product, "matmul_kernel")
    count = len(re.findall(pattern, ptx))
    assert count > len(idle) + 1
    survivors = {
        i
        for i in range(count)
        if survives(check_ptx_of_product, ptx, damaged(ptx, pattern, by, slice(i, i + 1)))
    }
    assert survivors == idle


# One wait of the loop alone is not missed: two stand in a row at its end, and one more at its head. Behind the loop nothing is
# waited for, its last copies are masked.
WAITS = {
    "none before the loop": ("", slice(1)),
    "one group too few before the loop": (one_more, slice(1)),
    "none in the loop": ("", slice(1, None)),
    "one group too few in the loop": (one_more, slice(1, None)),
}


@pytest.mark.parametrize("damage", WAITS)
def test_waits_of_a_product(damage: str) -> None:
    ptx = ptx_of(check_ptx_of_product, "matmul_kernel")
    assert not survives(check_ptx_of_product, ptx, damaged(ptx, WAIT, *WAITS[damage]))


OF_ATTENTION = {
    "a wait for the last keys": (WAIT, "", slice(-2, -1)),
    "the barrier after it": (rf"({WAIT}\s*){BARRIER}", r"\1", slice(-2, -1)),
    "a barrier before a maximum is read": (rf"(st\.shared[^;]*;\s*){BARRIER}", r"\1", slice(1)),
    "the last barrier": (BARRIER, "", slice(-1, None)),
}


@pytest.mark.parametrize("damage", OF_ATTENTION)
def test_order_in_attention(damage: str) -> None:
    ptx = ptx_of(check_ptx_of_attention, "paged_kernel")
    assert not survives(check_ptx_of_attention, ptx, damaged(ptx, *OF_ATTENTION[damage]))


@pytest.mark.parametrize("place", [1, 3, 5, 7])
@pytest.mark.parametrize(
    ("pattern", "by"),
    [(PRODUCT, ""), (LOAD, r"\1.trans"), (TURNED, r"\1")],
    ids=["product", "keys", "values"],
)
def test_numbers_of_attention(pattern: str, by: str, place: int) -> None:
    """Instructions of its two loops, an eighth of the way through them and so on: of scores, and of what they weigh."""
    ptx = ptx_of(check_ptx_of_attention, "paged_kernel")
    at = len(re.findall(pattern, ptx)) * place // 8
    assert not survives(check_ptx_of_attention, ptx, damaged(ptx, pattern, by, slice(at, at + 1)))


def test_what_is_not_there_is_not_damaged(mutated: Mutate) -> None:
    assert not issubclass(NotApplied, Caught)
    with pytest.raises(NotApplied, match="not in"):
        mutated(linear, "a text that is not there", "another")
    with pytest.raises(NotApplied, match="does not run"):
        ptx_of(check_ptx_of_product, "paged_kernel")
    ptx = ptx_of(check_ptx_of_product, "matmul_kernel")
    for pattern, by, which in (
        (r"wgmma", "", slice(None)),
        (PRODUCT, "", slice(99, None)),
        ("mma", "mma", slice(None)),
    ):
        with pytest.raises(NotApplied, match="in the PTX"):
            damaged(ptx, pattern, by, which)
    assert survives(check_ptx_of_product, ptx, damaged(ptx, r"\bret;", "ret; ret;"))
    with pytest.raises(Unsupported):  # neither found nor not: no test of damage passes
        survives(check_ptx_of_product, ptx, damaged(ptx, PRODUCT, "wgmma.sync;"))
