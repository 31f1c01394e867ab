"""A quantised checkpoint from a checkpoint and calibration pages, block by block; a killed run goes on where it was.

Everything is written to DIR.partial: a shard for each block, the hidden states after the last whole one, and `state.json`, which
says what is whole. DIR is that folder, renamed at the end. In memory are one block's weights in float32 and the pages' hidden
states.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from pagemill.errors import CheckpointError, ConfigError
from pagemill.model.config import ModelConfig, read_json
from pagemill.model.packed import content_digest
from pagemill.model.weights import Checkpoint
from pagemill.quantize.calibrate import CalibrationError
from pagemill.quantize.search import Inputs, Rounded, relative_error, round_int4, round_rows, search
from pagemill.quantize.walk import CalibrationPage, Fed, Walk, biased, feeds, norms, units
from pagemill.quantize.writer import header, quantization_config, stored, write_json, write_shard

SchemeName = Literal["int4-awq", "int8", "fp8", "mixed"]
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
WIDE_FILE = "pagemill-wide.safetensors"
CARD_FILE = "pagemill-quantization.json"
LARGEST_ERROR = 0.01
"""Relative squared error of a layer's output beyond which 8 bits are not taken for it: it stays as it is."""
OUTLIER = 20.0
"""Largest channel of a head's keys over its median one, beyond which a layer's keys should stay in bfloat16."""
_GROUPS = (128, 64, 32)
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
_SPARE = 1 << 30  # bytes that stay free on the disk


@dataclass(frozen=True)
class Job:
    """What is to be made."""

    folder: Path
    """Of the checkpoint."""
    config: ModelConfig
    out: Path
    scheme: SchemeName
    group_size: int = 128
    kv_scales: bool = False
    """Also write scales of a float8 KV cache, a tensor each layer, for readers that want them; pagemill needs none."""

    @property
    def text(self) -> str:
        """Form of the decoder's layers."""
        return {"int4-awq": "int4", "mixed": "int4"}.get(self.scheme, self.scheme)

    @property
    def vision(self) -> str:
        """Form of the tower's."""
        return "fp8" if self.scheme == "fp8" else "int8"


@dataclass
class Report:
    """What came of one block."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By layer: form, relative squared output error, and that of round-to-nearest without factors."""
    keys: dict[str, list[float]] = field(default_factory=dict)
    """Of a decoder layer: largest magnitudes a kv head, and the outlier ratio of its keys."""


def check(job: Job) -> None:
    """Raise ConfigError or CheckpointError for what cannot be made, before anything is read or written."""
    if job.scheme not in SCHEMES:
        raise ConfigError(f"scheme should be one of {', '.join(SCHEMES)}, not {job.scheme!r}")
    if job.group_size not in _GROUPS:
        raise ConfigError(f"group size should be 32, 64 or 128, not {job.group_size}")
    given = read_json(job.folder / "config.json").get("quantization_config")
    if given is not None:
        raise CheckpointError(f"{job.folder} is quantised already; quantise the model that it was made from")
    if job.out.exists():
        raise ConfigError(f"{job.out} exists; give another folder with --output, or delete it")
    if job.text == "int4":
        t = job.config.text
        for name, k in (("hidden size", t.hidden_size), ("intermediate size", t.intermediate_size)):
            if k % job.group_size:
                raise ConfigError(
                    f"groups of {job.group_size} do not divide the decoder's {name} {k}; use a smaller --group-size"
                )


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _fold(
    unit: str, feed: str, weights: dict[str, Tensor], fed: Inputs, scheme: str, group: int, kv_heads: int
) -> None:
    """Scale the inputs of a feed's layers where that lowers their error.

    The factors go into what makes the inputs: the norm before them, the rows of the values (attention's output is a mean of
    values, a head's own), or the rows of the up projection.
    """
    layers = feeds(unit)[feed]
    mine = [weights[f"{layer}.weight"] for layer in layers]
    norm_name = norms(unit).get(feed)
    source, rows = "", slice(None)
    exact: Callable[[Tensor], Tensor] = lambda s: s  # noqa: E731
    repeat = 1
    if norm_name is not None:
        norm = weights[f"{norm_name}.weight"]

        def exact(s: Tensor) -> Tensor:
            folded = _bfloat16(norm / s)
            return torch.where((norm != 0) & (folded != 0), norm / folded, 1.0)

    elif feed == "down":
        source = "mlp.up_proj"
    elif unit.startswith("vision."):
        source, rows = "attn.qkv", slice(2 * fed.columns, 3 * fed.columns)
    else:
        source = "self_attn.v_proj"
        head_dim = len(weights[f"{source}.weight"]) // kv_heads
        repeat = fed.columns // (kv_heads * head_dim)

        def exact(s: Tensor) -> Tensor:  # query heads of a group read the same values
            heads = s.view(kv_heads, repeat, head_dim).log().mean(1, keepdim=True).exp()
            return heads.expand(kv_heads, repeat, head_dim).flatten()

    s, _, _ = search(fed, mine, scheme, group, exact)
    for layer in layers:
        weights[f"{layer}.weight"] *= s
    if norm_name is not None:
        weights[f"{norm_name}.weight"] = _bfloat16(norm / s)
    else:
        own = s if repeat == 1 else s.view(kv_heads, repeat, -1)[:, 0].flatten()
        weights[f"{source}.weight"][rows] /= own[:, None]
        if biased(unit, source):
            weights[f"{source}.bias"][rows] /= own
    fed.scale(s)


def _unused(fed: Inputs) -> bool:
    return not fed.count or not bool(fed.highest.max() > 0)


def quantise_unit(
    job: Job, unit: str, weights: dict[str, Tensor], fed: Fed
) -> tuple[dict[str, Rounded | None], dict[str, Rounded], Report]:
    """Round a block's linear layers, whose `weights` (float32) are changed by the factors folded into them.

    Returns the rounded layers by name (None: stays as it is), the int8 forms of `mixed`, and the report. Raises CalibrationError
    for a layer that the pages did not feed.
    """
    scheme = job.vision if unit.startswith("vision.") else job.text
    report = Report()
    nearest: dict[str, float] = {}
    for feed, layers in feeds(unit).items():
        inputs = fed.inputs[feed]
        if _unused(inputs):
            raise CalibrationError(
                f"the calibration pages do not exercise {unit}.{layers[0]}: its inputs are all zero; give other pages"
            )
        for layer in layers:
            w = weights[f"{layer}.weight"]
            plainly = round_int4(w, job.group_size) if scheme == "int4" else round_rows(w, scheme)
            nearest[layer] = relative_error(inputs.sample, w, plainly.weight(), scheme)
    if scheme != "fp8":  # a float needs no common range
        for feed in feeds(unit):
            _fold(unit, feed, weights, fed.inputs[feed], scheme, job.group_size, job.config.text.num_kv_heads)
    rounded: dict[str, Rounded | None] = {}
    wide: dict[str, Rounded] = {}
    for feed, layers in feeds(unit).items():
        inputs = fed.inputs[feed]
        for layer in layers:
            w = weights[f"{layer}.weight"]
            if scheme == "int4":
                one = round_int4(w, job.group_size, inputs.products)
            else:
                one = round_rows(w, scheme)
            rounded[layer] = one
            error = relative_error(inputs.sample, w, one.weight(), scheme)
            report.layers[layer] = {"form": scheme, "error": error, "nearest": nearest[layer]}
            if job.scheme == "mixed" and scheme == "int4":
                wide[layer] = round_rows(w, "int8")
                error = relative_error(inputs.sample, w, wide[layer].weight(), "int8")
                report.layers[layer]["wide"] = error
        # Layers of one input are computed as one: all of them stay as they are, or none.
        if scheme != "int4" and max(report.layers[layer]["error"] for layer in layers) > LARGEST_ERROR:
            for layer in layers:
                rounded[layer] = None
                report.layers[layer]["form"] = "plain"
    if fed.keys is not None and fed.values is not None:
        ratio = fed.keys.amax(1) / fed.keys.median(1).values.clamp_min(1e-6)
        report.keys = {
            "keys": fed.keys.amax(1).tolist(),
            "values": fed.values.amax(1).tolist(),
            "outliers": ratio.tolist(),
        }
    return rounded, wide, report


class _Partial:
    """The folder that a run writes to, and what of it is whole."""

    def __init__(self, job: Job, key: str) -> None:
        self.folder = job.out.with_name(f"{job.out.name}.partial")
        self.state: dict[str, Any] = {"key": key, "units": {}, "states": None, "seconds": 0.0}
        path = self.folder / "state.json"
        if path.exists():
            found = read_json(path)
            if found.get("key") != key:
                raise ConfigError(
                    f"{self.folder} is of a run with another model, other pages or other options; delete it, or give "
                    "what that run was given"
                )
            self.state = found
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by one process at a time; a lock ends with its process."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing {self.folder}") from None
        else:
            yield
        finally:
            os.close(fd)

    def done(self, unit: str, report: Report, states: Sequence[Tensor], number: int, seconds: float) -> None:
        """Note that a block is whole, the hidden states after it, and the seconds it took."""
        self.state["seconds"] += seconds
        name = f"states-{number:03}.safetensors"
        write_shard(self.folder / name, {f"{i:05}": state for i, state in enumerate(states)})
        before = self.state["states"]
        self.state["units"][unit] = {"layers": report.layers, "keys": report.keys}
        self.state["states"] = name
        write_json(self.folder / "state.json", self.state)
        if before and before != name:
            (self.folder / before).unlink(missing_ok=True)

    def states(self) -> list[Tensor]:
        """The hidden states after the last whole block."""
        found = load_file(self.folder / self.state["states"])
        return [found[name] for name in sorted(found)]


def _key(job: Job, pages: Sequence[CalibrationPage], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(content_digest(files).encode())
    digest.update(
        repr((job.scheme, job.group_size, job.kv_scales, job.config.text, job.config.vision)).encode()
    )
    for page in pages:
        digest.update(repr((page.token_ids, page.grid)).encode())
        digest.update(page.patches.tobytes())
        digest.update(page.levels.tobytes())
    return digest.hexdigest()


def make(
    job: Job,
    pages: Sequence[CalibrationPage],
    described: dict[str, Any],
    on_unit: Callable[[str, int, int], None] = lambda unit, done, total: None,
    complete: Callable[[Path, dict[str, Any]], None] = lambda folder, card: None,
) -> dict[str, Any]:
    """Make the checkpoint; returns its card (what `CARD_FILE` holds). `described` goes into it as it is.

    `complete` may add to the card and the folder, which can be loaded by then, before it gets its name. `on_unit` is called with
    each block's name before its work, and how many of all are done. Raises PagemillError; then, and after a kill, the next call
    with the same job and pages goes on. DIR is there as a whole, or not at all.
    """
    check(job)
    if not pages:
        raise CalibrationError("there is no calibration page; give some with --pages")
    checkpoint = Checkpoint(job.folder, job.config)
    try:
        partial = _Partial(job, _key(job, pages, checkpoint.files))
        size = sum(file.stat().st_size for file in checkpoint.files)
        free = shutil.disk_usage(partial.folder).free
        if free < size + _SPARE:
            raise ConfigError(
                f"{partial.folder} has {free / 1e9:.1f} GB free, up to {(size + _SPARE) / 1e9:.1f} are needed"
            )
        with partial.locked():
            for pattern in (".pagemill-*.tmp", ".tmp*"):  # of writers that were killed, ours and safetensors'
                for torn in partial.folder.glob(pattern):
                    torn.unlink()
            card = _run(job, pages, checkpoint, partial, described, on_unit)
            complete(partial.folder, card)
            write_json(partial.folder / CARD_FILE, card)
            for left in ("state.json", "lock", partial.state["states"]):
                (partial.folder / left).unlink(missing_ok=True)
            os.rename(partial.folder, job.out)
    finally:
        checkpoint.close()
    return card


def _run(
    job: Job,
    pages: Sequence[CalibrationPage],
    checkpoint: Checkpoint,
    partial: _Partial,
    described: dict[str, Any],
    on_unit: Callable[[str, int, int], None],
) -> dict[str, Any]:
    walk = Walk(job.config, pages, checkpoint.read)
    names = units(job.config)
    whole = partial.state["units"]
    if whole:
        walk.states = partial.states()
    else:
        walk.begin()
    for number, unit in enumerate(names):
        if unit in whole:
            continue
        on_unit(unit, number, len(names))
        started = time.perf_counter()
        weights = walk.weights(unit)
        fed = walk.run(unit, weights, products=job.text == "int4" and unit.startswith("text."))
        rounded, wide, report = quantise_unit(job, unit, weights, fed)
        tensors = _tensors(checkpoint, unit, weights, rounded)
        if job.kv_scales and fed.keys is not None and fed.values is not None:
            attention = _own_name(checkpoint, f"{unit}.self_attn.q_proj").removesuffix(".q_proj")
            for name, seen in (("k_scale", fed.keys), ("v_scale", fed.values)):
                tensors[f"{attention}.{name}"] = (seen.max() / 448.0).reshape(1)
        write_shard(partial.folder / f"model-{number + 1:05}-of-{len(names) + 1:05}.safetensors", tensors)
        if wide:
            layers = {
                f"{_own_name(checkpoint, f'{unit}.{layer}')}.{part}": tensor
                for layer, one in wide.items()
                for part, tensor in (("weight", one.q), ("weight_scale", one.scales))
            }
            write_shard(partial.folder / f"wide-{number:03}.safetensors", layers)
        partial.done(unit, report, walk.states, number, time.perf_counter() - started)
    on_unit("the rest", len(names), len(names))
    return _finish(job, checkpoint, partial, described | {"seconds": partial.state["seconds"]})


def _own_name(checkpoint: Checkpoint, module: str) -> str:
    """A module's name in the checkpoint's own dialect."""
    return checkpoint.original_name(f"{module}.weight").removesuffix(".weight")


def _tensors(
    checkpoint: Checkpoint, unit: str, weights: dict[str, Tensor], rounded: dict[str, Rounded | None]
) -> dict[str, Tensor]:
    """A block's tensors by their names in the file, in the dtype of the checkpoint where they are not rounded."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        dtype = checkpoint.read(f"{unit}.{name}").dtype
        layer = name.removesuffix(".weight")
        one = rounded.get(layer)
        if one is None:
            tensors[checkpoint.original_name(f"{unit}.{name}")] = value.to(dtype)
        else:
            scale_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
            tensors |= stored(_own_name(checkpoint, f"{unit}.{layer}"), one, scale_dtype)
    return tensors


def _finish(job: Job, checkpoint: Checkpoint, partial: _Partial, described: dict[str, Any]) -> dict[str, Any]:
    """The tensors that belong to no block, the index, the settings, and the card."""
    folder = partial.folder
    names = units(job.config)
    mine = tuple(f"{name}." for name in names)
    rest = {
        checkpoint.original_name(name): checkpoint.read(name)
        for name in checkpoint.names
        if not name.startswith(mine)
    }
    write_shard(folder / f"model-{len(names) + 1:05}-of-{len(names) + 1:05}.safetensors", rest)
    if job.scheme == "mixed":
        _join_wide(folder, job.config.text.num_layers)
    where: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors, size = header(path)
        where |= dict.fromkeys(tensors, path.name)
        total += size
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )
    reports = partial.state["units"]
    plain = [
        _own_name(checkpoint, f"{unit}.{layer}").removeprefix("model.")
        for unit, report in reports.items()
        for layer, found in report["layers"].items()
        if found["form"] == "plain"
    ]
    for pattern in _COPIED:
        for path in job.folder.glob(pattern):
            if path.name not in ("config.json", "model.safetensors.index.json", CARD_FILE):
                shutil.copy(path, folder / path.name)
    settings = read_json(job.folder / "config.json")
    settings["quantization_config"] = quantization_config(
        job.text, job.vision, job.group_size, plain, job.kv_scales
    )
    write_json(folder / "config.json", settings)
    outliers = [
        unit for unit, report in reports.items() if max(report["keys"].get("outliers", [0.0])) > OUTLIER
    ]
    card = {
        "scheme": job.scheme,
        "decoder": job.text,
        "vision": job.vision,
        "group_size": job.group_size if job.text == "int4" else None,
        "plain": plain,
        "key_outliers": outliers,
        "bytes": total,
        "bytes_before": sum(file.stat().st_size for file in checkpoint.files),
        **described,
        "blocks": reports,
    }
    return card


def _join_wide(folder: Path, count: int) -> None:
    """Make one file of the int8 forms of the decoder's layers. They are deleted when it is whole, and only then."""
    parts = sorted(folder.glob("wide-*.safetensors"))
    if len(parts) == count:
        write_shard(folder / WIDE_FILE, {name: t for part in parts for name, t in load_file(part).items()})
    elif not (folder / WIDE_FILE).exists():
        raise CheckpointError(
            f"{folder} holds {len(parts)} of {count} wide layers; delete it and begin again"
        )
    for part in parts:
        part.unlink()
