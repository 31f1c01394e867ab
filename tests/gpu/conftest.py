"""The Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/gpu`, as `make test` does.

The interpreter is chosen when triton is imported, so these tests have a process of their own. It computes on CPU tensors; its
products of bfloat16 are wrong (they multiply the bits), so that float32 and float16 stand for it here.
"""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm; `wanted` is float64. A NaN anywhere makes it NaN, which is below nothing."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def bound(dtype: torch.dtype) -> float:
    """What a few roundings of `dtype` may add up to."""
    return 2e-6 if dtype == torch.float32 else 1e-3
