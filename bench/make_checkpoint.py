"""Write a random-weight checkpoint of a true shape: for speed, memory and loading, not for reading.

    python bench/make_checkpoint.py --preset 3b -o /tmp/random-3b

Presets: `3b` and `7b` are the shapes of Qwen2.5-VL-3B and 7B (and of the OCR models tuned from them), `micro` is
one for tests. Tokenizer, chat template and image settings are those of the embedded pagemill-tiny, so `pagemill read
--model DIR` works at once. Shards are written one after another: memory stays at one shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint
from pagemill.model.weights import expected_shapes

_VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2, hidden_act="silu",
)  # fmt: skip
_TEXT = dict(
    max_position_embeddings=128000, rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu",
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), use_sliding_window=False,
)  # fmt: skip
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3b": (
        dict(_TEXT, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
             num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
        dict(_VISION, out_hidden_size=2048),
    ),
    "7b": (
        dict(_TEXT, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
             num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
        dict(_VISION, out_hidden_size=3584),
    ),
    "micro": (
        dict(_TEXT, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=1, vocab_size=2048, tie_word_embeddings=True, rope_theta=100.0,
             max_position_embeddings=2048, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])),
        dict(_VISION, depth=2, hidden_size=32, intermediate_size=36, num_heads=2, fullatt_block_indexes=[1],
             out_hidden_size=48),
    ),
}  # fmt: skip
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "pagemill.json", "preprocessor_config.json",
           "generation_config.json")  # fmt: skip


def write_checkpoint(
    folder: Path,
    text: dict[str, Any],
    vision: dict[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    std: float = 0.02,
    flat: bool = True,
    new_names: bool = False,
    shard_bytes: int = 4 << 30,
) -> Path:
    """Write a checkpoint with normal weights of deviation `std` (norms around one).

    `flat` keeps the text fields beside `vision_config`, else they are nested in `text_config`; `new_names` takes
    the tensor names of transformers 5; one file if all fits `shard_bytes`, else shards with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(find_checkpoint("pagemill-tiny") / name, folder / name)
    config: dict[str, Any] = dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", vision_config=vision,
        image_token_id=2046, video_token_id=2047, vision_start_token_id=2043, vision_end_token_id=2044,
        eos_token_id=[2036, 2034], torch_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    config.update(text if flat else dict(text_config=text))
    (folder / "config.json").write_text(json.dumps(config, indent=1))

    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Size]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    weight_map: dict[str, str] = {}

    def flush(last: bool) -> None:
        nonlocal shard, size
        single = last and not shards
        name = "model.safetensors" if single else f"model-{len(shards) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shards.append({})
        shard, size = {}, 0
        if last and not single:
            index = dict(metadata=dict(total_size=total), weight_map=weight_map)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    for canonical, shape in expected_shapes(read_config(folder)).items():
        center = 1.0 if (len(shape) == 1 and "norm" in canonical) or "ln_q" in canonical else 0.0
        tensor = (torch.randn(shape, generator=generator) * std + center).to(dtype)
        name = canonical
        if canonical.startswith("text."):
            name = ("model.language_model." if new_names else "model.") + canonical.removeprefix("text.")
        elif canonical.startswith("vision."):
            name = ("model.visual." if new_names else "visual.") + canonical.removeprefix("vision.")
        if size + tensor.nbytes > shard_bytes and shard:
            flush(last=False)
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush(last=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3b")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    started = time.perf_counter()
    text, vision = PRESETS[args.preset]
    write_checkpoint(args.output, text, vision, dtype=getattr(torch, args.dtype))
    size = sum(f.stat().st_size for f in args.output.glob("*.safetensors"))
    print(f"{args.output}: {size / 1e9:.2f} GB of random weights in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
