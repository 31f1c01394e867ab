"""`pagemill simulate`: every combination is a run of a result file that the report reads, and errors are one sentence."""

import json

import pytest
from typer.testing import CliRunner

from pagemill.cli import app
from pagemill.cost.devices import measured
from pagemill.cost.model import Efficiency
from pagemill.cost.resultfile import load
from pagemill.cost.scenario import Scenario, answer, find_machine, save_machine
from pagemill.cost.simulator import Degeneration, Workload
from pagemill.errors import ConfigError


def run(*arguments):
    return CliRunner().invoke(app, ["simulate", "--pages", "40", *arguments])


def test_every_combination_is_a_run_that_the_report_reads(tmp_path):
    file = tmp_path / "result.json"
    done = run(
        *("--device", "l4,h100-sxm", "--concurrency", "8,16", "--guard", "off,stop", "--degeneration", "0.1"),
        *("--against", "aws/Textract", "-o", str(file)),
    )
    assert done.exit_code == 0, done.output
    assert "h100-sxm, concurrency=16, guard=stop" in done.output
    (result,) = load([str(file)])
    assert result.kind == "simulation"
    assert len(result.runs) == 8
    for found in result.runs:
        assert found.pages == len(found.timeline) == 40
        assert found.usd_per_million > 0
    said = json.loads(file.read_text())["runs"]
    assert {r["name"]: r["degenerate"] for r in said}["l4, concurrency=8, guard=off"] == 4
    fastest = max(result.runs, key=lambda found: found.pages_per_s)
    assert fastest.settings["device"] == "h100-sxm"


def test_json_holds_price_efficiency_and_the_closed_form():
    done = run("--json", "--degeneration", "0", "--price", "2.5", "--utilisation", "0.5")
    result = json.loads(done.stdout)
    (only,) = result["runs"]
    assert result["price"]["usd_per_hour"] == 2.5
    assert only["usd_per_page"] == pytest.approx(2.5 / 3600 / only["pages_per_s"] / 0.5)
    assert only["model_pages_per_s"] > 0
    assert "assumed" in result["engine"]["devices"]["h100-sxm"]["efficiency"]["origin"]


def test_idle_time_is_paid_for_where_pages_arrive():
    result = answer(Scenario(Workload(30, pages_per_day=3000, degeneration=Degeneration(0.0)), price="1"))
    (only,) = result["runs"]
    assert only["settings"]["utilisation"] == 1.0
    assert only["stage_s_per_page"]["idle"] > 20
    assert only["usd_per_page"] == pytest.approx(only["seconds"] / 30 / 3600)


def test_a_measured_machine_is_a_device_with_its_own_efficiencies(tmp_path):
    device = measured("mine", flops={"float32": 1e11}, bandwidth=2e10, memory=1e10, source="a test")
    mine = tmp_path / "mine.json"
    save_machine(str(mine), device, Efficiency(0.9, 0.7, 0.6, 0.9, row_s=1e-4, origin="a test"))
    assert find_machine(str(mine))[0] == device
    arguments = (
        "--device",
        str(mine),
        "--shape",
        "pagemill-tiny",
        "--precision",
        "float32",
        "--max-new-tokens",
        "900",
    )
    done = run(*arguments, "--price", "0.1")
    assert done.exit_code == 0, done.output
    assert "mine: efficiencies a test" in done.output
    done = run(*arguments)
    assert done.exit_code == 2
    assert "no price is known for 'mine'" in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema": "pagemill-machine/2"}',
        '{"schema": "pagemill-machine/1", "device": {"id": 1}}',
    ],
)
def test_another_file_is_no_machine(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ConfigError, match="is no measured machine of this version"):
        find_machine(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        find_machine(str(tmp_path / "none.json"))


def test_published_speeds_are_listed():
    done = CliRunner().invoke(app, ["simulate", "--published"])
    assert done.exit_code == 0
    assert "reached" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "tpu"), "unknown device 'tpu'; known are h100-sxm"),
        (("--price", "free"), "unknown price 'free' of h100-sxm"),
        (("--shape", "13b"), "unknown model shape '13b'"),
        (("--precision", "fp4"), "unknown precision 'fp4'"),
        (("--guard", "pray"), "--guard should be off, stop or rescue, got 'pray'"),
        (("--concurrency", "8,x"), "--concurrency should be whole numbers"),
        (("--kv-cache-gb", "nan"), "--kv-cache-gb should be numbers above 0"),
        (("--against", "nobody"), "unknown API 'nobody'"),
        (("--device", ","), "at least one device"),
        (("--device", "l4", "--shape", "7b", "--kv-cache-gb", "20"), "does not fit l4"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, says):
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


def test_an_empty_list_is_refused():
    with pytest.raises(ConfigError, match="at least one device"):
        answer(Scenario(Workload(1), devices=()))
