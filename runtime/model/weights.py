"""safetensors to weights: every tensor found by its canonical name, checked before it is read, read once.

Two name dialects are in the wild: `model.*` beside `visual.*` (as published) and `model.language_model.*` beside
`model.visual.*` (transformers 5). Both map to `text.*` and `vision.*` here. Shapes are compared with the configuration
from the files' headers alone, so a wrong checkpoint is refused before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagemill.errors import CheckpointError
from pagemill.model.config import ModelConfig, read_json

_DTYPES = {"BF16", "F16", "F32"}
# Mapped pages count as resident memory until the file is closed; reopening this often keeps them a small share.
_REOPEN_BYTES = 128 << 20
_PREFIXES = (
    ("model.language_model.", "text."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("model.", "text."),
    ("lm_head.", "lm_head."),
)
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # derived buffers that old exporters kept


def canonical_name(name: str) -> str | None:
    """Map a checkpoint's tensor name to `text.*`, `vision.*` or `lm_head.weight`; None when it is no known name."""
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor the architecture needs."""
    t, v = config.text, config.vision
    shapes: dict[str, tuple[int, ...]] = {
        "text.embed_tokens.weight": (t.vocab_size, t.hidden_size),
        "text.norm.weight": (t.hidden_size,),
    }
    if not t.tie_word_embeddings:
        shapes["lm_head.weight"] = (t.vocab_size, t.hidden_size)
    kv = t.num_kv_heads * t.head_dim
    for i in range(t.num_layers):
        p = f"text.layers.{i}."
        for name, rows in (("q", t.hidden_size), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, t.hidden_size)
            shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{p}self_attn.o_proj.weight"] = (t.hidden_size, t.hidden_size)
        shapes[f"{p}mlp.gate_proj.weight"] = (t.intermediate_size, t.hidden_size)
        shapes[f"{p}mlp.up_proj.weight"] = (t.intermediate_size, t.hidden_size)
        shapes[f"{p}mlp.down_proj.weight"] = (t.hidden_size, t.intermediate_size)
        shapes[f"{p}input_layernorm.weight"] = (t.hidden_size,)
        shapes[f"{p}post_attention_layernorm.weight"] = (t.hidden_size,)
    shapes["vision.patch_embed.proj.weight"] = (
        v.hidden_size, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size,
    )  # fmt: skip
    linears = {
        "attn.qkv": (3 * v.hidden_size, v.hidden_size),
        "attn.proj": (v.hidden_size, v.hidden_size),
        "mlp.gate_proj": (v.intermediate_size, v.hidden_size),
        "mlp.up_proj": (v.intermediate_size, v.hidden_size),
        "mlp.down_proj": (v.hidden_size, v.intermediate_size),
    }
    merged = v.hidden_size * v.spatial_merge_size**2
    for i in range(v.depth):
        p = f"vision.blocks.{i}."
        for name, shape in linears.items():
            shapes[f"{p}{name}.weight"] = shape
            shapes[f"{p}{name}.bias"] = shape[:1]
        shapes[f"{p}norm1.weight"] = (v.hidden_size,)
        shapes[f"{p}norm2.weight"] = (v.hidden_size,)
    shapes["vision.merger.ln_q.weight"] = (v.hidden_size,)
    for layer, rows in (("0", merged), ("2", v.out_hidden_size)):
        shapes[f"vision.merger.mlp.{layer}.weight"] = (rows, merged)
        shapes[f"vision.merger.mlp.{layer}.bias"] = (rows,)
    return shapes


class Checkpoint:
    """The tensors of a folder by canonical name. Every name and shape is checked on construction.

    `read` returns a tensor that shares the mapped file; use it (pack, copy) and drop it, so that the mapping can be
    released. Raises `CheckpointError` for missing, unexpected, mis-shaped, doubly named or truncated tensors.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        self._open_path: Path | None = None
        self._open_file: Any = None
        self._bytes_since_open = 0
        expected = expected_shapes(config)
        if config.text.tie_word_embeddings:
            expected_extra = {"lm_head.weight"}  # some exporters write the tied copy too
        else:
            expected_extra = set()
        unexpected: list[str] = []
        for path, names in self._files():
            for name in names:
                if name.endswith(_NOT_WEIGHTS):
                    continue
                canonical = canonical_name(name)
                if canonical in expected_extra:
                    continue
                if canonical is None or canonical not in expected:
                    unexpected.append(name)
                    continue
                if canonical in self._where:
                    raise CheckpointError(
                        f"{folder}: {name} and {self._where[canonical][1]} name the same weight"
                    )
                self._where[canonical] = (path, name)
                self._check_header(path, name, expected[canonical])
        missing = [name for name in expected if name not in self._where]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(expected)} weights are missing, first {missing[0]}; "
                "the download is incomplete or config.json belongs to another model"
            )
        if unexpected:
            raise CheckpointError(
                f"{folder}: {len(unexpected)} tensors do not belong to the architecture in config.json, "
                f"first {unexpected[0]}"
            )

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._where)

    def original_name(self, name: str) -> str:
        """The name that the files have for a canonical one."""
        return self._where[name][1]

    @property
    def files(self) -> list[Path]:
        """The files that hold weights, in their order."""
        return sorted({path for path, _ in self._where.values()})

    def _files(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield each weight file with the names it holds, in the order of the files."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map should map tensor names to file names")
            for file in sorted(set(weight_map.values())):
                if (
                    Path(file).name != file or not file.isprintable()
                ):  # never leave the folder on a stranger's word
                    raise CheckpointError(f"{index}: {file!r} is not a plain file name")
                yield self.folder / file, [name for name, f in weight_map.items() if f == file]
        elif single.exists():
            yield single, list(self._file(single).keys())
        elif any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            raise CheckpointError(
                f"{self.folder} holds only pickled weights, which can run code; convert them to safetensors first"
            )
        else:
            raise CheckpointError(
                f"{self.folder} holds neither model.safetensors nor model.safetensors.index.json"
            )

    def _file(self, path: Path) -> Any:
        if path != self._open_path or self._bytes_since_open > _REOPEN_BYTES:
            self.close()
            try:
                self._open_file = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path} is missing: the index names it; download the checkpoint again"
                ) from None
            except (SafetensorError, OSError, json.JSONDecodeError) as error:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file ({error}); download it again"
                ) from None
            self._open_path = path
        return self._open_file

    def _check_header(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        try:
            found = self._file(path).get_slice(name)
        except SafetensorError:
            raise CheckpointError(f"{path} does not hold {name}, which its index promises") from None
        if found.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {found.get_dtype()}; supported are bf16, fp16 and fp32"
            )
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found.get_shape())}, config.json implies {list(shape)}"
            )

    def read(self, name: str) -> Tensor:
        """Return the tensor of canonical `name`, in its stored dtype, on the CPU, sharing the mapped file."""
        path, original = self._where[name]
        tensor: Tensor = self._file(path).get_tensor(original)
        self._bytes_since_open += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Release the mapped file."""
        self._open_file, self._open_path, self._bytes_since_open = None, None, 0
