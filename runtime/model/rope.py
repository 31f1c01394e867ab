"""Positions and rotary angles: M-RoPE of the decoder, 2-D rotary of the vision tower.

M-RoPE (Qwen2-VL, arXiv 2409.12191): every token has a temporal, a height and a width position. Text tokens have the same
number three times; the tokens of an image count rows and columns from where the image starts, and the text
after it goes on from the largest position used. `mrope_section` says how many of the head's frequencies each
of the three turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""Patches of one image: frames, rows, columns."""


def mrope_positions(
    num_tokens: int, images: Sequence[tuple[int, Grid]], merge_size: int
) -> tuple[npt.NDArray[np.int32], int]:
    """Positions of a prompt.

    `images` gives for each image the index of its first placeholder and its grid in patches. Returns int32 `[3, num_tokens]`
    and the delta: a later token at index i has position i + delta on all three axes.
    """
    positions = np.empty((3, num_tokens), dtype=np.int32)
    index = position = 0
    for start, (t, h, w) in images:
        text = start - index
        positions[:, index:start] = np.arange(position, position + text, dtype=np.int32)
        position += text
        h, w = h // merge_size, w // merge_size
        cells = np.indices((t, h, w), dtype=np.int32).reshape(3, -1)
        index = start + cells.shape[1]
        positions[:, start:index] = cells + position
        # Frames of one still image do not advance the clock; the largest of rows and columns does.
        position += max(h, w)
    positions[:, index:] = np.arange(position, position + num_tokens - index, dtype=np.int32)
    return positions, position - index


_TABLE_ROWS = 1024


class MRope:
    """Tables of the decoder's rotary embedding, for `kernels.mrope_angles`.

    Cosines and sines are looked up in tables that grow by whole chunks, so that a position's angles are the same
    bits in every batch (vectorised cosines may round differently in the tail of an array).
    """

    def __init__(
        self, head_dim: int, theta: float, section: tuple[int, int, int], device: torch.device
    ) -> None:
        self._device = device
        self._inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        # [head_dim / 2]: which of the three positions turns this frequency
        self._axis = torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(device)
        self._cos = self._sin = torch.empty(0, head_dim // 2, device=device)

    def _grow(self, rows: int) -> None:
        while len(self._cos) < rows:
            first = len(self._cos)
            angles = torch.arange(first, first + _TABLE_ROWS, dtype=torch.float32)[:, None] * self._inv_freq
            self._cos = torch.cat([self._cos, angles.cos().to(self._device)])
            self._sin = torch.cat([self._sin, angles.sin().to(self._device)])

    def tables(self, max_position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what turns each frequency, int64 `[head_dim / 2]`, and cosines and sines of at least the positions up to
        `max_position`, float32 `[positions, head_dim / 2]`.
        """
        self._grow(max_position + 1)
        return self._axis, self._cos, self._sin


def vision_angles(grid: Grid, merge_size: int, head_dim: int, theta: float) -> Tensor:
    """Angles of the vision tower's 2-D rotary embedding, float32 `[patches, head_dim / 2]`, in patch order.

    The first half of the frequencies turns with the row, the second with the column of the patch; patches come cell by
    cell (`merge_size` x `merge_size`), as the image processor orders them.
    """
    t, h, w = grid
    rows, columns = np.indices((h, w))
    order = (h // merge_size, merge_size, w // merge_size, merge_size)
    row = torch.from_numpy(rows.reshape(order).transpose(0, 2, 1, 3).reshape(-1).astype(np.float32))
    column = torch.from_numpy(columns.reshape(order).transpose(0, 2, 1, 3).reshape(-1).astype(np.float32))
    dim = head_dim // 2
    inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = torch.cat([row[:, None] * inv_freq, column[:, None] * inv_freq], dim=-1)
    return angles.repeat(t, 1)
