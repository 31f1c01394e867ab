from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_engine import Engine, result_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.errors import OutputError
from pagemill.jobs import Inputs, open_output, run
from pagemill.jobs.journal import FinishedPages, Journal, encode
from pagemill.results import PageResult

LINE = encode(result_of("a_p9.png", 1))


def read_all(output: Path, *, pages: int = 3, resume: bool = True) -> list[int]:
    """Run over `a_pN.png`; return the pages that the engine was asked for."""
    engine = Engine()
    with open_output(str(output), resume=resume) as target:
        run(engine, Inputs([f"a_p{pages}.png"]), target)
    return sorted(page for _, page in engine.reads)


def pages_in(output: Path) -> list[int]:
    return sorted(json.loads(line)["page"] for line in output.read_bytes().splitlines())


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4 * len(LINE)), zeros=st.integers(0, 3))
def test_file_cut_anywhere_is_mended(tmp_path_factory: pytest.TempPathFactory, cut: int, zeros: int) -> None:
    output = tmp_path_factory.mktemp("cut") / "out.jsonl"
    whole = b"".join(encode(result_of("a_p4.png", page)) for page in range(1, 5))
    left = whole[:cut]
    torn = b"" if left.endswith(b"\n") else b"\0" * zeros
    output.write_bytes(left + torn)
    read = read_all(output, pages=4)
    assert read == list(range(left.count(b"\n") + 1, 5))
    assert pages_in(output) == [1, 2, 3, 4]
    assert output.read_bytes().startswith(left[: left.rfind(b"\n") + 1])


@pytest.mark.parametrize(
    "content",
    [
        b"notes of mine\n",
        b"notes without a newline",
        b"[\n]\n",
        b'{"source": 1, "page": 1}\n',
        b'{"source":"a","page":1}\n',
        b'{"source":"a","page":"1","status":"ok"}\n',
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        LINE + b"notes\n" + LINE,
        LINE + b"notes without a newline",
        LINE + b"\n",
        LINE[:-5] + b"\n" + LINE,
        b"\xff\xfe",
        b'{"source":"mine","id":7}',
        LINE + b'{"source":"mine","id":7}',
        LINE.replace(b'"page":1', b'"page":true'),
        LINE.replace(b'"margin":null,', b""),
        LINE.replace(b'"margin":null', b'"margin":[]'),
        LINE.replace(b'"error":null', b'"error":{"why":1}'),
        b'{"source":' + b"[" * 100_000,
        b'{"source":' + b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_not_ours_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(OutputError, match="left as it is"):
        open_output(str(output), resume=True)
    assert output.read_bytes() == content


@pytest.mark.parametrize("suffix", ["jsonl", "json", "md", "txt"])
def test_nothing_is_replaced_unasked(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    output.write_bytes(LINE)
    with pytest.raises(OutputError, match="--overwrite"):
        open_output(str(output))
    with open_output(str(output), overwrite=True) as target:
        assert output.read_bytes() == LINE, "opening alone changes nothing: the model may not even load"
        run(Engine(), Inputs(["b_p2.png"]), target)
    assert b"a_p9" not in output.read_bytes()
    assert output.read_bytes().count(b"segunda") == 2


@pytest.mark.parametrize("suffix", ["json", "md", "txt"])
def test_unfinished_run_is_not_replaced_unasked(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    journal = tmp_path / f"out.{suffix}.journal.jsonl"
    journal.write_bytes(LINE)
    with pytest.raises(OutputError, match="--resume"):
        open_output(str(output))
    assert journal.read_bytes() == LINE


def test_empty_file_is_used_without_asking(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.touch()
    assert read_all(output, resume=False) == [1, 2, 3]
    assert pages_in(output) == [1, 2, 3]


def test_run_that_never_starts_leaves_no_file(tmp_path: Path) -> None:
    with open_output(str(tmp_path / "out.jsonl")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_engine_that_breaks_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.md"
    monkeypatch.setenv("FAKE_RAISE", "b_p2")
    with open_output(str(output)) as target, pytest.raises(RuntimeError, match="the engine broke"):
        run(Engine(), Inputs(["a_p9.png", "b_p2.png"]), target)
    assert not output.exists()
    finished = pages_in(tmp_path / "out.md.journal.jsonl")
    assert len(finished) == 6  # the fake engine holds three pages back
    monkeypatch.delenv("FAKE_RAISE")
    engine = Engine()
    with open_output(str(output), resume=True) as target:
        run(engine, Inputs(["a_p9.png", "b_p2.png"]), target)
    assert len(engine.reads) == 11 - len(finished)
    assert output.read_text().count("## Page") == 11


def test_each_record_is_on_disk_before_it_is_reported(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    reported: list[tuple[str, int]] = []

    def on_page(result: PageResult, totals: object) -> None:
        reported.append((result.source, result.page))
        there = {(r["source"], r["page"]) for r in map(json.loads, output.read_bytes().splitlines())}
        assert there >= set(reported)

    with open_output(str(output)) as target:
        totals = run(Engine(), Inputs(["a_p50.png"]), target, on_page=on_page)
    assert len(reported) == totals.pages == 50


def test_fsync_comes_before_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real(fd))[1])
    with open_output(str(tmp_path / "out.jsonl")) as target:
        monkeypatch.setattr(os, "write", _counting(os.write, events))
        run(Engine(), Inputs(["a_p20.png"]), target, on_page=lambda *_: events.append("page"))
    pending = False
    for event in events:
        if event == "write":
            pending = True
        elif event == "fsync":
            pending = False
        else:
            assert not pending
    assert events.count("page") == 20


def _counting(real: object, events: list[str]) -> object:
    def write(fd: int, data: bytes) -> int:
        events.append("write")
        return real(fd, data)  # type: ignore[operator]

    return write


def test_failing_report_stops_the_run(tmp_path: Path) -> None:
    def on_page(*_: object) -> None:
        raise ZeroDivisionError

    with open_output(str(tmp_path / "out.jsonl")) as target, pytest.raises(ZeroDivisionError):
        run(Engine(), Inputs(["a_p3.png"]), target, on_page=on_page)


def test_file_name_that_is_not_utf8_comes_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9_p2.png")
    output = tmp_path / "out.jsonl"
    with open_output(str(output)) as target:
        run(Engine(), Inputs([name]), target)
    lines = output.read_bytes().decode("utf-8").splitlines()
    assert [os.fsencode(json.loads(line)["source"]) for line in lines] == [b"caf\xe9_p2.png"] * 2
    engine = Engine()
    with open_output(str(output), resume=True) as target:
        run(engine, Inputs([name]), target)
    assert engine.reads == []


def test_finished_pages_ignore_the_spelling_of_a_path() -> None:
    finished = FinishedPages()
    finished.add("x/../a.png", 2)
    assert ("a.png", 2) in finished
    assert (os.path.abspath("a.png"), 2) in finished
    assert ("a.png", 1) not in finished
    assert ("b.png", 2) not in finished
    assert len(finished) == 1


def test_lock_is_held_until_close_and_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = Journal.open(path, resume=False, overwrite=False)
    with pytest.raises(OutputError, match="another run"):
        Journal.open(path, resume=True, overwrite=False)
    first.close()
    Journal.open(path, resume=True, overwrite=False).close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/out.jsonl", "No such file or directory"),
        ("file.txt/out.jsonl", "Not a directory"),
        ("folder", "is a folder"),
        ("x" * 300 + ".jsonl", "File name too long"),
    ],
)
def test_output_that_cannot_be_opened(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=reason):
        open_output(str(tmp_path / name), "jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        open_output(str(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "md"])
def test_resume_in_another_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """There the same relative name is another file, which would pass for read."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    output = tmp_path / f"out.{suffix}"
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FAKE_RAISE", "b_p2")
    with open_output(str(output)) as target, pytest.raises(RuntimeError, match="the engine broke"):
        run(Engine(), Inputs(["a_p9.png", "b_p2.png"]), target)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(OutputError, match=f"names that start from {tmp_path / 'here'}: "):
        open_output(str(output), resume=True)
    monkeypatch.chdir(tmp_path / "here")
    with open_output(str(output), resume=True) as target:
        assert len(target.finished) == 6
        assert target.note is None
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    with open_output(str(output), resume=True) as target:
        assert target.note is not None, "the folder is gone: what is assumed is said"


def test_absolute_names_go_on_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with open_output(str(output)) as target:
        run(Engine(), Inputs([f"{tmp_path}/a_p3.png"]), target)
    monkeypatch.chdir(tmp_path / "there")
    engine = Engine()
    with open_output(str(output), resume=True) as target:
        assert target.note is None
        run(engine, Inputs(["../a_p3.png"]), target)
    assert engine.reads == []


def test_journal_that_lost_its_folder_is_said(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(LINE)
    with open_output(str(output), resume=True) as target:
        assert target.note is not None
        assert "relative names" in target.note
