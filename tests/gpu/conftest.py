"""The Triton kernels on a GPU, or in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/gpu`, as `make test` does.

The interpreter is chosen when triton is imported, so these tests have a process of their own. It computes on CPU tensors; its
products of bfloat16 are wrong (they multiply the bits), so that float32 and float16 stand for it there. Where there is a GPU and
no interpreter, the same tests run on the GPU, in bfloat16 too: `make bench-gpu`.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
collect_ignore_glob = [] if INTERPRETED or ON_GPU else ["test_*.py"]
_DTYPES = {"f32": torch.float32, "f16": torch.float16} | ({"bf16": torch.bfloat16} if ON_GPU else {})

CAPABILITY = torch.cuda.get_device_capability() if ON_GPU and torch.version.hip is None else None
needs_fp8 = pytest.mark.skipif(
    CAPABILITY is not None and CAPABILITY < (8, 9),
    reason=f"fp8 needs compute capability 8.9; this device has {CAPABILITY}",
)
KEPT = [
    pytest.param(torch.int8, id="int8"),
    pytest.param(torch.float8_e4m3fn, id="fp8", marks=needs_fp8),
]
"""What quantised keys and values are stored as."""


@pytest.fixture(autouse=True)
def _tensors() -> Iterator[None]:
    """What a test makes lies on its device. Uninitialised tensors, results among them, hold NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)  # on a GPU, cumsum for one would be refused
    with DEVICE if ON_GPU else nullcontext():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def whole_engine(_tensors: None) -> Iterator[None]:
    """For tests of more than kernels: the engine says itself where its tensors lie, and what it records on a GPU fills none."""
    torch.use_deterministic_algorithms(not ON_GPU)
    with torch.device("cpu"):
        yield


@pytest.fixture(params=_DTYPES.values(), ids=_DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm; `wanted` is float64. A NaN anywhere makes it NaN, which is below nothing."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def bound(dtype: torch.dtype) -> float:
    """What a few roundings of `dtype` may add up to."""
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
