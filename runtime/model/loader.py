"""A name to a checkpoint folder, and a folder to a model that runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from pagemill.config import WeightCache
from pagemill.errors import CheckpointError
from pagemill.kernels import Kernels, Scheme
from pagemill.model import packed
from pagemill.model.config import ModelConfig
from pagemill.model.decoder import Decoder
from pagemill.model.unpack import what_is_stored, what_runs
from pagemill.model.vision import VisionTower
from pagemill.model.weights import Checkpoint

EMBEDDED = "pagemill-tiny"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass
class Model:
    """A loaded checkpoint: configuration, vision tower, decoder."""

    config: ModelConfig
    vision: VisionTower
    decoder: Decoder
    weights: str = "packed at start"
    """Where the packed weights came from, and whether they are kept."""
    mapped_bytes: int = 0
    """Bytes of the file that backs them: memory that the system counts as free, but that the model needs."""
    checkpoint: str = "plain"
    """What the checkpoint holds: the method, and the form of each part's weights."""
    unchecked: tuple[Future[bool], Callable[[], Model]] | None = None
    """The check of the mapped file, while it may still run, and what makes the model again if it fails."""

    def settle(self) -> None:
        """Wait until the mapped weights are known to be whole; if they are not, put new ones in their place.

        To be called before anything computes with a model that was loaded with `check_beside`. Raises what packing raises, and
        then again at the next call.
        """
        if self.unchecked is None:
            return
        check, again = self.unchecked
        if not check.result():
            new = again()
            self.vision, self.decoder = new.vision, new.decoder
            self.weights, self.mapped_bytes = new.weights, new.mapped_bytes
        self.unchecked = None


@dataclass(frozen=True)
class _Schemes:
    """How the linear layers of each part are stored (`pagemill.kernels.linear`)."""

    vision: Scheme
    text: Scheme
    vocabulary: Scheme
    """Of the embedding and the output layer."""


_SCHEMES = {
    "none": _Schemes("plain", "plain", "plain"),
    "int8": _Schemes("int8", "int8", "int8"),
    # Decoding streams the decoder's weights: there four bits pay. The tower's arithmetic is what costs, and the output
    # layer chooses the token.
    "int4": _Schemes("int8", "int4", "int8"),
}


def find_checkpoint(name: str) -> Path:
    """Return the folder of `name`: the embedded model, a folder, or a Hugging Face id (downloaded or cached).

    Downloads respect HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Raises `CheckpointError` when there is no such model.
    """
    if name == EMBEDDED:
        return Path(str(resources.files("pagemill") / "assets" / EMBEDDED))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"no model {name!r}: not the embedded {EMBEDDED}, not a folder, and not a Hugging Face id (owner/name)"
        )
    return _download(name)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most runs never need it
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise CheckpointError(
            f"{repo_id} is gated: accept its licence on the hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repo_id} is not on the hub, or is private and HF_TOKEN is missing") from None
    except HFValidationError:
        raise CheckpointError(f"{repo_id!r} is not a folder here and not a valid Hugging Face id") from None
    except LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise CheckpointError(
            f"{repo_id} is not in the local cache and the hub cannot be reached{offline}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repo_id} could not be downloaded: {reason}") from None


def load_model(
    folder: Path,
    config: ModelConfig,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantize: str = "none",
    weight_cache: WeightCache = "off",
    check_beside: bool = False,
) -> Model:
    """Read a folder's weights into a model, each tensor once, or map the packed form that an earlier start wrote.

    Peak memory is the packed weights plus one matrix. `quantize` and `weight_cache` are those of `EngineConfig`. With
    `check_beside`, mapped weights are checked in a thread that `Model.settle` waits for; else before this returns.
    """
    schemes = _SCHEMES[quantize]
    checkpoint = Checkpoint(folder, config)
    try:
        path = None
        if packed.is_wanted(weight_cache, checkpoint, device):
            stored = f"{quantize} {checkpoint.quantization!r}" if checkpoint.quantization else quantize
            path = packed.entry(checkpoint, config, kernels, dtype, stored)
        weights = packed.PackedWeights(checkpoint, path, check_beside)
        vision = VisionTower(config.vision, weights, kernels, device, dtype, schemes.vision)
        decoder = Decoder(config.text, weights, kernels, device, dtype, schemes.text, schemes.vocabulary)
        weights.keep()
    finally:
        checkpoint.close()
    decoder_linears = [w for each in decoder.layers for w in (each.qkv, each.out, each.gate_up, each.down)]
    stored = what_is_stored(checkpoint)
    if checkpoint.quantization is not None:
        stored += f"; the decoder runs in {what_runs(decoder_linears)}"
    model = Model(config, vision, decoder, weights.note, weights.mapped_bytes, stored)

    def again() -> Model:
        if path is not None:
            packed.refuse(path)
        return load_model(
            folder, config, kernels, device, dtype, quantize=quantize, weight_cache=weight_cache
        )

    if weights.check is not None:
        model.unchecked = weights.check, again
    return model
