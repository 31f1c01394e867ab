"""What the kernel benchmarks of a GPU do without one: their cases, their clock, what they make of seconds."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu_cases
import pytest
import torch
from gpu_cases import DeviceSeconds, cases, copy_bandwidth, eviction_bytes, peak
from op_cases import SHAPES, Ops, Shape

from pagemill import kernels

TINY = Shape(64, 96, 4, 2, 16, 300, 32, 36, 2)


class FakeDevice:
    """Work queued on a device that runs behind the host: an event has its time when the device has come to it."""

    def __init__(self):
        self.now, self.queue = 0.0, []

    def work(self, seconds):
        self.queue.append(seconds)

    def event(self):
        device = self

        class Event:
            at = None

            def record(self):
                device.queue.append(self)

            def synchronize(self):
                while device.queue:
                    item = device.queue.pop(0)
                    if isinstance(item, float):
                        device.now += item
                    else:
                        item.at = device.now

            def elapsed_time(self, last):
                assert self.at is not None
                assert last.at is not None
                return 1e3 * (last.at - self.at)

        return Event()


def test_only_the_ops_own_device_time_counts():
    device = FakeDevice()
    clock = DeviceSeconds(device.event, lambda: device.work(7.0))
    device.work(3.0)  # of somebody before
    assert clock.run(lambda: device.work(0.25)) == pytest.approx(0.25)
    times = iter([5.0, 0.5, 0.125, 0.25])
    assert clock.best(lambda: device.work(next(times)), rounds=3) == pytest.approx(0.125)
    assert clock() == pytest.approx(0.25 + 5.0 + 0.5 + 0.125 + 0.25)


def test_a_benchmark_reads_the_devices_clock(benchmark):
    device = FakeDevice()
    clock = DeviceSeconds(device.event, lambda: device.work(7.0))
    times = iter([9.0, 2.0, 4.0, 1.0])  # the first warms up
    benchmark._timer = clock
    benchmark.pedantic(
        lambda: clock.run(lambda: device.work(next(times))), rounds=3, iterations=1, warmup_rounds=1
    )
    if not benchmark.disabled:
        assert benchmark.stats.stats.median == pytest.approx(2.0)
        assert benchmark.stats.stats.max == pytest.approx(4.0)


def test_ceilings_are_operations_and_bytes_a_second():
    clock = SimpleNamespace(best=lambda call: (call(), 0.5)[1])
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        assert peak(clock, dtype, "cpu", n=32) == 2 * 32**3 / 0.5
    assert copy_bandwidth(clock, "cpu", size=1000) == 2 * 1000 / 0.5


def test_the_peak_is_that_of_the_faster_layout():
    times = iter([0.5, 0.25])
    assert peak(SimpleNamespace(best=lambda call: next(times)), torch.int8, "cpu", n=32) == 2 * 32**3 / 0.25


def test_what_evicts_is_larger_than_any_cache():
    assert eviction_bytes(40 << 20) == 1 << 30
    assert eviction_bytes(512 << 20) == 2 << 30


@pytest.fixture
def short(monkeypatch):
    """The cases with fewer rows."""
    monkeypatch.setattr(gpu_cases, "PREFILL_ROWS", (70,))
    monkeypatch.setattr(gpu_cases, "VISION_ROWS", (70,))
    monkeypatch.setattr(gpu_cases, "BATCHES", [(1, 1, 40), (3, 5, 40)])
    monkeypatch.setattr(gpu_cases, "SEGMENTS", [(3, 16)])


def with_fp8(of):
    """The reference with fp8 weights, which it has not: multiplied as what they stand for."""

    def pack_quantized(q, scales, zeros, bias, *, gated=False, **_):
        assert q.dtype == torch.float8_e4m3fn
        weight = q.float() * scales[:, None]
        return of.pack_swiglu(*weight.chunk(2), bias) if gated else of.pack_linear(weight, bias)

    return replace(of, pack_quantized=pack_quantized)


@pytest.mark.usefixtures("short")
def test_every_case_runs():
    """Each that is in a contract, on the torch reference and a tiny shape, from the inputs that it makes."""
    reference = kernels.select("reference", torch.device("cpu"), torch.float32)
    ops = Ops(with_fp8(reference), torch.float32)
    every = cases(TINY)
    assert len({case.name for case in every}) == len(every)
    named = {
        "embed",
        "greedy",
        "sampled",
        "gelu",
        "swiglu",
        "rotary",
        "rms_norm",
        "linear",
        "paged",
        "varlen",
    }
    assert named <= {case.name.split("-")[0] for case in every if not case.only_triton}
    for case in every:
        if case.only_triton:
            continue  # tests/gpu/test_cases.py
        work = case.make(ops)
        work.call()
        assert work.moved > 0
        assert (work.flops > 0) == case.name.startswith(("linear", "paged", "varlen"))


def test_a_language_model_alone_has_no_case_of_the_vision_tower():
    whole, alone = ({case.name for case in cases(SHAPES["7b"], vision=vision)} for vision in (True, False))
    left_out = {name.split("-")[0] for name in whole - alone if not name.startswith("linear")}
    assert left_out == {"varlen", "rotary", "pixel_values", "gelu"}
    layers = {name.split("-")[1] for name in alone if name.startswith("linear")}
    assert layers == {"qkv", "out", "gate_up", "down", "head"}


def test_operations_and_bytes_are_those_counted_by_hand():
    """The 3B shape, without its memory."""
    ops = Ops(kernels.select("reference", torch.device("cpu"), torch.bfloat16), torch.bfloat16)

    def pack(shape, layer, **_):
        n, k = (shape.matrices() | shape.small_matrices())[layer]
        return SimpleNamespace(out_features=n, in_features=k, gated=False)

    ops.pack = pack
    every = {case.name: case for case in cases(SHAPES["3b"])}
    work = every["linear-down-int4-16"].make(ops)
    assert work.flops == 2 * 16 * 2048 * 11008
    weights = 2048 * 11008 / 2 + 2048 * 86 * 5
    assert work.moved == pytest.approx(weights + 2 * 16 * (2048 + 11008))
    work = every["linear-qkv-int8-64"].make(ops)
    assert work.moved == 2560 * 2048 + 4 * 2560 + 2 * 64 * (2560 + 2048)
    work = every["paged-bf16-16x1-of-2048"].make(ops)
    assert work.flops == 4 * 16 * 2048 * 16 * 128
    assert work.moved == 2 * 16 * 2048 * 2 * 128 * 2 + 2 * 16 * 16 * 128 * 2
    work = every["linear-out-fp8-1024"].make(ops)
    assert work.flops == 2 * 1024 * 2048**2
    assert work.moved == 2048 * 2048 + 4 * 2048 + 2 * 1024 * (2048 + 2048)
    assert every["paged-fp8-16x1-of-2048"].make(ops).moved == 2 * 16 * 2048 * 2 * 132 + 2 * 16 * 16 * 128 * 2


def test_a_devices_result_has_rates_and_a_share_of_the_ceiling_by_its_median():
    file = Path(__file__).parents[1] / "bench" / "kernels" / "conftest.py"
    spec = importlib.util.spec_from_file_location("bench_kernels_conftest", file)
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)

    def row(statistic):
        stats = dict.fromkeys(("q1", "q3", "max", "mean", "stddev", "rounds", "iterations"), 1.0)
        info = dict(
            flops=4e12, bytes=1e9, arithmetic="torch.bfloat16 on cuda", peak_flops=8e12, bandwidth=4e9
        )
        return {"stats": stats | {"min": 0.5, "median": 2.0}, "extra_info": info | statistic}

    rows = [row({"statistic": "median"}), row({})]
    hooks.pytest_benchmark_update_json({"benchmarks": rows})
    device, host = (r["extra_info"] for r in rows)
    assert (device["limit_s"], device["limited_by"]) == (0.5, "arithmetic")
    assert (device["fraction"], device["tflop_per_s"], device["gb_per_s"]) == (0.25, 2.0, 0.5)
    assert (host["fraction"], host["tflop_per_s"]) == (1.0, 8.0)
