"""Positions against a slow construction, token by token, straight from the paper's description."""

import math

import numpy as np
import pytest
import torch

from pagemill.kernels.angles import mrope_angles_reference
from pagemill.model.rope import _TABLE_ROWS, MRope, mrope_positions, vision_angles


def slow_positions(num_tokens, images, merge):
    out, position, index = [], 0, 0
    images = list(images)
    while index < num_tokens:
        if images and images[0][0] == index:
            _, (t, h, w) = images.pop(0)
            for frame in range(t):
                for row in range(h // merge):
                    for column in range(w // merge):
                        out.append((position + frame, position + row, position + column))
                        index += 1
            position += max(h, w) // merge
        else:
            out.append((position,) * 3)
            position += 1
            index += 1
    return np.array(out).T, position - index


@pytest.mark.parametrize(
    ("num_tokens", "images"),
    [
        (5, []),
        (1, []),
        (10, [(0, (1, 2, 2))]),  # image first
        (20, [(3, (1, 6, 10))]),  # 15 tokens, text around
        (18, [(3, (1, 6, 10))]),  # image last
        (40, [(2, (1, 4, 10)), (12, (1, 14, 2)), (25, (1, 2, 30))]),  # two back to back, three in all
    ],
)
def test_positions(num_tokens, images):
    expected, delta = slow_positions(num_tokens, images, 2)
    positions, found = mrope_positions(num_tokens, images, 2)
    np.testing.assert_array_equal(positions, expected)
    assert found == delta


def test_mrope_angles_come_from_their_axis_and_do_not_depend_on_the_batch():
    rope = MRope(16, 100.0, (2, 3, 3), torch.device("cpu"))
    positions = torch.tensor([[5, 3000, 0], [7, 3000, 1], [11, 3000, 2]])
    cos, sin = mrope_angles_reference(positions, *rope.tables(3000))
    for token in range(3):
        for f, axis in enumerate([0, 0, 1, 1, 1, 2, 2, 2]):
            angle = positions[axis, token].item() * 100.0 ** (-2 * f / 16)
            assert cos[token, f].item() == pytest.approx(math.cos(angle), abs=3e-4)
            assert sin[token, f].item() == pytest.approx(math.sin(angle), abs=3e-4)
    fresh = MRope(16, 100.0, (2, 3, 3), torch.device("cpu"))
    alone, _ = mrope_angles_reference(positions[:, :1], *fresh.tables(_TABLE_ROWS - 1))
    assert torch.equal(alone[0], cos[0])


def test_vision_angles_turn_with_row_and_column():
    angles = vision_angles((1, 4, 6), 2, 8, 10000.0)
    assert angles.shape == (24, 4)
    # Cell by cell: the second cell of the first row holds columns 2 and 3.
    rows = [0, 0, 1, 1] * 3 + [2, 2, 3, 3] * 3
    columns = [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5] * 2
    np.testing.assert_allclose(angles[:, 0], rows)
    np.testing.assert_allclose(angles[:, 2], columns)
    np.testing.assert_allclose(angles[:, 1], np.array(rows) / 100.0, rtol=1e-6)
