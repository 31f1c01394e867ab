"""Decode steps as graphs, on a fake GPU: the same tokens, padded batches that touch nothing, buffers that stay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from micro import IMAGE, Ask, World, drain

from pagemill import Engine, SamplingParams, kernels
from pagemill.graphs import ladder
from pagemill.staging import Layout, Staging

PAGE = Path(__file__).parents[1] / "bench" / "pages" / "form_24.png"
CPU = torch.device("cpu")
ASKS = [
    Ask((*range(1, 3 + i), *([IMAGE] if i % 3 else []), 5), (i % 6,) if i % 3 else (), max_new)
    for i, max_new in enumerate((9, 1, 30, 4, 17, 2, 12, 23))
]
SIZES = [32, 24, 16, 8, 4, 2, 1]  # for at most 7 sequences, in the order of recording


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait at barriers for longer than these products take
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(monkeypatch):
    """What engines take their device for."""
    gpu = FakeGpu()
    monkeypatch.setattr("pagemill.core.gpu_of", lambda device: gpu)
    monkeypatch.setattr(gpu, "peak", lambda run: 0)
    return gpu


@pytest.fixture
def native(world, monkeypatch):
    """The micro model with native kernels, whose rows are the same bits in every batch."""
    decoder = world.model.decoder
    monkeypatch.setattr(decoder, "kernels", replace(decoder.kernels, capturable=True))
    return world


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The micro model with kernels whose every operation the fake sees."""
    chosen = replace(kernels.select("reference", CPU, torch.float32), capturable=True)
    return World(tmp_path_factory.mktemp("reference"), chosen=chosen)


def run(world, core, outputs=None):
    """Three requests come at a time, so that the batch grows, and they end one by one. Returns the tokens of each.

    With `outputs`, what is expected, every third step verifies drafts of it, whose last token is wrong.
    """
    waiting, seqs, steps = list(ASKS), [], 0

    def guess():
        for seq in core.scheduler.running:
            done = len(seq.output_ids)
            seq.draft = [*outputs[seq.id][done : done + 2], 7] if steps % 3 == 0 and done else []
            del seq.draft[max(seq.max_tokens - len(seq.token_ids) - 1, 0) :]

    if outputs is not None:
        core._guess = guess
    while waiting or core.scheduler.has_work:
        if steps % 2 == 0:
            seqs += [world.add(core, ask, ignore_eos=True, drafts="off") for ask in waiting[:3]]
            waiting = waiting[3:]
        core.step()
        core.scheduler.check()
        steps += 1
    drain(core)
    return [seq.output_ids for seq in seqs]


def batches(core):
    """How many tokens each call of the graphs has, from now on."""
    counts, graphs = [], core.runner._graphs

    def counting(arrays):
        counts.append(len(arrays["token_ids"]))
        return graphs(arrays)

    counting.takes = graphs.takes
    core.runner._graphs = counting
    return counts


@pytest.mark.parametrize("most", [1, 2, 3, 6, 8, 16, 17, 32, 50, 256])
def test_the_ladder_holds_every_batch_and_wastes_less_than_half(most):
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        assert min(size for size in sizes if size >= count) < 2 * count


@pytest.mark.parametrize("drafts", [False, True])
def test_tokens_are_those_of_the_engine_without_graphs(reference, gpu, drafts):
    eager = reference.core(max_num_seqs=7, cuda_graphs=False)
    wanted = run(reference, eager)
    assert gpu.recorded == 0
    core = reference.core(max_num_seqs=7, overlap=not drafts)
    counts = batches(core)
    assert gpu.recorded == len(SIZES)
    assert run(reference, core, wanted if drafts else None) == wanted
    assert gpu.replayed == [SIZES.index(min(s for s in SIZES if s >= count)) for count in counts]
    assert set(counts) >= ({2, 4, 5, 9} if drafts else {1, 2, 3, 5}), "on the ladder and between its steps"
    assert (max(counts) > 7) == drafts
    assert (core.stats.steps < eager.stats.steps) == drafts


def test_padding_changes_no_bit_and_writes_nothing(native, gpu, monkeypatch):
    """Two engines step by step: the same logits, and the same keys and values in the whole cache."""
    eager, graphed = (native.core(max_num_seqs=7, cuda_graphs=each) for each in (False, True))
    logits = {}
    for core in (eager, graphed):

        def execute(plan, core=core, execute=core.runner.execute):
            found = execute(plan)
            logits[core] = found.clone()
            with torch.inference_mode():
                found[:] = torch.nan  # nothing may come back from an earlier, larger batch
            return logits[core]

        monkeypatch.setattr(core.runner, "execute", execute)
    for step in range(40):
        for core in (eager, graphed):
            for ask in ASKS[3 * step : 3 * step + 3]:
                native.add(core, ask, ignore_eos=True, drafts="off")
            if core.scheduler.has_work:
                core.step()
        assert torch.equal(logits[eager], logits[graphed])
        for ours, theirs in zip(graphed.runner.kv_cache, eager.runner.kv_cache, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
    assert not graphed.scheduler.has_work
    assert len(gpu.replayed) > 20


def test_preempted_sequences_come_to_the_same_tokens(native, gpu):
    core = native.core(num_blocks=26, block_size=2, max_num_seqs=4)
    core.scheduler.predictor.mean = core.scheduler.predictor.deviation = 0.0
    many = [Ask((1, 2, i, IMAGE, 3), (i % 3,), 24) for i in range(4)]
    seqs = [native.add(core, ask) for ask in many]
    drain(core)
    assert core.scheduler.num_preemptions
    assert [seq.output_ids for seq in seqs] == [native.reference(ask) for ask in many]
    assert gpu.replayed


def test_kernels_that_look_at_values_are_not_recorded(world, gpu):
    world.core(max_num_seqs=7)
    assert gpu.recorded == 0


def test_the_embedded_model_reads_a_page_with_graphs(gpu, monkeypatch):
    select = kernels.select
    monkeypatch.setattr(kernels, "select", lambda *args: replace(select(*args), capturable=True))
    params = SamplingParams(max_new_tokens=48)
    found = []
    for graphs in (False, True):
        with Engine.from_pretrained(dtype="float32", max_num_seqs=3, cuda_graphs=graphs) as engine:
            found.append(next(engine.read([PAGE], params=params)).raw)
    assert found[0] == found[1] != ""
    assert gpu.replayed


def test_the_fake_refuses_memory_that_was_not_recorded(reference, gpu, monkeypatch):
    core = reference.core(max_num_seqs=2)
    reference.add(core, ASKS[0], ignore_eos=True, drafts="off")
    core.step()
    core.step()
    assert gpu.replayed
    rope = reference.model.decoder.rope
    monkeypatch.setattr(rope, "_cos", rope._cos.clone())
    with pytest.raises(AssertionError, match="not recorded"):
        core.step()


def test_the_fake_refuses_inputs_that_were_replaced():
    gpu, numbers = FakeGpu(), torch.arange(4.0)
    inputs, out = {"x": numbers}, torch.zeros(4)

    def double():
        out.copy_(2 * inputs["x"])

    replay = gpu.capture(double)
    numbers += 1
    replay()
    assert out.tolist() == [2, 4, 6, 8]
    inputs["x"] = numbers.clone()
    with pytest.raises(AssertionError, match="not recorded"):
        replay()


def test_staged_arrays_arrive_and_are_not_written_over():
    gpu = FakeGpu()
    staging, random = Staging(gpu), np.random.default_rng(0)
    for length in (3, 0, 1, 7, 70_000, 5, 2):  # one is longer than the buffers are at first
        arrays = {
            "ids": random.integers(0, 99, length),
            "pair": random.integers(0, 99, (2, length)).astype(np.int32),
            "view": random.integers(0, 99, (length, 9)).astype(np.int32)[:, ::2],
            "one": np.array([length]),
        }
        found = staging.bring(arrays)
        for name, array in arrays.items():
            assert found[name].numpy().dtype == array.dtype
            assert np.array_equal(found[name].numpy(), array)
            assert found[name].storage_offset() * array.itemsize % 64 == 0, "Triton's kernels rely on it"
    assert gpu.copies == 7


def test_pinned_memory_waits_for_its_copy():
    """Of two buffers, one is written while the copy out of the other runs; the fake fails where it is not waited for."""
    gpu = FakeGpu()
    staging, target = Staging(gpu), torch.empty(8, dtype=torch.uint8)
    first = staging.memory(8)
    staging.send(first, target)
    second = staging.memory(8)
    assert second.data_ptr() != first.data_ptr()
    second[:] = 1
    staging.send(second, target)
    first[:] = 2
    with pytest.raises(AssertionError, match="written while"):
        staging.memory(8)


def test_a_layout_is_dense_and_aligned():
    layout = Layout({"a": ((3,), np.int64), "b": ((0, 5), np.int32), "c": ((2, 3), np.int32)})
    assert layout.num_bytes == 128
    memory = torch.zeros(128, dtype=torch.uint8)
    views = layout.tensors(memory)
    views["c"][1, 2] = -1
    assert memory[64 + 20 : 64 + 24].tolist() == [255] * 4
    assert views["b"].shape == (0, 5)
