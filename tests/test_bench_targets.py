"""The table of targets, of made-up results."""

import json
import sys

import pytest
import targets

H100 = "NVIDIA H100 80GB HBM3"


def op(name, seconds=1.0, fraction=0.5, device=H100, by="triton"):
    stats = dict.fromkeys(("min", "median", "q1", "q3"), seconds)
    info = {
        "limit_s": 1.0,
        "limited_by": "arithmetic",
        "fraction": fraction,
        "disturbed": 1.0,
        "device": device,
    }
    return {"name": f"test_op[{name}-{by}]", "stats": stats, "extra_info": info}


def gap(concurrency, percent, way="graphs, ahead"):
    return {
        "concurrency": concurrency,
        "rows": [{"way": "graphs", "gap %": 50.0}, {"way": way, "gap %": percent}],
    }


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Runs the program on kernels and runs of a trace; returns its lines after those of the files, by their target."""

    def run(ops=None, *runs):
        arguments = ["targets.py", "--kernels", str(tmp_path / "kernels.json"), "--overlap"]
        if ops is not None:
            (tmp_path / "kernels.json").write_text(json.dumps({"benchmarks": ops}))
        for number, (form, rows) in enumerate(runs):
            file = tmp_path / f"overlap-{number}.json"
            file.write_text(json.dumps({"asked": {"quantize": form}, "traced": rows}))
            arguments.append(str(file))
        monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "not-there.json")])
        targets.main()
        lines = capsys.readouterr().out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("target "))
        found = {}
        for line in lines[first + 1 :]:
            title, *cells = (cell.strip() for cell in line.split("  ") if cell.strip())
            found[title] = cells
        return found

    return run


ATTENTION_H100 = "long prefill attention, of the peak, H100"
ATTENTION_A100 = "long prefill attention, of the peak, A100"
GAP = "waiting for the CPU, steps planned ahead"


def test_without_files_nothing_is_measured(table):
    found = table()
    assert len(found) == 9
    assert all(cells[-1] == "not measured" for cells in found.values())


def test_attention_is_held_against_its_cards_target(table):
    ops = [
        op("3b-paged-bf16-1x4096-of-4096", fraction=0.7),
        op("7b-paged-bf16-1x32768-of-32768", fraction=0.66),
        op("3b-paged-bf16-1x1-of-4096", fraction=0.01),  # no prefill
        op("3b-paged-bf16-8x512-of-4096", fraction=0.02),  # no long one
        op("3b-paged-bf16-1x4096-of-4096", fraction=0.03, by="reference"),
    ]
    found = table(ops)
    assert found[ATTENTION_H100] == [">= 65 %", "66 %", "7b-paged-bf16-1x32768-of-32768", "70 %", "met"]
    assert found[ATTENTION_A100] == [">= 75 %", "not measured"]
    on_a100 = [op("3b-paged-bf16-1x4096-of-4096", fraction=0.7, device="NVIDIA A100-SXM4-80GB")]
    assert table(on_a100)[ATTENTION_A100][-1] == "NOT MET"
    assert table(on_a100)[ATTENTION_H100][-1] == "not measured"


def test_decoding_is_held_against_the_bandwidth_from_16_sequences_on(table):
    ops = [op(f"3b-paged-{kind}-{n}x1-of-2048", fraction=f) for kind, n, f in
           [("bf16", 16, 0.85), ("bf16", 64, 0.93), ("int8", 16, 0.84), ("int8", 64, 0.9)]]  # fmt: skip
    found = table([*ops, op("3b-paged-bf16-1x1-of-32768", fraction=0.1)])
    assert found["paged decode from batch 16, bf16"][1:] == [
        "85 %",
        "3b-paged-bf16-16x1-of-2048",
        "93 %",
        "met",
    ]
    assert found["paged decode from batch 16, int8"][-1] == "NOT MET"
    assert found["paged decode from batch 16, fp8"][-1] == "not measured"


def test_quantised_products_are_held_against_the_faster_bfloat16(table):
    ops = [
        *(op("3b-linear-qkv-bf16-1", 4.0), op("3b-linear-qkv-bf16-1", 3.5, by="reference")),
        *(
            op("3b-linear-qkv-int4-1", 1.0),
            op("3b-linear-down-bf16-16", 8.0),
            op("3b-linear-down-int4-16", 2.0),
        ),
        *(op("3b-linear-down-bf16-64", 1.0), op("3b-linear-down-int4-64", 9.0)),  # no target for 64 rows
        *(op("3b-linear-down-bf16-4096", 1.0), op("3b-linear-down-int4-4096", 1.01)),
        *(op("3b-linear-vision_down-bf16-4096", 1.0), op("3b-linear-vision_down-int4-4096", 9.0)),
        *(op("7b-linear-out-bf16-32768", 3.2), op("7b-linear-out-fp8-32768", 2.0)),
        *(op("3b-linear-vision_down-fp8-4096", 0.5), op("3b-linear-down-fp8-64", 9.0)),
        op("3b-linear-gate_up-fp8-1024", 9.0),  # with nothing to compare it with
    ]
    found = table(ops)
    assert found["int4 over bf16, 1 and 16 rows"] == [">= 3 x", "3.5 x", "3b-linear-qkv-int4-1", "4 x", "met"]
    assert found["int4 over bf16, 4096 rows"][1:] == [
        "0.99 x",
        "3b-linear-down-int4-4096",
        "0.99 x",
        "NOT MET",
    ]
    assert found["fp8 over bf16, 1024 rows and more"][1:] == [
        "1.6 x",
        "7b-linear-out-fp8-32768",
        "2 x",
        "met",
    ]


def test_the_longest_wait_for_the_cpu_counts(table):
    found = table(None, ("none", [gap(1, 6.0), gap(16, 4.0)]), ("int4", [gap(1, None)]))
    assert found[GAP] == ["<= 5 %", "6 %", "none, 1 at once", "4 %", "NOT MET"]
    assert table(None, ("int4", [gap(64, 5.0)]))[GAP][-1] == "met"
    assert table(None, ("int4", [gap(1, None)]))[GAP][-1] == "not measured"


@pytest.mark.parametrize("option", ["--kernels", "--overlap"])
@pytest.mark.parametrize("text", ["{", "[]", '{"traced": 1, "benchmarks": 2}'])
def test_a_file_that_is_no_result_is_one_sentence(option, text, tmp_path, monkeypatch, capsys):
    file = tmp_path / "some.json"
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["targets.py", option, str(file)])
    with pytest.raises(SystemExit, match="2"):
        targets.main()
    assert capsys.readouterr().err.startswith(f"error: {file} is no result of ")


def test_every_target_has_cases(tmp_path):
    """The benchmarks have what the patterns look for."""
    from gpu_cases import cases
    from op_cases import SHAPES

    names = [
        f"{size}-{case.name}-triton"
        for size in ("3b", "7b")
        for case in cases(SHAPES[size], vision=size == "3b")
    ]
    result = tmp_path / "kernels.json"
    result.write_text(json.dumps({"benchmarks": [op(name.removesuffix("-triton")) for name in names]}))
    ops = targets.gpu_ops(targets.read(str(result)))
    assert len(ops) == len(names)
    for target in targets.TARGETS:
        found = target.numbers(ops)
        assert {name.split("-")[0] for name in found} == {"3b", "7b"}, target.title
