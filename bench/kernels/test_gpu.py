"""Microbenchmarks of the ops of the 3B and 7B shapes on a GPU, with the Triton kernels and with torch's own ops beside them.

    pytest bench/kernels/test_gpu.py --benchmark-json=bench/results/kernels_gpu.json
    python bench/compare_kernels.py bench/results/kernels_gpu.json      # seconds, TFLOP/s, GB/s, share of the ceiling

A round is one call between two events of the device, after all its caches were filled with other data; the table has medians. The
ceilings are measured in the same run: torch's matrix product (bfloat16, int8 or fp8) and a copy. The vision tower of the 7B is
that of the 3B. Without a GPU every case is skipped.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from gpu_cases import Case, DeviceSeconds, cases, copy_bandwidth, cuda_seconds, peak
from op_cases import SHAPES, Ops

from pagemill.kernels import select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
_ROUNDS = 40
_CASES = {
    f"{size}-{case.name}": case for size in ("3b", "7b") for case in cases(SHAPES[size], vision=size == "3b")
}


@cache
def _clock() -> DeviceSeconds:
    return cuda_seconds()


@cache
def _bandwidth() -> float:
    return copy_bandwidth(_clock(), "cuda")


@cache
def _peak(dtype: torch.dtype) -> float:
    return peak(_clock(), dtype, "cuda")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("name", list(_CASES))
def test_op(benchmark: Any, name: str, implementation: str) -> None:
    case: Case = _CASES[name]
    torch.manual_seed(0)
    kernels = select(implementation, torch.device("cuda"), torch.bfloat16)
    if "fp8" in name and torch.float8_e4m3fn not in kernels.quantised_kv:
        pytest.skip("this GPU does not convert fp8")
    if implementation == "reference" and (
        case.only_triton or any(w in name for w in ("int8", "int4", "fp8"))
    ):
        pytest.skip("the reference of quantised ops is written to be read, not to be fast")
    if implementation == "reference" and "1x32768-of" in name:
        pytest.skip("the reference of attention holds every score at once")
    with torch.inference_mode():
        work, clock = case.make(Ops(kernels, torch.bfloat16, "cuda")), _clock()
        work.call()  # compiles
        benchmark._timer = clock
        benchmark.pedantic(lambda: clock.run(work.call), rounds=_ROUNDS, iterations=1, warmup_rounds=3)
        benchmark.extra_info.update(
            flops=work.flops,
            bytes=work.moved,
            arithmetic=f"{case.arithmetic} on cuda",
            peak_flops=_peak(case.arithmetic),
            bandwidth=_bandwidth(),
            statistic="median",
            device=torch.cuda.get_device_name(0),
        )
