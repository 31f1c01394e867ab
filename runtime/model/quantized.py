"""What a checkpoint's `quantization_config` says, and how each module's weight is stored.

Read are AutoAWQ (`gemm`), GPTQ (v1 and v2, also of GPTQModel), compressed-tensors (integers, packed or not; fp8) and fp8 as in
DeepSeek's and Qwen's checkpoints. **The tensors decide** what a module is stored as; the settings say what they mean. So lists
of what was not converted are only needed where settings differ by module (compressed-tensors: `targets`, `ignore`), and a module
left plain is plain whatever a list says. Everything else is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pagemill.errors import CheckpointError
from pagemill.model.config import read_json
from pagemill.model.patterns import Pattern

Layout = Literal["awq", "gptq", "packed", "integers", "fp8"]
Header = tuple[str, tuple[int, ...]]
"""dtype as the safetensors format names it, and shape."""

_FLOATS = frozenset(("F16", "BF16", "F32"))
_MOST_TARGETS = 100_000
_MOST_WORK = 500_000  # of patterns, for a whole checkpoint
_INSTEAD = "use the model's bfloat16, AWQ, GPTQ, compressed-tensors or fp8 checkpoint"
_UNUSED = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale", "k_scale", "v_scale", "q_scale",
    "k_zero_point", "v_zero_point", "q_zero_point",
)  # fmt: skip
_DIALECTS: Mapping[str, tuple[str, ...]] = {
    "text.": ("model.", "model.language_model.", "language_model.model.", "language_model."),
    "vision.": ("visual.", "model.visual."),
    "lm_head": ("lm_head", "language_model.lm_head", "model.lm_head"),
}


@dataclass(frozen=True)
class Stored:
    """How one module's weight `[N, K]` is stored. `rows` and `columns` are those that share a scale; 0: all of them."""

    layout: Layout
    bits: int
    rows: int = 1
    columns: int = 0
    symmetric: bool = True
    zero_offset: int = 0
    """What is added to the stored zero points: 1 in the first version of GPTQ."""
    any_scale: bool = False
    """The scales' shape says whether they are of the tensor or of a row."""
    any_group: bool = False
    """The scales' shape says how large the groups are: settings differ by module."""

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Scales of a weight `[n, k]`, down and across."""
        return -(-n // (self.rows or n)), -(-k // (self.columns or k))

    def __str__(self) -> str:
        if self.layout == "fp8":
            return "fp8"
        return f"int{self.bits}" + (f" g{self.columns}" if self.columns else "")


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    stored: Stored | None
    """None: its weights are left plain."""


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's settings: the method, and what its modules are stored as."""

    method: str
    everywhere: Stored | None = None
    groups: tuple[_Group, ...] = ()
    ignore: tuple[str, ...] = ()
    _patterns: dict[str, Pattern] = field(default_factory=dict, repr=False, compare=False)

    def stored(self, module: str, name: str, headers: Mapping[str, Header]) -> Stored:
        """Return how a quantised module is stored, its tensors' headers checked by the shapes that this implies.

        `module`: its canonical name; `name`: its name in the file; `headers`: of its tensors, by what follows the module's name,
        and of the shape that the weight should have under "". Raises CheckpointError.
        """
        found = self.everywhere or self._of_groups(module, name)
        n, k = headers[""][1]
        return _check(name, found, n, k, headers)

    def _of_groups(self, module: str, name: str) -> Stored:
        names = [name]
        for canonical, prefixes in _DIALECTS.items():
            if module.startswith(canonical):
                names += [prefix + module[len(canonical) :] for prefix in prefixes]
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        # The file's own dialect first: another one's name of one module may be what a list calls another.
        for each in dict.fromkeys(names):
            if any(self._matches(target, each, kind) for target in self.ignore):
                continue
            # A name before a pattern before a class, as the library chooses.
            for rank in ("name", "re:", "class"):
                for group in self.groups:
                    for target in group.targets:
                        is_rank = "re:" if target.startswith("re:") else "class" if target == kind else "name"
                        if is_rank == rank and self._matches(target, each, kind) and group.stored is not None:
                            return group.stored
        raise CheckpointError(
            f"{name} is stored quantised, but no group of quantization_config is meant for it (targets, ignore)"
        )

    def _matches(self, target: str, name: str, kind: str) -> bool:
        if not target.startswith("re:"):
            return target in (name, kind)
        if target not in self._patterns:
            try:
                self._patterns[target] = Pattern(target.removeprefix("re:"))
            except ValueError as error:
                raise CheckpointError(
                    f"quantization_config: the target {target[:80]!r} is refused: {error}"
                ) from None
        try:
            matches = self._patterns[target].match(name)
        except ValueError as error:
            raise CheckpointError(
                f"quantization_config: the target {target[:80]!r} is refused: {error}"
            ) from None
        if sum(pattern.work for pattern in self._patterns.values()) > _MOST_WORK:
            raise CheckpointError(
                "quantization_config: its targets take too long to be matched; simplify them"
            )
        return matches


def unused(name: str) -> bool:
    """Whether a tensor belongs to a quantised module, but not to its weight: activations and keys get their own scales."""
    return name.rpartition(".")[2] in _UNUSED


# The tensors of a module


def _check(name: str, stored: Stored, n: int, k: int, headers: Mapping[str, Header]) -> Stored:
    """Check dtypes and shapes of a module's tensors; return `stored`, completed by what the shapes say."""
    layout = _layout(name, headers)
    wanted: dict[str, Layout] = {"qweight": "awq" if stored.layout == "awq" else "gptq"}
    found: Layout = wanted.get(layout) or ("packed" if layout == "weight_packed" else "integers")
    if layout == "fp8":
        found = "fp8"
    family = {"packed": "integers"}
    if family.get(found, found) != family.get(stored.layout, stored.layout):
        raise CheckpointError(f"{name} is stored as {layout}, but quantization_config says {stored}")
    stored = _replace(stored, layout=found)

    def check(suffix: str, dtypes: frozenset[str], *shapes: tuple[int, ...], needed: bool = True) -> None:
        header = headers.get(suffix)
        if header is None:
            if needed:
                raise CheckpointError(
                    f"{name}.{suffix} is missing: {name} is stored as {stored}, and needs it"
                )
            return
        if header[0] not in dtypes or header[1] not in shapes:
            raise CheckpointError(
                f"{name}.{suffix} is {header[0]} {list(header[1])}, expected {'|'.join(sorted(dtypes))} "
                f"{' or '.join(str(list(shape)) for shape in shapes)} for a weight of {n} x {k} stored as {stored}"
            )

    ints = frozenset(("I32",))
    if found in ("awq", "gptq"):
        per = 32 // stored.bits
        if stored.any_group:
            stored = _by_shape(stored, k, headers)
            per = 32 // stored.bits
        if n % per or (found == "gptq" and k % per):
            raise CheckpointError(f"{name}: a weight of {n} x {k} does not divide into {per} integers a word")
        if found == "awq" and stored.columns and k % stored.columns:
            raise CheckpointError(f"{name}: groups of {stored.columns} do not divide {k} inputs")
        groups = stored.grid(n, k)[1]
        check("qweight", ints, (k, n // per) if found == "awq" else (k // per, n))
        check("qzeros", ints, (groups, n // per))
        check("scales", _FLOATS, (groups, n))
        check("g_idx", ints, (k,), needed=False)
        return stored
    scale = "weight_scale_inv" if "weight_scale_inv" in headers else "weight_scale"
    if stored.any_scale:
        size = headers.get(scale, ("", ()))[1]
        stored = _replace(stored, rows=1 if n > 1 and size[:1] == (n,) else 0, columns=0)
    grid = stored.grid(n, k)
    shapes: list[tuple[int, ...]] = [grid]
    if grid[1] == 1:
        shapes.append(grid[:1])
    if grid == (1, 1):
        shapes.append(())
    check(scale, _FLOATS, *shapes)
    if found == "fp8":
        return stored
    packed_zeros = -(-grid[0] * stored.bits // 32), grid[1]
    if found == "packed":
        check("weight_packed", ints, (n, -(-k * stored.bits // 32)))
        check("weight_shape", frozenset(("I64", "I32")), (2,), needed=False)
        check("weight_g_idx", ints, (k,), needed=False)
    zeros = headers.get("weight_zero_point")
    if zeros is not None and zeros[0] == "I32" and found == "packed":
        check("weight_zero_point", ints, packed_zeros)
    else:
        check("weight_zero_point", frozenset(("I8",)), *shapes, needed=not stored.symmetric)
    return stored


def _layout(name: str, headers: Mapping[str, Header]) -> str:
    for suffix in ("qweight", "weight_packed"):
        if suffix in headers:
            return suffix
    dtype = headers["weight"][0] if "weight" in headers else ""
    if dtype == "I8":
        return "int8"
    if dtype == "F8_E4M3":
        return "fp8"
    raise CheckpointError(
        f"{name}.weight is stored as {dtype or 'nothing that is known'}; supported are bf16, fp16, fp32, int8 and fp8 (e4m3)"
    )


def _by_shape(stored: Stored, k: int, headers: Mapping[str, Header]) -> Stored:
    """GPTQModel's `dynamic` settings differ by module; the tensors' shapes say the same."""
    rows = headers["qweight"][1][:1]
    for bits in (4, 8):
        if rows == (k * bits // 32,):
            stored = _replace(stored, bits=bits)
    groups = headers.get("scales", ("", ()))[1][:1]
    if groups and 0 < groups[0] <= k and groups[0] != stored.grid(1, k)[1] and k % groups[0] == 0:
        stored = _replace(stored, columns=0 if groups[0] == 1 else k // groups[0])
    return stored


def _replace(stored: Stored, **changes: Any) -> Stored:
    return Stored(**{**stored.__dict__, **changes})


# The settings


class _Settings:
    """Typed access to one object of settings; errors name the file and the field."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} should be a JSON object, found {str(values)[:80]!r}")
        self.where, self.values = where, values

    def integer(self, *names: str, default: int | None = None, allowed: Callable[[int], bool]) -> int:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not allowed(value):
                raise CheckpointError(f"{self.where}: {name} {str(value)[:80]} is not supported")
            return value
        if default is None:
            raise CheckpointError(f"{self.where}: {names[0]} is missing")
        return default

    def text(self, *names: str, default: str = "") -> str:
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if not isinstance(value, str):
                    raise CheckpointError(f"{self.where}: {name} should be text, found {str(value)[:80]!r}")
                return value.lower()
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} should be true or false, found {str(value)[:80]!r}")
        return default if value is None else value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or []
        if (
            not isinstance(value, list)
            or len(value) > _MOST_TARGETS
            or not all(isinstance(v, str) for v in value)
        ):
            raise CheckpointError(
                f"{self.where}: {name} should be a list of names, found {str(value)[:80]!r}"
            )
        return tuple(value)

    def inner(self, name: str) -> _Settings | None:
        value = self.values.get(name)
        return None if value is None else _Settings(f"{self.where} {name}", value)

    def refuse(self, what: str, instead: str = _INSTEAD) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what} is not supported; {instead}")


def read_quantization(folder: Path) -> Quantization | None:
    """Read a folder's settings: of config.json, or what older GPTQ and AWQ exporters wrote beside it. None: it is not quantised.

    Raises CheckpointError for what is not supported.
    """
    for where, values in _found(folder):
        settings = _Settings(where, values)
        default = "gptq" if "quantize_config.json" in where else "awq" if "quant_config.json" in where else ""
        method = settings.text("quant_method", "quant_type", default=default)
        if method == "awq":
            return _awq(settings)
        if method in ("gptq", "gptqmodel"):
            return _gptq(settings)
        if method in ("compressed-tensors", "compressed_tensors"):
            return _compressed_tensors(settings)
        if method == "fp8":
            return _fp8(settings)
        raise settings.refuse(f"the quantisation {(method or 'without a quant_method')[:80]!r}")
    return None


def _found(folder: Path) -> Iterator[tuple[str, Any]]:
    path = folder / "config.json"
    root = read_json(path)
    text = root.get("text_config")
    for values in (root, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if values.get(key):
                yield f"{path} {key}", values[key]
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            yield str(folder / name), read_json(folder / name)


def _is_group(value: int) -> bool:
    return value == -1 or 1 <= value <= 1 << 24


def _awq(settings: _Settings) -> Quantization:
    version = settings.text("version", "checkpoint_format", "format", default="gemm")
    if version != "gemm" or settings.text("backend", default="autoawq") == "llm-awq":
        raise settings.refuse(
            f"AWQ's {version[:40]} layout", "use a checkpoint that AutoAWQ saved with version gemm"
        )
    bits = settings.integer("bits", "w_bit", default=4, allowed=lambda b: b == 4)
    group = settings.integer("group_size", "q_group_size", default=128, allowed=_is_group)
    if not settings.flag("zero_point", True):
        raise settings.refuse(
            "AWQ without zero points", "use a checkpoint that AutoAWQ saved with zero_point"
        )
    return Quantization("awq", Stored("awq", bits, columns=max(group, 0), symmetric=False))


def _gptq(settings: _Settings) -> Quantization:
    layout = settings.text("checkpoint_format", "format", default="gptq")
    if layout not in ("gptq", "gptq_v2") or settings.flag("is_marlin_format", False):
        raise settings.refuse(
            f"GPTQ's {layout[:40]} layout", "use a checkpoint in the format gptq or gptq_v2"
        )
    bits = settings.integer("bits", allowed=lambda b: b in (4, 8))
    group = settings.integer("group_size", default=128, allowed=_is_group)
    stored = Stored(
        "gptq", bits, columns=max(group, 0), symmetric=False, zero_offset=int(layout == "gptq"),
        any_group=bool(settings.values.get("dynamic")),
    )  # fmt: skip
    return Quantization("gptq", stored)


def _fp8(settings: _Settings) -> Quantization:
    if (kind := settings.text("fmt", default="e4m3")) != "e4m3":
        raise settings.refuse(f"fp8 in {kind[:40]}")
    block = settings.values.get("weight_block_size")
    if block is None:
        return Quantization("fp8", Stored("fp8", 8, any_scale=True))
    return Quantization("fp8", Stored("fp8", 8, *_block(settings, "weight_block_size")))


def _block(settings: _Settings, name: str) -> tuple[int, int]:
    block = settings.values.get(name)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(b, int) and not isinstance(b, bool) and 1 <= b <= 1 << 24 for b in block)
    ):
        raise CheckpointError(f"{settings.where}: {name} should be two sizes, found {str(block)[:80]!r}")
    return block[0], block[1]


def _compressed_tensors(settings: _Settings) -> Quantization:
    formats = (
        "pack-quantized",
        "int-quantized",
        "naive-quantized",
        "float-quantized",
        "mixed-precision",
        "dense",
        "",
    )

    def check_format(part: _Settings) -> None:
        if (found := part.text("format")) not in formats:
            raise part.refuse(f"the format {found[:40]}")

    check_format(settings)
    sparsity = settings.inner("sparsity_config")
    if sparsity is not None and sparsity.text("format", default="dense") != "dense":
        raise sparsity.refuse(
            f"the sparse format {sparsity.text('format')[:40]}", "use the model's dense checkpoint"
        )
    transforms = settings.inner("transform_config")
    if transforms is not None and transforms.values.get("config_groups"):
        raise transforms.refuse("a checkpoint with transforms of activations")
    groups_of = settings.inner("config_groups")
    if groups_of is None:
        raise CheckpointError(f"{settings.where}: config_groups is missing")
    groups = []
    for name in groups_of.values:
        group = groups_of.inner(name)
        if group is None:
            continue
        check_format(group)
        weights = group.inner("weights")
        groups.append(_Group(group.names("targets"), None if weights is None else _weights(weights)))
    return Quantization("compressed-tensors", None, tuple(groups), settings.names("ignore"))


def _weights(weights: _Settings) -> Stored:
    kind, strategy = weights.text("type", default="int"), weights.text("strategy")
    group = weights.integer("group_size", default=-1, allowed=lambda g: g == 0 or _is_group(g))
    if not strategy:
        strategy = (
            "group"
            if group > 0
            else "channel"
            if group == -1 and "group_size" in weights.values
            else "tensor"
        )
    if kind not in ("int", "float"):
        raise weights.refuse(f"the type {kind[:40]}")
    bits = weights.integer(
        "num_bits", default=8, allowed=lambda b: b in ((8,) if kind == "float" else (4, 8))
    )
    if strategy == "group" and group <= 0:
        raise CheckpointError(f"{weights.where}: group_size {group} is no size of groups")
    if strategy == "block":
        rows, columns = _block(weights, "block_structure")
    elif strategy in ("tensor", "channel", "group"):
        rows, columns = int(strategy != "tensor"), group if strategy == "group" else 0
    else:
        raise weights.refuse(f"the strategy {strategy[:40]}")
    layout: Layout = "fp8" if kind == "float" else "packed"
    return Stored(layout, bits, rows, columns, weights.flag("symmetric", True))
