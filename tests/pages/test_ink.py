"""Ink, lines and text height of pages whose type is known, clean and spoilt in every usual way."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw, ImageFont

from pagemill.pages.ink import measure_ink, plausible_output_chars
from pagemill.pages.source import PageRef, load_page

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
LINES = (
    "O contrato entre as partes fica sujeito ao foro da",
    "comarca de Aparecida, conforme a clausula sexta; o",
    "contratante declara conhecer os termos e assume o",
    "compromisso de pagar o valor ajustado em parcelas",
    "mensais, sucessivas e iguais, sem prejuizo da multa",
    "prevista para os casos de atraso ou de rescisao.",
)


def font(size):
    return ImageFont.load_default(size)


def x_height(size):
    _, top, _, bottom = font(size).getbbox("x")
    return bottom - top


def sheet(size, *, width=None, count=12, ground="white", ink="black", upper=False, left=None, top=None):
    """Lines of text at `size` pixels an em, uint8 [H, W, 3]."""
    left, top = left or 2 * size, top or 2 * size
    picture = Image.new("RGB", (width or 30 * size, round(top + 1.4 * size * count + 2 * size)), ground)
    pen = ImageDraw.Draw(picture)
    for i in range(count):
        line = LINES[i % len(LINES)]
        pen.text((left, top + 1.4 * size * i), line.upper() if upper else line, ink, font(size))
    return np.asarray(picture)


def noisy(page, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, (*page.shape[:2], 1))
    return (page + noise).clip(0, 255).astype(np.uint8)


def as_jpeg(page, quality=50):
    file = io.BytesIO()
    Image.fromarray(page).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def shaded(page):
    """Lit from the upper left; the far corner has half of the light."""
    y, x = np.mgrid[0 : page.shape[0], 0 : page.shape[1]]
    light = 1 - 0.5 * (0.5 * y / page.shape[0] + 0.5 * x / page.shape[1])
    return (page * light[..., None]).astype(np.uint8)


def bordered(page, thickness=30, lean=12):
    """Scanned on black: a border on three sides, leaning."""
    y, x = np.mgrid[0 : page.shape[0], 0 : page.shape[1]]
    out = (
        (x < thickness + lean * y / page.shape[0])
        | (y < thickness / 2 + lean * x / page.shape[1])
        | (x >= page.shape[1] - thickness)
    )
    return np.where(out[..., None], np.uint8(18), page)


def dusty(page, specks=25, seed=0):
    page, draw = page.copy(), np.random.default_rng(seed)
    for y, x in zip(
        draw.integers(0, page.shape[0], specks), draw.integers(0, page.shape[1], specks), strict=True
    ):
        page[y : y + draw.integers(1, 3), x : x + draw.integers(1, 3)] = draw.integers(0, 120)
    return page


def peppered(page, share=0.002, seed=0):
    chance = np.random.default_rng(seed).random(page.shape[:2])
    page = page.copy()
    page[chance < share], page[chance > 1 - share] = 0, 255
    return page


def tilted(page, degrees):
    picture = Image.fromarray(page).rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    return np.asarray(picture)


def blank(height=842, width=595, ground=(250, 248, 240)):
    return np.full((height, width, 3), ground, np.uint8)


def written(page, text, at, size, ink=(30, 30, 30)):
    picture = Image.fromarray(page.copy())
    ImageDraw.Draw(picture).text(at, text, ink, font(size))
    return np.asarray(picture)


@pytest.mark.parametrize("size", [8, 10, 14, 20, 33, 48, 90])
def test_text_height_is_the_x_height_of_the_type(size):
    ink = measure_ink(sheet(size))
    assert ink.text_height == pytest.approx(x_height(size), rel=0.08, abs=0.8)
    assert 12 <= ink.num_lines <= 15


@pytest.mark.parametrize("dpi", [72, 150, 300, 600])
def test_text_height_follows_the_resolution(dpi):
    ink = measure_ink(sheet(10 * dpi // 72))
    assert ink.text_height / dpi == pytest.approx(0.55 * 10 / 72, rel=0.12)


def test_capitals_are_measured_by_their_own_height():
    _, top, _, bottom = font(20).getbbox("H")
    assert measure_ink(sheet(20, upper=True, width=800)).text_height == pytest.approx(bottom - top, abs=1)


SPOILT = {
    "tint": lambda page: sheet(16, ground=(210, 225, 190)),
    "colour": lambda page: sheet(16, ink=(200, 30, 40)),
    "green": lambda page: sheet(16, ink=(0, 200, 0)),
    "faint": lambda page: sheet(16, ink=(205, 205, 205)),
    "white on black": lambda page: 255 - page,
    "white on blue": lambda page: sheet(16, ink="white", ground=(20, 40, 120)),
    "noise": lambda page: noisy(page, 8),
    "noise on grey": lambda page: noisy(sheet(16, ground=(170, 170, 170)), 18),
    "jpeg": lambda page: as_jpeg(page, 30),
    "shade": shaded,
    "shade, noise, jpeg": lambda page: as_jpeg(noisy(shaded(page), 5)),
    "border": bordered,
    "dust": dusty,
    "pepper": peppered,
    "tilt": lambda page: tilted(page, 2),
    "a quarter turn": lambda page: np.rot90(page),
    "a quarter turn back": lambda page: np.rot90(page, -1),
    "upside down": lambda page: page[::-1, ::-1],
    "in a frame": lambda page: framed(page),
    "black box among": lambda page: np.concatenate([page, 255 - page]),
}


def framed(page):
    picture = Image.fromarray(page.copy())
    ImageDraw.Draw(picture).rectangle((6, 6, page.shape[1] - 7, page.shape[0] - 7), outline="black", width=2)
    return np.asarray(picture)


@pytest.mark.parametrize("how", SPOILT)
def test_text_height_survives(how):
    clean = sheet(16)
    ink = measure_ink(SPOILT[how](clean))
    assert ink.text_height == pytest.approx(x_height(16), abs=1.2)
    assert not ink.blank
    expected = measure_ink(clean).num_glyphs * (2 if how == "black box among" else 1)
    assert 0.6 < ink.num_glyphs / expected < 1.5


def test_a_photo_beside_the_text_does_not_move_its_height():
    draw = np.random.default_rng(3)
    coarse = draw.integers(0, 256, (12, 30, 3), dtype=np.uint8)
    text = sheet(16)
    photo = np.asarray(Image.fromarray(coarse).resize((text.shape[1], 300), Image.Resampling.BICUBIC))
    ink = measure_ink(np.concatenate([noisy(photo, 6), text]))
    assert ink.text_height == pytest.approx(x_height(16), abs=1.2)


def test_headings_do_not_move_the_height_of_the_text():
    heading = np.asarray(Image.fromarray(sheet(48, count=1, width=480)))
    ink = measure_ink(np.concatenate([heading, sheet(16)]))
    assert ink.text_height == pytest.approx(x_height(16), abs=1)


def test_columns_count_their_lines_each():
    page = np.concatenate([sheet(12, width=400), np.full((sheet(12).shape[0], 90, 3), 255, np.uint8)], axis=1)
    page = np.concatenate([page, page], axis=1)
    assert 24 <= measure_ink(page).num_lines <= 28


BLANK = {
    "white": lambda: blank(ground=(255, 255, 255)),
    "tint": blank,
    "black": lambda: blank(ground=(0, 0, 0)),
    "noise": lambda: noisy(blank(), 4),
    "strong noise": lambda: noisy(blank(ground=(200, 200, 200)), 20),
    "noise cut off at white": lambda: noisy(blank(), 10),
    "shade": lambda: shaded(noisy(blank(), 4)),
    "jpeg": lambda: as_jpeg(noisy(shaded(blank()), 4)),
    "dust": lambda: dusty(blank()),
    "pepper": lambda: peppered(blank()),
    "border": lambda: noisy(bordered(blank()), 4),
    "thin border": lambda: noisy(bordered(blank(), 9, 5), 4),
    "all of it": lambda: as_jpeg(bordered(noisy(shaded(blank()), 5))),
    "a large scan": lambda: noisy(bordered(blank(2600, 1840), 40, 60), 5),
}


@pytest.mark.parametrize("how", BLANK)
def test_nothing_printed_is_blank(how):
    ink = measure_ink(BLANK[how]())
    assert ink.blank
    assert (ink.coverage, ink.box, ink.text_height, ink.num_lines, ink.num_glyphs) == (0, None, None, 0, 0)


NOT_BLANK = {
    "page number": lambda: written(blank(), "7", (297, 800), 7),
    "page number, noise": lambda: noisy(written(blank(), "12", (297, 800), 8), 5),
    "page number, border": lambda: noisy(bordered(written(blank(), "213", (530, 815), 8)), 4),
    "page number on a large scan": lambda: noisy(
        written(blank(2600, 1840), "9", (900, 2480), 24, (60, 60, 60)), 5
    ),
    "faint line": lambda: written(blank(), LINES[0], (60, 300), 10, (218, 216, 208)),
    "faint line, noise": lambda: noisy(written(blank(), LINES[0], (60, 300), 10, (205, 205, 205)), 4),
    "faint line, jpeg": lambda: as_jpeg(shaded(written(blank(), LINES[0], (60, 300), 10, (190, 190, 190)))),
    "faint all over": lambda: sheet(10, count=30, ink=(215, 215, 215), left=1, top=1),
    "yellow note": lambda: written(
        blank(ground=(255, 255, 255)), "ver folha 2", (60, 300), 14, (230, 190, 0)
    ),
    "rule": lambda: written(blank(), "__________", (60, 300), 12),
    "dot leaders": lambda: written(blank(), ". . . . . . . . . . . .", (60, 300), 16),
    "white on black": lambda: (
        255 - written(blank(ground=(255, 255, 255)), LINES[0], (60, 300), 10, (0, 0, 0))
    ),
}


@pytest.mark.parametrize("how", NOT_BLANK)
def test_the_least_print_is_not_blank(how):
    ink = measure_ink(NOT_BLANK[how]())
    assert not ink.blank
    assert ink.box is not None
    assert ink.coverage > 0


@pytest.mark.parametrize("factor", [1, 3])
def test_the_box_holds_the_print(factor):
    page = np.full((1200, 900, 3), 255, np.uint8)
    text = sheet(16, width=500, count=9)
    page[300 : 300 + text.shape[0], 200:700] = text
    dark = np.argwhere(page.min(axis=2) < 128)
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0) + 1
    page = page.repeat(factor, axis=0).repeat(factor, axis=1)
    box = measure_ink(page).box
    assert np.abs(np.array(box) - factor * np.array([top, left, bottom, right])).max() <= 3 * factor


def test_the_border_of_a_scan_is_not_in_the_box():
    box = measure_ink(bordered(sheet(16, left=80, top=80))).box
    assert box[0] > 60
    assert box[1] > 60


def test_coverage_is_the_share_of_ink():
    page = sheet(40)
    dark = (page[..., 1] < 128).mean()
    ink = measure_ink(page)
    assert ink.coverage == pytest.approx(dark, rel=0.15)
    assert ink.ink_pixels == pytest.approx(dark * page.shape[0] * page.shape[1], rel=0.15)


def samples():
    for name in ("truth.jsonl", "pdf_truth.jsonl", "stress/truth.jsonl"):
        folder = (SAMPLES / name).parent
        for row in map(json.loads, (SAMPLES / name).read_text(encoding="utf-8").splitlines()):
            yield pytest.param(folder / row["file"], row.get("page", 1), row["truth"], id=f"{row['file']}")


@pytest.mark.parametrize(("file", "page", "truth"), list(samples()))
def test_no_sample_page_is_short_of_characters(file, page, truth):
    ink = measure_ink(load_page(PageRef(str(file), page), 72))
    text = "\n".join(value for value in truth.values() if value)
    assert not ink.blank
    assert plausible_output_chars(ink) > 1.25 * len(text)


@pytest.mark.parametrize("size", [4, 5, 6, 8, 12, 30])
def test_small_and_tight_type_is_not_short_of_characters(size):
    page, count = Image.new("RGB", (40 * size, 60 * size), "white"), 0
    pen = ImageDraw.Draw(page)
    for i in range(58):
        line = LINES[i % len(LINES)] + " " + LINES[(i + 1) % len(LINES)][:20]
        pen.text((size, i * size), line, "black", font(size))
        count += len(line) + 1
    assert plausible_output_chars(measure_ink(np.asarray(page))) > 1.15 * count


@settings(max_examples=60, deadline=None)
@given(
    page=st.one_of(
        arrays(np.uint8, st.tuples(st.integers(1, 90), st.integers(1, 200), st.just(3))),
        st.tuples(
            st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 255)
        ).map(lambda t: np.random.default_rng(t[2]).integers(0, t[3] + 1, (t[0], t[1], 3), dtype=np.uint8)),
    )
)
def test_any_pixels_give_statistics_that_make_sense(page):
    kept = page.copy()
    ink = measure_ink(page)
    height, width = page.shape[:2]
    assert 0 <= ink.coverage <= 1
    assert ink.blank == (ink.box is None) == (ink.coverage == 0)
    if ink.box is not None:
        top, left, bottom, right = ink.box
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
    if ink.text_height is not None:
        assert 0 < ink.text_height <= max(height, width)
        assert ink.num_lines > 0
    assert plausible_output_chars(ink) >= 100
    assert (page == kept).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (7, 7), (9, 3000), (3000, 9)])
def test_slivers_are_measured(shape):
    measure_ink(np.zeros((*shape, 3), np.uint8))
    measure_ink(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_pixels_may_lie_anyhow():
    page = sheet(16)
    page.flags.writeable = False
    assert measure_ink(np.asfortranarray(page)) == measure_ink(page)
    assert measure_ink(page[:, ::-1][:, ::-1]) == measure_ink(page)
