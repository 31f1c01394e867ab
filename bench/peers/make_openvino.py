"""A checkpoint in OpenVINO's form, by optimum; `weights.sh` calls it.

    make_openvino.py CHECKPOINT int8|int4 OUTPUT

As `optimum-cli export openvino`, with the weights mapped into memory instead of read: half of its peak.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from optimum.commands.optimum_cli import main
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


checkpoint, form, output = sys.argv[1:]
Qwen2_5_VLForConditionalGeneration.from_pretrained = load_mapped
sys.argv = ["optimum-cli", "export", "openvino", "--model", checkpoint, "--task", "image-text-to-text",
            "--weight-format", form, output]  # fmt: skip
main()
