"""Files to pixels: every format and pixel layout, and every way in which a file can be bad."""

import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image, ImageDraw

from pagemill.errors import ConfigError, PageError
from pagemill.pages import image, pdf, source, tiff
from pagemill.pages.source import PageRef, expand_inputs, list_pages, load_page

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
DPI = 72.0


def corners(width: int = 40, height: int = 60) -> Image.Image:
    """Make a page whose four corners tell how it lies: red, green, blue and black on white."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for box, colour in {
        (0, 0): "red",
        (width - 16, 0): (0, 255, 0),
        (0, height - 16): "blue",
        (width - 16, height - 16): "black",
    }.items():
        draw.rectangle((*box, box[0] + 15, box[1] + 15), fill=colour)
    return picture


def pages(path: Path | str) -> list[PageRef]:
    return list(list_pages(str(path)))


def read(path: Path | str, page: int = 1, dpi: float = DPI) -> np.ndarray:
    rgb = load_page(PageRef(str(path), page), dpi)
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    assert rgb.flags.c_contiguous
    return rgb


def sentence(path: Path | str, page: int = 1) -> str:
    """Return what is said of a file or page that cannot be read: one sentence that begins with where."""

    def list_and_read() -> None:
        assert PageRef(str(path), page) in pages(path)
        read(path, page)

    return refusal(list_and_read, path)


def refusal(act: Callable[[], object], path: Path | str) -> str:
    with pytest.raises(PageError) as caught:
        act()
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    return said


def pdf_bytes(*sizes: tuple[float, float], **options: object) -> bytes:
    document = pypdfium2.PdfDocument.new()
    for size in sizes:
        document.new_page(*size)
    out = io.BytesIO()
    document.save(out, **options)
    document.close()
    return out.getvalue()


def raw_pdf(objects: list[bytes], trailer: bytes = b"/Root 1 0 R") -> bytes:
    """Write objects 1, 2, ... with a correct cross-reference table."""
    out, offsets = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d %b >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(out)


def png_header(width: int, height: int) -> bytes:
    """Make a PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


# Formats


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.webp", {"lossless": True}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.tif", {"compression": "tiff_adobe_deflate", "big_tiff": True}),
    ],
    ids=str,
)
def test_lossless_formats_give_back_every_pixel(tmp_path, name, options):
    picture = corners()
    picture.save(tmp_path / name, **options)
    assert pages(tmp_path / name) == [PageRef(str(tmp_path / name), 1)]
    np.testing.assert_array_equal(read(tmp_path / name), np.asarray(picture))


def test_jpeg_decodes_as_pillow_does(tmp_path):
    corners().save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as picture:
        np.testing.assert_array_equal(read(tmp_path / "a.jpg"), np.asarray(picture))


def test_the_content_decides_not_the_name(tmp_path):
    corners().save(tmp_path / "scan.png", format="JPEG")
    assert read(tmp_path / "scan.png").shape == (60, 40, 3)
    (tmp_path / "b.jpg").write_bytes(pdf_bytes((30, 50)))
    assert read(tmp_path / "b.jpg").shape == (50, 30, 3)
    (tmp_path / "no_suffix").write_bytes((tmp_path / "scan.png").read_bytes())
    assert read(tmp_path / "no_suffix").shape == (60, 40, 3)


def test_an_animation_is_one_page(tmp_path):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert len(pages(tmp_path / name)) == 1
        assert read(tmp_path / name)[5, 5].tolist() == [255, 0, 0]
        assert "page 2: does not exist" in refusal(partial(read, tmp_path / name, 2), tmp_path / name)


def test_sample_pages_decode_as_pillow_does():
    for path in sorted(SAMPLES.glob("*.png"))[:6]:
        with Image.open(path) as picture:
            np.testing.assert_array_equal(read(path), np.asarray(picture.convert("RGB")))


# Pixel layouts


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 95}),
        ("a.png", {}),
        ("a.webp", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
    ],
    ids=str,
)
def test_exif_orientation_turns_the_page_upright(tmp_path, orientation, name, options):
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # the inverse of what a reader must do
    picture = corners() if stored is None else corners().transpose(Image.Transpose(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / name, exif=exif, **options)
    rgb = read(tmp_path / name).astype(int)
    assert rgb.shape == (60, 40, 3)
    for (y, x), colour in {
        (5, 5): (255, 0, 0),
        (5, 34): (0, 255, 0),
        (54, 5): (0, 0, 255),
        (54, 34): (0, 0, 0),
    }.items():
        assert abs(rgb[y, x] - colour).max() < 40


def test_a_damaged_exif_block_does_not_cost_the_page(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\1\2\3")
    assert read(tmp_path / "a.jpg").shape == (60, 40, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_white(tmp_path, mode):
    rgba = Image.new("RGBA", (4, 1))
    for x, value in enumerate([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 51), (255, 255, 255, 0)]):
        rgba.putpixel((x, 0), value)
    if mode == "PA":
        picture = rgba.convert("L").convert("P")
        picture.putalpha(rgba.getchannel("A"))
        assert picture.mode == "PA"
    else:
        picture = rgba.convert(mode)
    name = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    picture.save(name)
    assert read(name)[0, :, 0].tolist() == [255, 0, 204, 255]


def test_transparent_colours_of_opaque_modes_become_white(tmp_path):
    grey = Image.new("L", (2, 1), 10)
    grey.putpixel((1, 0), 20)
    grey.save(tmp_path / "l.png", transparency=10)
    assert read(tmp_path / "l.png")[0, :, 0].tolist() == [255, 20]
    colour = Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((1, 0), (4, 5, 6))
    colour.save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert read(tmp_path / "rgb.png")[0].tolist() == [[255, 255, 255], [4, 5, 6]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [50, 60, 70]]
    deep = Image.fromarray(np.array([[1000, 65535, 0]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=1000)
    assert read(tmp_path / "deep.png")[0, :, 0].tolist() == [255, 255, 0]


def test_palette_and_one_bit(tmp_path):
    corners().quantize(8).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read(tmp_path / "p.png"), np.asarray(corners()))
    bits = Image.new("1", (10, 9), 1)
    bits.putpixel((3, 2), 0)
    for name, options in {"a.png": {}, "a.bmp": {}, "a.tif": {}, "b.tif": {"compression": "group4"}}.items():
        bits.save(tmp_path / name, **options)
        rgb = read(tmp_path / name)
        assert rgb[2, 3].tolist() == [0, 0, 0]
        assert int((rgb == 255).sum()) == (10 * 9 - 1) * 3


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    cmyk.paste((0, 255, 255, 0), (0, 0, 8, 16))  # red
    for name in ("a.jpg", "a.tif"):
        cmyk.save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
        rgb = read(tmp_path / name).astype(int)
        assert abs(rgb[8, 3] - (255, 0, 0)).max() < 20
        assert abs(rgb[8, 12] - (255, 255, 255)).max() < 20


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 32768, 65406, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert read(tmp_path / name)[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]


def tiff_bytes(values: np.ndarray, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """Write a grey TIFF of one strip in any depth, little-endian."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if bits == 12:
        flat = values.reshape(-1, 2).astype(np.uint32)
        packed = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], 1)
        data = packed.astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize(
    ("values", "bits", "photometric", "sample_format", "expected"),
    [
        (np.array([[0, 4095], [2048, 16]], np.uint16), 12, 1, 1, [0, 255, 128, 1]),
        (np.array([[0, 65535], [32768, 257]], np.uint16), 16, 0, 1, [255, 0, 127, 254]),  # white is zero
        (np.array([[0, 255], [100, 3]], np.int32), 32, 1, 2, [0, 255, 100, 3]),
        (np.array([[0, 65535], [32768, 257]], np.int32), 32, 1, 2, [0, 255, 128, 1]),
        (np.array([[-1000, 1000], [0, 1000]], np.int32), 32, 1, 2, [0, 255, 128, 255]),
        (np.array([[0, 1], [0.5, 0.25]], np.float32), 32, 1, 3, [0, 255, 128, 64]),
        (np.array([[0, 255], [100, 3]], np.float32), 32, 1, 3, [0, 255, 100, 3]),
        (np.array([[-3e38, 3e38], [0, 3e38]], np.float32), 32, 1, 3, [0, 255, 128, 255]),
        (np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32), 32, 1, 3, [255, 255, 0, 255]),
        (np.full((2, 2), np.nan, np.float32), 32, 1, 3, [255] * 4),
    ],
    ids=[
        "12 bits",
        "white is zero",
        "int 8",
        "int 16",
        "int signed",
        "unit",
        "float 8",
        "huge",
        "nan",
        "all nan",
    ],
)
def test_deep_and_floating_grey(tmp_path, values, bits, photometric, sample_format, expected):
    (tmp_path / "a.tif").write_bytes(tiff_bytes(values, bits, photometric, sample_format))
    assert read(tmp_path / "a.tif")[:, :, 0].ravel().tolist() == pytest.approx(expected, abs=1)


# Many pages


def test_a_tiff_of_many_pages(tmp_path):
    for name, options in {
        "a.tif": {},
        "b.tif": {"compression": "tiff_lzw"},
        "c.tif": {"big_tiff": True},
    }.items():
        sheets = [Image.new("RGB", (20 + i, 30), (i, 0, 0)) for i in range(5)]
        sheets[0].save(tmp_path / name, save_all=True, append_images=sheets[1:], **options)
        assert pages(tmp_path / name) == [PageRef(str(tmp_path / name), i) for i in range(1, 6)]
        for i in (4, 0, 2):
            rgb = read(tmp_path / name, i + 1)
            assert rgb.shape == (30, 20 + i, 3)
            assert rgb[3, 3].tolist() == [i, 0, 0]
        assert "page 6: does not exist" in refusal(partial(read, tmp_path / name, 6), tmp_path / name)


def directories_of(data: bytes) -> list[int]:
    return list(tiff.directories(io.BytesIO(data)))


def many_tiff(count: int) -> bytearray:
    sheets = [Image.new("RGB", (20, 30), (i, 0, 0)) for i in range(count)]
    out = io.BytesIO()
    sheets[0].save(out, "TIFF", save_all=True, append_images=sheets[1:], compression="tiff_lzw")
    return bytearray(out.getvalue())


def test_a_damaged_page_of_a_tiff_leaves_the_others(tmp_path):
    data = many_tiff(4)
    second = directories_of(data)[1]
    data[second + 2 : second + 26] = b"\xff" * 24  # its first two tags
    (tmp_path / "a.tif").write_bytes(data)
    assert len(pages(tmp_path / "a.tif")) == 4
    assert "page 2" in sentence(tmp_path / "a.tif", 2)
    for i in (0, 2, 3):
        assert read(tmp_path / "a.tif", i + 1)[3, 3].tolist() == [i, 0, 0]


def test_a_tiff_whose_chain_breaks_or_loops_ends(tmp_path):
    data = many_tiff(3)
    second = directories_of(data)[1]
    pointer = second + 2 + 12 * struct.unpack_from("<H", data, second)[0]
    struct.pack_into("<I", data, pointer, 0x7FFFFFF0)
    (tmp_path / "broken.tif").write_bytes(data)
    assert len(pages(tmp_path / "broken.tif")) == 3  # what the pointer stood for is not lost unseen
    assert "page 3" in sentence(tmp_path / "broken.tif", 3)
    struct.pack_into("<I", data, pointer, directories_of(data)[0])
    (tmp_path / "loop.tif").write_bytes(data)
    assert len(pages(tmp_path / "loop.tif")) == 2


def test_thumbnails_in_a_tiff_are_not_pages(tmp_path):
    sheets = [Image.new("L", (20 + i, 30), i) for i in range(3)]
    out = io.BytesIO()
    with tiff_writer(out) as writer:
        for i, sheet in enumerate(sheets):
            sheet.save(writer, "TIFF", tiffinfo={254: 1 if i == 1 else 2})
            writer.newFrame()
    (tmp_path / "a.tif").write_bytes(out.getvalue())
    assert len(pages(tmp_path / "a.tif")) == 2
    assert read(tmp_path / "a.tif", 2).shape == (30, 22, 3)


def tiff_writer(out: io.BytesIO):
    from PIL.TiffImagePlugin import AppendingTiffWriter

    return AppendingTiffWriter(out, True)


def test_a_tiff_of_too_many_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "MAX_TIFF_PAGES", 3)
    (tmp_path / "a.tif").write_bytes(many_tiff(4))
    assert "more than 3 pages" in refusal(lambda: pages(tmp_path / "a.tif"), tmp_path / "a.tif")


def test_a_tiff_without_pages(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0\0\0\0\0" + bytes(20))
    assert "no pages" in sentence(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(b"II*\0\x08")
    assert "ends within its header" in sentence(tmp_path / "b.tif")


def test_pages_are_found_lazily(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "MAX_TIFF_PAGES", 3)
    (tmp_path / "a.tif").write_bytes(many_tiff(4))
    found = list_pages(str(tmp_path / "a.tif"))
    assert [next(found).page for _ in range(3)] == [1, 2, 3]


def test_loading_a_tiff_page_does_not_walk_the_pages_before_it(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(many_tiff(5))
    refs = pages(tmp_path / "a.tif")
    monkeypatch.delattr(tiff, "directories")
    for i in (4, 0, 2):
        assert load_page(refs[i], DPI)[3, 3].tolist() == [i, 0, 0]


# PDF


def test_pdf_pages_have_the_size_their_dpi_asks(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_bytes((72, 144), (100, 50)))
    assert pages(tmp_path / "a.pdf") == [PageRef(str(tmp_path / "a.pdf"), i) for i in (1, 2)]
    assert read(tmp_path / "a.pdf", 1).shape == (144, 72, 3)
    assert read(tmp_path / "a.pdf", 1, dpi=144).shape == (288, 144, 3)
    assert read(tmp_path / "a.pdf", 2, dpi=36).shape == (25, 50, 3)
    assert (read(tmp_path / "a.pdf", 1) == 255).all()
    assert "page 3: does not exist" in refusal(lambda: read(tmp_path / "a.pdf", 3), tmp_path / "a.pdf")
    assert "page 0: does not exist" in refusal(lambda: read(tmp_path / "a.pdf", 0), tmp_path / "a.pdf")


def test_pdf_colours_and_orientation(tmp_path):
    corners(400, 600).save(tmp_path / "a.pdf", resolution=72.0)
    rgb = read(tmp_path / "a.pdf").astype(int)
    assert rgb.shape == (600, 400, 3)
    assert abs(rgb[8, 8] - (255, 0, 0)).max() < 40
    assert abs(rgb[592, 8] - (0, 0, 255)).max() < 40


def test_pdf_after_leading_junk(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"\r\n\r\njunk\r\n" + pdf_bytes((72, 72)))
    assert len(pages(tmp_path / "a.pdf")) == 1


def test_sample_pdfs():
    for name, count in {"digital_3p.pdf": 3, "scan_mixed_4p.pdf": 4, "scan_prose_3p.pdf": 3}.items():
        refs = pages(SAMPLES / name)
        assert [ref.page for ref in refs] == list(range(1, count + 1))
        assert all(load_page(ref, DPI).std() > 1 for ref in refs)


def test_a_giant_pdf_page_is_rendered_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_RASTER_PIXELS", 100_000)
    (tmp_path / "a.pdf").write_bytes(pdf_bytes((14400, 7200), (14400, 0.01)))
    height, width, _ = read(tmp_path / "a.pdf", 1, dpi=300).shape
    assert height * width <= 101_000
    assert width / height == pytest.approx(2, rel=0.02)
    assert read(tmp_path / "a.pdf", 2, dpi=300).shape[0] == 1


def test_a_pdf_behind_a_password(tmp_path):
    # The standard handler, revision 2, with keys that match no empty password.
    encrypt = b"<< /Filter /Standard /V 1 /R 2 /O (%b) /U (%b) /P -44 >>" % (b"o" * 32, b"u" * 32)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>",
        encrypt,
    ]
    trailer = b"/Root 1 0 R /Encrypt 4 0 R /ID [<00112233445566778899aabbccddeeff> <00112233445566778899aabbccddeeff>]"
    (tmp_path / "a.pdf").write_bytes(raw_pdf(objects, trailer))
    assert "password" in sentence(tmp_path / "a.pdf")


def test_a_pdf_without_pages(tmp_path):
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"]
    (tmp_path / "a.pdf").write_bytes(raw_pdf(objects))
    assert "no pages" in sentence(tmp_path / "a.pdf")


def test_a_pdf_that_claims_more_pages_than_it_can_hold(tmp_path, monkeypatch):
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 1000000 >>"]
    (tmp_path / "a.pdf").write_bytes(raw_pdf(objects))
    assert "damaged, it claims 1000000 pages" in refusal(
        lambda: pages(tmp_path / "a.pdf"), tmp_path / "a.pdf"
    )
    monkeypatch.setattr(pdf, "MAX_PDF_PAGES", 2)
    (tmp_path / "b.pdf").write_bytes(pdf_bytes((72, 72), (72, 72), (72, 72)))
    assert "more than 2, split it" in refusal(lambda: pages(tmp_path / "b.pdf"), tmp_path / "b.pdf")


def test_a_damaged_page_of_a_pdf_leaves_the_others(tmp_path):
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 4 0 R 5 0 R] /Count 3 >>",
        page,
        b"(this is no page)",
        page,
    ]
    (tmp_path / "a.pdf").write_bytes(raw_pdf(objects))
    assert len(pages(tmp_path / "a.pdf")) == 3
    assert "page 2" in sentence(tmp_path / "a.pdf", 2)
    assert read(tmp_path / "a.pdf", 1).shape == read(tmp_path / "a.pdf", 3).shape == (72, 72, 3)


@pytest.mark.parametrize("content", [b"%PDF-1.7\n", b"%PDF-1.7\n" + b"x" * 3000, b"%PDF-1.7\n%%EOF"])
def test_a_damaged_pdf(tmp_path, content):
    (tmp_path / "a.pdf").write_bytes(content)
    assert "PDF" in sentence(tmp_path / "a.pdf")


def test_pdfs_and_images_read_from_many_threads(tmp_path):
    corners(400, 600).save(tmp_path / "a.png")
    work: list[tuple[Path, int]] = [
        (SAMPLES / "digital_3p.pdf", 1),
        (SAMPLES / "digital_3p.pdf", 2),
        (SAMPLES / "scan_mixed_4p.pdf", 1),
        (tmp_path / "a.png", 1),
    ]
    expected = [read(*item) for item in work]
    wrong: list[object] = []

    def run(seed: int) -> None:
        try:
            for i in np.random.default_rng(seed).permutation(len(work) * 3) % len(work):
                np.testing.assert_array_equal(read(*work[i]), expected[i])
        except (AssertionError, PageError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Bad files


def test_text_named_png(tmp_path):
    (tmp_path / "a.png").write_text("a shopping list\n")
    said = sentence(tmp_path / "a.png")
    assert said == f"{tmp_path}/a.png: is not a page in a known format (PNG, JPEG, WebP, BMP, TIFF, PDF)"


def test_nothing_in_the_file(tmp_path):
    (tmp_path / "a.png").touch()
    assert sentence(tmp_path / "a.png").endswith("the file is empty")


def test_no_file_a_folder_a_pipe(tmp_path):
    assert "no such file" in sentence(tmp_path / "missing.png")
    assert "is a folder" in sentence(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in sentence(tmp_path / "pipe.png")
    assert "not a possible file name" in sentence("a\0b.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert "no such file" in sentence(tmp_path / "dangling.png")
    assert "cannot be read" in sentence(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    corners().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "ermission denied" in sentence(tmp_path / "a.png")


def test_an_error_of_the_disk_is_a_sentence(tmp_path, monkeypatch):
    corners().save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source, "open", fail, raising=False)
    assert sentence(tmp_path / "a.png").endswith("a.png: cannot be read (Permission denied)")


def test_a_file_above_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "a.tif", "wb") as file:
        file.truncate(source.MAX_FILE_BYTES + 1)
    assert "2.1 GB, the limit is" in sentence(tmp_path / "a.tif")


@pytest.mark.parametrize("size", [(30_000, 30_000), (200_000, 1000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_from_its_header(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    said = sentence(tmp_path / "a.png")
    assert f"page 1: is {size[0]}x{size[1]} px, more than the limit of 179 million" in said


def test_bombs_in_other_formats(tmp_path):
    bmp = io.BytesIO()
    corners().save(bmp, "BMP")
    data = bytearray(bmp.getvalue())
    struct.pack_into("<ii", data, 18, 30_000, 30_000)
    (tmp_path / "a.bmp").write_bytes(data)
    assert "30000x30000 px" in sentence(tmp_path / "a.bmp")
    data = bytearray(tiff_bytes(np.zeros((2, 2), np.uint16), 16, 1))
    for entry in (0, 1):
        struct.pack_into("<I", data, len(data) - 4 - 12 * (10 - entry) + 8, 30_000)
    (tmp_path / "a.tif").write_bytes(data)
    assert "30000x30000 px" in sentence(tmp_path / "a.tif")
    webp = io.BytesIO()
    corners().save(webp, "WEBP", lossless=True)
    data = bytearray(webp.getvalue())
    at = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] | 0x0FFFFFFF)  # 16384 x 16384
    (tmp_path / "a.webp").write_bytes(data)
    assert "million" in sentence(tmp_path / "a.webp")


def test_the_limit_is_ours_whatever_pillow_is_told(tmp_path, monkeypatch, recwarn):
    corners(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read(tmp_path / "a.png").shape == (100, 100, 3)
    monkeypatch.setattr(image, "MAX_PAGE_PIXELS", 9_999)
    assert "100x100 px" in sentence(tmp_path / "a.png")
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "lzw.tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_an_error_not_half_a_page(tmp_path, name, keep):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8))
    picture.save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    sentence(tmp_path / name)


@pytest.mark.parametrize("dpi", [0, -72, float("nan"), float("inf")])
def test_a_dpi_that_cannot_be(dpi):
    with pytest.raises(ConfigError, match="dpi"):
        read(SAMPLES / "digital_3p.pdf", dpi=dpi)


# Inputs


def test_folders_are_walked_and_sorted(tmp_path):
    for name in ("b.png", "a.PDF", "sub/c.JPEG", "sub/deep/d.tif", "notes.txt", ".hidden.png", ".git/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    got = [os.path.relpath(path, tmp_path) for path in expand_inputs([str(tmp_path)])]
    assert got == ["a.PDF", "b.png", "sub/c.JPEG", "sub/deep/d.tif"]


def test_files_are_kept_as_given_in_order_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "any.suffix", "odd[1].png"):
        Path(name).touch()
    assert expand_inputs(["b.png", "any.suffix", "odd[1].png", "b.png"]) == [
        "b.png",
        "any.suffix",
        "odd[1].png",
    ]
    assert expand_inputs(["*.png"]) == ["a.png", "b.png", "odd[1].png"]
    assert expand_inputs(["b.png", "?.png", "."]) == ["b.png", "a.png", "./a.png", "./b.png", "./odd[1].png"]
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "z.png").touch()
    assert expand_inputs(["sub/**/*.png"]) == ["sub/deep/z.png"]
    assert expand_inputs(["s*"]) == ["sub/deep/z.png"]


@pytest.mark.parametrize("given", ["missing.png", "*.png", "empty", "a\0b"])
def test_an_input_that_matches_nothing_is_named(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(PageError, match=rf"^{re.escape(given)}: (there is no|no file|the folder has no) "):
        expand_inputs([given])


def test_an_empty_name_is_a_sentence():
    with pytest.raises(PageError, match=r"^an input has an empty name"):
        expand_inputs([""])


def test_a_folder_that_cannot_be_listed_costs_no_other(tmp_path, monkeypatch):
    real = os.scandir

    def scandir(path: str):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    for name in ("a/1.png", "locked/2.png", "z/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "scandir", scandir)
    found = expand_inputs([str(tmp_path)])
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a/1.png", "z/3.png", "locked"]
    assert "Permission denied" in sentence(tmp_path / "locked")
    assert expand_inputs([str(tmp_path / "locked")]) == [str(tmp_path / "locked")]
