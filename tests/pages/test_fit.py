"""The size at which pages are shown, and what cropping keeps."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_ink import blank, bordered, sheet

from pagemill.errors import ConfigError, PageError
from pagemill.pages.fit import MAX_ENLARGEMENT, FitOptions, crop, fit_page, fit_pixels
from pagemill.pages.ink import measure_ink
from pagemill.pages.pdf import render_page
from pagemill.pages.preprocess import ImageProcessor
from pagemill.pages.source import PageRef

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
DIGITAL = PageRef(str(SAMPLES / "digital_3p.pdf"), 1)
PROCESSOR = ImageProcessor()


def shown(image):
    """The `(height, width)` in pixels that the model sees."""
    return image.grid[1] * 14, image.grid[2] * 14


def auto(height, **more):
    return FitOptions("auto", preferred_height=height, **more)


@pytest.mark.parametrize(
    "options", [FitOptions("full"), FitOptions("full", preferred_height=9.0), FitOptions()]
)
@pytest.mark.parametrize("name", ["prose_00.png", "hard_36.png"])
def test_full_is_what_the_checkpoint_takes(options, name):
    rgb = np.asarray(Image.open(SAMPLES / name).convert("RGB"))
    image, ink = fit_page(PageRef(str(SAMPLES / name), 1), 72, options, PROCESSOR)
    assert image.content_hash == PROCESSOR.prepare(rgb).content_hash
    assert ink == measure_ink(rgb)


@pytest.mark.parametrize("size", [11, 13, 24, 40, 60])
def test_text_lands_at_the_preferred_height(size):
    page = sheet(size)
    image, ink = fit_pixels(page, auto(10.0), PROCESSOR)
    factor = shown(image)[0] / page.shape[0]
    assert shown(image)[1] / page.shape[1] == pytest.approx(factor, rel=0.12)  # whole tokens
    assert factor <= MAX_ENLARGEMENT * 1.05
    assert ink.text_height * factor == pytest.approx(10, rel=0.15) or 0.9 < 10 / ink.text_height < 1.4


def test_text_near_the_preferred_height_is_not_resampled():
    page = sheet(20)
    height = measure_ink(page).text_height
    for preferred in (0.92 * height, height, 1.25 * height):
        assert (
            fit_pixels(page, auto(preferred), PROCESSOR)[0].content_hash
            == PROCESSOR.prepare(page).content_hash
        )


def test_small_type_keeps_a_page_from_shrinking_to_its_median():
    large, small = sheet(40, count=9), sheet(24, count=6, width=1200)
    alone, together = (
        fit_pixels(page, auto(11.0), PROCESSOR)[0] for page in (large, np.concatenate([large, small]))
    )
    shrunk = [shown(image)[1] / 1200 for image in (alone, together)]
    assert shrunk[0] < 0.6
    assert shrunk[1] == pytest.approx(1.25 * shrunk[0], rel=0.1)


def test_a_page_is_enlarged_only_so_far():
    for options in (auto(80.0), auto(80.0, crop=True)):
        for image, page in (
            (fit_pixels(sheet(12), options, PROCESSOR)[0], sheet(12)),
            (fit_page(DIGITAL, 50, options, PROCESSOR)[0], render_page(DIGITAL.source, 1, 50)),
        ):
            assert max(shown(image)) <= MAX_ENLARGEMENT * max(page.shape) + 28


def test_nothing_is_shown_beyond_the_limits_of_the_checkpoint():
    processor = ImageProcessor(min_pixels=50_000, max_pixels=200_000)
    for size, preferred in ((10, 40.0), (40, 40.0), (40, 2.0)):
        height, width = shown(fit_pixels(sheet(size), auto(preferred), processor)[0])
        assert 50_000 <= height * width <= 200_000


def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((500, 700), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("page", [blank(), photo()])
def test_pages_without_text_are_shown_in_full(page):
    image, ink = fit_pixels(page, auto(5.0), PROCESSOR)
    assert ink.text_height is None
    assert image.content_hash == PROCESSOR.prepare(page).content_hash


def test_a_number_is_the_longer_side_of_a_shrunk_page():
    page = sheet(24, count=20)
    assert max(shown(fit_pixels(page, FitOptions(560), PROCESSOR)[0])) == 560
    assert (
        fit_pixels(page, FitOptions(5000), PROCESSOR)[0].content_hash == PROCESSOR.prepare(page).content_hash
    )


def test_a_pdf_page_is_rendered_for_the_size_that_is_asked_for():
    image, _ = fit_page(DIGITAL, 72, FitOptions(1008), PROCESSOR)
    assert shown(image) == (1008, 672)
    assert image.content_hash == PROCESSOR.prepare(render_page(DIGITAL.source, 1, 108)).content_hash


def test_a_pdf_page_that_has_to_grow_gains_detail():
    image, ink = fit_page(DIGITAL, 40, auto(12.0), PROCESSOR)
    coarse = render_page(DIGITAL.source, 1, 40)
    height, width = shown(image)
    assert height > 1.8 * coarse.shape[0]
    rendered = render_page(DIGITAL.source, 1, 40 * height / coarse.shape[0])
    assert ink.text_height == pytest.approx(12, rel=0.15)
    enlarged = PROCESSOR.prepare(coarse, size=(height, width)).patches
    exact = PROCESSOR.prepare(rendered, size=(height, width)).patches
    error = [np.abs(patches.astype(int) - exact).mean() for patches in (image.patches, enlarged)]
    assert error[0] < 0.6 * error[1]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(9, 30), preferred=st.floats(4, 40), dark=st.booleans(), cropped=st.booleans())
def test_any_page_fits(size, preferred, dark, cropped):
    page = sheet(size, count=4)
    page = 255 - page if dark else page
    processor = ImageProcessor(min_pixels=28 * 28 * 4, max_pixels=500_000)
    height, width = shown(fit_pixels(page, auto(preferred, crop=cropped), processor)[0])
    assert height % 28 == width % 28 == 0
    assert height * width <= 500_000


def test_cropping_cuts_margins_and_keeps_the_print():
    page = np.full((1400, 1000, 3), 255, np.uint8)
    text = sheet(18, width=500, count=8)
    page[500 : 500 + text.shape[0], 300:800] = text
    cut = crop(page, measure_ink(page))
    assert cut.shape[0] < 400
    assert cut.shape[1] < 620
    assert (cut < 128).sum() == (page < 128).sum()
    assert (cut[:8] == 255).all()
    assert (cut[:, :8] == 255).all()


def test_cropping_takes_off_the_border_of_a_scan():
    page = bordered(sheet(18, left=100, top=100), 40, 0)
    cut = crop(page, measure_ink(page))
    assert (cut[:, 0] > 128).all()
    assert cut.shape[1] < page.shape[1]


@pytest.mark.parametrize("page", [blank(), sheet(12, left=2, top=2)[:, :290]])
def test_cropping_leaves_a_page_without_margins_alone(page):
    assert crop(page, measure_ink(page)).shape[1] == page.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "half"}, "auto, full or a number"),
        ({"resolution": 0}, "auto, full or a number"),
        ({"resolution": True}, "auto, full or a number"),
        ({"resolution": 800.0}, "auto, full or a number"),
        ({"preferred_height": 0.0}, "positive number"),
        ({"preferred_height": float("nan")}, "positive number"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FitOptions(**options)


def test_a_file_that_is_no_page_is_one_sentence(tmp_path):
    (tmp_path / "page.pdf").write_bytes(b"%PDF-1.7 nothing")
    with pytest.raises(PageError, match=r"page\.pdf"):
        fit_page(PageRef(str(tmp_path / "page.pdf"), 1), 72, auto(11.0), PROCESSOR)
