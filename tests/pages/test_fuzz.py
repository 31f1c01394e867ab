"""Damaged bytes: whatever a file holds, a page of sane shape comes out, or a PageError, and nothing else."""

import io
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pagemill.errors import PageError
from pagemill.pages import image, pdf
from pagemill.pages.source import PageRef, list_pages, load_page

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
KINDS = ["png", "interlaced", "jpeg", "progressive", "webp", "bmp", "tiff", "lzw", "group4", "bigtiff", "pdf"]


@pytest.fixture(autouse=True, scope="module")
def small_pages():
    """Keep a header that happens to claim a large page from costing gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "MAX_PAGE_PIXELS", 4_000_000)
        patch.setattr(pdf, "MAX_RASTER_PIXELS", 1_000_000)
        yield


@lru_cache
def seed(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 18, 3), dtype=np.uint8)
    noise[:12] = 255
    picture, out = Image.fromarray(noise), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in ("png", "interlaced"):
        picture.quantize(16).save(out, "PNG", transparency=0, exif=exif)
    elif kind in ("jpeg", "progressive"):
        picture.save(out, "JPEG", progressive=kind == "progressive", exif=exif)
    elif kind == "webp":
        picture.save(out, "WEBP", exif=exif)
    elif kind == "bmp":
        picture.save(out, "BMP")
    elif kind == "group4":
        picture.convert("1").save(out, "TIFF", compression="group4")
    elif kind == "pdf":
        return (SAMPLES / "digital_3p.pdf").read_bytes()[:60_000]
    else:
        picture.save(
            out,
            "TIFF",
            save_all=True,
            append_images=[picture.convert("L")],
            compression="tiff_lzw" if kind == "lzw" else None,
            big_tiff=kind == "bigtiff",
        )
    return out.getvalue()


def survive(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow grumbles about damaged metadata
        file.write(data)
        file.flush()
        refs = attempt(lambda: list(islice(list_pages(file.name), 20)), file.name)
        for i, ref in enumerate(refs if isinstance(refs, list) else [], 1):
            assert ref == PageRef(file.name, i)
        for page in (1, 2):
            rgb = attempt(partial(load_page, PageRef(file.name, page), 20), f"{file.name}, page {page}")
            if isinstance(rgb, np.ndarray):
                assert rgb.dtype == np.uint8
                assert rgb.ndim == 3
                assert rgb.shape[2] == 3
                assert min(rgb.shape) >= 1


def attempt(act: Callable[[], object], where: str) -> object:
    """Return what `act` gives, or None where it refuses in one sentence."""
    try:
        return act()
    except PageError as refusal:
        said = str(refusal)
    assert said.startswith(f"{where}: ")
    assert "\n" not in said
    return None


slow_is_fine = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
@slow_is_fine
@given(data=st.data())
def test_changed_bytes(kind, data):
    content = bytearray(seed(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        # Most of what a decoder trusts stands at the ends.
        at = data.draw(
            st.one_of(st.integers(0, min(200, len(content) - 1)), st.integers(0, len(content) - 1))
        )
        at = at if data.draw(st.booleans()) else len(content) - 1 - at
        value = data.draw(
            st.one_of(
                st.sampled_from([b"\0", b"\xff", b"\x7f", b"\xff\xff\xff\xff", b"\x80"]),
                st.binary(max_size=8),
            )
        )
        content[at : at + len(value)] = value
    survive(bytes(content))


@pytest.mark.parametrize("kind", KINDS)
@slow_is_fine
@given(data=st.data())
def test_cut_and_spliced_bytes(kind, data):
    content = seed(kind)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    other = seed(data.draw(st.sampled_from(KINDS)))
    survive(
        data.draw(st.sampled_from([content[:stop], content[:start] + content[stop:], content[:stop] + other]))
    )


@slow_is_fine
@given(
    st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0+", b"BM", b"RIFF....WEBP", b"%PDF-", b""]
    ),
    st.binary(),
)
def test_a_good_beginning_and_then_anything(magic, rest):
    survive(magic + rest)
