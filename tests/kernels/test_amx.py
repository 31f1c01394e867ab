"""The AMX kernels as compiled: on the processor, or trapped instruction by instruction where it has no tiles."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pagemill._native as _native

SOURCE = Path(__file__).with_name("amx.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.skipif(not _native.emulated_isas(), reason="needs AVX-512 with bfloat16 around the tiles")
def test_the_machine_code_computes_the_bits_of_the_model(tmp_path: Path) -> None:
    program = tmp_path / "amx"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off"]  # as setup.py has them
    subprocess.run([str(COMPILER), *flags, "-o", str(program), str(SOURCE)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(n) for n in re.findall(r"(\d+) [a-z]", done.stdout)]
    assert len(counts) == 6
    if "amx" not in _native.isas():
        assert min(counts) > 0
