"""Several engines, each in a process that may be killed: every page once, the same text, and nobody left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pagemill.engine
from pagemill import Engine, Fleet, SamplingParams
from pagemill.cli import app
from pagemill.errors import ConfigError, DeviceError, RequestError
from pagemill.fleet import _Worker
from pagemill.pages.source import PageRef

PAGES = Path(__file__).parents[1] / "bench" / "pages"
SAMPLES = [str(PAGES / f"{name}.png") for name in ("prose_00", "form_24", "legal_12", "form_30", "prose_09")]
OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_bytes": 64 << 20}
SOME = SamplingParams(max_new_tokens=100, max_retries=0)
SHORT = SamplingParams(max_new_tokens=8)
POISON = 137


def kill_if_poisoned(rgb):
    """What a page does that a driver or a decoder dies of: a classical engine called by `draft_text`."""
    if (rgb[0, 0] == POISON).all():
        os.kill(os.getpid(), signal.SIGKILL)
    return ""


def lose_the_device_once(rgb):
    """Give the engine of the first process that comes here a device that is lost in its next step."""
    marker = Path(tempfile.gettempdir()) / f"pagemill-lost-{os.getppid()}"
    with suppress(FileExistsError):
        marker.touch(exist_ok=False)
        (engine,) = pagemill.engine._open_engines
        error = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access")
        engine.core.runner.execute = Mock(side_effect=error)
    return ""


def _hang_once(how):
    """Have the engine of the first process that comes here hang once it has read a page; the marker names the process."""
    marker = Path(tempfile.gettempdir()) / f"pagemill-hung-{os.getppid()}"
    with suppress(FileExistsError):
        with open(marker, "x") as file:
            file.write(str(os.getpid()))
        (engine,) = pagemill.engine._open_engines
        execute = engine.core.runner.execute

        def hang(plan):
            if engine.core.stats.finished:
                how()
            return execute(plan)

        engine.core.runner.execute = hang
    return ""


def hang_in_a_kernel(rgb):
    """The engine's thread waits for ever; the process's other threads go on."""
    return _hang_once(threading.Event().wait)


def hang_altogether(rgb):
    """As where a call that never returns holds the interpreter lock."""
    return _hang_once(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def pids(fleet):
    return [process["pid"] for process in fleet.describe()["processes"]]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def texts(pages):
    return sorted((page.source, page.page, page.status, page.raw) for page in pages)


@pytest.fixture(scope="module")
def fleet():
    with Fleet.from_pretrained(devices=["cpu", "cpu"], **OPTIONS) as fleet:
        processes = pids(fleet)
        yield fleet
        processes += pids(fleet)
    assert all(map(is_gone, processes))
    with pytest.raises(RequestError, match="closed"):
        fleet.read(SAMPLES[0])


@pytest.fixture(scope="module")
def expected():
    with Engine.from_pretrained(**OPTIONS) as engine:
        return texts(engine.read([*SAMPLES, "missing.png", str(PAGES / "digital_3p.pdf")], params=SOME))


def test_reads_as_one_engine_does_and_both_take_part(fleet, expected):
    found = list(fleet.read([*SAMPLES, "missing.png", PAGES / "digital_3p.pdf"], params=SOME))
    assert texts(found) == expected
    assert [page.error for page in found if page.status == "error"] == [
        "missing.png: there is no such file or folder"
    ]
    facts, stats = fleet.describe(), fleet.stats()
    assert facts["device"] == "cpu,cpu"
    assert facts["max_num_seqs"] == 8
    assert facts["kv_cache_bytes"] == 128 << 20
    assert stats.finished == 8
    assert stats.max_num_seqs == 4
    assert 0 < stats.occupancy <= 1
    skipped = {(source, 1) for source in SAMPLES[1:]}
    assert [page.source for page in fleet.read(SAMPLES, skip=skipped, params=SHORT)] == SAMPLES[:1]
    assert list(fleet.read([])) == []


def test_pages_are_spread_and_handed_out_a_few_at_a_time(fleet):
    before = fleet.stats().finished
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield PageRef(SAMPLES[taken % 5], 1)

    reading = fleet.read(SAMPLES[0], params=SHORT)
    fleet._readings[max(fleet._readings)].pages = endless()
    next(reading)
    most = sum(worker.room for worker in fleet._workers)
    assert taken <= most + 2  # and one to replace the page that came back, and one in hand
    assert {worker for worker, _ in fleet._readings[max(fleet._readings)].held.values()} == set(
        fleet._workers
    )
    reading.close()  # early: what runs is cancelled, and the engines read on
    assert not fleet._readings
    assert len(list(fleet.read(SAMPLES[:2], params=SHORT))) == 2
    assert fleet.stats().finished - before < taken + 2


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"resolution": 3}, "resolution should be"),
        ({"params": SamplingParams(guidance={"type": "nonsense"})}, "JSON schema"),
        ({"draft_text": lambda _: ""}, "cannot be sent"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(fleet, wrong, error):
    with pytest.raises((ConfigError, RequestError), match=error):
        fleet.read(SAMPLES[0], **wrong)
    assert not fleet._readings


def test_killed_worker_costs_no_page_and_is_begun_anew(fleet, expected):
    before, victim = pids(fleet), None
    found = []
    for page in fleet.read([*SAMPLES, "missing.png", PAGES / "digital_3p.pdf"], params=SOME):
        if page.status == "ok" and victim is None:
            (reading,) = fleet._readings.values()
            victim, _ = next(iter(reading.held.values()))
            os.kill(victim.pid, signal.SIGKILL)
        found.append(page)
    assert texts(found) == expected
    wait_until(lambda: victim.ready and victim.pid not in before)
    assert len(set(before) & set(pids(fleet))) == 1


def test_worker_that_loses_its_device_is_begun_anew(fleet, expected):
    before = pids(fleet)
    marker = Path(tempfile.gettempdir()) / f"pagemill-lost-{os.getpid()}"
    try:
        found = list(fleet.read(SAMPLES, draft_text=lose_the_device_once, params=SOME))
        assert marker.exists()
    finally:
        marker.unlink(missing_ok=True)
    assert texts(found) == [row for row in expected if row[0] in SAMPLES]
    wait_until(lambda: all(worker.ready for worker in fleet._workers))
    assert len(set(before) & set(pids(fleet))) == 1
    assert any("illegal memory access" in worker.failure for worker in fleet._workers)


@pytest.mark.parametrize("hang", [hang_in_a_kernel, hang_altogether])
def test_worker_that_hangs_is_ended_and_begun_anew(monkeypatch, fleet, expected, hang):
    wait_until(lambda: all(worker.ready for worker in fleet._workers))
    before = {worker.pid: worker for worker in fleet._workers}
    monkeypatch.setattr("pagemill.fleet._SECONDS_TO_END", 1.0)
    marker = Path(tempfile.gettempdir()) / f"pagemill-hung-{os.getpid()}"
    with monkeypatch.context() as impatient:
        for worker in fleet._workers:
            impatient.setattr(worker, "stall_seconds", 3.0)
        try:
            found = list(fleet.read(SAMPLES, draft_text=hang, params=SOME))
            victim = int(marker.read_text())
        finally:
            marker.unlink(missing_ok=True)
    assert texts(found) == [row for row in expected if row[0] in SAMPLES]
    wait_until(lambda: is_gone(victim))
    assert "ended no step in" in before[victim].failure
    wait_until(lambda: all(worker.ready for worker in fleet._workers))
    at = [worker.turn for worker in fleet._workers]
    wait_until(lambda: all(worker.turn > then for worker, then in zip(fleet._workers, at, strict=True)))


def test_patience_is_longer_until_a_page_is_read():
    worker = _Worker("cpu", {}, {}, stall_seconds=50.0)
    assert worker.patience == math.inf
    worker.turn = time.monotonic() - 60.0
    assert 430 < worker.patience <= 440
    worker.proven = True
    assert -20 < worker.patience <= -10


def test_device_that_hangs_while_it_loads_anew_is_given_up_even_if_its_process_cannot_be_ended(monkeypatch):
    with Fleet.from_pretrained(devices=["cpu"], stall_seconds=5, **OPTIONS) as fleet:
        monkeypatch.setattr("pagemill.fleet._SLOW_START", 1)
        monkeypatch.setattr("pagemill.fleet._WORKER", "import threading; threading.Event().wait()")
        (worker,) = fleet._workers
        monkeypatch.setattr(worker, "stall_seconds", 1.0)
        wait, stuck = subprocess.Popen.wait, []

        def never(self, timeout=None):
            if self.pid == first:
                return wait(self, timeout)
            stuck.append(self)
            raise subprocess.TimeoutExpired("", timeout)

        first = worker.pid
        monkeypatch.setattr(subprocess.Popen, "wait", never)
        reading = fleet.read(SAMPLES, params=SOME)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(DeviceError, match=r"cannot be ended \(.*did not load the model within 1 seconds"):
            list(reading)
    assert stuck
    wait(stuck[0], 10)


@pytest.mark.parametrize("seconds", [0, 4, -1, math.nan])
def test_patience_that_cannot_be_meant(seconds):
    with pytest.raises(ConfigError, match="stall_seconds should be at least 5"):
        Fleet.from_pretrained(devices=["cpu"], stall_seconds=seconds)


def test_the_commands_option(monkeypatch):
    told = []
    monkeypatch.setattr(Fleet, "__init__", lambda self, name, workers: told.extend(workers) or 1 / 0)
    assert CliRunner().invoke(app, ["read", SAMPLES[0], "--devices", "cpu", "--stall-seconds", "7"]).exit_code
    assert [seconds for *_, seconds in told] == [7.0]
    alone = CliRunner().invoke(app, ["read", SAMPLES[0], "--stall-seconds", "7"])
    assert alone.exit_code == 2
    assert "--stall-seconds needs --devices" in alone.output


def test_page_that_kills_its_process_becomes_an_error_and_the_others_are_read(fleet, expected, tmp_path):
    page = np.asarray(Image.open(SAMPLES[1]).convert("RGB")).copy()
    page[0, 0] = POISON
    poisoned = str(tmp_path / "poison.png")
    Image.fromarray(page).save(poisoned)
    pages = [*SAMPLES[:2], poisoned, *SAMPLES[2:]]
    found = list(fleet.read(pages, draft_text=kill_if_poisoned, params=SOME))
    errors = [page for page in found if page.status == "error"]
    assert [(page.source, page.page) for page in errors] == [(poisoned, 1)]
    assert "SIGKILL" in errors[0].error
    others = texts(page for page in found if page.status != "error")
    assert others == [row for row in expected if row[0] in SAMPLES]


def test_no_worker_left_is_one_sentence(monkeypatch, fleet):
    """What is finished was yielded; the rest is not called failed, since nothing says that it is to blame. The fleet is
    of no use afterwards: this test is its last.
    """
    wait_until(lambda: all(worker.ready for worker in fleet._workers))
    monkeypatch.setattr("pagemill.fleet._FRUITLESS_LIVES", 0)
    reading = fleet.read([*SAMPLES, PAGES / "digital_3p.pdf"], params=SOME)
    found = [next(reading)]
    for pid in pids(fleet):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"no engine is left \(cpu: .*SIGKILL.*; cpu: .*SIGKILL"):
        found.extend(reading)
    assert all(page.status == "ok" for page in found)
    with pytest.raises(DeviceError, match="no engine is left"):
        fleet.read(SAMPLES)
    assert fleet.stats().steps == 0


@pytest.mark.parametrize(
    ("devices", "error"),
    [
        ([], "a list of names"),
        ("cpu,cpu", "a list of names"),
        (["cuda:1"], "CUDA_VISIBLE_DEVICES names 1"),
        (["abacus"], "'abacus'"),
    ],
)
def test_devices_that_there_are_not(monkeypatch, devices, error):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=error):
        Fleet.from_pretrained(devices=devices, **OPTIONS)


def test_command_killed_and_resumed_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out.jsonl"
    arguments = ["read", *SAMPLES, str(PAGES / "digital_3p.pdf"), "-o", str(output), "--resume"]
    arguments += ["--devices", "cpu,cpu", "--concurrency", "1", "--max-new-tokens", "60"]
    command = [sys.executable, "-c", "from pagemill.cli import main; main()", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 1)
    children = Path(f"/proc/{process.pid}/task")
    workers = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert output.read_bytes().count(b"\n") < 8, "it was to be killed before it ends"
    wait_until(lambda: all(map(is_gone, workers)))

    done = CliRunner().invoke(app, [*arguments, "--devices", "cpu"])
    assert done.exit_code == 0, done.output
    assert "already" in done.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    pages = sorted((Path(r["source"]).name, r["page"], r["status"]) for r in records)
    pdf = [("digital_3p.pdf", page, "ok") for page in (1, 2, 3)]
    assert pages == sorted([*pdf, *((Path(name).name, 1, "ok") for name in SAMPLES)])
