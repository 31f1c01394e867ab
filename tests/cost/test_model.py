"""The cost model: the published table of operations, limits, memory, money, and the directions in which numbers move."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.cost.devices import find_device, measured
from pagemill.cost.model import (
    GPU_EFFICIENCY,
    LIMIT,
    PRECISIONS,
    SHAPES,
    Efficiency,
    Money,
    PageStats,
    Shape,
    StepCost,
    _run,
    check_published,
    find_precision,
    find_shape,
    memory,
    predict,
)
from pagemill.errors import ConfigError
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint
from pagemill.model.weights import expected_shapes

H100, L4 = find_device("h100-sxm"), find_device("l4")
BF16 = PRECISIONS["bfloat16"]


def cost(shape="3b", device=H100, precision="bfloat16", efficiency=GPU_EFFICIENCY):
    return StepCost(Shape(SHAPES[shape]), PRECISIONS[precision], device, efficiency)


# TFLOP a page of 1,000 output tokens, as counted by hand for the two published shapes.
@pytest.mark.parametrize(
    ("tokens", "vision", "prefill", "total_3b", "total_7b"),
    [(1518, 8.6, 8.8, 23.5, 43.0), (2145, 12.6, 12.6, 31.3, 55.7), (2880, 17.6, 17.2, 41.0, 71.0),
     (4800, 32.3, 30.0, 68.5, 113.8)],
)  # fmt: skip
def test_operations_of_a_page_are_those_of_the_published_table(tokens, vision, prefill, total_3b, total_7b):
    work = Shape(SHAPES["3b"]).work(tokens, 1000)
    assert work.vision == pytest.approx(vision * 1e12, rel=0.02)
    assert work.prefill == pytest.approx(prefill * 1e12, rel=0.02)
    assert work.decode == pytest.approx(6.2e12, rel=0.02)
    assert work.total == pytest.approx(total_3b * 1e12, rel=0.02)
    assert Shape(SHAPES["7b"]).work(tokens, 1000).total == pytest.approx(total_7b * 1e12, rel=0.02)


def test_sizes_are_the_published_ones():
    small, large = Shape(SHAPES["3b"]), Shape(SHAPES["7b"])
    assert small.params == pytest.approx(3.755e9, rel=1e-3)
    assert large.params == pytest.approx(8.29e9, rel=1e-3)
    assert (small.kv_bytes(BF16), large.kv_bytes(BF16)) == (36864, 57344)


def test_parameters_are_those_of_the_weights():
    config = read_config(find_checkpoint("pagemill-tiny"))
    matrices = sum(math.prod(s) for s in expected_shapes(config).values() if len(s) > 1)
    assert Shape(config).params == matrices
    assert find_shape("pagemill-tiny") == config


def test_windows_of_a_small_image_are_the_image():
    shape = Shape(SHAPES["3b"])
    patches = 4 * 9
    assert shape.vision_attention_flops(9) == 4 * 1280 * 32 * patches**2


@pytest.mark.parametrize(("name", "least", "most"), [("w4a16", 0.25, 0.27), ("int4", 0.26, 0.28)])
def test_4_bit_weights_take_a_quarter_and_their_scales(name, least, most):
    assert least < PRECISIONS[name].weight_bytes / BF16.weight_bytes < most


def test_quantising_all_weights_helps_the_tower_too_and_a_small_kv_cache_holds_more_pages():
    plain, decoder, everything = (cost(precision=name) for name in ("bfloat16", "w8a8", "int8"))
    assert plain.vision_s([1518]) == decoder.vision_s([1518]) > 1.3 * everything.vision_s([1518])
    assert plain.matmul_s(2048, 1) > 1.9 * decoder.matmul_s(2048, 1) > everything.matmul_s(2048, 1)
    assert everything.shape.weight_bytes(PRECISIONS["int8"]) == everything.shape.params
    assert everything.chunk_s(0, 1558) == plain.chunk_s(0, 1558)  # attention is not quantised
    small = find_precision("int8", "int8")
    assert small.name == "int8, KV int8"
    pages = [memory(plain.shape, p, L4, PageStats()).max_concurrency for p in (PRECISIONS["int8"], small)]
    assert pages[1] == pytest.approx(pages[0] * 2 / small.kv_bytes, abs=2)


def test_a_decoding_step_reads_the_weights_once_whatever_the_batch():
    model = cost(efficiency=LIMIT)
    reads = 2 * (model.shape.layer_params + model.shape.head_params) / H100.bandwidth
    assert model.matmul_s(1, 1) == pytest.approx(reads)
    assert model.matmul_s(64, 64) == pytest.approx(reads)
    assert model.matmul_s(4096, 4096) > 2 * reads  # far beyond the ridge it is arithmetic
    assert model.context_s == pytest.approx(36864 / H100.bandwidth)


def test_one_page_at_a_time_takes_the_sum_of_its_steps():
    model, pages = cost(), PageStats(1518, 100, 40, output_sigma=0)
    found = predict(model, pages, 1, max_step_tokens=2048)
    seconds = model.vision_s([1518]) + model.matmul_s(1558, 1) + model.chunk_s(0, 1558)
    seconds += sum(model.matmul_s(1, 1) + model.context_s * (1558 + i) for i in range(1, 100))
    seconds += 100 * (GPU_EFFICIENCY.step_s + GPU_EFFICIENCY.row_s)
    assert 1 / found.pages_per_s == pytest.approx(seconds, rel=0.01)


@given(
    st.sampled_from(["bandwidth", "memory", "bfloat16"]),
    st.floats(1.0, 4.0),
    st.floats(64, 5000),
    st.floats(1, 3000),
    st.integers(1, 200),
)
def test_more_of_anything_is_never_slower(what, factor, image, output, concurrency):
    pages = PageStats(image, output)
    longer = replace(pages, output_tokens=output * 1.01)
    concurrency = min(concurrency, memory(Shape(SHAPES["3b"]), BF16, L4, longer).max_concurrency)
    if what == "bfloat16":
        better = replace(L4, flops=dict(L4.flops, bfloat16=factor * L4.flops["bfloat16"]))
    else:
        better = replace(L4, **{what: factor * getattr(L4, what)})
    slow = predict(cost(device=L4), pages, concurrency)
    fast = predict(cost(device=better), pages, concurrency)
    assert fast.pages_per_s >= slow.pages_per_s * (1 - 1e-12)
    assert sum(slow.stages().values()) == pytest.approx(1 / slow.pages_per_s)
    assert predict(cost(device=L4), longer, concurrency).pages_per_s <= slow.pages_per_s * (1 + 1e-9)


@given(
    st.integers(1, 3000),
    st.integers(1, 256),
    st.floats(30, 5000),
    st.floats(1, 3000),
    st.sampled_from([0.0, 0.1, 0.4, 0.8]),
)
def test_a_run_computes_every_token_once(count, places, image, output, sigma):
    stretches = _run(count, PageStats(image, output, output_sigma=sigma), places, 2048)
    assert sum(s.steps * s.prefilled for s in stretches) == pytest.approx(count * (image + 40))
    assert sum(s.steps * s.ended for s in stretches) == pytest.approx(count)
    assert sum(s.steps * s.rows for s in stretches) == pytest.approx(count * (output - 1), rel=0.02, abs=1e-6)
    assert all(0 <= s.rows <= places * (1 + 1e-9) and s.steps >= 0 for s in stretches)


def test_a_run_of_one_page_is_that_page_alone_and_a_long_run_is_steady():
    model, pages = cost(), PageStats(output_sigma=0)
    alone, steady = predict(model, pages, 1), predict(model, pages, 64)
    waits = GPU_EFFICIENCY.prepare_s / 8
    one = predict(model, pages, 64, count=1)
    assert 1 / one.pages_per_s == pytest.approx(1 / alone.pages_per_s + waits, rel=0.005)
    assert one.latency_s == pytest.approx(alone.latency_s, rel=0.005)
    for count, apart in ((640, 0.1), (6400, 0.01), (640_000, 1e-4)):
        found = predict(model, PageStats(), 64, count=count)
        assert 1 - apart < found.pages_per_s / predict(model, PageStats(), 64).pages_per_s < 1
    assert predict(model, pages, 64, count=10**6).stages() == pytest.approx(steady.stages(), rel=1e-3)


def test_a_larger_batch_reads_more_pages_until_memory_ends_it():
    pages, model = PageStats(), cost(device=L4)
    most = memory(model.shape, BF16, L4, pages).max_concurrency
    speeds = [predict(model, pages, c).pages_per_s for c in (1, 4, 16, 64, most)]
    assert speeds == sorted(speeds)
    assert predict(model, pages).concurrency == min(most, 256)
    with pytest.raises(ConfigError, match=f"{most + 1} pages at once do not fit l4; {most} do"):
        predict(model, pages, most + 1)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="leaves no room for a page; take a smaller precision"):
        predict(cost("7b", replace(L4, memory=16e9)), PageStats())
    assert predict(cost("7b", replace(L4, memory=16e9), "int4"), PageStats()).pages_per_s > 0


def test_pages_are_not_read_faster_than_the_host_prepares_them():
    slow = replace(GPU_EFFICIENCY, prepare_s=2.0)
    found = predict(cost(efficiency=slow), PageStats(), 64, host_cores=4)
    assert found.host_bound
    assert found.pages_per_s == pytest.approx(2.0)
    here = measured("here", flops={"bfloat16": 1e11}, bandwidth=1e10, memory=1e11, source="test")
    shared = predict(cost(device=here, efficiency=slow), PageStats(), 4)
    assert shared.prepare_s == 2.0
    assert not shared.host_bound


def test_dollars():
    money = Money(usd_per_hour=3.6, pages_per_s=10, utilisation=0.5)
    assert money.usd_per_page == pytest.approx(2e-4)
    assert money.usd_per_million_pages == pytest.approx(200)
    assert money.pages_per_month == pytest.approx(13.14e6)
    assert (money.devices_for(13e6), money.devices_for(14e6)) == (1, 2)
    assert money.monthly_usd(14e6) == pytest.approx(2 * 3.6 * 730)
    even = money.break_even(0.001)
    assert even * 0.001 == pytest.approx(money.monthly_usd(even))
    assert money.break_even(1.9e-4) is None  # dearer than the API however full it is


@pytest.mark.parametrize(
    "wrong", [{"utilisation": 0}, {"utilisation": 1.1}, {"pages_per_s": 0}, {"usd_per_hour": math.nan}]
)
def test_impossible_money_is_refused(wrong):
    with pytest.raises(ConfigError):
        Money(**(dict(usd_per_hour=1.0, pages_per_s=1.0) | wrong))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: find_shape("70b"), "unknown model shape '70b'; give 3b, 7b"),
        (lambda: find_precision("fp2"), "unknown precision 'fp2'; known are float32"),
        (lambda: find_precision("int8", "fp4"), "unknown kv_cache_dtype 'fp4'; known are auto, int8, fp8"),
        (lambda: PageStats(image_tokens=0), "image_tokens of a page should be at least 1"),
        (lambda: PageStats(output_sigma=math.nan), "output_sigma of a page should be at least 0"),
        (lambda: Efficiency(0, 1, 1, 1), "the matmul efficiency should be a share above 0"),
        (lambda: Efficiency(1, 1, 1, 1, step_s=-1), "the step_s of an efficiency should be at least 0"),
        (lambda: cost(device=find_device("a100-40"), precision="fp8"), "a100-40 has no fp8"),
        (
            lambda: StepCost(Shape(SHAPES["3b"]), find_precision("int8", "fp8"), find_device("a100-40")),
            "a100-40 has no fp8",
        ),
        (lambda: predict(cost(), PageStats(), 0), "concurrency should be from 1"),
        (lambda: predict(cost(), PageStats(), 64, max_step_tokens=64), "no room beside 64 pages"),
        (lambda: predict(cost(), PageStats(), 64, count=0), "a run has at least one page, got 0"),
    ],
)
def test_bad_input_is_one_sentence(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_no_published_system_is_faster_than_the_hardware():
    checks = check_published()
    held = [check for check in checks if check.predicted]
    assert len(held) >= 20
    for check in held:
        assert 0 < check.share_of_limit < 1
        assert check.limit > check.predicted > 0
        assert check.note
    assert {check.row.gpu for check in checks if not check.predicted} == {"l20", "a10", "mixed modal fleet"}
    quantised = {check.row.system: check for check in held}["olmOCR-2-7B FP8"]
    assert "fp8; shape of the 7b" in quantised.note
