"""The comparison of two kernel benchmarks: noise is no news, a slower op is, a slower machine is not."""

from __future__ import annotations

import json
import sys

import compare_kernels
import pytest
from hypothesis import given
from hypothesis import strategies as st


def write(path, ops, limit=1.0, disturbed=1.0):
    rows = [
        {
            "name": name,
            "stats": {
                "min": median,
                "median": median,
                "q1": median * (1 - spread),
                "q3": median * (1 + spread),
            },
            "extra_info": {
                "limit_s": limit,
                "limited_by": "bandwidth",
                "fraction": limit / median,
                "disturbed": disturbed,
            },
        }
        for name, (median, spread) in ops.items()
    ]
    path.write_text(json.dumps({"benchmarks": rows}))
    return str(path)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_kernels.py", *arguments])
    code = 0
    try:
        compare_kernels.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("new", "limit", "code"),
    [
        ({"a": (1.0, 0.01), "b": (1.0, 0.01)}, 1.0, 0),
        ({"a": (1.5, 0.01), "b": (1.0, 0.01)}, 1.0, 1),  # slower
        ({"a": (1.5, 0.60), "b": (1.0, 0.01)}, 1.0, 0),  # within its own noise
        ({"a": (1.05, 0.0), "b": (1.0, 0.01)}, 1.0, 0),  # too little to matter
        ({"a": (0.5, 0.01), "b": (1.0, 0.01)}, 1.0, 0),  # faster
        ({"a": (1.5, 0.01), "b": (1.5, 0.01)}, 1.5, 0),  # the machine was slower
        ({"a": (1.0, 0.01)}, 1.0, 1),  # an op is gone
    ],
)
def test_what_is_news(tmp_path, monkeypatch, capsys, new, limit, code):
    old = write(tmp_path / "old.json", {"a": (1.0, 0.02), "b": (1.0, 0.02)})
    found, shown = run(monkeypatch, capsys, old, write(tmp_path / "new.json", new, limit))
    assert found == code, shown.out
    assert "ops: " in shown.out


def test_seconds_can_be_compared_as_they_are(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old.json", {"a": (1.0, 0.01)})
    new = write(tmp_path / "new.json", {"a": (1.5, 0.01)}, limit=1.5)
    assert run(monkeypatch, capsys, old, new)[0] == 0
    assert run(monkeypatch, capsys, old, new, "--absolute")[0] == 1


def test_what_the_machine_did_is_no_news(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old.json", {"a": (1.0, 0.01)})
    assert (
        run(monkeypatch, capsys, old, write(tmp_path / "b.json", {"a": (1.5, 0.01)}, disturbed=1.5))[0] == 0
    )
    assert (
        run(monkeypatch, capsys, old, write(tmp_path / "c.json", {"a": (1.9, 0.01)}, disturbed=1.5))[0] == 1
    )


@given(st.floats(1e-7, 10), st.floats(1e-7, 10), st.floats(0, 0.9), st.floats(0, 1))
def test_never_slower_both_ways(one, other, spread, threshold):
    def op(median):
        low, high = median * (1 - spread), median * (1 + spread)
        return compare_kernels.Op(median, median, low, high, 1.0, "bandwidth", 1.0)

    there = compare_kernels.compare({"a": op(one)}, {"a": op(other)})[0]
    back = compare_kernels.compare({"a": op(other)}, {"a": op(one)})[0]
    assert not (there.slower(threshold) and back.slower(threshold))
    assert not (there.slower(threshold) and there.faster(threshold))


@pytest.mark.parametrize("content", [None, "", "[]", '{"benchmarks": []}', '{"benchmarks": [{}]}'])
def test_other_files_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    code, shown = run(monkeypatch, capsys, str(path))
    assert code == 2
    assert shown.err.count("\n") == 1
