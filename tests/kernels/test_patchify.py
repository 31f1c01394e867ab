"""patchify against Pillow, against the Qwen2-VL image processor, and each implementation against the other."""

import threading

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import pagemill._native as _native
from pagemill.errors import KernelUnavailable
from pagemill.kernels.patchify import patchify
from pagemill.kernels.pixels import normalisation

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ISAS = _native.isas()

# (height, width) of the page, (height, width) of its patches
SHAPES = [
    ((2339, 1654), (1288, 896)),  # A4 at 200 DPI
    ((56, 84), (56, 84)),  # nothing to resize
    ((60, 84), (56, 84)),  # one axis only
    ((56, 90), (56, 84)),
    ((56, 80), (56, 84)),
    ((31, 33), (280, 280)),  # enlarged
    ((1, 1), (56, 56)),
    ((1, 7), (28, 112)),
    ((5, 300), (28, 140)),
    ((3000, 17), (1400, 28)),  # vertical pass first
    ((300, 56), (140, 28)),
    ((60, 80), (56, 84)),  # vertical pass first, the width enlarged
    ((60, 56), (140, 28)),
    ((997, 1009), (28, 28)),  # wide filters
    ((1009, 31), (28, 28)),
    ((31, 1009), (28, 28)),
]


def page(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Make noise of full contrast, which overshoots in the filter and is clipped between the passes."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, np.uint8(255) * (noise > 127), noise).astype(
        np.uint8
    )


def pasted(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The page [height, width, 3] that patches of 14 pixels, in groups of 2 x 2, were cut from."""
    height, width = size
    blocks = patches.reshape(height // 28, width // 28, 2, 2, 3, 14, 14)
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)


def vertical_first(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    return shape[0] > size[0] and shape[0] - size[0] > 2 * (shape[1] - size[1])


def follows_pillow_13(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Earlier Pillows always begin with the horizontal pass."""
    both = shape[0] != size[0] and shape[1] != size[1]
    return int(PIL.__version__.split(".")[0]) >= 13 or not (both and vertical_first(shape, size))


@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("kernel", ["reference", "native"])
def test_resized_pixels_are_pillows(shape, size, kernel):
    if not follows_pillow_13(shape, size):
        pytest.skip("this Pillow begins with the other pass")
    rgb = page(*shape)
    expected = np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pasted(patchify(rgb, *size, kernel=kernel), size), expected)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_patches_are_those_of_the_qwen2_vl_image_processor(shape, size):
    if not follows_pillow_13(shape, size):
        pytest.skip("this Pillow begins with the other pass")
    rgb = page(*shape, seed=1)
    exact = size[0] * size[1]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": exact, "longest_edge": exact})
    processor.resize = lambda image, **_: np.asarray(
        Image.fromarray(image.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BICUBIC)
    ).transpose(2, 0, 1)  # the sizes are tested in test_preprocess.py: here any target will do
    expected = processor(
        images=[Image.fromarray(rgb)],
        image_mean=MEAN,
        image_std=STD,
        return_tensors="np",
        input_data_format=None,
    )
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    levels = normalisation(MEAN, STD)
    for kernel in ("reference", "native"):
        patches = patchify(rgb, *size, kernel=kernel)
        values = levels[np.arange(3)[:, None], patches.reshape(len(patches), 3, 196)]
        moments = values[:, :, None].repeat(2, axis=2).reshape(len(patches), 1176)
        np.testing.assert_allclose(moments, expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_bits(shape, size, isa):
    rgb = page(*shape, seed=2)
    expected = patchify(rgb, *size, kernel="reference")
    _native.set_isa(isa)
    np.testing.assert_array_equal(patchify(rgb, *size), expected)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    patch=st.sampled_from([1, 7, 8, 14, 16]),
    merge=st.integers(1, 3),
    groups=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    isa=st.sampled_from(ISAS),
)
def test_native_is_the_reference_on_any_shape(height, width, patch, merge, groups, isa):
    rgb = page(height, width, seed=height * width)
    size = (groups[0] * patch * merge, groups[1] * patch * merge)
    options = {"patch_size": patch, "merge_size": merge}
    expected = patchify(rgb, *size, kernel="reference", **options)
    _native.set_isa(isa)
    np.testing.assert_array_equal(patchify(rgb, *size, **options), expected)


def test_patch_order_is_group_patch_channel_row_column():
    """Every pixel of a page that needs no resize is found where the contract puts it."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (12, 24, 3), dtype=np.uint8)
    patches = patchify(rgb, 12, 24, patch_size=3, merge_size=2, kernel="native")
    assert patches.shape == (4 * 8, 3 * 3 * 3)
    index = 0
    for group_y in range(2):
        for group_x in range(4):
            for y in range(2):
                for x in range(2):
                    top, left = (group_y * 2 + y) * 3, (group_x * 2 + x) * 3
                    square = rgb[top : top + 3, left : left + 3].transpose(2, 0, 1)
                    np.testing.assert_array_equal(patches[index].reshape(3, 3, 3), square)
                    index += 1


def test_views_and_read_only_pages_are_read_as_what_they_show():
    rgb = page(90, 70)
    expected = patchify(rgb[::-1, ::2].copy(), 56, 28)
    np.testing.assert_array_equal(patchify(rgb[::-1, ::2], 56, 28), expected)
    rgb.setflags(write=False)
    np.testing.assert_array_equal(patchify(rgb, 56, 28), patchify(rgb.copy(), 56, 28))


def test_pages_prepared_side_by_side_do_not_mix():
    pages = [page(200 + 7 * i, 150 + 5 * i, seed=i) for i in range(8)]
    expected = [patchify(rgb, 140, 112, kernel="reference") for rgb in pages]
    got: list[np.ndarray | None] = [None] * len(pages)

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = patchify(pages[i], 140, 112)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "rgb",
    [
        np.zeros((0, 10, 3), np.uint8),
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
    ],
    ids=["empty", "grey", "rgba", "float"],
)
def test_a_page_outside_the_contract_is_refused(rgb):
    with pytest.raises(ValueError, match="uint8"):
        patchify(rgb, 28, 28)
    with pytest.raises(ValueError, match="patchify"):
        _native.patchify(rgb, 28, 28, 14, 2)


@pytest.mark.parametrize("size", [(0, 28), (28, -28), (30, 28), (28, 14), (1 << 40, 28)])
def test_a_size_outside_the_contract_is_refused(size):
    rgb = page(30, 30)
    with pytest.raises(ValueError, match="multiples"):
        _native.patchify(rgb, *size, 14, 2)
    if size[0] < 1 << 20:
        with pytest.raises(ValueError, match="multiples of 28"):
            patchify(rgb, *size)


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch_size": 0},
        {"merge_size": -1},
    ],
    ids=repr,
)
def test_native_refuses_what_it_cannot_take(arguments):
    good = {"patch_size": 14, "merge_size": 2}
    with pytest.raises(ValueError, match="patchify"):
        _native.patchify(page(30, 30), 28, 28, **(good | arguments))


def test_native_takes_contiguous_pages_only():
    with pytest.raises(ValueError, match="C-contiguous"):
        _native.patchify(page(30, 30)[:, ::-1], 28, 28, 14, 2)


def test_an_unknown_kernel_is_named():
    with pytest.raises(KernelUnavailable, match="triton"):
        patchify(page(30, 30), 28, 28, kernel="triton")
