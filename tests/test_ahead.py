"""Planned ahead: a step is launched before the tokens of the one before are known, images are encoded before they are needed.

On a fake GPU, whose embeddings are NaN until they are waited for. The reference is the engine that knows every token in time.
"""

import numpy as np
import pytest
import test_core
import test_steering
import torch
from fake_gpu import FakeGpu
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import IMAGE, IMAGES, Ask, drain
from test_steering import TouchyDetector, storm

import pagemill.core
from pagemill.decode.guidance import Regex
from pagemill.pages.preprocess import PreparedImage
from pagemill.runner import Runner


@pytest.fixture
def gpu(monkeypatch):
    """What engines take their device for."""
    return on_a_gpu(monkeypatch)


def on_a_gpu(patch):
    gpu = FakeGpu()
    patch.setattr(pagemill.core, "gpu_of", lambda device: gpu)
    patch.setattr(gpu, "peak", lambda run: 0)
    return gpu


def watch(core):
    """The plans that are executed from now on, and whether each was launched early."""
    plans, launch = [], core._launch

    def watching(*, early):
        flight = launch(early=early)
        if flight.plan.work:
            plans.append((flight.plan, early))
        return flight

    core._launch = watching
    return plans


@settings(max_examples=60, deadline=None)
@given(test_core.scenarios())
def test_output_does_not_depend_on_the_company(world, scenario):
    for ask, _, _ in scenario["requests"]:
        world.reference(ask)
    with pytest.MonkeyPatch.context() as patch:
        on_a_gpu(patch)
        test_core.test_output_does_not_depend_on_the_company.hypothesis.inner_test(world, scenario)


@settings(max_examples=60, deadline=None)
@given(test_steering.scenarios(), st.sampled_from([0, 0, 1]))
def test_steered_output_is_that_of_one_step_after_another(world, scenario, longest):
    """Grammars that force tokens, loops that are rolled back, retries, draws, stop strings: each makes a planned step wrong."""
    with pytest.MonkeyPatch.context() as patch:
        on_a_gpu(patch)
        patch.setattr(pagemill.core, "LoopDetector", TouchyDetector)
        test_steering.run(world, scenario | {"longest": longest})


def test_steered_output_survives_preemption(world, gpu, monkeypatch):
    monkeypatch.setattr(pagemill.core, "LoopDetector", TouchyDetector)
    early = preemptions = 0
    for seed in range(6):
        plans, launch = [], pagemill.core.EngineCore._launch

        def watching(self, *, early, plans=plans, launch=launch):
            flight = launch(self, early=early)
            plans.append(early)
            return flight

        with monkeypatch.context() as patch:
            patch.setattr(pagemill.core.EngineCore, "_launch", watching)
            core, _ = test_steering.run(world, storm(seed) | {"longest": 0})
        early += sum(plans)
        preemptions += core.scheduler.num_preemptions
    assert early > 200
    assert preemptions > 10


def test_steps_follow_each_other_without_waiting(world, gpu):
    core = world.core(max_num_seqs=3)
    plans = watch(core)
    asks = [Ask((1, 2, i, IMAGE), (i,), 20) for i in range(3)]
    seqs = [world.add(core, ask, drafts="off", ignore_eos=True) for ask in asks]
    drain(core)
    assert [early for _, early in plans] == [False] + [True] * (len(plans) - 1)
    assert len(plans) == 20, "as many as one after another: no token is computed for nothing"
    assert gpu.fetched == 20
    assert core.stats.rejected_draft_tokens == 0
    assert all(len(seq.output_ids) == 20 for seq in seqs)


def test_an_end_that_was_not_foreseen_costs_one_token(world, gpu):
    core = world.core()
    seq = world.add(core, Ask((1, 2, IMAGE), (0,), 30), drafts="off", guidance=Regex("[ab]{7}"))
    other = world.add(core, Ask((1, 2), (), 30), drafts="off", ignore_eos=True)
    drain(core)
    assert (seq.finish_reason, other.finish_reason) == ("stop", "length")
    assert core.stats.rejected_draft_tokens == 1


def test_a_step_for_nobody_is_dropped(world, gpu):
    core = world.core()
    seq = world.add(core, Ask((1, 2), (), 30), drafts="off", ignore_eos=True)
    core.step()
    assert core.ahead
    core.cancel(seq)
    after = world.add(core, Ask((1, 2), (), 30), drafts="off", ignore_eos=True)
    assert core.step()[0] == [after]
    assert core.stats.rejected_draft_tokens == 1
    drain(core)
    assert after.output_ids[0] == seq.output_ids[0]


@pytest.mark.parametrize("why", ["drafts", "a reference", "asked"])
def test_where_steps_wait_for_tokens(world, gpu, why):
    core = world.core(overlap=why != "asked")
    plans, ask = watch(core), Ask((1, 2, 3), (), 8)
    if why == "a reference":
        prompt = core.tokenize(list(ask.prompt), [])
        core.add(prompt, pagemill.core.SamplingParams(drafts="off"), 8, reference=[5, 6, 7])
    else:
        core.draft_budget.lengths = lambda acceptances, limit: [2 * (why == "drafts")] * len(acceptances)
        world.add(core, ask, ignore_eos=True)
    drain(core)
    # The step of the prompt has no draft, and what follows it may be planned before its token is known.
    assert sum(early for _, early in plans) == 0


def test_a_cancelled_sequence_leaves_a_step_under_way(world, gpu):
    core = world.core(max_num_seqs=2)
    asks = [Ask((1, i), (), 9) for i in range(3)]
    seqs = [world.add(core, ask, drafts="off", ignore_eos=True) for ask in asks]
    for _ in range(4):
        core.step()
    assert core.ahead
    core.cancel(seqs[0])
    core.scheduler.check()
    drain(core)
    assert seqs[0].finish_reason == "cancelled"
    for seq, ask in zip(seqs[1:], asks[1:], strict=True):
        alone = world.core(overlap=False)
        expected = world.add(alone, ask, drafts="off", ignore_eos=True)
        drain(alone)
        assert seq.output_ids == expected.output_ids
    assert len(seqs[0].output_ids) == 4


@pytest.mark.parametrize("place", ["launch", "fetch", "clock"])
def test_a_step_that_fails_leaves_no_placeholder(world, gpu, place):
    """One sequence was preempted while the next step was planned: it waits, with a token that never comes."""
    core = world.core(num_blocks=26, block_size=2, max_num_seqs=4)
    core.scheduler.predictor.mean = core.scheduler.predictor.deviation = 0.0
    asks = [Ask((1, 2, i, IMAGE, 3), (i % 3,), 24) for i in range(4)]
    seqs = [world.add(core, ask, drafts="off") for ask in asks]
    preempted, preempt = [], core.scheduler._preempt

    def watching(seq, step):
        preempted.append(seq)
        preempt(seq, step)

    core.scheduler._preempt = watching
    execute, fetch = core.runner.execute, gpu.fetch

    def failing():
        if preempted:
            raise RuntimeError("this step")

    seconds = core.runner.seconds
    if place == "launch":
        core.runner.execute = lambda plan: failing() or execute(plan)
    elif place == "clock":
        core.runner.seconds = lambda plan: failing() or seconds(plan)
    else:

        def fetched_late(*given):
            there = fetch(*given)

            def wait():
                failing()
                return there()

            return wait

        gpu.fetch = fetched_late
    with pytest.raises(RuntimeError, match="this step"):
        drain(core)
    core.runner.execute, core.runner.seconds, gpu.fetch = execute, seconds, fetch
    assert not core.ahead
    victim = preempted[0]
    assert victim.row < 0
    assert victim.token_ids[-1] >= 0
    for seq in list(core.scheduler.running):
        core.cancel(seq)
    drain(core)
    assert victim.output_ids == world.reference(asks[seqs.index(victim)])


def pages(count, h=4, w=6):
    """Images that nobody has seen before."""
    random = np.random.default_rng(h * w)
    return [
        PreparedImage(
            random.integers(0, 256, (h * w, 588), dtype=np.uint8),
            IMAGES[0].levels,
            (1, h, w),
            h * w // 4,
            f"{h}x{w} page {i}".encode().ljust(16),
        )
        for i in range(count)
    ]


def add_page(core, image, max_new=12):
    prompt = core.tokenize([1, IMAGE, 2, 3, 4], [image])
    params = pagemill.core.SamplingParams(max_new_tokens=max_new, ignore_eos=True, drafts="off")
    return core.add(prompt, params, 99)


def test_images_are_encoded_once_and_beside_steps_that_decode(world, gpu):
    images, outputs = pages(6), {}
    for overlap in (False, True):
        core = world.core(max_num_seqs=2, overlap=overlap)
        plans, before = watch(core), gpu.encoded
        seqs = [add_page(core, image, 9 + i) for i, image in enumerate(images)]
        drain(core)
        outputs[overlap] = [seq.output_ids for seq in seqs]
        assert gpu.encoded - before == (len(images) if overlap else 0), "without, on the one stream"
        assert core.stats.images == len(images)
        ahead = [plan for plan, _ in plans if plan.ahead]
        assert len(ahead) == (1 if overlap else 0), "four wait, and there is room for all"
        for plan in ahead:
            assert not plan.encode
            assert all(work.start >= work.seq.num_prompt for work in plan.work)
            assert [seq for seq, _ in plan.ahead] == seqs[2:]
    assert outputs[True] == outputs[False]


def test_embeddings_are_waited_for(world, gpu, monkeypatch):
    """So that the fake would tell."""
    monkeypatch.setattr(Runner, "_join_images", lambda self, plan: False)
    core = world.core()
    seq = add_page(core, pages(1)[0])
    drain(core)
    assert seq.finish_reason == "error"
    assert "not finite" in seq.error


def test_space_for_images_is_for_those_that_run(world, gpu):
    """Six tokens an image: what is encoded in a step, and half of the space, is two of them."""
    core = world.core(max_num_seqs=1, max_step_image_tokens=13)
    small, large = pages(5), pages(1, 4, 26)[0]
    seqs = [add_page(core, image) for image in small]
    core.step()
    core.step()
    assert [seq in core.scheduler._early for seq in seqs] == [False, True, True, False, False]
    assert core.images.used_tokens == 12
    # One that goes before all others and takes the whole space.
    urgent = core.add(
        core.tokenize([1, IMAGE], [large]), pagemill.core.SamplingParams(max_new_tokens=3), 3, -1
    )
    core.cancel(seqs[0])
    drain(core)
    assert gpu.encoded == len(seqs) + 1 + 2, "two gave way, and were encoded again"
    assert urgent.finish_reason == "length"
    assert {seq.finish_reason for seq in seqs[1:]} == {"length"}


def test_images_held_early_go_with_their_sequence(world, gpu):
    core = world.core(max_num_seqs=1)
    first, second, third = (add_page(core, image) for image in pages(3))
    core.step()
    core.step()
    assert core.images.used_tokens == 12
    core.cancel(second)
    core.scheduler.check()
    assert core.images.used_tokens == 6
    drain(core)
    assert [seq.finish_reason for seq in (first, second, third)] == ["length", "cancelled", "length"]


def test_too_little_memory_for_images_ahead_costs_no_page(world, gpu, monkeypatch):
    images = pages(4)
    core = world.core(max_num_seqs=1)
    seqs, encode = [add_page(core, image) for image in images], core.runner.encode

    def exhausted(images):
        if images and images[0][0].row < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        encode(images)

    monkeypatch.setattr(core.runner, "encode", exhausted)
    with pytest.warns(RuntimeWarning, match="no longer encoded beside decoding") as told:
        drain(core)
    assert len(told) == 1
    assert gpu.num_tidied
    for seq, image in zip(seqs, images, strict=True):
        alone = world.core(overlap=False)
        expected = add_page(alone, image)
        drain(alone)
        assert seq.output_ids == expected.output_ids


def test_what_the_cache_holds_already_is_not_encoded_ahead(world, gpu):
    """The prompt's blocks are found by content."""
    core, image = world.core(max_num_seqs=1, block_size=2), pages(1)[0]
    add_page(core, image)
    drain(core)
    running, again = add_page(core, pages(2)[1]), add_page(core, image)
    before = gpu.encoded
    drain(core)
    assert gpu.encoded - before == 1
    assert again.finish_reason == running.finish_reason == "length"
