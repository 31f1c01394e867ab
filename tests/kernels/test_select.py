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


def test_amx_keeps_the_matrix_kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "has_amx", lambda: True)
    kernels = select("auto", CPU, torch.bfloat16)
    assert kernels.describe()["linear"] == kernels.describe()["embed"] == "reference (torch)"
    assert kernels.describe()["paged_attention"].startswith("native")
    packed = kernels.pack_linear(torch.eye(8), None)
    assert torch.equal(kernels.linear(torch.ones(1, 8, dtype=torch.bfloat16), packed), torch.ones(1, 8))
    assert kernels.embed(torch.tensor([2]), packed).shape == (1, 8)
    assert select("native", CPU, torch.bfloat16).describe()["linear"].startswith("native")
    assert select("auto", CPU, torch.float32).describe()["linear"].startswith("native")


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
