"""safetensors to weights: every tensor found by its canonical name, checked before it is read, read once.

Two name dialects are in the wild: `model.*` beside `visual.*` (as published) and `model.language_model.*` beside
`model.visual.*` (transformers 5). Both map to `text.*` and `vision.*` here. Shapes are compared with the configuration
from the files' headers alone, so a wrong checkpoint is refused before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagemill.errors import CheckpointError
from pagemill.model.config import ModelConfig, read_json
from pagemill.model.quantized import Header, Stored, read_quantization, unused

WIDE_FILE = "pagemill-wide.safetensors"
"""int8 copies of a checkpoint's int4 weights, which other readers do not see."""
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
        self.shapes = expected_shapes(config)
        """Canonical name and shape of every tensor that the architecture needs, were it stored plain."""
        self.quantization = read_quantization(folder)
        self.stored: dict[str, Stored] = {}
        """How the modules are stored that are not plain, by canonical name."""
        self.unused: list[str] = []
        """What the checkpoint holds beside its weights, and the engine has no use for."""
        headers: dict[str, Header] = {}
        unexpected: list[str] = []
        for path, names in self._files():
            for name in names:
                if name.endswith(_NOT_WEIGHTS):
                    continue
                canonical = canonical_name(name)
                if config.text.tie_word_embeddings and canonical and canonical.startswith("lm_head."):
                    continue  # some exporters write the tied copy too
                if canonical is not None and self.quantization is not None and unused(canonical):
                    kind = (
                        "scales of keys and values"
                        if "_scale" in name
                        and "attn." in name
                        and (name.endswith((".k_scale", ".v_scale", ".q_scale")))
                        else "static scales of activations"
                    )
                    if kind not in self.unused:
                        self.unused.append(kind)
                    continue
                module = (canonical or "").rpartition(".")[0]
                of_module = (
                    self.quantization is not None and len(self.shapes.get(f"{module}.weight", ())) == 2
                )
                if canonical is None or (canonical not in self.shapes and not of_module):
                    unexpected.append(name)
                    continue
                if canonical in self._where:
                    raise CheckpointError(
                        f"{folder}: {name} and {self._where[canonical][1]} name the same weight"
                    )
                self._where[canonical] = (path, name)
                headers[canonical] = self._header(path, name)
        missing: list[str] = []
        for name, shape in self.shapes.items():
            if name in headers and headers[name][0] in _DTYPES:
                self._check_header(name, headers[name], shape)
                continue
            module, _, kind = name.rpartition(".")
            own = {n.rpartition(".")[2]: h for n, h in headers.items() if n.rpartition(".")[0] == module}
            if self.quantization is None or kind != "weight" or len(shape) != 2 or not set(own) - {"bias"}:
                if name in headers:
                    self._check_header(name, headers[name], shape)
                missing.append(name)
                continue
            own[""] = ("", shape)
            first = next(n for n in headers if n.rpartition(".")[0] == module and not n.endswith(".bias"))
            original = self._where[first][1].rpartition(".")[0]
            self.stored[module] = self.quantization.stored(module, original, own)
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(self.shapes)} weights are missing, first {missing[0]}; "
                "the download is incomplete or config.json belongs to another model"
            )
        allowed = {"bias", "qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_scale_inv",
                   "weight_zero_point", "weight_shape", "weight_g_idx"}  # fmt: skip
        for name in headers.keys() - self.shapes.keys():
            module, _, kind = name.rpartition(".")
            if module not in self.stored or kind not in allowed:
                unexpected.append(self._where[name][1])
        if unexpected:
            raise CheckpointError(
                f"{folder}: {len(unexpected)} tensors do not belong to the architecture in config.json, "
                f"first {unexpected[0]}"
            )
        self._read_wide()

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

    def _header(self, path: Path, name: str) -> Header:
        try:
            found = self._file(path).get_slice(name)
        except SafetensorError:
            raise CheckpointError(f"{path} does not hold {name}, which its index promises") from None
        return str(found.get_dtype()), tuple(found.get_shape())

    def _check_header(self, canonical: str, header: Header, shape: tuple[int, ...]) -> None:
        path, name = self._where[canonical]
        if header[0] not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {header[0]}; supported are bf16, fp16 and fp32"
            )
        if header[1] != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(header[1])}, config.json implies {list(shape)}"
            )

    def _read_wide(self) -> None:
        """Find the int8 copies of int4 weights of the decoder, `pagemill-wide.safetensors`."""
        path = self.folder / WIDE_FILE
        if not self.stored or not path.exists():
            return
        for name in list(self._file(path).keys()):
            canonical = canonical_name(name)
            module, _, kind = (canonical or "").rpartition(".")
            shape = self.shapes.get(f"{module}.weight", ())
            wanted = {"weight": ("I8", shape), "weight_scale": ("F32", (*shape[:1], 1))}.get(kind)
            if not module.startswith("text.layers.") or len(shape) != 2 or self._header(path, name) != wanted:
                raise CheckpointError(
                    f"{path}: {name} is no int8 weight, or scale, of the decoder in config.json's shape"
                )
            self._where[f"wide.{canonical}"] = (path, name)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        return name in self._where

    def has_wide(self, modules: Sequence[str]) -> bool:
        """Whether these modules have int8 copies, all of them; CheckpointError where only some have."""
        names = [f"wide.{module}.{kind}" for module in modules for kind in ("weight", "weight_scale")]
        found = [self.has(name) for name in names]
        if any(found) and not all(found):
            lacking = names[found.index(False)].removeprefix("wide.")
            raise CheckpointError(f"{self.folder / WIDE_FILE}: {lacking} is missing")
        return all(found)

    @property
    def has_any_wide(self) -> bool:
        """Whether any module has an int8 copy."""
        return any(name.startswith("wide.") for name in self._where)

    def name_of(self, module: str) -> str:
        """Return the name that the files give to a module."""
        found = next(n for n in self._where if n.rpartition(".")[0] == module and not n.endswith(".bias"))
        return self._where[found][1].rpartition(".")[0]

    def read(self, name: str) -> Tensor:
        """Return the tensor of canonical `name`, in its stored dtype, on the CPU, sharing the mapped file."""
        path, original = self._where[name]
        tensor: Tensor = self._file(path).get_tensor(original)
        self._bytes_since_open += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Release the mapped file."""
        self._open_file, self._open_path, self._bytes_since_open = None, None, 0
