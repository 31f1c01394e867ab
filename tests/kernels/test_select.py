import os
import subprocess
import sys
import textwrap

import pytest
import torch

import pagemill._native as _native
from pagemill.errors import KernelUnavailable
from pagemill.kernels import select

CPU = torch.device("cpu")


def test_auto_is_native_on_the_cpu_and_reference_elsewhere() -> None:
    native = f"native ({_native.isa()})"
    assert set(select("auto", CPU, torch.float32).describe().values()) == {native}
    assert set(select("auto", torch.device("meta"), torch.float32).describe().values()) == {
        "reference (torch)"
    }


def test_forced_kinds_are_what_they_say(dtype: torch.dtype) -> None:
    assert set(select("reference", CPU, dtype).describe().values()) == {"reference (torch)"}
    assert set(select("native", CPU, dtype).describe().values()) == {f"native ({_native.isa()})"}


@pytest.mark.parametrize("forced", [*_native.isas(), *_native.emulated_isas(), ""])
def test_the_environment_forces_an_instruction_set(forced: str) -> None:
    assert _run("import pagemill._native as n; print(n.isa())", forced) == (forced or _native.isas()[0])


def test_an_instruction_set_that_the_machine_lacks_is_refused_before_any_work() -> None:
    told = _run(
        """
        import torch
        from pagemill.errors import KernelUnavailable
        from pagemill.kernels import select
        for kind in ("auto", "reference"):
            try:
                select(kind, torch.device("cpu"), torch.float32)
            except KernelUnavailable as error:
                print(error)
        """,
        "sse9",
    ).splitlines()
    names = ", ".join(_native.isas())
    assert told == [f"PAGEMILL_ISA: expected one of this machine's {names}, found sse9"] * 2


def _run(code: str, isa: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PAGEMILL_ISA": isa}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("kind", "device", "dtype"),
    [
        ("triton", "cpu", torch.float32),
        ("native", "meta", torch.float32),
        ("fastest", "cpu", torch.float32),
        ("auto", "cpu", torch.float16),
    ],
)
def test_what_cannot_run_is_refused(kind: str, device: str, dtype: torch.dtype) -> None:
    with pytest.raises(KernelUnavailable, match="use"):
        select(kind, torch.device(device), dtype)


@pytest.mark.parametrize(("capability", "takes"), [((8, 0), False), ((8, 9), True), ((10, 0), True)])
def test_fp8_keys_and_values_need_a_gpu_that_converts_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], takes: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = select("triton", torch.device("cuda"), torch.bfloat16)
    assert (torch.float8_e4m3fn in chosen.quantised_kv) == takes
    assert torch.int8 in chosen.quantised_kv


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for kind in ("auto", "triton"):
        with pytest.raises(KernelUnavailable, match=r"Old GPU has compute capability 7\.5.* need 8\.0"):
            select(kind, torch.device("cuda"), torch.bfloat16)
