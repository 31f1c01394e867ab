"""A checkpoint in OpenVINO's form, by optimum; `weights.sh` calls it.

    make_openvino.py CHECKPOINT int8|int4 OUTPUT

As `optimum-cli export openvino`, in less memory (which takes 19 GB at this size): weights are mapped instead of read, and the
vision tower is traced over a small image, as a trace keeps every layer's attention scores; sizes are dynamic in what it writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from optimum.commands.optimum_cli import main
from optimum.exporters.openvino.input_generators import DummyQwen2VLVisionEmbedInputGenerator
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights


def load_mapped(folder: str, *_: Any, **__: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Stand in for `from_pretrained`."""
    config = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration(config)  # memory that is never written to is never there
    torch.set_default_dtype(torch.float32)
    weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            prefix = "model." if name.startswith("visual.") else "model.language_model."
            weights[prefix + name.removeprefix("model.")] = weight
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or missing != ["lm_head.weight"]:
        raise SystemExit(f"{folder} has names that this script does not know: {(missing + unexpected)[:3]}")
    model.tie_weights()
    return model.eval()


trace_over = DummyQwen2VLVisionEmbedInputGenerator.__init__


def trace_over_small_image(self: Any, *args: Any, **kwargs: Any) -> None:
    trace_over(self, *args, **kwargs | {"height": 140, "width": 196})


checkpoint, form, output = sys.argv[1:]
DummyQwen2VLVisionEmbedInputGenerator.__init__ = trace_over_small_image
Qwen2_5_VLForConditionalGeneration.from_pretrained = load_mapped
sys.argv = ["optimum-cli", "export", "openvino", "--model", checkpoint, "--task", "image-text-to-text",
            "--weight-format", form, output]  # fmt: skip
main()
