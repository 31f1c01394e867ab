"""Files of a quantised checkpoint in the compressed-tensors format, as transformers and vLLM read it.

Integers of 4 bits lie in int32 words, eight columns a word, the first in the lowest bits, each plus 8 (`pack-quantized`);
their zero points likewise, eight rows a word. int8 and e4m3 weights lie as they are beside a scale a row (`int-quantized`,
`float-quantized`). Every shard is written beside its place, synced and renamed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pagemill.files import written_whole
from pagemill.quantize.search import Rounded

FORMATS = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}


def pack_columns(codes: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 `[N, K]`, as int32 `[N, ceil(K / 8)]`."""
    n, k = codes.shape
    words = -(-k // 8)
    padded = torch.zeros(n, words * 8, dtype=torch.int64)
    padded[:, :k] = codes
    shifted = padded.view(n, words, 8) << (4 * torch.arange(8))
    return shifted.sum(-1).to(torch.int32)  # the top code's high bit becomes the sign


def stored(name: str, rounded: Rounded, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear layer, below its `name`."""
    if rounded.zeros is None:
        return {
            f"{name}.weight": rounded.q.contiguous(),
            f"{name}.weight_scale": rounded.scales.to(scale_dtype).contiguous(),
        }
    return {
        f"{name}.weight_packed": pack_columns(rounded.q),
        f"{name}.weight_scale": rounded.scales.to(scale_dtype).contiguous(),
        f"{name}.weight_zero_point": pack_columns(rounded.zeros.T.contiguous()).T.contiguous(),
        f"{name}.weight_shape": torch.tensor(rounded.q.shape, dtype=torch.int64),
    }


def _weights(scheme: str, group: int) -> dict[str, Any]:
    if scheme == "int4":
        return {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    kind = "int" if scheme == "int8" else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}


def _activations(scheme: str) -> dict[str, Any] | None:
    if scheme == "int4":
        return None
    kind = "int" if scheme == "int8" else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def quantization_config(
    text: str, vision: str, group: int, plain: list[str], kv_scales: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json: the schemes of both parts, and the modules left `plain`.

    Modules are told by patterns that fit every dialect of their names: decoders have `layers`, the tower has `blocks`.
    """
    targets = {
        text: [r"re:.*layers\.\d+\.(self_attn|mlp)\.\w+_proj$"],
    }
    targets.setdefault(vision, []).append(r"re:.*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+_proj)$")
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": _weights(scheme, group),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": FORMATS[scheme],
        }
        for i, (scheme, names) in enumerate(targets.items())
    }
    formats = {FORMATS[scheme] for scheme in targets}
    scheme_of_cache = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", r"re:.*visual\.merger\..*", *(f"re:.*{_escaped(name)}$" for name in plain)],
        "kv_cache_scheme": scheme_of_cache if kv_scales else None,
        "global_compression_ratio": None,
    }


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors, all of it or nothing."""
    with written_whole(path) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def header(path: Path) -> tuple[list[str], int]:
    """Names of the tensors of a file that `write_shard` wrote, and their bytes."""
    with open(path, "rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    entries.pop("__metadata__", None)
    return list(entries), sum(end - start for start, end in (e["data_offsets"] for e in entries.values()))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, all of it or nothing."""
    with written_whole(path) as file:
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        file.write_text(text, "utf-8", "backslashreplace")  # names of files may be no UTF-8
