"""The simulator: skipping equals stepping to the last digit, no page is lost, and known results come out."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.cost.devices import find_device, measured
from pagemill.cost.model import GPU_EFFICIENCY, PRECISIONS, SHAPES, PageStats, Shape, StepCost, predict
from pagemill.cost.simulator import Degeneration, Settings, Workload, draw, simulate
from pagemill.errors import ConfigError

BF16 = PRECISIONS["bfloat16"]
SMALL = Shape(SHAPES["3b"])


def cost(device="l4", shape="3b", efficiency=GPU_EFFICIENCY):
    return StepCost(Shape(SHAPES[shape]), BF16, find_device(device), efficiency)


def differing(one, other):
    """Names of the fields in which two outcomes differ, but for how many steps were planned."""

    def same(a, b):
        return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b

    names = [field.name for field in fields(one) if field.name != "planned_steps"]
    return [name for name in names if not same(getattr(one, name), getattr(other, name))]


@st.composite
def runs(draw_value):
    """A workload and an engine for it: roomy or so tight that pages are preempted, at once or arriving, with loops or none."""
    one_of = st.sampled_from
    stats = PageStats(
        draw_value(one_of([20, 60, 150])),
        draw_value(one_of([1, 20, 60, 150])),
        draw_value(one_of([1, 9, 30])),
        draw_value(one_of([0.0, 0.4, 1.0])),
        draw_value(one_of([0.0, 0.5])),
    )
    loops = Degeneration(
        draw_value(one_of([0.0, 0.2, 1.0])),
        draw_value(one_of(["off", "stop", "rescue"])),
        draw_value(one_of([1, 10, 40])),
        draw_value(one_of([0.0, 0.5, 1.0])),
    )
    when = draw_value(
        one_of(
            [{}, {"order": "longest"}, {"order": "oracle"}, {"pages_per_day": 2e5}, {"pages_per_day": 2e6}]
        )
    )
    workload = Workload(
        draw_value(st.integers(1, 40)),
        stats,
        degeneration=loops,
        max_new_tokens=draw_value(one_of([40, 120, 400])),
        interactive=draw_value(one_of([0.0, 0.3])),
        seed=draw_value(st.integers(0, 1000)),
        **when,
    )
    longest = int(draw(workload)["image"].max()) + stats.text_tokens + workload.max_new_tokens
    block_size, concurrency = draw_value(one_of([1, 4, 16])), draw_value(one_of([1, 3, 8, 16]))
    engine = Settings(
        concurrency,
        kv_cache_bytes=SMALL.kv_bytes(BF16)
        * (longest + block_size)
        * draw_value(one_of([1, 1.3, 2, 10, 50])),
        max_step_tokens=concurrency + draw_value(one_of([1, 7, 64, 2000])),
        max_step_image_tokens=draw_value(one_of([50, 4096])),
        block_size=block_size,
    )
    return workload, engine


@settings(deadline=None, max_examples=40)
@given(runs())
def test_skipping_gives_what_stepping_gives_and_every_page_ends_once(run):
    workload, engine = run
    skipped = simulate(workload, engine, cost())
    stepped = simulate(workload, engine, cost(), skip=False)
    assert not differing(skipped, stepped)
    assert stepped.planned_steps == stepped.steps
    assert sorted(skipped.page) == list(range(workload.pages))
    assert (skipped.arrived <= skipped.scheduled).all()
    assert (skipped.scheduled < skipped.first_token).all()
    assert (skipped.first_token <= skipped.finished).all()
    assert (np.diff(skipped.finished) >= 0).all()
    assert sum(skipped.stage_s.values()) == pytest.approx(skipped.seconds)
    assert 0 < skipped.occupancy <= 1
    shared = workload.stats.text_tokens * engine.max_num_seqs / skipped.kv_cache_tokens
    assert 0 < skipped.kv_use["mean"] <= skipped.kv_use["peak"] <= 1 + shared
    lengths = draw(workload)
    healthy = ~skipped.looped
    assert (skipped.output[healthy] == lengths["output"][skipped.page[healthy]]).all()
    assert not skipped.degenerate[healthy].any()


def test_most_steps_are_skipped_where_pages_are_long():
    outcome = simulate(Workload(200), Settings(32), cost("h100-sxm"))
    assert outcome.planned_steps < outcome.steps / 5
    assert outcome.preemptions == 0


def test_a_tight_cache_preempts_and_skipping_still_equals_stepping():
    stats = PageStats(200, 300, output_sigma=1.0)
    tight = Settings(24, kv_cache_bytes=SMALL.kv_bytes(BF16) * 5000)
    workload = Workload(150, stats, max_new_tokens=2000, seed=3)
    skipped = simulate(workload, tight, cost())
    assert skipped.preemptions > 0
    assert skipped.waste_tokens["recompute"] > 0
    assert skipped.planned_steps < skipped.steps
    assert not differing(skipped, simulate(workload, tight, cost(), skip=False))


def test_a_seed_gives_the_same_run_and_another_seed_another():
    workload = Workload(60, degeneration=Degeneration(0.1), max_new_tokens=2000, pages_per_day=50_000)
    one, again = (simulate(workload, Settings(16), cost()) for _ in range(2))
    assert not differing(one, again)
    assert differing(one, simulate(replace(workload, seed=1), Settings(16), cost()))


@pytest.mark.parametrize(
    ("device", "concurrency", "stats"),
    [
        ("h100-sxm", 16, PageStats()),
        ("h100-sxm", 128, PageStats(400, 150, output_sigma=0.3)),
        ("l40s", 64, PageStats(4800, 128)),
    ],
)
def test_a_long_run_settles_at_what_the_closed_form_says(device, concurrency, stats):
    outcome = simulate(Workload(8 * concurrency + 300, stats), Settings(concurrency), cost(device))
    assert outcome.steady_pages_per_s() == pytest.approx(
        predict(cost(device), stats, concurrency).pages_per_s, rel=0.05
    )


@pytest.mark.parametrize(
    ("pages", "stats"),
    [
        (4, PageStats()),
        (20, PageStats()),
        (80, PageStats()),
        (16, PageStats(4800, 128)),
        (32, PageStats(400, 150)),
    ],
)
def test_runs_of_any_length_take_on_average_what_the_closed_form_says(pages, stats):
    model, draws = cost("h100-sxm"), range(max(480 // pages, 10))
    mean = sum(
        simulate(Workload(pages, stats, seed=seed), Settings(16), model).seconds for seed in draws
    ) / len(draws)
    assert pages / predict(model, stats, 16, count=pages).pages_per_s == pytest.approx(mean, rel=0.06)


@settings(deadline=None, max_examples=15)
@given(runs(), st.floats(1.0, 5.0))
def test_a_uniformly_faster_device_never_takes_longer(run, factor):
    workload, engine = run
    slow, l4 = cost(), find_device("l4")
    e = replace(slow.efficiency, step_s=0, row_s=0, image_s=0, prepare_s=0)
    workload = replace(workload, pages_per_day=None)  # arrivals do not get faster with the device
    faster = replace(l4, bandwidth=factor * l4.bandwidth, flops={k: factor * v for k, v in l4.flops.items()})
    before = simulate(workload, engine, StepCost(SMALL, BF16, l4, e))
    after = simulate(workload, engine, StepCost(SMALL, BF16, faster, e))
    assert after.seconds * factor == pytest.approx(before.seconds, rel=1e-6)


def test_more_bandwidth_is_never_slower():
    l4, workload = find_device("l4"), Workload(100, max_new_tokens=2000)
    seconds = [
        simulate(workload, Settings(32), StepCost(SMALL, BF16, replace(l4, bandwidth=b * 1e9))).seconds
        for b in (150, 300, 600, 1200)
    ]
    assert seconds == sorted(seconds, reverse=True)


# Published: 2.42 % of requests loop, and the batch takes 7.3 minutes instead of 4.2. Card, cap and page count were not said; with
# the benchmark's 496 pages and its cap of 8,192 tokens, on an L40S with 64 pages at once:
def test_the_published_batch_with_and_without_looping_pages():
    base = Workload(496, PageStats(1518, 620), degeneration=Degeneration(0.0242), max_new_tokens=8192)
    minutes = {}
    for name, loops in {
        "none": Degeneration(),
        "off": Degeneration(0.0242),
        "stop": Degeneration(0.0242, "stop"),
        "rescue": Degeneration(0.0242, "rescue"),
    }.items():
        outcome = simulate(replace(base, degeneration=loops), Settings(64), cost("l40s", "7b"))
        minutes[name] = outcome.seconds / 60
        assert outcome.looped.sum() == (12 if loops.rate else 0)
        assert outcome.degenerate.sum() == {"none": 0, "off": 12, "stop": 12}.get(
            name, outcome.degenerate.sum()
        )
    assert minutes["none"] == pytest.approx(4.2, rel=0.05)
    assert minutes["off"] == pytest.approx(7.3, rel=0.07)
    for guard in ("stop", "rescue"):
        assert minutes[guard] < minutes["none"] * 1.03


def test_a_rescue_throws_away_what_it_took_to_find_the_loop():
    loops = Degeneration(1.0, "rescue", detect_tokens=50, rescued=1.0)
    workload = Workload(20, PageStats(100, 200), degeneration=loops)
    outcome = simulate(workload, Settings(4), cost())
    lengths = draw(workload)
    saved = (lengths["output"] > lengths["loop_at"])[outcome.page]
    assert (outcome.degenerate == ~saved).all()
    assert outcome.waste_tokens["discarded"] == 20 * 50
    assert (outcome.output[saved] == lengths["output"][outcome.page[saved]]).all()


def test_the_longest_first_shortens_the_tail():
    base = Workload(128, PageStats(800, 400, output_sigma=0.8), max_new_tokens=4000)
    by_chance = simulate(base, Settings(32), cost()).seconds
    assert simulate(replace(base, order="oracle"), Settings(32), cost()).seconds < 0.95 * by_chance


def test_the_urgent_overtake():
    workload = Workload(120, PageStats(400, 100), pages_per_day=1e6, interactive=0.1, seed=2)
    outcome = simulate(workload, Settings(8), cost())
    latency = outcome.finished - outcome.arrived
    urgent = draw(workload)["interactive"][outcome.page]
    assert latency[urgent].mean() < 0.5 * latency[~urgent].mean()


def test_arrivals_follow_the_day():
    profile = (0.0,) * 8 + (1.0,) * 8 + (0.0,) * 8
    arrive = draw(Workload(20_000, pages_per_day=10_000, day_profile=profile))["arrive"]
    hours = arrive % 86400 / 3600
    assert hours.min() >= 8
    assert hours.max() <= 16
    assert arrive.max() / 86400 == pytest.approx(
        1 + 2 / 3, abs=0.2
    )  # the second day's pages come by 16 o'clock
    outcome = simulate(Workload(50, pages_per_day=2000, day_profile=profile), Settings(4), cost())
    assert outcome.stage_s["idle"] > 8 * 3600 * 0.99


def test_lengths_can_be_given():
    workload = Workload(50, lengths=((100, 10), (300, 30)))
    outcome = simulate(workload, Settings(4), cost())
    assert set(outcome.output) == {10, 30}


def test_a_machine_that_prepares_pages_itself_takes_the_time_for_it():
    here = measured("here", flops={"bfloat16": 1e12}, bandwidth=1e11, memory=1e11, source="test")
    efficiency = replace(GPU_EFFICIENCY, prepare_s=0.5)
    workload = Workload(10, PageStats(100, 20), max_new_tokens=100)
    with_ = simulate(workload, Settings(4), StepCost(SMALL, BF16, here, efficiency))
    without = simulate(workload, Settings(4), StepCost(SMALL, BF16, here, replace(efficiency, prepare_s=0.0)))
    assert with_.stage_s["prepare"] == pytest.approx(5.0)
    assert with_.seconds == pytest.approx(without.seconds + 5.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Workload(0), "the workload is empty: 0 pages"),
        (lambda: Workload(1, max_new_tokens=0), "max_new_tokens should be at least 1"),
        (lambda: Workload(1, pages_per_day=0), "pages a day should be above 0"),
        (lambda: Workload(1, day_profile=(0.0,) * 24), "24 weights"),
        (lambda: Workload(1, order="random"), "order should be arrival"),
        (lambda: Workload(1, order="oracle", pages_per_day=1.0), "not to pages that arrive"),
        (lambda: Degeneration(1.5), "the rate of degeneration should be a share"),
        (lambda: Degeneration(guard="maybe"), "guard should be off, stop or rescue"),
        (lambda: Degeneration(detect_tokens=0), "after at least one token"),
        (lambda: Settings(0), "max_num_seqs should be at least 1"),
        (lambda: Settings(64, max_step_tokens=64), "no room for a prefill beside 64 pages"),
        (
            lambda: simulate(Workload(1), Settings(kv_cache_bytes=1e12), cost()),
            "a KV cache of 1000.0 GB does not fit l4",
        ),
        (
            lambda: simulate(Workload(1), Settings(kv_cache_bytes=1e6), cost()),
            "does not fit the KV cache on l4",
        ),
        (lambda: draw(Workload(1, lengths=((0, 1),))), "lengths should be pairs"),
    ],
)
def test_bad_input_is_one_sentence(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
