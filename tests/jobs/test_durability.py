"""Real processes, really killed, on disks that are really full: every page ends as exactly one record."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import pages_of

FAKE_CLI = Path(__file__).parent / "fake_cli.py"


def start(
    *arguments: str | Path, cwd: Path, limit_bytes: int | None = None, **env: str
) -> subprocess.Popen[bytes]:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, str(FAKE_CLI), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


def scans(folder: Path, files: int, pages: int) -> list[str]:
    names = [f"scan{index:02d}_p{pages}.png" for index in range(files)]
    for name in names:
        (folder / name).touch()
    return names


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def keys(path: Path) -> list[tuple[object, object]]:
    return sorted((record["source"], record["page"]) for record in records(path))


def expected(names: list[str]) -> list[tuple[str, int]]:
    return sorted((name, page) for name in names for page in range(1, pages_of(name) + 1))


def wait_for_bytes(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and (not path.exists() or path.stat().st_size < size):
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", ["jsonl", "md"])
def test_kill_9_and_resume_gives_every_page_once(tmp_path: Path, seed: int, suffix: str) -> None:
    dice = random.Random(seed)
    names = scans(tmp_path, files=12, pages=9)
    output = tmp_path / f"out.{suffix}"
    journal = output if suffix == "jsonl" else tmp_path / "out.md.journal.jsonl"
    kills = 0
    for _ in range(4):
        before = journal.stat().st_size if journal.exists() else 0
        process = start("read", *names, "-o", output, "--resume", cwd=tmp_path, FAKE_DELAY="0.003")
        wait_for_bytes(journal, before + dice.randrange(9000), process)
        time.sleep(dice.random() * 0.003)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        finish(process)
        if journal.exists() and dice.random() < 0.5:
            with open(journal, "ab") as file:  # what a kill in the middle of a write leaves
                file.write(
                    b'{"source":"scan00_p9.png","page":1,"status":"ok","header":"x'[: dice.randrange(60)]
                )
    assert kills >= 2
    code, _, err = finish(start("read", *names, "-o", output, "--resume", cwd=tmp_path))
    assert code == 0, err
    if suffix == "jsonl":
        assert keys(output) == expected(names)
    else:
        text = output.read_text()
        titles = [line for line in text.splitlines() if line.startswith("#")]
        wanted = [t for name in names for t in (f"# {name}", *(f"## Page {n}" for n in range(1, 10)))]
        assert titles == wanted
        assert not journal.exists()


def test_sigkill_never_takes_back_a_record(tmp_path: Path) -> None:
    names = scans(tmp_path, files=10, pages=20)
    output = tmp_path / "out.jsonl"
    process = start("read", *names, "-o", output, cwd=tmp_path, FAKE_DELAY="0.002")
    wait_for_bytes(output, 5000, process)
    process.kill()
    finish(process)
    whole = output.read_bytes()
    whole = whole[: whole.rindex(b"\n") + 1]
    code, _, err = finish(start("read", *names, "-o", output, "--resume", cwd=tmp_path))
    assert code == 0
    assert output.read_bytes().startswith(whole)
    lines = whole.count(b"\n")
    assert err.startswith(f"{lines} pages are in {output} already.\n")
    assert f"{200 - lines} pages: " in err


def test_full_disk_is_one_sentence_and_resume_mends_it(tmp_path: Path) -> None:
    names = scans(tmp_path, files=10, pages=10)
    output = tmp_path / "out.jsonl"
    code, _, err = finish(
        start("read", *names, "-o", output, cwd=tmp_path, limit_bytes=6000, FAKE_DELAY="0.001")
    )
    assert code == 2
    assert err.count("\n") == 1, err
    assert "cannot write" in err
    assert "--resume" in err
    assert "Traceback" not in err
    data = output.read_bytes()
    assert 0 < len(data) <= 6000
    assert data.endswith(b"\n"), "what was not reported is taken back"
    assert len(records(output)) >= 1
    code, _, err = finish(start("read", *names, "-o", output, "--resume", cwd=tmp_path))
    assert code == 0, err
    assert keys(output) == expected(names)


def test_full_disk_while_the_document_is_made_keeps_the_journal(tmp_path: Path) -> None:
    names = scans(tmp_path, files=4, pages=10)
    output = tmp_path / "out.json"
    journal = tmp_path / "out.json.journal.jsonl"
    finish(start("read", *names, "-o", tmp_path / "all.jsonl", cwd=tmp_path))
    size = (tmp_path / "all.jsonl").stat().st_size  # an array is a few bytes longer than the journal
    code, _, err = finish(start("read", *names, "-o", output, cwd=tmp_path, limit_bytes=size))
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert not output.exists()
    assert sorted(p.name for p in tmp_path.glob("out.*")) == [journal.name]
    code, _, err = finish(start("read", *names, "-o", output, "--resume", cwd=tmp_path))
    assert code == 0, err
    assert len(json.loads(output.read_text())) == 40


@pytest.mark.parametrize("format", ["jsonl", "json"])
def test_full_device(tmp_path: Path, format: str) -> None:
    names = scans(tmp_path, files=2, pages=2)
    code, _, err = finish(start("read", *names, "-o", "/dev/full", "--format", format, cwd=tmp_path))
    assert code == 2
    assert err == "error: cannot write /dev/full: No space left on device.\n"


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_ctrl_c_keeps_finished_pages_and_tells_how_to_go_on(tmp_path: Path, suffix: str) -> None:
    names = scans(tmp_path, files=10, pages=20)
    output = tmp_path / f"out.{suffix}"
    journal = output if suffix == "jsonl" else tmp_path / "out.txt.journal.jsonl"
    process = start("read", *names, "-o", output.name, "--overwrite", cwd=tmp_path, FAKE_DELAY="0.005")
    wait_for_bytes(journal, 3000, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    again = f"pagemill read {' '.join(names)} -o {output.name} --resume\n"
    assert err.endswith(f"Go on with: {again}")
    found = keys(journal)
    assert 0 < len(found) < 200
    assert len(set(found)) == len(found)
    code, _, err = finish(start("read", *names, "-o", output.name, "--resume", cwd=tmp_path))
    assert code == 0, err
    if suffix == "jsonl":
        assert keys(output) == expected(names)
    else:
        assert output.read_text().count("\f") == 199


def test_ctrl_c_does_not_repeat_a_thousand_names(tmp_path: Path) -> None:
    names = scans(tmp_path, files=60, pages=20)
    process = start("read", *names, "-o", "out.jsonl", cwd=tmp_path, FAKE_DELAY="0.005")
    wait_for_bytes(tmp_path / "out.jsonl", 1000, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.endswith("finished pages are safe. Go on with the same command and --resume.\n")


@pytest.mark.parametrize("format", ["jsonl", "md"])
def test_a_stream_gets_what_was_read_before_the_device_was_lost(tmp_path: Path, format: str) -> None:
    names = scans(tmp_path, files=8, pages=1)
    process = start("read", *names, "--format", format, "-q", cwd=tmp_path, FAKE_LOST=names[6])
    code, out, err = finish(process)
    assert code == 2
    assert out.count('{"source":' if format == "jsonl" else "## Page") == 3  # those that the engine gave back
    assert err == "stopped, for no device is left.\nerror: cuda:0 is lost to this process\n"


def test_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    names = scans(tmp_path, files=10, pages=9)
    process = start("read", *names, cwd=tmp_path, FAKE_DELAY="0.3", FAKE_CLOSE="60")
    assert process.stdout is not None
    assert process.stdout.readline()  # a page is finished: the run is under way
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"interrupted" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    names = scans(tmp_path, files=10, pages=20)
    process = start("read", *names, cwd=tmp_path, FAKE_DELAY="0.001")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'{"source":')
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait(timeout=30) == 141
    assert err == ""


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    names = scans(tmp_path, files=10, pages=20)
    output = tmp_path / "out.jsonl"
    first = start("read", *names, "-o", output, cwd=tmp_path, FAKE_DELAY="0.005")
    wait_for_bytes(output, 500, first)
    first.send_signal(signal.SIGSTOP)  # it must not end before the others have tried
    for option in ("--resume", "--overwrite"):
        code, _, err = finish(start("read", *names, "-o", output, option, cwd=tmp_path))
        assert code == 2
        assert "another run is writing" in err
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert keys(output) == expected(names)
