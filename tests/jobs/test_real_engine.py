"""The real engine behind the command line, killed once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from pagemill import Engine, SamplingParams
from pagemill.jobs import list_inputs, open_output, run

PAGES = Path(__file__).parents[2] / "bench" / "pages"


def test_kill_9_and_resume(tmp_path: Path) -> None:
    inputs = [PAGES / name for name in ("form_24.png", "prose_00.png", "digital_3p.pdf", "legal_12.png")]
    (tmp_path / "empty.png").touch()
    output = tmp_path / "out.jsonl"
    arguments = ["read", *inputs, "empty.png", "-o", output, "--resume", "--concurrency", "2"]
    command = [sys.executable, "-c", "from pagemill.cli import main; main()", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    assert process.poll() is None, "it was to be killed before it ends"
    process.kill()
    process.wait()

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "already" in done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted((Path(r["source"]).name, r["page"], r["status"]) for r in records) == [
        ("digital_3p.pdf", 1, "ok"),
        ("digital_3p.pdf", 2, "ok"),
        ("digital_3p.pdf", 3, "ok"),
        ("empty.png", 1, "error"),
        ("form_24.png", 1, "ok"),
        ("legal_12.png", 1, "ok"),
        ("prose_00.png", 1, "ok"),
    ]


def test_file_that_vanished_after_the_listing_is_one_record(tmp_path: Path) -> None:
    for name in ("a.png", "gone[1].png", "z.png"):
        (tmp_path / name).write_bytes((PAGES / "form_24.png").read_bytes())
    found = list_inputs([str(tmp_path)])
    (tmp_path / "gone[1].png").unlink()
    output = tmp_path / "out.jsonl"
    with open_output(str(output)) as target, Engine.from_pretrained("pagemill-tiny") as engine:
        totals = run(engine, found, target, params=SamplingParams(max_new_tokens=4))
    assert (totals.pages, totals.failed) == (3, 1)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    failed = [record for record in records if record["status"] == "error"]
    assert [(r["source"], r["page"]) for r in failed] == [(str(tmp_path / "gone[1].png"), 1)]
