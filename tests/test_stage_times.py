"""Seconds of a step's stages where the device works behind its calls: a device that is not there, in time that is not real."""

import time
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import FakeGpu
from micro import IMAGE, Ask

import pagemill.core
from pagemill.decode.guidance import Regex
from pagemill.runner import DeviceClock

LAUNCH, IMAGES, DECODER, CHOICE = 0.01, 2.0, 3.0, 0.5


class Device:
    """Work given to it is queued; the host goes on."""

    def __init__(self) -> None:
        self.host = self.done = 0.0

    def give(self, seconds: float) -> None:
        self.host += LAUNCH
        self.done = max(self.done, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.done)

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None, passed=False)

        def record() -> None:
            event.at = max(self.done, self.host)

        def synchronize() -> None:
            self.host = max(self.host, event.at)
            event.passed = True

        def elapsed_time(last: SimpleNamespace) -> float:
            assert last.passed, "torch raises where the last event is still to come"
            return 1e3 * (last.at - event.at)

        event.record, event.synchronize, event.elapsed_time = record, synchronize, elapsed_time
        return event


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    return device


def test_a_gpus_marks_are_its_events(device):
    clock = DeviceClock(torch.device("cuda"))
    first = clock.mark()
    device.give(2.0)
    middle = clock.mark()
    device.give(3.0)
    last = clock.mark()
    assert device.host < 0.1, "marking waits for nothing"
    assert clock.seconds(middle, last) == pytest.approx(3.0)
    assert clock.seconds(first, middle) == pytest.approx(2.0 + LAUNCH)


def test_a_cpus_marks_are_moments():
    clock = DeviceClock(torch.device("cpu"))
    first = clock.mark()
    time.sleep(0.01)
    assert 0.01 <= clock.seconds(first, clock.mark()) < 5


@pytest.mark.parametrize(("mask_s", "seen"), [(0.0, 0.0), (1.5, 0.0), (9.0, 4.0)])
def test_stages_of_a_device_that_works_behind_add_up(world, device, monkeypatch, mask_s, seen):
    core = world.core()
    seq = world.add(core, Ask((1, IMAGE, 2), (0,), 2), guidance=Regex("[ab]{4}"))
    runner, vision, decoder = core.runner, world.model.vision, world.model.decoder
    sample, fill = pagemill.core.sample, core._fill_masks

    class Late:
        """A part of the model, given to the device."""

        def __init__(self, part, seconds):
            self.part, self.seconds = part, seconds

        def __call__(self, *given):
            device.give(self.seconds)
            return self.part(*given)

        def __getattr__(self, name):
            return getattr(self.part, name)

    def fill_late(*given):
        device.host += mask_s
        return fill(*given)

    def sample_late(*given):
        device.wait()
        device.host += CHOICE
        return sample(*given)

    runner.clock = DeviceClock(torch.device("cuda"))
    model = SimpleNamespace(
        config=world.model.config,
        vision=Late(vision, IMAGES),
        decoder=Late(decoder, DECODER),
        settle=world.model.settle,
    )
    runner.model = model
    monkeypatch.setattr(core, "_fill_masks", fill_late)
    monkeypatch.setattr(pagemill.core, "sample", sample_late)
    monkeypatch.setattr(time, "perf_counter", lambda: device.host)
    core.step()
    stats = core.stats
    assert stats.encode_s == pytest.approx(IMAGES, abs=3 * LAUNCH)
    assert seq.timeline.vision == stats.encode_s
    assert stats.prefill_s == pytest.approx(DECODER, abs=3 * LAUNCH)
    assert stats.decode_s == 0
    assert stats.masks_s == pytest.approx(seen, abs=3 * LAUNCH)
    assert stats.sampling_s == pytest.approx(CHOICE, abs=3 * LAUNCH)
    assert stats.busy_s == pytest.approx(device.host)
    core.step()
    assert stats.encode_s == seq.timeline.vision == pytest.approx(IMAGES, abs=3 * LAUNCH)
    assert stats.decode_s == pytest.approx(DECODER, abs=3 * LAUNCH)
    assert stats.busy_s == pytest.approx(device.host)


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize(("mask_s", "hidden"), [(1.5, True), (9.0, False)])
def test_what_the_thread_does_while_the_device_works_takes_no_time(
    world, device, monkeypatch, mask_s, hidden, foreseen
):
    """Steps that are planned ahead follow each other at once, unless the thread is slower than the device.

    An end that is not foreseen leaves a step that the device computes for nobody, and then the next page comes.
    """
    gpu, steps = FakeGpu(), 12
    monkeypatch.setattr(pagemill.core, "gpu_of", lambda device: gpu)
    monkeypatch.setattr(gpu, "peak", lambda run: 0)
    core = world.core(cuda_graphs=False)
    pages = 1 if foreseen else 3
    ask, regex = Ask((1, 2), (), steps if foreseen else 99), Regex("[ab]{40}" if foreseen else "([ab]){8}")
    asked = [(ask, dict(guidance=regex, drafts="off"))] * pages
    fetch, fill, decoder = gpu.fetch, core._fill_masks, world.model.decoder

    def decode(batch, cache):
        device.give(DECODER)
        return decoder(batch, cache)

    def fill_late(*given):
        device.host += mask_s
        return fill(*given)

    def fetch_late(*given):
        device.give(0.0)
        there, at = fetch(*given), device.done

        def wait():
            device.host = max(device.host, at)
            return there()

        return wait

    core.runner.clock = DeviceClock(torch.device("cuda"))
    core.runner.model = SimpleNamespace(
        config=world.model.config, vision=world.model.vision, decoder=decode, settle=world.model.settle
    )
    monkeypatch.setattr(core, "_fill_masks", fill_late)
    monkeypatch.setattr(gpu, "fetch", fetch_late)
    monkeypatch.setattr(time, "perf_counter", lambda: device.host)
    seqs = []
    for ask, params in asked:
        seqs.append(world.add(core, ask, **params))
        while core.scheduler.has_work:
            core.step()
    stats = core.stats
    steps = stats.steps
    launches = 4 * LAUNCH * steps
    assert [seq.finish_reason for seq in seqs] == ["length" if foreseen else "stop"] * pages
    assert (stats.rejected_draft_tokens == pages) != foreseen
    assert stats.busy_s == pytest.approx(device.host)
    if foreseen:
        assert stats.prefill_s + stats.decode_s == pytest.approx(steps * DECODER, abs=launches)
        assert device.host == pytest.approx(steps * max(DECODER, mask_s), abs=launches + DECODER)
        late = stats.masks_s + stats.bookkeeping_s + stats.sampling_s
        assert late == pytest.approx(0 if hidden else steps * (mask_s - DECODER), abs=launches + DECODER)
    elif hidden:  # but for the last step, which nobody waited for
        assert stats.prefill_s + stats.decode_s == pytest.approx((steps - 1) * DECODER, abs=launches)
        assert stats.sampling_s < launches
