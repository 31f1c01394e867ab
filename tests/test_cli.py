"""The command line as a program: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pagemill.cli import app

FAKE_CLI = Path(__file__).parent / "jobs" / "fake_cli.py"


def pagemill(*arguments: str | bytes | Path, cwd: Path, **env: str) -> tuple[int, str, str]:
    """Run the command line with the fake engine; return exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, str(FAKE_CLI), *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **env},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a_p2.png", "b.png", "loop.png", "bad.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_records_go_to_standard_output(folder: Path) -> None:
    code, out, err = pagemill("read", "a_p2.png", "b.png", cwd=folder)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert sorted((r["source"], r["page"]) for r in records) == [
        ("a_p2.png", 1),
        ("a_p2.png", 2),
        ("b.png", 1),
    ]
    assert list(records[0]) == [
        *("source", "page", "status", "header", "margin", "footer", "text"),
        *("finish_reason", "tokens", "seconds", "model", "error"),
        *("confidence", "mismatch", "loops", "drafts", "attempts", "shortcut"),
    ]
    assert err.startswith("3 pages: 3 ok, 0 degenerate, 0 failed · ")
    assert err.endswith("→ standard output\n")


@pytest.mark.parametrize(
    ("format", "first"), [("json", "["), ("md", "# a_p2.png"), ("txt", "header of a_p2.png")]
)
def test_documents_go_to_standard_output(folder: Path, format: str, first: str) -> None:
    code, out, _ = pagemill("read", "a_p2.png", "-o", "-", "--format", format, cwd=folder)
    assert code == 0
    assert out.splitlines()[0] == first


def test_degenerate_pages_are_no_failure(folder: Path) -> None:
    code, _, err = pagemill("read", "loop.png", "b.png", cwd=folder)
    assert code == 0
    assert err.startswith("2 pages: 1 ok, 1 degenerate, 0 failed")


def test_failed_page_is_named_and_takes_no_other_down(folder: Path) -> None:
    code, _, err = pagemill("read", "bad.png", "b.png", "missing.png", "-o", "out.jsonl", cwd=folder)
    assert code == 1
    assert err.startswith("3 pages: 1 ok, 0 degenerate, 2 failed")
    assert "  failed: bad.png, page 1: cannot be decoded\n" in err
    assert "  failed: missing.png" in err
    assert len((folder / "out.jsonl").read_text().splitlines()) == 3
    code, _, err = pagemill(
        "read", "bad.png", "b.png", "missing.png", "-o", "out.jsonl", "--resume", cwd=folder
    )
    assert code == 1
    assert "2 pages had failed in an earlier run and were not read again." in err


def test_quiet_says_nothing(folder: Path) -> None:
    assert pagemill("read", "bad.png", "a_p2.png", "a_p2.png", "-o", "o.md", "-q", cwd=folder) == (1, "", "")


def test_file_given_twice_is_read_once_and_said(folder: Path) -> None:
    code, out, err = pagemill("read", "b.png", "./b.png", cwd=folder)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert err.startswith("1 of the inputs name a file a second time")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.png"], "missing.png"),
        (["b.png", "--model", "nowhere"], "nowhere is neither a folder nor a known checkpoint."),
        (["b.png", "-o", "out.csv"], "--format jsonl|json|md|txt"),
        (["b.png", "-o", "missing/out.jsonl"], "cannot write"),
        (["b.png", "-o", "."], "the suffix names no format"),
        (["b.png", "-o", ".", "--format", "md"], "is a folder"),
        (["b.png", "--resume"], "--resume needs a file"),
        (["b.png", "-o", "x.md", "--resume", "--overwrite"], "give one of them"),
        (["b.png", "-o", "b_full.jsonl"], "--resume to go on"),
        ([""], "an input has an empty name"),
        (["b.png", "-o", ""], "the output has an empty name"),
        (["b.png", "-o", "", "--format", "md"], "the output has an empty name"),
        (["b.png", "--model", "too\x1bbig"], "there is not enough memory"),
        (["b\x1b[31m\n.png"], "b\\x1b[31m\\n.png"),
        (["b_full.jsonl", "b.png", "-o", "b_full.jsonl", "--overwrite"], "would destroy the input"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, arguments: list[str], sentence: str) -> None:
    (folder / "b_full.jsonl").write_text("mine\n")
    code, out, err = pagemill("read", *arguments, cwd=folder)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert (folder / "b_full.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["read"],
        ["read", "b.png", "--format", "csv"],
        ["read", "b.png", "--device", "tpu"],
        ["read", "b.png", "--dtype", "int3"],
        ["read", "b.png", "--max-new-tokens", "0"],
        ["read", "b.png", "--concurrency", "0"],
        ["read", "b.png", "--dpi", "-1"],
        ["read", "b.png", "--dpi", "nan"],
        ["read", "b.png", "--concurrency", "1000000000000"],
        ["read", "b.png", "--kv-cache-gb", "inf"],
        ["read", "b.png", "--kv-cache-gb", "nan"],
        ["read", "b.png", "--kv-cache-gb", "1e300"],
        ["read", "b.png", "--guard", "maybe"],
        ["read", "b.png", "--drafts", "3"],
        *(
            ["read", "b.png", "--resolution", value]
            for value in ("27", "20001", "-5", "1e3", "half", "", "²")
        ),
        ["read", "b.png", "--no-such-option"],
        ["no-such-command"],
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str]) -> None:
    code, out, err = pagemill(*arguments, cwd=folder)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_model_that_does_not_load_leaves_the_old_output(folder: Path) -> None:
    (folder / "out.jsonl").write_text("mine\n")
    code, _, _ = pagemill("read", "b.png", "-o", "out.jsonl", "--overwrite", "--model", "nowhere", cwd=folder)
    assert code == 2
    assert (folder / "out.jsonl").read_text() == "mine\n"


def test_bug_is_one_sentence_and_a_traceback_only_when_asked(folder: Path) -> None:
    code, _, err = pagemill("read", "b.png", cwd=folder, FAKE_RAISE="b.png")
    assert code == 70
    assert err == "error: RuntimeError: the engine broke; this is a bug in pagemill (--debug shows where).\n"
    code, _, err = pagemill("read", "b.png", "--debug", cwd=folder, FAKE_RAISE="b.png")
    assert code == 70
    assert "Traceback" in err


def test_file_name_that_is_not_utf8(folder: Path) -> None:
    name = b"caf\xe9_bad.png"
    (folder / os.fsdecode(name)).touch()
    code, out, err = pagemill("read", name, cwd=folder, PYTHONIOENCODING="utf-8")
    assert code == 1
    assert os.fsencode(json.loads(out)["source"]) == name
    assert "failed: caf\\udce9_bad.png" in err


def test_file_name_that_looks_like_markup(folder: Path) -> None:
    (folder / "[red]bad[1].png").touch()
    code, out, err = pagemill("read", "[red]bad[1].png", cwd=folder)
    assert code == 1
    assert json.loads(out)["source"] == "[red]bad[1].png"
    assert "failed: [red]bad[1].png, page 1" in err


def test_options_reach_the_engine(folder: Path) -> None:
    code, out, _ = pagemill("describe", "-m", "some", "--device", "cuda", "--dtype", "float32", cwd=folder)
    facts = json.loads(out)
    assert code == 0
    assert (facts["model"], facts["device"], facts["dtype"]) == ("some", "cuda", "float32")


def test_steering_reaches_the_engine(folder: Path) -> None:
    def how(*arguments: str) -> dict[str, object]:
        code, _, err = pagemill("read", "b.png", *arguments, cwd=folder, FAKE_HOW=str(folder / "how.json"))
        assert code == 0, err
        asked = json.loads((folder / "how.json").read_text())
        return asked | asked.pop("params")

    default = dict(dpi=None, resolution="auto", crop=False, max_new_tokens=None)
    default |= dict(guidance="auto", guard="rescue", drafts="auto")
    assert how() == default
    schema = {"type": "object", "properties": {"título": {"type": "string"}}}
    (folder / "schema.json").write_text(json.dumps(schema, ensure_ascii=False), encoding="utf-8")
    for arguments, expected in [
        (
            "--guidance page --guard off --resolution full",
            dict(guidance="page", guard="off", resolution="full"),
        ),
        ("--guidance schema.json --guard stop", dict(guidance=schema, guard="stop")),
        ("--guidance off --drafts off --crop", dict(guidance="off", drafts="off", crop=True)),
        ("--guidance regex:a|b --resolution 1288 --dpi 9", dict(resolution=1288, dpi=9.0)),
    ]:
        if "regex" in arguments:
            expected["guidance"] = "Regex(pattern='a|b')"
        assert how(*arguments.split()) == default | expected


def refused(*arguments: str) -> str:
    """What is said to arguments that are wrong; in this process, since nothing gets to run."""
    done = CliRunner().invoke(app, ["read", "b.png", "--model", "nowhere", *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--guard", "maybe"),
        ("--drafts", "3"),
        *(("--resolution", value) for value in ("27", "20001", "-5", "1e3", "half", "", "²")),
    ],
    ids=" ".join,
)
def test_steering_that_is_none(arguments: tuple[str, str]) -> None:
    err = refused(*arguments)
    assert arguments[0] in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.json", None, "give page, off, or a file with a JSON schema"),
        (".", None, "give page, off"),
        ("", None, "give page, off"),
        ("nul\0.json", None, "give page, off"),
        ("no.json", b"{title: string}", "--guidance no.json is not JSON: Expecting property name"),
        ("list.json", b'["object"]', "--guidance list.json should hold a JSON schema, an object."),
        ("deep.json", b"[" * 100_000, "--guidance deep.json is not JSON"),
        ("latin.json", b'{"title": "\xe9"}', "--guidance latin.json: give page, off"),
        (
            "large.json",
            b'{"title": "' + b"x" * 1_000_000 + b'"}',
            "--guidance large.json: the schema is larger",
        ),
        ("a\x1b[2J\n.json", b"", "a\\x1b[2J\\n.json is not JSON"),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "nul",
        "no JSON",
        "list",
        "deep",
        "not UTF-8",
        "large",
        "control characters",
    ],
)
def test_guidance_from_a_file_that_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, sentence: str
) -> None:
    monkeypatch.chdir(folder)
    if content is not None:
        (folder / name).write_bytes(content)
    (folder / "old.jsonl").write_text("mine\n")
    err = refused("--guidance", name, "-o", "old.jsonl", "--overwrite")
    assert err.startswith("error: --guidance ")
    assert sentence in err
    assert err.count("\n") == 1
    assert (folder / "old.jsonl").read_text() == "mine\n"


def test_steering_is_in_the_help(folder: Path) -> None:
    _, out, _ = pagemill("read", "--help", cwd=folder)
    words = " ".join(out.replace("│", " ").split())
    for option in (
        "--guidance page|off|SCHEMA.json",
        "--guard",
        "--drafts",
        "--resolution auto|full|N",
        "--crop",
    ):
        assert option in words
    assert "rescue|stop|off" in words


def test_resume_takes_records_of_an_older_version(folder: Path) -> None:
    old = {
        **dict(source="b.png", page=1, status="degenerate", header=None, margin=None, footer=None, text="a"),
        **dict(
            finish_reason="length",
            tokens=dict(image=1, prompt=2, output=3),
            seconds={},
            model="m",
            error=None,
        ),
    }
    line = json.dumps(old, separators=(",", ":")) + "\n"
    (folder / "out.jsonl").write_text(line)
    code, _, err = pagemill("read", "b.png", "a_p2.png", "-o", "out.jsonl", "--resume", cwd=folder)
    assert code == 0, err
    assert err.startswith("1 page is in ")
    lines = (folder / "out.jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == line
    assert sorted(json.loads(one)["page"] for one in lines[1:]) == [1, 2]
    for format in ("md", "json"):
        (folder / f"o.{format}.journal.jsonl").write_text(line)
        code, _, err = pagemill("read", "b.png", "a_p2.png", "-o", f"o.{format}", "--resume", cwd=folder)
        assert code == 0, err
        assert "page 2 of a_p2.png" in (folder / f"o.{format}").read_text()


def run_on_a_terminal(*arguments: str, cwd: Path, **env: str) -> tuple[int, str]:
    """Run with standard error, and standard output, on a terminal; return the exit code and what it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(FAKE_CLI), *arguments],
        cwd=cwd,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **env},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=30), shown.decode()


def test_terminal_shows_a_live_bar(folder: Path) -> None:
    (folder / "c_p40.png").touch()
    code, shown = run_on_a_terminal(
        "read", "c_p40.png", "loop.png", "bad.png", "-o", "out.jsonl", cwd=folder, FAKE_DELAY="0.04"
    )
    assert code == 1
    assert "0:00:01" in shown, "the clock goes on"
    assert "0 failed" not in shown, "a count of zero is left out"
    assert "pages/s" in shown
    assert "42 pages: 40 ok, 1 degenerate, 1 failed" in shown


def test_bar_and_clock_fit_a_narrow_terminal(folder: Path) -> None:
    (folder / "loop_p30.png").touch()
    arguments = ("read", "loop_p30.png", "bad.png", "-o", "out.jsonl")
    _, shown = run_on_a_terminal(*arguments, cwd=folder, FAKE_DELAY="0.06", COLUMNS="80")
    frames = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("\r") if "0:00:01" in line]
    assert frames
    assert all(re.search(r"0:00:01 [━╸╺]{10} \d+/\d+ pages · \S+ pages/s", frame) for frame in frames)
    assert all(len(frame.strip()) <= 80 for frame in frames)


def test_terminal_shows_the_time_while_no_page_finishes(folder: Path) -> None:
    _, shown = run_on_a_terminal("read", "b.png", "-o", "out.jsonl", cwd=folder, FAKE_DELAY="1.8")
    assert "0:00:01" in shown
    assert "0/1 pages" in shown


def test_terminal_without_a_file_shows_records_not_a_bar(folder: Path) -> None:
    code, shown = run_on_a_terminal("read", "a_p2.png", cwd=folder, FAKE_DELAY="0.02")
    assert code == 0
    assert shown.count('{"source":') == 2
    assert "\x1b[?25l" not in shown, "the bar would hide the cursor"


def test_describe_on_a_terminal_is_a_table(folder: Path) -> None:
    code, shown = run_on_a_terminal("describe", cwd=folder)
    assert code == 0
    assert "kernels.attention" in shown
    assert "fake" in shown


def test_version_and_help_do_not_load_torch(folder: Path) -> None:
    program = (
        "import sys; from pagemill.cli import app; app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    )
    for arguments in (["--version"], ["--help"], ["read", "--help"], ["describe", "--help"]):
        out = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        ).stdout
        assert out
        if arguments == ["--version"]:
            assert out == f"pagemill {version('pagemill')}\n"
        if arguments == ["read", "--help"]:
            assert "pagemill read scans/ contract.pdf -o pages.jsonl --resume" in out
            assert "degenerate pages count as read" in " ".join(out.split())


def test_ctrl_c_while_the_program_is_imported_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pagemill", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_control_characters_of_a_name_do_not_reach_the_terminal(folder: Path) -> None:
    name = "bad\x1b[2J\x9b\n\u202e.png"
    (folder / name).touch()
    for format in ("md", "txt", "jsonl"):
        code, out, err = pagemill("read", name, "--format", format, cwd=folder, PYTHONIOENCODING="utf-8")
        assert code == 1
        assert "failed: bad\\x1b[2J\\x9b\\n\\u202e.png, page 1" in err
        if format != "jsonl":
            assert "bad\\x1b[2J\\x9b\\n\\u202e.png" in out
            assert not {"\x1b", "\x9b", "\u202e"} & set(out)


def test_exit_codes_are_named_in_the_help(folder: Path) -> None:
    _, out, _ = pagemill("read", "--help", cwd=folder)
    assert all(f"{code}:" in out for code in (0, 1, 2, 70, 130, 141) if code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
@pytest.mark.parametrize(
    ("device", "why"),
    [("cuda", "torch"), ("cpu", "measures a GPU"), ("tpu", "device should be cpu or cuda")],
)
def test_tuning_needs_a_gpu(device: str, why: str) -> None:
    done = CliRunner().invoke(app, ["tune", "--device", device])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
