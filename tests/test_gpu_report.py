"""The report of a GPU box, where there is none: what is asked, and what comes of a command that fails."""

import sys
from types import SimpleNamespace

import gpu_report
import pytest
import torch

PROPERTIES = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80e9, multi_processor_count=132)


@pytest.fixture
def box(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: PROPERTIES)


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "-o", str(tmp_path / "gpu.md")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main() == 2
    assert capsys.readouterr().err == "bench-gpu needs a GPU, and torch sees none here.\n"
    assert not (tmp_path / "gpu.md").exists()


def test_a_failing_command_costs_no_other_section(box, monkeypatch, tmp_path):
    def python(code):
        return [sys.executable, "-c", code]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fails = python("print('\\n'.join(map(str, range(3000)))); 1 / 0")
    steps = [
        gpu_report.Step("a", "First", [fails, python("print('never')")], 60),
        gpu_report.Step("b", "Second", [python("import os; print('TRITON_INTERPRET' in os.environ)")], 60),
        gpu_report.Step("c", "Third", [python("import time; print('begun', flush=True); time.sleep(60)")], 0.6),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_report, "steps", lambda output, checkpoint: steps)
    out = tmp_path / "deep" / "gpu.md"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "-o", str(out)])
    assert gpu_report.main() == 1
    first, second, third = out.read_text().split("\n## ")[1:]
    assert "Some GPU, compute capability 9.0, 80.0 GB, 132 multiprocessors" in out.read_text()
    assert "**FAILED**, exit code 1" in first
    assert "ZeroDivisionError" in first
    assert "lines before)" in first
    assert "\n7\n" not in first
    assert "\n1500\n" in first, "a table of that many rows is whole"
    assert "never" not in first
    assert ": ok, exit code 0" in second
    assert "\nFalse\n" in second
    assert "**FAILED**, ended after 1 s" in third
    assert "begun" in third
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "-o", str(out), "--only", "b"])
    assert gpu_report.main() == 0


def test_the_commands_name_files_that_are_there(tmp_path):
    for step in gpu_report.steps(tmp_path / "gpu.md", tmp_path / "model"):
        for command in step.commands:
            assert command[0] == sys.executable
            paths = [word for word in command[1:] if word.startswith(("bench/", "tests/"))]
            for path in paths:
                if path != "bench/codegen.py":
                    assert (gpu_report.ROOT / path).exists(), path
