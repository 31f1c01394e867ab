"""What a trace of a device becomes, and which steps are traced."""

from types import SimpleNamespace

import overlap
import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


@pytest.mark.parametrize(
    ("intervals", "bridge", "length"),
    [
        ([], 0, 0),
        ([(3, 5)], 0, 2),
        ([(10, 12), (0, 4)], 0, 6),  # in no order
        ([(0, 4), (4, 6)], 0, 6),  # one ends where the next begins
        ([(0, 4), (3, 6), (3, 5)], 0, 6),  # two streams
        ([(0, 10), (2, 3), (8, 12)], 0, 12),  # one inside another
        ([(0, 4), (6, 8), (11, 12)], 2, 9),  # the first pause is as long as the bridge, the second longer
        ([(0, 10), (2, 3), (11, 12)], 1, 12),
        ([(5, 5)], 9, 0),
    ],
)
def test_a_union_of_intervals_counts_no_moment_twice(intervals, bridge, length):
    assert overlap.covered(intervals, bridge) == length


def event(name, start, end, device=DeviceType.CUDA, mark=False):
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=time_range, device_type=device, is_user_annotation=mark)


def test_only_kernels_are_busy_and_only_long_pauses_are_the_cpus():
    events = [
        event("cudaGraphLaunch", 0, 50, DeviceType.CPU),
        event("ProfilerStep#5", 0, 200, mark=True),
        event("Memcpy HtoD (Pinned -> Device)", 95, 99),
        event("Memset (Device)", 99, 100),
        event("matmul_kernel", 100, 150),
        event("greedy_kernel", 152, 180),
        event("matmul_kernel", 190, 200),
    ]
    kernels = overlap.kernel_times(events)
    assert kernels == [(100, 150), (152, 180), (190, 200)]
    found = overlap.shares(kernels)
    assert found["busy %"] == pytest.approx(88)
    assert found["gap %"] == pytest.approx(10)
    assert found["kernels a step"] == 3 / overlap._TRACED
    assert found["ms of kernels a step"] == pytest.approx(0.088 / overlap._TRACED)
    assert overlap.shares([]) == dict.fromkeys(found)


class Core:
    """Sequences that begin one a step, and end each after so many tokens."""

    def __init__(self, tokens, pages):
        self.left, self.tokens = [tokens] * pages, tokens
        self.steps = 0

    def step(self):
        self.steps += 1
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        running = [i for i, left in enumerate(self.left) if i < self.steps and left]
        for i in running:
            self.left[i] -= 1
        return [SimpleNamespace(id=i) for i in running], [i for i in running if not self.left[i]]


def engine_of(core):
    def generate(requests, params):
        while any(core.left):
            core.step()
        return [SimpleNamespace(error=None) for _ in requests]

    return SimpleNamespace(core=core, generate=generate)


def test_steps_are_traced_once_all_have_begun():
    core = Core(tokens=60, pages=5)
    events = overlap.trace(engine_of(core), [None] * 5, None, ProfilerActivity.CPU)
    assert sum(event.name == "aten::mm" for event in events) == overlap._TRACED
    assert core.steps == 64, "the pages are read to their ends"
    assert "step" not in vars(core)


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 41])
def test_a_window_that_one_page_ends_in_is_none(tokens):
    """One before the others have begun; before the window; in it; at its last step."""
    core = Core(tokens, pages=5)
    assert overlap.trace(engine_of(core), [None] * 5, None, ProfilerActivity.CPU) == []
    assert not any(core.left)


def test_the_shortest_window():
    """Five steps until all have begun, the last of which starts the profiler; four that warm up, the window, and one end."""
    core = Core(tokens=5 + overlap._WARMUP + overlap._TRACED + 1, pages=5)
    assert overlap.trace(engine_of(core), [None] * 5, None, ProfilerActivity.CPU)


def test_a_table_has_a_column_for_what_was_measured():
    rows = [{"way": "graphs", "pages/s": [1.0, 0.5, 2.0], "busy %": 97.123, "gap %": None, "differ": 2}]
    assert overlap.table(rows).splitlines() == [
        "| way | pages/s | busy % | gap % | differ |",
        "| --- | --- | --- | --- | --- |",
        "| graphs | 1 (0.5 to 2) | 97.1 | - | 2 |",
    ]


@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_one_engine_is_all_ways_in_turn(monkeypatch, gpu):
    scheduler, runner = SimpleNamespace(encode_ahead=None), SimpleNamespace(_graphs="recorded")
    engine = SimpleNamespace(core=SimpleNamespace(runner=runner, gpu=gpu, scheduler=scheduler))
    done = []

    def read(engine, requests, params):
        done.append((runner._graphs, engine.core._ahead, scheduler.encode_ahead))
        return {"pages/s": float(len(done))}, ["token"] if len(done) != 5 else ["another"]

    def trace(engine, requests, params):
        read(engine, requests, params)
        return [event("matmul_kernel", 0, 80 + len(done)), event("greedy_kernel", 99, 100)]

    monkeypatch.setattr(overlap, "read", read)
    monkeypatch.setattr(overlap, "trace", trace)
    ahead = gpu is not None
    ways = [(None, False, False), ("recorded", False, False), ("recorded", ahead, ahead)]
    rows = overlap.measure(engine, [None] * 6, None, rounds=1)
    assert done == 2 * ways
    assert [row["pages/s"] for row in rows] == [[n, n, n] for n in (4, 5, 6)], (
        "the first round does not count"
    )
    assert [row["pages that differ"] for row in rows] == [0, 1, 0]
    rows = overlap.measure_traced(engine, [None] * 6, None)
    assert done == 3 * ways
    assert [row["busy %"] for row in rows] == pytest.approx([88, 89, 90])
