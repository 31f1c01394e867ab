"""Write quantized.safetensors: small weights packed and dequantised by the formats' own libraries.

    pip install torch compressed-tensors; unpack the sources of autoawq 0.2.9 and the wheel of auto-gptq 0.7.1
    python make_quantized.py AUTOAWQ_SOURCE AUTO_GPTQ_WHEEL

Written with compressed-tensors 0.20.0. The two others need CUDA builds: only their packing files are loaded.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

N, K = 8, 256
found: dict[str, torch.Tensor] = {}


def scales(*shape):
    return (torch.rand(*shape) * 0.02 + 0.02).half().float()


def compressed(name, layout, args, scale, zeros=None):
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    rows = N if zeros is None else len(zeros)
    state = dict(weight=torch.randn(rows, K) * 0.1, weight_scale=scale)
    if zeros is not None:
        state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    wanted = compressor.decompress(dict(stored), scheme)["weight"]
    found.update({f"{name}/{part}": value.contiguous() for part, value in stored.items()})
    found[f"{name}/wanted"] = wanted.float().contiguous()


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main():
    torch.manual_seed(0)
    awq_source, gptq_wheel = map(Path, sys.argv[1:])
    pack, eight = "pack-quantized", dict(num_bits=8)
    compressed("packed g32", pack, dict(num_bits=4, strategy="group", group_size=32), scales(N, 8))
    zeros = torch.randint(-8, 8, (2 * N, 2)).to(torch.int8)  # the library does not unpack those of 8 rows
    asymmetric = dict(num_bits=4, strategy="group", group_size=128, symmetric=False)
    compressed("packed zeros", pack, asymmetric, scales(2 * N, 2), zeros)
    compressed("packed row", pack, dict(num_bits=4, strategy="channel"), scales(N, 1))
    compressed("packed 8", pack, dict(eight, strategy="channel"), scales(N, 1) / 16)
    compressed("int8", "int-quantized", dict(eight, strategy="channel"), scales(N, 1) / 16)
    compressed("naive", "naive-quantized", dict(num_bits=4, strategy="group", group_size=64), scales(N, 4))
    block = dict(eight, type="float", strategy="block", block_structure=[4, 128])
    compressed("fp8 block", "float-quantized", block, scales(2, 2) / 16)

    awq = module(awq_source / "awq/utils/packing_utils.py")
    q, z = (torch.randint(-(2**31), 2**31, (rows, N // 8)).int() for rows in (K, K // 64))
    scale = scales(K // 64, N).half()
    wanted = awq.dequantize_gemm(q, z, scale.float(), 4, 64).T.contiguous()
    found.update({"awq/qweight": q, "awq/qzeros": z, "awq/scales": scale, "awq/wanted": wanted})

    transformers = types.ModuleType("transformers")
    transformers.pytorch_utils = types.SimpleNamespace(Conv1D=type("Conv1D", (), {}))
    sys.modules.setdefault("transformers", transformers)
    gptq = module(gptq_wheel / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for name, bits in (("gptq", 4), ("gptq 8", 8)):
        layer = gptq.QuantLinear(bits, 64, 256, 32, False, weight_dtype=torch.float32)
        linear = torch.nn.Linear(256, 32, bias=False)
        index = (torch.randperm(256) // 64).int()
        zeros = torch.randint(1, 2**bits, (32, 4)).float()
        scale = scales(32, 4)
        q = torch.randint(0, 2**bits, (32, 256))
        linear.weight.data = (q - zeros[:, index.long()]) * scale[:, index.long()]
        layer.pack(linear, scale.clone(), zeros.clone(), index)
        wanted = layer(torch.eye(256)).T[:8].contiguous()
        found.update(
            {f"{name}/{part}": getattr(layer, part).clone() for part in ("qweight", "qzeros", "g_idx")}
        )
        found[f"{name}/scales"] = layer.scales.half()
        found[f"{name}/wanted"] = wanted.detach()
    save_file(found, Path(__file__).with_name("quantized.safetensors"))


if __name__ == "__main__":
    main()
