from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_engine import Engine, result_of

from pagemill.errors import ConfigError, OutputError, PageError
from pagemill.jobs import Inputs, Totals, count_pages, infer_format, list_inputs, open_output, run
from pagemill.jobs.documents import as_json, as_markdown, as_text, write_atomically
from pagemill.jobs.progress import rates
from pagemill.results import PageResult


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_a_file_is_read_once_under_its_first_name() -> None:
    touch("a.png", "b.png", "folder/c.png")
    found = list_inputs(["b.png", "./a.png", os.path.abspath("b.png"), "a.png", "folder", "folder/c.png"])
    assert found.sources == ["b.png", "./a.png", "folder/c.png"]
    assert found.repeated == 3
    assert found.unreadable == []


def test_links_to_one_file_are_two_inputs() -> None:
    touch("a.png")
    os.symlink("a.png", "b.png")
    assert list_inputs(["a.png", "b.png"]).sources == ["a.png", "b.png"]


def test_missing_input_is_a_record_and_harms_no_other() -> None:
    touch("a.png", "b.png")
    found = list_inputs(["a.png", "missing.png", "b.png", "missing.png"])
    assert found.sources == ["a.png", "b.png"]
    assert [(r.source, r.page, r.status, r.finish_reason) for r in found.unreadable] == [
        ("missing.png", 1, "error", "error")
    ]
    assert found.repeated == 1
    with open_output("out.json") as target:
        totals = run(Engine(), found, target)
    assert totals.failed == 1
    assert [r["source"] for r in json.loads(Path("out.json").read_text())] == [
        "a.png",
        "missing.png",
        "b.png",
    ]


def test_nothing_found_is_an_error() -> None:
    with pytest.raises(PageError, match=r"missing\.png"):
        list_inputs(["missing.png", "missing.pdf"])
    with pytest.raises(PageError, match="no inputs"):
        list_inputs([])


def test_missing_input_is_not_recorded_again_on_resume() -> None:
    touch("a.png")
    for _ in range(2):
        with open_output("out.jsonl", resume=True) as target:
            totals = run(Engine(), list_inputs(["missing.png", "a.png"]), target)
        assert totals.failed == 1, "an earlier failure is still a failure of the output"
    assert len(Path("out.jsonl").read_text().splitlines()) == 2


def test_pages_are_counted_without_opening_images() -> None:
    touch("a.png", "b.png", "corrupt.pdf")
    found = list_inputs(["a.png", "b.png", "corrupt.pdf"])
    assert list(count_pages(found)) == [(2, False), (3, True)]
    assert list(count_pages(list_inputs(["a.png"]))) == [(1, True)]


@pytest.mark.parametrize(
    ("output", "format"),
    [
        (None, "jsonl"),
        ("-", "jsonl"),
        ("a.JSONL", "jsonl"),
        ("x/a.json", "json"),
        ("a.b.md", "md"),
        ("a.txt", "txt"),
    ],
)
def test_format_from_suffix(output: str | None, format: str) -> None:
    assert infer_format(output) == format


@pytest.mark.parametrize("output", ["out", "out.csv", ".jsonl", "out."])
def test_unknown_suffix(output: str) -> None:
    with pytest.raises(ConfigError, match="--format"):
        infer_format(output)


def sample() -> list[dict[str, object]]:
    return [
        PageResult("a.pdf", 1, "ok", header="ACME\nLtda", text="Olá\n\nmundo\n", footer="1").to_dict(),
        PageResult("a.pdf", 2, "degenerate", text="x x x", margin="Vide").to_dict(),
        PageResult("b.png", 1, "error", error="b.png, page 1: cannot be decoded").to_dict(),
        PageResult("c.png", 1, "ok", text="feed\fin text").to_dict(),
        PageResult("d.png", 1, "ok").to_dict(),
    ]


def test_markdown() -> None:
    assert "".join(as_markdown(sample())) == (
        "# a.pdf\n\n## Page 1\n\n> *header:* ACME\n> Ltda\n\nOlá\n\nmundo\n\n> *footer:* 1\n"
        "\n## Page 2\n\n> *warning:* the model fell into repetition on this page\n\n> *margin:* Vide\n\nx x x\n"
        "\n# b.png\n\n## Page 1\n\n> *error:* b.png, page 1: cannot be decoded\n"
        "\n# c.png\n\n## Page 1\n\nfeed\fin text\n"
        "\n# d.png\n\n## Page 1\n"
    )


def test_text_has_one_part_a_page() -> None:
    parts = "".join(as_text(sample())).split("\f")
    assert parts == [
        "ACME\nLtda\n\nOlá\n\nmundo\n\n1\n",
        "x x x\n\nVide\n",
        "[b.png, page 1 was not read: b.png, page 1: cannot be decoded]\n",
        "feed\nin text\n",
        "\n",
    ]


def test_json_is_an_array_with_one_record_a_line() -> None:
    text = "".join(as_json(sample()))
    assert json.loads(text) == sample()
    assert len(text.splitlines()) == 7
    assert json.loads("".join(as_json([]))) == []


@pytest.mark.parametrize("format", ["json", "md", "txt"])
def test_document_is_in_the_order_of_the_inputs(format: str) -> None:
    names = ["z_p11.png", "a_p2.png", "m_p3.png"]
    touch(*names)
    with open_output(f"out.{format}") as target:
        run(Engine(), list_inputs(names), target)
    text = Path(f"out.{format}").read_text()
    seen = [line.split(" of ")[1] for line in text.replace("\\n", "\n").splitlines() if " of z_p11" in line]
    assert len(seen) >= 11
    places = [
        text.index(f"page {page} of {name}")
        for name, n in zip(names, (11, 2, 3), strict=True)
        for page in range(1, n + 1)
    ]
    assert places == sorted(places)
    assert sorted(os.listdir(".")) == sorted([*names, f"out.{format}"])


def test_records_of_other_inputs_stay_on_resume() -> None:
    touch("a.png", "b.png")
    Path("out.json.journal.jsonl").write_text(result_of("older.png", 1).to_json() + "\n")
    with open_output("out.json", resume=True) as target:
        run(Engine(), list_inputs(["b.png", "a.png"]), target)
    assert [r["source"] for r in json.loads(Path("out.json").read_text())] == ["b.png", "a.png", "older.png"]


def test_finished_document_without_a_journal_is_not_resumed() -> None:
    touch("a.png")
    Path("out.md").write_text("# mine\n")
    with pytest.raises(Exception, match="no unfinished run"):
        open_output("out.md", resume=True)
    assert Path("out.md").read_text() == "# mine\n"


def test_document_through_a_link_replaces_the_file_behind_it() -> None:
    touch("a.png", "folder/real.md")
    os.symlink("folder/real.md", "out.md")
    with open_output("out.md") as target:
        run(Engine(), list_inputs(["a.png"]), target)
    assert os.path.islink("out.md")
    assert "# a.png" in Path("folder/real.md").read_text()


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.md"
    path.write_text("old")

    def chunks() -> object:
        yield "new"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(path, chunks())  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.md"]


@pytest.mark.parametrize("format", ["json", "md", "txt"])
def test_names_that_are_not_utf8_make_valid_documents(format: str) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with open_output(f"out.{format}") as target:
        run(Engine(), Inputs([name]), target)
    text = Path(f"out.{format}").read_bytes().decode("utf-8")
    if format == "json":
        assert os.fsencode(json.loads(text)[0]["source"]) == b"caf\xe9.png"


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--overwrite"):
        open_output("out.jsonl", resume=True, overwrite=True)
    for output in (None, "-", "/dev/null"):
        with pytest.raises(ConfigError, match="--resume needs"):
            open_output(output, "jsonl", resume=True)


@pytest.mark.parametrize("output", ["scan.png", "link.png", "hard.png", "./folder/../scan.png"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_input_is_never_the_output(output: str, resume: bool) -> None:
    touch("folder/x")
    Path("scan.png").write_bytes(b"precious")
    os.symlink("scan.png", "link.png")
    os.link("scan.png", "hard.png")
    with pytest.raises(OutputError, match="destroy the input"):
        open_output(output, "jsonl", resume=resume, overwrite=not resume, sources=["scan.png"])
    assert Path("scan.png").read_bytes() == b"precious"
    open_output("other.jsonl", sources=["scan.png", "missing.png", "a\0b"]).close()


def test_an_input_is_never_the_journal() -> None:
    Path("out.md.journal.jsonl").write_bytes(b"precious")
    with pytest.raises(OutputError, match="destroy the input"):
        open_output("out.md", overwrite=True, sources=["out.md.journal.jsonl"])


def test_a_file_beside_the_document_is_left_alone() -> None:
    touch("a.png")
    Path("out.md.tmp").write_text("mine")
    with open_output("out.md") as target:
        run(Engine(), list_inputs(["a.png"]), target)
    assert Path("out.md.tmp").read_text() == "mine"
    assert sorted(os.listdir(".")) == ["a.png", "out.md", "out.md.tmp"]


def test_an_unlisted_folder_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    touch("in/a.png", "in/locked/b.png", "in/z.png")
    monkeypatch.setattr(os, "scandir", scandir)
    found = list_inputs(["in"])
    assert found.sources == ["in/a.png", "in/z.png", "in/locked"]
    assert list(count_pages(found))[-1] == (3, True)


def test_rate_is_of_pages_that_were_read() -> None:
    totals = Totals(seconds=2.0)
    totals.statuses.update({"ok": 3, "degenerate": 1, "error": 96})
    assert rates(totals).startswith("2 pages/s")
