"""The sample pages' scores: grouped as they are reported, and those published with the model."""

from __future__ import annotations

import pytest
from score import WAYS, by_group, score_samples, transformers_readings

from pagemill.decode.page import is_json_object
from pagemill.score import Reading, Truth, score_page


def test_groups_average_over_pages() -> None:
    def page(file: str, text: str, reason: str) -> object:
        truth = Truth(file, 1, "a b c d e", "a b c d e", {}, ("text",))
        return score_page(truth, Reading(file, 1, {"text": text}, text, reason))

    groups = by_group(
        [
            page("form_1.png", "a b c d e", "stop"),
            page("legal_2.png", "", "loop"),
            page("hard_3.png", "x" * 27, "stop"),
        ],
        "record",
    )
    assert {name: row["pages"] for name, row in groups.items()} == {
        "clean": 2,
        "form": 1,
        "legal": 1,
        "hard": 1,
    }
    clean = groups["clean"]
    assert clean["benchmark_score"] == pytest.approx((1 + 0) / 2)
    assert clean["cer"] == clean["degeneration_rate"] == 0.5
    assert clean["valid_json"] == 0
    assert groups["hard"]["cer"] == 3


def test_a_sample_page_without_a_reading_is_no_result() -> None:
    with pytest.raises(SystemExit, match="not simply scored: 1, "):
        score_samples(transformers_readings()[1:])


def test_the_model_card_is_reproduced() -> None:
    """What transformers wrote, scored here, gives the scores published with pagemill-tiny."""
    readings = transformers_readings()
    assert len(readings) == 48
    scores = score_samples(readings)
    groups = {way: by_group(scores, way) for way in WAYS}
    for group, score, cer, pages in [("clean", 0.829, 0.054, 36), ("hard", 0.185, 0.778, 12)]:
        record = groups["record"][group]
        assert record["benchmark_score"] == pytest.approx(score, abs=0.0006)
        assert record["cer"] == pytest.approx(cer, abs=0.0006)
        assert record["degeneration_rate"] == 0
        assert record["pages"] == pages
    assert groups["record"]["hard"]["valid_json"] == pytest.approx(8 / 12)
    # The raw way counts a page of broken JSON as it stands, so it is the stricter one.
    assert groups["raw"]["clean"]["valid_json"] == pytest.approx(35 / 36)
    assert sum(not is_json_object(reading.raw or "") for reading in readings) == 5
    assert groups["raw"]["clean"]["benchmark_score"] < groups["record"]["clean"]["benchmark_score"]
