"""The model against transformers: logits within 1e-3 on the trained miniature and on random shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pagemill import kernels
from pagemill.kernels import kv_cache_shapes
from pagemill.kernels.pixels import normalisation
from pagemill.model.config import read_config
from pagemill.model.decoder import RaggedBatch
from pagemill.model.loader import find_checkpoint, load_model
from pagemill.model.rope import mrope_positions

SHAPES = {
    # name: (text overrides, vision overrides)
    "vision head 80, GQA 8:1": (
        dict(hidden_size=128, num_attention_heads=8, num_key_value_heads=1, mrope_section=[2, 3, 3]),
        dict(hidden_size=160, num_heads=2, intermediate_size=171, depth=3, fullatt_block_indexes=[1]),
    ),
    "no GQA, head 32, window of one cell": (
        dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, mrope_section=[4, 6, 6]),
        dict(
            hidden_size=32,
            num_heads=2,
            intermediate_size=50,
            depth=2,
            fullatt_block_indexes=[0],
            window_size=28,
        ),
    ),
    "all windows, untied": (
        dict(
            hidden_size=96, num_attention_heads=3, num_key_value_heads=1, mrope_section=[4, 6, 6], tie=False
        ),
        dict(hidden_size=48, num_heads=3, intermediate_size=64, depth=2, fullatt_block_indexes=[]),
    ),
}
IMAGE, VOCAB = 90, 100
LEVELS = torch.tensor(normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))


def random_bytes(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3 * 14 * 14), generator=generator, dtype=torch.uint8)


def values_of(patches: torch.Tensor) -> torch.Tensor:
    """What transformers' image processor makes of patches: normalised, every pixel at both moments."""
    pixels = patches.view(len(patches), 3, 1, 196).double() / 255
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.25]], dtype=torch.double)[:, :, None, None]
    return ((pixels - mean) / std).repeat(1, 1, 2, 1).view(len(patches), 1176).float()


def random_checkpoint(
    folder: Path, text: dict, vision: dict, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    text = dict(text)
    tie = text.pop("tie", True)
    section = text.pop("mrope_section")
    config = Qwen2_5_VLConfig(
        text_config=dict(
            intermediate_size=72, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=4096, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=section), bos_token_id=1,
            eos_token_id=2, pad_token_id=1, tie_word_embeddings=tie, **text,
        ),
        vision_config=dict(out_hidden_size=text["hidden_size"], **vision),
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        tie_word_embeddings=tie,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that attention is peaked and a wrong position shows.
            parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def hf_logits(model, token_ids, patches, grids):
    ids = torch.tensor([token_ids])
    kwargs = {}
    if grids:
        kwargs = dict(pixel_values=values_of(torch.cat(patches)), image_grid_thw=torch.tensor(grids))
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **kwargs,
        ).logits[0]


def our_logits(folder, token_ids, patches, grids, kind, chunk=None, block_size=16):
    """Run a prompt through our model by hand, in chunks, with blocks in shuffled order."""
    config = read_config(folder)
    device, dtype = torch.device("cpu"), torch.float32
    k = kernels.select(kind, device, dtype)
    model = load_model(folder, config, k, device, dtype)
    images = [(patch, LEVELS, grid) for patch, grid in zip(patches, grids, strict=True)]
    embeds = model.vision(images) if grids else []
    t, merge = config.text, config.vision.spatial_merge_size
    starts, at = [], 0
    for grid in grids:
        at = token_ids.index(config.image_token_id, at)
        starts.append(at)
        at += grid[0] * grid[1] * grid[2] // merge**2
    positions, _ = mrope_positions(len(token_ids), list(zip(starts, grids, strict=True)), merge)
    n = len(token_ids)
    num_blocks = -(-n // block_size)
    shapes = kv_cache_shapes(num_blocks, t.num_kv_heads, t.head_dim, block_size)
    kv = [tuple(torch.full(s, float("nan")) for s in shapes) for _ in range(t.num_layers)]
    table = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    index = np.arange(n)
    slots = table[index // block_size].astype(np.int64) * block_size + index % block_size
    is_image = np.array(token_ids) == config.image_token_id
    all_embeds = torch.cat(embeds) if grids else None
    out = []
    for a in range(0, n, chunk or n):
        b = min(a + (chunk or n), n)
        count, first = int(is_image[a:b].sum()), int(is_image[:a].sum())
        index = np.where(is_image[a:b], is_image[a:b].cumsum() - 1, -1).astype(np.int32)
        out.append(
            model.decoder(
                RaggedBatch(
                    token_ids=torch.tensor(token_ids[a:b]),
                    positions=torch.from_numpy(positions[:, a:b].astype(np.int64)),
                    max_position=int(positions.max()),
                    slots=torch.from_numpy(slots[a:b]),
                    query_start=torch.tensor([0, b - a], dtype=torch.int32),
                    context_lens=torch.tensor([b], dtype=torch.int32),
                    block_tables=torch.from_numpy(table[None]),
                    logit_rows=torch.arange(b - a),
                    image_index=torch.from_numpy(index) if count else None,
                    image_embeds=all_embeds[first : first + count] if count else None,
                ),
                kv,
            )
        )
    return torch.cat(out)


def prompt_of(grids, image_token, text=(3, 4, 5), tail=(6, 7, 8, 9)):
    ids = list(text)
    for grid in grids:
        ids += [image_token] * (grid[0] * grid[1] * grid[2] // 4) + [11, 12]
    return ids + list(tail)


@pytest.mark.parametrize("kind", ["reference", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "grids",
    [
        [],
        [(1, 2, 2)],
        [(1, 10, 6)],
        [(1, 18, 22)],
        [(1, 4, 26), (1, 14, 2)],
        [(1, 8, 8), (1, 8, 8), (1, 2, 30)],
    ],
    ids=["no image", "one cell", "odd cells", "windows and rests", "two flat images", "three images"],
)
def test_logits_of_random_shapes(tmp_path, shape, grids, kind):
    text, vision = SHAPES[shape]
    reference = random_checkpoint(tmp_path, text, vision)
    generator = torch.Generator().manual_seed(1)
    patches = [random_bytes(g[0] * g[1] * g[2], generator) for g in grids]
    ids = prompt_of(grids, IMAGE)
    expected = hf_logits(reference, ids, patches, grids)
    for chunk, block_size in ((None, 16), (7, 4)):
        ours = our_logits(tmp_path, ids, patches, grids, kind, chunk, block_size)
        assert (ours - expected).abs().max() < 1e-3
        assert expected.std() > 0.1  # a check that cannot fail is none


@pytest.mark.parametrize("kind", ["reference", "auto"])
def test_logits_of_the_miniature(kind):
    folder = find_checkpoint("pagemill-tiny")
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    grids = [(1, 48, 32)]
    generator = torch.Generator().manual_seed(2)
    patches = [random_bytes(48 * 32, generator)]
    config = json.loads((folder / "config.json").read_text())
    ids = prompt_of(grids, config["image_token_id"], text=(2035, 300), tail=range(100, 140))
    expected = hf_logits(reference, ids, patches, grids)
    ours = our_logits(folder, ids, patches, grids, kind, chunk=150)
    assert (ours - expected).abs().max() < 1e-3
