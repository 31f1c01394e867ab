"""Whether transformers reads what `pagemill quantize` writes: its logits beside those of the weights as pagemill decodes them.

    python bench/check_exports.py DIR...

Needs transformers and compressed-tensors, in an environment of its own or beside pagemill. Every DIR is loaded by transformers
with its compressed-tensors integration, and once more as plain weights that a decoder in this file makes of the tensors; both
read the same tokens and patches of noise. Activations of 8 bits are rounded by transformers alone, and so the logits differ by
some per cent; wrong scales or swapped nibbles make them differ by all. compressed-tensors 0.20 expects zero points of another
shape than it writes and loads no asymmetric 4-bit checkpoint into transformers; 0.15 to 0.17 do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

BOUND = 0.12
"""Of the relative difference of logits."""


def unpack(words: Tensor, count: int) -> Tensor:
    """Signed 4-bit integers `[N, count]` of int32 words, the first in the lowest bits, stored plus 8."""
    nibbles = (words.long()[..., None] >> (4 * torch.arange(8))) & 15
    return nibbles.flatten(1)[:, :count] - 8


def plain_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, decoded."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: t for file in sorted(set(index.values())) for name, t in load_file(folder / file).items()}
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if kind == "weight_packed" and scale is not None:
            n, k = stored[f"{module}.weight_shape"].tolist()
            zero = unpack(stored[f"{module}.weight_zero_point"].T, n).T
            q = unpack(tensor, k).view(n, scale.shape[1], -1)
            plain[f"{module}.weight"] = ((q - zero[..., None]) * scale.float()[..., None]).view(n, k)
        elif kind == "weight" and scale is not None:
            plain[name] = tensor.float() * scale.float()
        elif kind in ("weight", "bias"):
            plain[name] = tensor.float()
    return plain


@torch.inference_mode()
def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    """Of one prompt with one image of noise."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    config = model.config
    random = torch.Generator().manual_seed(0)
    t, h, w = grid = (1, 8, 12)
    merge = config.vision_config.spatial_merge_size
    count = t * h * w // merge**2
    dim = config.vision_config.in_channels * config.vision_config.temporal_patch_size
    pixels = torch.randn(t * h * w, dim * config.vision_config.patch_size**2, generator=random)
    words = torch.randint(0, 2000, (40,), generator=random).tolist()
    start, end = config.vision_start_token_id, config.vision_end_token_id
    ids = torch.tensor([[start, *[config.image_token_id] * count, end, *words]])
    kinds = (ids == config.image_token_id).int()
    out = model(
        input_ids=ids,
        pixel_values=pixels.to(dtype),
        image_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=kinds,
    )
    return out.logits.float()


def check(folder: Path) -> bool:
    """Print one folder's difference; whether it is small."""
    settings = json.loads((folder / "config.json").read_text())
    form = settings.pop("quantization_config")["format"]
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch)
        for file in folder.glob("*.json"):
            if "index" not in file.name:
                shutil.copy(file, plain / file.name)
        (plain / "config.json").write_text(json.dumps(settings))
        save_file(
            {n: t.contiguous() for n, t in plain_weights(folder).items()},
            plain / "model.safetensors",
            {"format": "pt"},
        )
        wanted, found = logits(plain, torch.float32), logits(folder, torch.float32)
    off = ((found - wanted).norm() / wanted.norm()).item()
    good = off < BOUND
    print(f"{folder.name}: {form}, logits differ by {off:.4f}, {'good' if good else 'TOO MUCH'}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    good = [check(folder) for folder in parser.parse_args().folders]
    if not all(good):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
