"""The model on calibration pages, one block or layer at a time: what every linear layer is fed.

All in float32 and by the engine's own blocks (`model/vision.py`, `model/decoder.py`); what goes into a linear layer is tapped
where the kernels are called. In memory are one block's weights and the hidden states of all pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagemill.kernels import Kernels, LayerCache, Norm, PackedLinear, select
from pagemill.model.config import ModelConfig
from pagemill.model.decoder import Layer, RaggedBatch, run_layer
from pagemill.model.rope import Grid, MRope
from pagemill.model.vision import NORM_EPS, Block, lay_out, run_block
from pagemill.quantize.search import Inputs

_BLOCK_SIZE = 16
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class CalibrationPage:
    """One page as the model sees it: its prompt and its answer as tokens, and its image."""

    token_ids: Sequence[int]
    positions: npt.NDArray[np.int32]
    """`[3, T]`"""
    image_start: int
    patches: npt.NDArray[np.uint8]
    levels: npt.NDArray[np.float32]
    grid: Grid


@dataclass
class Fed:
    """What a block's layers were fed, and how large its keys and values are."""

    inputs: dict[str, Inputs] = field(default_factory=dict)
    """By the feed's name: qkv, out, gate_up, down."""
    keys: Tensor | None = None
    """Largest magnitude of each channel of each kv head `[Hk, D]`, after the rotary embedding."""
    values: Tensor | None = None


def units(config: ModelConfig) -> list[str]:
    """Canonical prefixes of the blocks and layers, in the order they run."""
    tower = [f"vision.blocks.{i}" for i in range(config.vision.depth)]
    return [*tower, *(f"text.layers.{i}" for i in range(config.text.num_layers))]


def feeds(unit: str) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block or layer, by what they are fed."""
    if unit.startswith("vision."):
        return {
            "qkv": ("attn.qkv",),
            "out": ("attn.proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
    return {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }


def norms(unit: str) -> dict[str, str]:
    """The RMSNorm before a feed, where there is one."""
    if unit.startswith("vision."):
        return {"qkv": "norm1", "gate_up": "norm2"}
    return {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}


def biased(unit: str, layer: str) -> bool:
    """Whether the architecture gives this linear layer a bias."""
    return unit.startswith("vision.") or layer in feeds(unit)["qkv"]


class Walk:
    """Takes the pages through the model block by block; `states` are their hidden states before the next one."""

    def __init__(self, config: ModelConfig, pages: Sequence[CalibrationPage], read: Read) -> None:
        self.config, self.pages, self._read = config, pages, read
        self._kernels = select("auto", torch.device("cpu"), torch.float32)
        self._rope = MRope(
            config.text.head_dim, config.text.rope_theta, config.text.mrope_section, torch.device("cpu")
        )
        self.states: list[Tensor] = []

    def begin(self) -> None:
        """Compute the hidden states before the tower's first block: `[patches, hidden]` of each page."""
        c, k = self.config.vision, self._kernels
        embed = k.pack_linear(self._read("vision.patch_embed.proj.weight").flatten(1), None)
        self.states = []
        for page in self.pages:
            layout = lay_out(c, page.grid, torch.device("cpu"))
            x = torch.empty(len(layout.order), c.patch_dim)
            levels = torch.from_numpy(page.levels.copy())
            k.pixel_values(torch.from_numpy(page.patches), layout.order, levels, c.temporal_patch_size, x)
            self.states.append(k.linear(x, embed))

    def weights(self, unit: str) -> dict[str, Tensor]:
        """The block's own tensors in float32, by name below `unit`."""
        names = [f"{layer}.weight" for layers in feeds(unit).values() for layer in layers]
        names += [
            f"{layer}.bias" for layers in feeds(unit).values() for layer in layers if biased(unit, layer)
        ]
        names += [f"{norm}.weight" for norm in norms(unit).values()]
        return {name: self._read(f"{unit}.{name}").float().clone() for name in names}

    def run(self, unit: str, weights: Mapping[str, Tensor], products: bool = False) -> Fed:
        """Take the pages through one block, tapping what its linear layers are fed; with `products`, also sums of x^T x."""
        if unit == "text.layers.0":
            self._enter_decoder()
        tower = unit.startswith("vision.")
        packed = _pack(self._kernels, unit, weights)
        widths = {name: weights[f"{layers[0]}.weight"].shape[1] for name, layers in feeds(unit).items()}
        fed = Fed({name: Inputs(k, torch.zeros(k, k) if products else None) for name, k in widths.items()})
        rows = sum(map(len, self.states))
        for page, state in zip(self.pages, self.states, strict=True):
            tapped = _tap(self._kernels, packed, lambda name, x: fed.inputs[name].add(x, len(x) / rows))
            if tower:
                self._block(tapped, Block(**packed), int(unit.rpartition(".")[2]), state, page)  # type: ignore[arg-type]
            else:
                self._layer(tapped, Layer(**packed), state, page, fed)  # type: ignore[arg-type]
        return fed

    def _block(self, k: Kernels, block: Block, number: int, state: Tensor, page: CalibrationPage) -> None:
        """Block `number`, in place."""
        c = self.config.vision
        layout = lay_out(c, page.grid, torch.device("cpu"))
        lengths = layout.frame_lengths if number in c.full_attention_blocks else layout.window_lengths
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        run_block(k, c, block, state, (layout.cos, layout.sin), offsets)

    def _layer(self, k: Kernels, layer: Layer, state: Tensor, page: CalibrationPage, fed: Fed) -> None:
        """The layer, in place; `fed` learns of keys and values."""
        c, tokens = self.config.text, len(state)
        blocks = -(-tokens // _BLOCK_SIZE)
        shapes = k.kv_cache_shapes(blocks, c.num_kv_heads, c.head_dim, _BLOCK_SIZE)
        cache = LayerCache(*(torch.zeros(shape) for shape in shapes))
        positions = torch.from_numpy(page.positions).long()
        highest = int(positions.max())
        batch = RaggedBatch(
            token_ids=torch.empty(0, dtype=torch.int64),
            positions=positions,
            max_position=highest,
            slots=torch.arange(tokens),
            query_start=torch.tensor([0, tokens], dtype=torch.int32),
            context_lens=torch.tensor([tokens], dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            logit_rows=torch.empty(0, dtype=torch.int64),
        )
        angles = k.mrope_angles(positions, *self._rope.tables(highest))
        run_layer(k, c, layer, state, angles, batch, cache)
        keys, values = cache.keys.abs().amax(dim=(0, 3)), cache.values.abs().amax(dim=(0, 2))
        fed.keys = keys if fed.keys is None else torch.maximum(fed.keys, keys)
        fed.values = values if fed.values is None else torch.maximum(fed.values, values)

    def _enter_decoder(self) -> None:
        """Images' hidden states through the merger, among the tokens' embeddings: `[tokens, hidden]` of each page."""
        c, k = self.config.vision, self._kernels
        first, second = (
            k.pack_linear(
                self._read(f"vision.merger.mlp.{i}.weight"), self._read(f"vision.merger.mlp.{i}.bias")
            )
            for i in (0, 2)
        )
        norm = self._read("vision.merger.ln_q.weight").float()
        table = self._read("text.embed_tokens.weight")
        for i, (page, state) in enumerate(zip(self.pages, self.states, strict=True)):
            y = k.rms_norm(state, norm, NORM_EPS).view(len(state) // c.spatial_merge_size**2, -1)
            y = k.linear(k.gelu(k.linear(y, first)), second)
            image = y[lay_out(c, page.grid, torch.device("cpu")).cell_inverse]
            rows = table[torch.tensor(page.token_ids)].float()
            rows[page.image_start : page.image_start + len(image)] = image
            self.states[i] = rows


def _pack(k: Kernels, unit: str, weights: Mapping[str, Tensor]) -> dict[str, PackedLinear | Tensor]:
    """The fields of `Block` or `Layer`."""
    tower = unit.startswith("vision.")

    def stacked(layers: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        biases = [weights[f"{layer}.bias"] for layer in layers if biased(unit, layer)]
        return [weights[f"{layer}.weight"] for layer in layers], torch.cat(biases) if biases else None

    of = feeds(unit)
    (gate, up), bias = stacked(of["gate_up"])
    return {
        "norm1" if tower else "attention_norm": weights[f"{norms(unit)['qkv']}.weight"],
        "qkv": k.pack_linear(*stacked(of["qkv"])),
        "proj" if tower else "out": k.pack_linear(*stacked(of["out"])),
        "norm2" if tower else "mlp_norm": weights[f"{norms(unit)['gate_up']}.weight"],
        "gate_up": k.pack_swiglu(gate, up, bias),
        "down": k.pack_linear(*stacked(of["down"])),
    }


def _tap(
    k: Kernels, weights: Mapping[str, PackedLinear | Tensor], seen: Callable[[str, Tensor], None]
) -> Kernels:
    """The kernels, telling `seen` what each of the packed layers is fed."""
    names = {id(item): "out" if name == "proj" else name for name, item in weights.items()}

    def linear(
        x: Tensor,
        packed: PackedLinear,
        *,
        out_float32: bool = False,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        x = x if norm is None else k.rms_norm(x, *norm)
        seen(names[id(packed)], x)
        return k.linear(x, packed, out_float32=out_float32, residual=residual)

    def linear_swiglu(x: Tensor, packed: PackedLinear, *, norm: Norm | None = None) -> Tensor:
        x = x if norm is None else k.rms_norm(x, *norm)
        seen(names[id(packed)], x)
        return k.linear_swiglu(x, packed)

    return replace(k, linear=linear, linear_swiglu=linear_swiglu)
