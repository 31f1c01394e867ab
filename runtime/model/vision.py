"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): patches to image embeddings, plain arithmetic over the kernels.

Most blocks attend inside windows of `window_size` pixels, a few over the whole image; 2-D rotary embedding; a
merger joins each cell of 2 x 2 patches into one embedding of the decoder's width. Images are packed one after
another: each attends only to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pagemill.gpu import to_device
from pagemill.kernels import Kernels, PackedLinear, Scheme
from pagemill.model.config import VisionConfig
from pagemill.model.packed import PackedWeights
from pagemill.model.rope import Grid, vision_angles
from pagemill.model.unpack import packed_linear

NORM_EPS = 1e-6  # fixed in the architecture, not a field of config.json


@dataclass
class Block:
    """Weights of one block."""

    norm1: Tensor
    qkv: PackedLinear
    proj: PackedLinear
    norm2: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True)
class Layout:
    """How one image's patches are laid out for window attention."""

    order: Tensor
    """int64 `[patches]`: patch order grouped by window."""
    cell_inverse: Tensor
    """int64 `[cells]`: puts merged cells back into reading order."""
    window_lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]
    cos: Tensor
    sin: Tensor


def lay_out(c: VisionConfig, grid: Grid, device: torch.device) -> Layout:
    """Return the layout of an image of this grid."""
    t, h, w = grid
    merge, side = c.spatial_merge_size, c.window_cells
    rows, columns = h // merge, w // merge
    cells = np.arange(t * rows * columns).reshape(t, rows, columns)
    windows = [
        cells[frame, r : r + side, col : col + side].reshape(-1)
        for frame in range(t)
        for r in range(0, rows, side)
        for col in range(0, columns, side)
    ]
    order = np.concatenate(windows)
    unit = merge * merge
    patches = torch.from_numpy((order[:, None] * unit + np.arange(unit)).reshape(-1))
    angles = to_device(vision_angles(grid, merge, c.head_dim, c.rope_theta)[patches], device)
    return Layout(
        order=to_device(patches, device),
        cell_inverse=to_device(torch.from_numpy(np.argsort(order)), device),
        window_lengths=tuple(len(window) * unit for window in windows),
        frame_lengths=(h * w,) * t,
        cos=angles.cos(),
        sin=angles.sin(),
    )


def run_block(
    k: Kernels,
    c: VisionConfig,
    block: Block,
    residual: Tensor,
    angles: tuple[Tensor, Tensor],
    offsets: Tensor,
) -> None:
    """One block: adds the outputs of its attention and of its MLP to `residual [patches, hidden]`, in place; `offsets` are
    those of the segments that attend to themselves."""
    rows = len(residual)
    qkv = k.linear(residual, block.qkv, norm=(block.norm1, NORM_EPS))
    qkv = qkv.view(rows, 3, c.num_heads, c.head_dim)
    k.rotary(qkv[:, :2].view(rows, 2 * c.num_heads, c.head_dim), *angles)
    y = k.varlen_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], offsets, c.head_dim**-0.5)
    k.linear(y.reshape(rows, c.hidden_size), block.proj, residual=residual)
    y = k.linear_swiglu(residual, block.gate_up, norm=(block.norm2, NORM_EPS))
    k.linear(y, block.down, residual=residual)


class VisionTower:
    """Weights and forward pass of the tower."""

    def __init__(
        self,
        config: VisionConfig,
        weights: PackedWeights,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        scheme: Scheme = "plain",
    ) -> None:
        self.config, self.kernels, self.device, self.dtype = config, kernels, device, dtype

        def vector(name: str) -> Tensor:
            name = f"vision.{name}"
            return weights.packed(name, lambda: weights.read(name).to(device, dtype, copy=True))

        def linear(*names: str, bias: bool = True, scheme: Scheme = scheme) -> PackedLinear:
            full = [f"vision.{n}" for n in names]
            return packed_linear(weights, full, bias, kernels, device, dtype, scheme)

        def gate_up(block: int) -> PackedLinear:
            names = [f"vision.blocks.{block}.mlp.{n}_proj" for n in ("gate", "up")]
            return packed_linear(weights, names, True, kernels, device, dtype, scheme, gated=True)

        self.patch_embed = linear("patch_embed.proj", bias=False, scheme="plain")
        self.blocks = [
            Block(
                norm1=vector(f"blocks.{i}.norm1.weight"),
                qkv=linear(f"blocks.{i}.attn.qkv"),
                proj=linear(f"blocks.{i}.attn.proj"),
                norm2=vector(f"blocks.{i}.norm2.weight"),
                gate_up=gate_up(i),
                down=linear(f"blocks.{i}.mlp.down_proj"),
            )
            for i in range(config.depth)
        ]
        self.merger_norm = vector("merger.ln_q.weight")
        self.merger_in = linear("merger.mlp.0")
        self.merger_out = linear("merger.mlp.2")
        self._layout = lru_cache(maxsize=32)(lambda grid: lay_out(config, grid, device))

    def _offsets(self, lengths: Sequence[int]) -> Tensor:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return to_device(torch.from_numpy(offsets), self.device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[tuple[Tensor, Tensor, Grid]]) -> list[Tensor]:
        """Encode still images, each given as patches, uint8 `[t*h*w, channels * patch_size**2]`, levels, float32
        `[channels, 256]`, and its grid; see `pagemill.kernels.pixels`.

        Returns for each image its embeddings `[t*h*w / merge**2, out_hidden_size]` in reading order.
        """
        k, c = self.kernels, self.config
        layouts = [self._layout(grid) for _, _, grid in images]
        x = torch.empty(
            sum(len(layout.order) for layout in layouts), c.patch_dim, dtype=self.dtype, device=self.device
        )
        first = 0
        for (patches, levels, _), layout in zip(images, layouts, strict=True):
            rows = x[first : first + len(layout.order)]
            levels = to_device(levels.to(self.dtype), self.device)
            k.pixel_values(to_device(patches, self.device), layout.order, levels, c.temporal_patch_size, rows)
            first += len(rows)
        angles = (
            torch.cat([layout.cos for layout in layouts]),
            torch.cat([layout.sin for layout in layouts]),
        )
        windows = self._offsets([n for layout in layouts for n in layout.window_lengths])
        frames = self._offsets([n for layout in layouts for n in layout.frame_lengths])

        residual = k.linear(x, self.patch_embed)
        for i, block in enumerate(self.blocks):
            run_block(k, c, block, residual, angles, frames if i in c.full_attention_blocks else windows)
        y = k.rms_norm(residual, self.merger_norm, NORM_EPS)
        y = y.view(len(x) // c.spatial_merge_size**2, -1)
        y = k.linear(k.gelu(k.linear(y, self.merger_in)), self.merger_out)

        sizes = [len(layout.cell_inverse) for layout in layouts]
        return [
            part[layout.cell_inverse] for part, layout in zip(torch.split(y, sizes), layouts, strict=True)
        ]
