"""What the kernel benchmarks measure of the Triton kernels alone."""

import pytest
import torch
from gpu_cases import cases
from op_cases import Ops, Shape

from pagemill.kernels import select
from tests.gpu.conftest import DEVICE, needs_fp8

TINY = Shape(64, 96, 4, 2, 16, 300, 32, 36, 2)
ALONE = [case for case in cases(TINY) if case.only_triton and not case.name.endswith("4096")]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[needs_fp8] if "fp8" in c.name else []) for c in ALONE]
)
def test_it_runs(case):
    """What `tests/test_bench_kernels.py` cannot run."""
    ops = Ops(select("triton", DEVICE, torch.float32), torch.float32, DEVICE.type)
    work = case.make(ops)
    work.call()
    assert work.moved > 0


def test_they_are_there():
    """Norms and roundings to 8 bits, and int4 made plain."""
    kinds = {case.name.rsplit("-", 1)[0] for case in ALONE}
    assert kinds == {"rms_norm-int8", "rms_norm-fp8", "quantize-int8", "quantize-fp8", "unpack-int4"}
