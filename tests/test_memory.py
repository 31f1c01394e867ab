"""A GPU's memory: what a step needs is found before keys and values take the rest, and running out is one sentence."""

from unittest.mock import Mock

import pytest
import torch
from fake_gpu import FakeGpu
from test_graphs import PAGE

from pagemill import Engine, SamplingParams
from pagemill.config import EngineConfig
from pagemill.core import EngineCore
from pagemill.errors import ConfigError, DeviceError
from pagemill.fleet import Fleet
from pagemill.gpu import named_device
from pagemill.memory import free_memory

SHORT = SamplingParams(max_new_tokens=5)


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    for module in ("core", "engine"):
        monkeypatch.setattr(f"pagemill.{module}.gpu_of", lambda device: gpu)
    return gpu


def exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


def test_keys_and_values_take_what_the_largest_step_leaves(world, gpu):
    options = dict(max_num_seqs=1024, max_step_image_tokens=1000, kv_cache_bytes=None)
    images = 2 * 1000 * world.model.config.text.hidden_size * 4
    gpu.free, gpu.peaks = 60_000_000, [10_000_000, 1_000_000]
    assert world.core(**options).kv_cache_bytes == int(0.9 * (49_000_000 - images))
    gpu.peaks = [10_000_000]
    assert world.core(cuda_graphs=False, **options).kv_cache_bytes == int(0.9 * (50_000_000 - images))
    gpu.peaks = [10_000_000]
    core = world.core(cuda_graphs=False, kv_cache_fraction=0.25, **options)
    assert core.kv_cache_bytes == int(0.25 * (50_000_000 - images))


def test_the_largest_step_is_the_largest_and_writes_no_key(world, gpu, monkeypatch):
    """The trial's one block stays empty, though every token of the step had one to go to."""
    from pagemill import core as module

    runners, steps, images = [], [], []
    decode, see = type(world.model.decoder).__call__, type(world.model.vision).__call__

    class Watched(module.Runner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runners.append(self)

    def decoder(self, batch, cache):
        logits = decode(self, batch, cache)
        steps.append((len(batch.token_ids), len(batch.context_lens), len(logits)))
        assert int(batch.context_lens.max()) <= 40
        return logits

    def vision(self, given):
        images.append(sum(len(patches) // 4 for patches, _, _ in given))
        return see(self, given)

    monkeypatch.setattr(module, "Runner", Watched)
    monkeypatch.setattr(type(world.model.decoder), "__call__", decoder)
    monkeypatch.setattr(type(world.model.vision), "__call__", vision)
    world.core(max_num_seqs=5, max_step_tokens=100, max_step_image_tokens=26, max_model_len=40)
    assert steps[0] == (100, 3, 100)
    assert steps[-1] == (32, 32, 32)
    assert [tokens for tokens, _, _ in steps[1:-1]] == [96, 64, 48, 32, 24, 16, 8, 4, 2, 1]
    assert images[0] == 25
    assert images == sorted(images, reverse=True)
    trial = runners[0]
    assert all(not part.any() for layer in trial.kv_cache for part in layer if part is not None)


def test_the_largest_image_counts_where_a_step_takes_less(world, gpu, monkeypatch):
    images, see = [], type(world.model.vision).__call__

    def vision(self, given):
        images.append(sum(len(patches) // 4 for patches, _, _ in given))
        return see(self, given)

    monkeypatch.setattr(type(world.model.vision), "__call__", vision)
    config = EngineConfig(
        kv_cache_bytes=1 << 20, max_step_tokens=8, max_step_image_tokens=16, max_model_len=99
    )
    for largest, tried in ((49, 49), (1000, 81)):  # no image may be longer than the context
        images.clear()
        gpu.peaks = [0, 0]
        EngineCore(world.model, world.prompter, config, torch.float32, None, largest).close()
        assert max(images) == tried


def test_a_gpu_too_small_for_a_step_is_refused(world, gpu):
    gpu.peaks = [900 << 20, 200 << 20]
    with pytest.raises(
        ConfigError, match=r"cpu has 1\.07 GB free .* takes 1\.16 GB of it; lower max_step_tokens"
    ):
        world.core(kv_cache_bytes=1000)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("engine.load_model", 'ran out of memory loading pagemill-tiny: .* were free; use quantize="int4"'),
        ("runner.Runner.try_step", "ran out of memory computing the largest step: .*; lower max_step_tokens"),
        ("runner.Runner.try_decoding", "ran out of memory computing the largest step"),
        ("runner.Runner.record_graphs", "ran out of memory recording decode steps: .*cuda_graphs=False"),
    ],
)
def test_running_out_while_starting_is_one_sentence(gpu, monkeypatch, place, sentence):
    monkeypatch.setattr(f"pagemill.{place}", exhausted)
    with pytest.raises(ConfigError, match=sentence) as raised:
        Engine.from_pretrained(max_step_image_tokens=16, max_step_tokens=32)
    assert "cpu" in str(raised.value)
    assert "1.07 GB of 2.15 GB were free" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("place", ["model.vision.VisionTower", "model.decoder.Decoder"])
def test_running_out_in_a_step_costs_that_batch_only(gpu, monkeypatch, place):
    with Engine.from_pretrained(max_step_image_tokens=16, max_step_tokens=32) as engine:
        tidied = gpu.num_tidied
        with monkeypatch.context() as patch:
            patch.setattr(f"pagemill.{place}.__call__", exhausted)
            page = next(engine.read([PAGE], params=SHORT))
        assert page.status == "error"
        assert "ran out of memory in a step: 1.07 GB of 2.15 GB were free; lower" in page.error
        assert next(engine.read([PAGE], params=SHORT)).status == "ok"
        assert gpu.num_tidied > tidied


def test_on_a_cpu_nothing_is_tried(world, monkeypatch):
    monkeypatch.setattr("pagemill.runner.Runner.try_step", exhausted)
    monkeypatch.setattr("pagemill.core.free_memory", lambda gpu: 1 << 30)
    core = world.core(max_num_seqs=4096, kv_cache_bytes=None)
    assert core.kv_cache_bytes == int(0.3 * (1 << 30))
    assert free_memory(None) > 0


@pytest.mark.parametrize(
    ("name", "built", "available", "sentence"),
    [
        ("cuda", False, False, "this torch is built for CPUs only: it sees no CUDA device"),
        ("cuda:0", True, False, "sees no CUDA device: is there a GPU, and a driver"),
        ("cuda:7", True, True, "there is no device cuda:7: torch sees 1, cuda:0 to cuda:0"),
        ("mps", True, True, "device should be cpu or cuda"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, name, built, available, sentence):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=sentence):
        Engine.from_pretrained(device=name)


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert named_device("cuda") == torch.device("cuda:2")
    assert named_device("cuda:1") == torch.device("cuda:1")


def test_a_driver_that_does_not_start_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    failed = RuntimeError("CUDA error: system not yet initialized\nCompile with")
    monkeypatch.setattr(torch.cuda, "current_device", Mock(side_effect=failed))
    for name in ("cuda", "cuda:1"):
        sentence = rf"^device {name} cannot be used \(CUDA error: system not yet initialized\)$"
        with pytest.raises(DeviceError, match=sentence):
            Engine.from_pretrained(device=name)


def test_engines_on_one_device_share_its_memory(monkeypatch):
    told = []
    monkeypatch.setattr(Fleet, "__init__", lambda self, name, workers: told.extend(workers))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Fleet.from_pretrained(devices=["cuda:0", "cuda:1", "cuda:1", "cpu"])
    assert [options["kv_cache_fraction"] for _, options, _, _ in told] == [0.9, 0.45, 0.45, 0.3]
    assert [seconds for *_, seconds in told] == [300, 300, 300, 3600]
