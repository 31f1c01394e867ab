"""The engine's inside, for real: whatever the company, order, chunking, block size and preemption, greedy output is the same.

A random model of a few thousand weights runs every request alone with room to spare; then hypothesis throws the same
requests together under hostile budgets. Look-alike pages (same size, one patch different) catch crossed pages.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import IMAGE, IMAGES, Ask, asks, drain, take

from pagemill.errors import ConfigError, RequestError


@st.composite
def scenarios(draw):
    requests = draw(
        st.lists(st.tuples(asks(), st.integers(0, 12), st.integers(0, 1)), min_size=1, max_size=6)
    )
    if draw(st.booleans()):  # the same page twice, and its look-alike beside it
        ask, arrival, priority = requests[0]
        requests.append((ask, arrival, priority))
        if ask.images and ask.images[0] in (0, 1, 2):
            twin = Ask(ask.prompt, ((ask.images[0] + 1) % 3, *ask.images[1:]), ask.max_new)
            requests.append((twin, arrival, priority))
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    return dict(
        requests=requests,
        cancel=draw(st.dictionaries(st.integers(0, 5), st.integers(0, 20), max_size=2)),
        block_size=block_size,
        # At least what one request may need: two images among three texts, and its output.
        num_blocks=draw(st.integers(-(-51 // block_size), -(-90 // block_size))),
        max_num_seqs=draw(st.integers(1, 5)),
        max_step_tokens=draw(st.sampled_from([1, 2, 5, 17, 64])),
        max_step_image_tokens=draw(st.sampled_from([1, 6, 100])),
        prefix_sharing=draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None)
@given(scenarios())
def test_output_does_not_depend_on_the_company(world, scenario):
    requests, cancel = scenario.pop("requests"), scenario.pop("cancel")
    core = world.core(**scenario)
    sequences, step = {}, 0
    while step <= 12 or core.scheduler.has_work:
        for i, (ask, arrival, priority) in enumerate(requests):
            if arrival == step:
                sequences[i] = world.add(core, ask, priority)
        for i, when in cancel.items():
            if when == step and i in sequences:
                core.cancel(sequences[i])
        if core.scheduler.has_work:
            core.step()
            core.scheduler.check()
        step += 1
        assert step < 5000
    drain(core)
    for i, (ask, _, _) in enumerate(requests):
        seq, expected = sequences[i], world.reference(ask)
        if seq.finish_reason == "cancelled":
            assert expected[: len(seq.output_ids)] == seq.output_ids
        else:
            assert seq.output_ids == expected
            assert seq.finish_reason == ("stop" if expected[-1] in (2034, 2036) else "length")


def test_look_alike_pages_read_differently(world):
    """Without this, crossed pages could not be noticed."""
    outputs = [tuple(world.reference(Ask((1, IMAGE, 2), (i,), 12))) for i in range(len(IMAGES))]
    assert len(set(outputs)) == len(outputs)


def test_tiny_pools_really_preempt(world):
    core = world.core(num_blocks=26, block_size=2, max_num_seqs=4)
    core.scheduler.predictor.mean = core.scheduler.predictor.deviation = 0.0
    many = [Ask((1, 2, i, IMAGE, 3), (i % 3,), 24) for i in range(4)]
    sequences = [world.add(core, ask, ignore_eos=True) for ask in many]
    drain(core)
    assert core.scheduler.num_preemptions > 0
    assert sequences[0].num_preemptions == 0, "the first come is served first"
    for seq, ask in zip(sequences, many, strict=True):
        fresh = world.core(prefix_sharing=False)
        alone = world.add(fresh, ask, ignore_eos=True)
        drain(fresh)
        assert seq.output_ids == alone.output_ids


def test_admission_goes_by_predicted_length_not_by_the_cap(world):
    core = world.core(num_blocks=40, block_size=2, max_num_seqs=8)
    for i in range(4):
        world.add(core, Ask((1, i, IMAGE), (0,), 60))
    core.step()
    assert len(core.scheduler.running) > 1, "four caps of 60 tokens would fill the pool with one"
    drain(core)


def test_equal_prompts_share_blocks_and_equal_looking_ones_do_not(world):
    core = world.core(block_size=2)
    for image, shared in ((0, 0), (0, 8), (1, 2)):
        before = core.scheduler.num_shared_tokens
        world.add(core, Ask((1, 2, IMAGE, 3), (image,), 2))
        drain(core)
        assert core.scheduler.num_shared_tokens - before == shared


def test_the_budgets_hold_in_every_step(world):
    core = world.core(max_step_tokens=7, max_step_image_tokens=6, max_num_seqs=3)
    for i in range(6):
        world.add(core, Ask((1, 2, IMAGE, 3), (i % 3,), 5))
    while core.scheduler.has_work:
        plan = core.scheduler.schedule()
        assert 0 < sum(work.num_tokens for work in plan.work) <= 7
        assert sum(image.num_tokens for _, image in plan.encode) <= 6
        assert len(core.scheduler.running) <= 3
        take(core, plan)
        core.scheduler.check()


def test_priorities_then_first_come(world):
    core = world.core(max_num_seqs=1)
    order = []
    sequences = [world.add(core, Ask((1, i), (), 3), priority) for i, priority in enumerate([1, 0, 1, 0])]
    while core.scheduler.has_work:
        order += [sequences.index(seq) for seq in core.step()[1]]
    assert order == [1, 3, 0, 2]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_rollback_and_go_on(world, block_size):
    ask = Ask((1, 2, IMAGE, 3), (1,), 20)
    core = world.core(block_size=block_size)
    seq = world.add(core, ask, ignore_eos=True, drafts="off")
    while len(seq.output_ids) < 9:
        core.step()
    first = seq.output_ids
    for keep in (9, 8, 3, 0):
        core.scheduler.rollback(seq, seq.num_prompt + keep)
        core.scheduler.check()
        assert seq.output_ids == first[:keep]
        while len(seq.output_ids) < 9:
            core.step()
            core.scheduler.check()
        assert seq.output_ids == first
        assert len(seq.logprobs) == 9
    drain(core)


def test_a_fork_after_rollback_leaves_the_shared_block_alone(world):
    """Two equal sequences share their prompt's blocks; one is rolled back into a shared block and writes there."""
    core = world.core(block_size=4)
    ask = Ask((1, 2, 3, 4, 5, 1, 2), (), 20)
    one = world.add(core, ask, ignore_eos=True, drafts="off")
    while len(one.output_ids) < 9:
        core.step()
    two = world.add(core, Ask(tuple(one.token_ids[:12]), (), 12), ignore_eos=True, drafts="off")
    core.step()
    assert set(one.block_table) & set(two.block_table)
    first = one.output_ids
    core.scheduler.rollback(one, one.num_prompt + 3)
    core.scheduler.check()
    drain(core)
    assert one.output_ids[: len(first)] == first
    assert two.output_ids[:4] == first[5:9]


def test_stop_strings_cut_the_text(world):
    core = world.core()
    ask = Ask((1, 2, IMAGE), (0,), 12)
    seq = world.add(core, ask, ignore_eos=True)
    drain(core)
    text = core.text_of(seq)
    stop = text[len(text) // 2 :][:2]
    core = world.core()
    seq = world.add(core, ask, ignore_eos=True, stop=(stop,))
    drain(core)
    assert core.text_of(seq) == text[: text.index(stop)]
    assert seq.finish_reason == "stop"
    assert len(seq.output_ids) < 12


def test_a_stop_string_that_ends_with_the_cap_is_a_stop(world):
    ask = Ask((1, 2, IMAGE), (0,), 12)
    core = world.core()
    seq = world.add(core, ask, ignore_eos=True)
    drain(core)
    texts = [core.prompter.decode(seq.output_ids[:n]) for n in range(13)]
    n = next(
        n for n in range(2, 13) if len(texts[n]) > len(texts[n - 1]) and texts[n][-1] not in texts[n - 1]
    )
    core = world.core()
    seq = world.add(core, Ask(ask.prompt, ask.images, n), ignore_eos=True, stop=(texts[n][-1],))
    drain(core)
    assert len(seq.output_ids) == n
    assert seq.finish_reason == "stop"


def test_an_image_twice_in_one_prompt_is_encoded_once(world):
    core = world.core(max_step_tokens=2)
    world.add(core, Ask((1, IMAGE, 2, IMAGE, 3), (0, 0), 2))
    encoded = 0
    while core.scheduler.has_work:
        plan = core.scheduler.schedule()
        encoded += len(plan.encode)
        take(core, plan)
        core.scheduler.check()
    assert encoded == 1


def test_cancelled_requests_that_never_ran_let_go_of_their_patches(world):
    core = world.core(max_num_seqs=1)
    running = world.add(core, Ask((1, 2), (), 6), ignore_eos=True)
    core.step()
    waiting = [world.add(core, Ask((1, IMAGE), (0,), 6)) for _ in range(3)]
    for seq in waiting:
        core.cancel(seq)
    assert sum(image.patches.nbytes for seq in waiting for image in seq.images) == 0
    assert not core.scheduler._waiting
    drain(core)
    assert running.finish_reason == "length"


def test_requests_that_can_never_fit_are_refused(world):
    core = world.core(num_blocks=4, block_size=4)
    with pytest.raises(RequestError, match="the KV cache holds 16"):
        world.add(core, Ask((1,) * 16, (), 4))
    seq = world.add(core, Ask((1,) * 15, (), 99), ignore_eos=True)
    drain(core)
    assert seq.finish_reason == "length"
    with pytest.raises(RequestError, match="prompt is empty"):
        world.add(core, Ask((), (), 4))
    with pytest.raises(RequestError, match="the context holds 8"):
        world.add(world.core(max_model_len=8), Ask((1,) * 8, (), 4))
    with pytest.raises(RequestError, match="1 image placeholders"):
        world.add(core, Ask((1, IMAGE), (), 4))
    with pytest.raises(RequestError, match="integers inside the vocabulary"):
        world.add(core, Ask((1, 4000), (), 4))
    with pytest.raises(ConfigError, match="beyond the model's 2048 positions"):
        world.core(max_model_len=5000)
    with pytest.raises(ConfigError, match="less than one KV block"):
        world.core(num_blocks=0.5, block_size=16)


def test_logits_that_are_not_finite_end_their_sequence_only(world):
    core = world.core()
    good = Ask((1, 2, 3), (), 6)
    seq, bad = world.add(core, good), world.add(core, Ask((1, IMAGE, 2), (3,), 6))
    bad.images[0].levels = np.full_like(bad.images[0].levels, np.nan)
    drain(core)
    assert bad.finish_reason == "error"
    assert seq.output_ids == world.reference(good)
