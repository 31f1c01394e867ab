"""Reference data: every row is found by its id, dated, and an unknown one is one sentence that says what there is."""

import math

import pytest

from pagemill.cost.devices import find_api, find_device, find_price, measured, reference
from pagemill.errors import ConfigError


def test_every_row_names_its_source_and_every_device_can_work():
    data = reference()
    assert len(data.gpus) == 11
    for row in (*data.gpus, *data.prices, *data.instances, *data.api_prices, *data.scores, *data.throughputs):
        assert row.source
    for device in data.gpus:
        assert device.rate("bfloat16") > 1e14
        assert 1e11 < device.bandwidth < 1e13
        assert find_device(device.id) is device
    assert all(price.date and price.usd_per_hour > 0 for price in data.prices)
    assert {price.kind for price in data.prices} == {"on-demand", "spot", "serverless"}


def test_a_device_says_which_arithmetic_it_has():
    with pytest.raises(ConfigError, match="a100-40 has no fp8 arithmetic; it has bfloat16, int8"):
        find_device("a100-40").rate("fp8")


def test_an_unknown_device_names_those_there_are():
    with pytest.raises(ConfigError, match="unknown device 'h100'; known are h100-sxm, h100-pcie"):
        find_device("h100")


def test_of_one_offer_the_newest_price_counts():
    price = find_price("h100-sxm", "runpod/h100-sxm/on-demand-secure")
    assert (price.usd_per_hour, price.date) == (3.99, "2026-11-09")


def test_prices_by_kind_provider_and_number():
    assert find_price("h100-sxm", "spot").kind == "spot"
    assert find_price("h100-sxm", "aws").usd_per_hour == 6.88
    assert find_price("l4", "runpod").usd_per_hour == 0.44  # the cheapest of the provider
    assert find_price("c7i.4xlarge").usd_per_hour == 0.714
    given = find_price("anything", "1.25")
    assert (given.usd_per_hour, given.source) == (1.25, "given by the user")


def test_the_price_of_a_kind_is_its_median_offer():
    offers = {p.id: p for p in sorted(reference().prices, key=lambda p: p.date) if p.device == "l4"}
    middle = sorted(p.usd_per_hour for p in offers.values() if p.kind == "on-demand")
    assert find_price("l4").usd_per_hour == middle[(len(middle) - 1) // 2]


@pytest.mark.parametrize(
    ("device", "which", "says"),
    [
        (
            "h100-sxm",
            "stolen",
            "unknown price 'stolen' of h100-sxm; give dollars an hour, or one of .*/h100-sxm/spot",
        ),
        ("l4", "spot", "unknown price 'spot' of l4"),
        ("c8i.4xlarge", "on-demand", "no price is known for 'c8i.4xlarge'; give one"),
        ("l4", "-1", "a price should be dollars an hour above zero"),
        ("l4", "nan", "a price should be dollars an hour above zero"),
    ],
)
def test_an_unknown_price_is_one_sentence(device, which, says):
    with pytest.raises(ConfigError, match=says):
        find_price(device, which)


def test_what_an_api_asks_for_a_page():
    assert find_api("aws/Textract").usd_per_page(1, 1) == 0.0015
    assert find_api("GPT-4o").usd_per_page(1000, 1000) == pytest.approx((2.5 + 10) / 1000)
    opus = find_api("claude opus 4.6")
    assert opus.usd_per_page(1600, 850, batch=True) == pytest.approx(opus.usd_per_page(1600, 850) / 2)
    assert find_api("gpt-5.5").usd_per_page(1, 1, batch=True) is None
    for unknown in ("nobody", ""):
        with pytest.raises(ConfigError, match="unknown API"):
            find_api(unknown)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_measured_device_has_possible_numbers(bad):
    with pytest.raises(ConfigError, match="a measured bandwidth should be above zero"):
        measured("here", flops={"float32": 1e11}, bandwidth=bad, memory=1e9, source="test")
    device = measured("here", flops={"float32": 1e11}, bandwidth=1e10, memory=1e9, source="test")
    assert device.measured
    assert device.host
