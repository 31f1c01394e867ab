"""The Triton kernels as they run on a GPU: compiled, and executed from their PTX on the CPU.

Triton's interpreter is chosen when triton is imported: these tests run in a process without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

WHY_NOT = (
    "triton's interpreter was chosen" if os.environ.get("TRITON_INTERPRET") == "1"
    else "triton is not installed (it is for Linux only)" if find_spec("triton") is None
    else ""
)  # fmt: skip
collect_ignore_glob = ["test_*.py"] if WHY_NOT else []

BF16 = 2.0**-8
"""Half a unit in the last place of a bfloat16, relative to the smallest number that has it."""
F32 = 2.0**-24


def pytest_report_header() -> list[str]:
    return [f"tests/emulator: skipped, {WHY_NOT}"] if WHY_NOT else []


@pytest.fixture(autouse=True)
def _poisoned_results() -> Iterator[None]:
    """Uninitialised tensors hold NaN, or the largest integer. One thread: tensors here are small."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of an A100, and its multiprocessors, which the number of split-KV ranges depends on."""
    if not WHY_NOT:
        from pagemill.kernels.gpu import configs

        monkeypatch.setattr(configs, "card_of", lambda device: configs.Card("", 80, 108))


def among_nan(x: Tensor, gap: int = 8) -> Tensor:
    """The rows of `x [M, K]` with `gap` NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + gap), torch.nan, dtype=x.dtype)
    return wide[:, : x.shape[1]].copy_(x)


class Mismatch(AssertionError):
    """Numbers are not what they should be."""


def assert_within(found: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Every element, by absolute error; a NaN is in no bound. Mismatch where one is beyond."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    off = ~(error <= bound)
    if off.any():
        raise Mismatch(
            f"{off.sum().item()} of {off.numel()} elements, the worst by {(error / bound).max().item():.3g} bounds"
        )
