"""Sizes, settings, patches and content hashes of one page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from micro import shown
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

import pagemill
from pagemill.errors import CheckpointError, ConfigError, PageError
from pagemill.pages.preprocess import ImageProcessor, smart_resize

TINY = Path(pagemill.__file__).parent / "assets" / "pagemill-tiny"
SAMPLES = Path(__file__).parents[2] / "bench" / "pages"


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=500)
@given(
    height=st.integers(1, 30_000),
    width=st.integers(1, 30_000),
    limits=st.sampled_from([(3136, 12845056), (12544, 1016064), (3136, 3136), (1, 784), (1 << 20, 1 << 22)]),
    factor=st.sampled_from([28, 32]),
)
@example(height=14, width=42, limits=(3136, 12845056), factor=28)  # halves round to even
@example(height=200, width=1, limits=(3136, 12845056), factor=28)
@example(height=201, width=1, limits=(3136, 12845056), factor=28)
def test_smart_resize_is_that_of_qwen2_vl(height, width, limits, factor):
    try:
        expected = hf.smart_resize(height, width, factor, *limits)
    except ValueError:
        with pytest.raises(PageError, match="aspect ratio"):
            smart_resize(height, width, factor, *limits)
    else:
        assert smart_resize(height, width, factor, *limits) == expected


def test_an_empty_page_has_no_size():
    with pytest.raises(PageError, match="empty"):
        smart_resize(0, 10)


@pytest.mark.parametrize("name", ["prose_00.png", "form_24.png", "hard_36.png", "legal_12.png"])
@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_sample_pages_are_prepared_as_by_the_checkpoints_own_processor(name, kernel):
    processor = hf.Qwen2VLImageProcessorPil.from_pretrained(TINY)
    with Image.open(SAMPLES / name) as picture:
        picture = picture.convert("RGB")
    expected = processor(images=[picture], return_tensors="np")
    prepared = ImageProcessor.from_folder(TINY).prepare(np.asarray(picture), kernel)
    assert prepared.grid == tuple(expected["image_grid_thw"][0])
    assert prepared.num_tokens == len(expected["pixel_values"]) // 4
    assert prepared.patches.dtype == np.uint8
    np.testing.assert_allclose(shown(prepared), expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 200), (200, 1), (27, 29), (43, 1700), (1500, 1100), (2000, 900)]
)
def test_ugly_pages_are_prepared_as_by_qwen2_vl(shape):
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("earlier Pillows resize some of these in the other order")
    ours = ImageProcessor(max_pixels=512 * 512)
    processor = hf.Qwen2VLImageProcessorPil(min_pixels=ours.min_pixels, max_pixels=ours.max_pixels)
    rgb = noise(*shape)
    expected = processor(images=[Image.fromarray(rgb)], return_tensors="np")
    prepared = ours.prepare(rgb)
    assert prepared.grid == tuple(expected["image_grid_thw"][0])
    np.testing.assert_allclose(shown(prepared), expected["pixel_values"], rtol=0, atol=1e-5)


def test_a_page_too_long_is_one_sentence():
    with pytest.raises(PageError, match=r"3000x10 px, an aspect ratio of 300"):
        ImageProcessor().prepare(noise(10, 3000))


def test_equal_patches_have_equal_hashes_whatever_made_them():
    processor = ImageProcessor(max_pixels=200 * 200)
    rgb = noise(300, 200)
    first = processor.prepare(rgb)
    assert len(first.content_hash) == 16
    assert processor.prepare(rgb.copy()).content_hash == first.content_hash
    assert processor.prepare(rgb, "reference").content_hash == first.content_hash
    assert replace(processor, min_pixels=3137).prepare(rgb).content_hash == first.content_hash  # same patches


def test_different_patches_have_different_hashes():
    processor = ImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    rgb = np.zeros((56, 112, 3), np.uint8)
    one_bit = rgb.copy()
    one_bit[55, 111, 2] = 1
    prepared = [
        processor.prepare(rgb),
        processor.prepare(one_bit),
        processor.prepare(rgb.transpose(1, 0, 2)),  # the same bytes in another shape
        replace(processor, image_mean=(0.5, 0.5, 0.5)).prepare(rgb),
        replace(processor, image_std=(0.5, 0.5, 0.5)).prepare(rgb),
        replace(processor, merge_size=1).prepare(rgb),
        replace(processor, temporal_patch_size=1).prepare(rgb),
        replace(processor, patch_size=7).prepare(rgb),
    ]
    assert len({image.content_hash for image in prepared}) == len(prepared)


def write(folder: Path, name: str = "preprocessor_config.json", **values: object) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        {"size": {"min_pixels": 784, "max_pixels": 7840}},
        {"min_pixels": 784, "max_pixels": 7840, "size": {"shortest_edge": 1, "longest_edge": 2}},
        {"min_pixels": 784, "max_pixels": None, "size": {"longest_edge": 7840}},
    ],
    ids=repr,
)
def test_both_dialects_of_the_pixel_limits(tmp_path, values):
    assert ImageProcessor.from_folder(write(tmp_path, **values)) == ImageProcessor(784, 7840)


def test_all_settings_are_read(tmp_path):
    folder = write(
        tmp_path, patch_size=16, temporal_patch_size=1, merge_size=3, image_mean=[0.5] * 3, image_std=[1] * 3
    )
    assert ImageProcessor.from_folder(folder) == ImageProcessor(
        3136, 12845056, 16, 1, 3, (0.5,) * 3, (1,) * 3
    )


def test_a_folder_without_settings_has_the_defaults(tmp_path):
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor()
    assert ImageProcessor.from_folder(write(tmp_path)) == ImageProcessor()


def test_settings_nested_in_the_processor_file(tmp_path):
    write(
        tmp_path,
        "processor_config.json",
        image_processor={"size": {"shortest_edge": 784, "longest_edge": 7840}},
    )
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor(784, 7840)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"resample": 2}, "resample"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": "14"}, "patch_size"),
        ({"merge_size": True}, "merge_size"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels"),
        ({"max_pixels": 1e6}, "max_pixels"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"image_std": 0.5}, "image_std"),
        ({"size": 224}, "size"),
    ],
    ids=repr,
)
def test_settings_that_cannot_work_name_the_file_and_the_setting(tmp_path, values, what):
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {what}"):
        ImageProcessor.from_folder(write(tmp_path, **values))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "list", "binary", "deep"]
)
def test_a_file_that_is_no_json_object(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)


def test_a_wrong_option_in_code_is_a_config_error():
    with pytest.raises(ConfigError, match="patch_size"):
        ImageProcessor(patch_size=-1)
