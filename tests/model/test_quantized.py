"""Quantised checkpoints: every format, against independent packers and the libraries' own weights."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import _TEXT, _VISION, write_checkpoint
from rapidfuzz.distance.Levenshtein import distance
from safetensors.torch import load_file, save_file

from pagemill import Engine, kernels
from pagemill.errors import CheckpointError
from pagemill.kernels.linear import dequantize_reference
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint, load_model
from pagemill.model.patterns import Pattern
from pagemill.model.quantized import Stored
from pagemill.model.unpack import awq_nibbles, fields, nibbles, read_weight, what_is_stored
from pagemill.model.weights import Checkpoint

CPU = torch.device("cpu")
TEXT = dict(
    _TEXT, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=2048, tie_word_embeddings=True, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
)  # fmt: skip
VISION = dict(
    _VISION,
    depth=1,
    hidden_size=32,
    intermediate_size=40,
    num_heads=2,
    fullatt_block_indexes=[0],
    out_hidden_size=64,
)
MLP, ATTENTION = "model.layers.0.mlp.", "model.layers.0.self_attn."
LINEARS = [ATTENTION + f"{n}_proj" for n in "qkvo"] + [MLP + f"{n}_proj" for n in ("gate", "up", "down")]


def words(values, bits, places=None):
    """Integers along the last dimension, put into int32 bit by bit."""
    per = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per)).long()
    values = values.unflatten(-1, (-1, per))
    total = sum(values[..., places[i] if places else i] << bits * i for i in range(per))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def codes(n, k, bits, group, symmetric, index=None):
    """Random integers `[n, k]`, scales and zeros `[n, G]` and what they stand for, in float64."""
    groups = -(-k // group)
    q = torch.randint(0, 1 << bits, (n, k))
    half = 1 << bits - 1
    zeros = torch.full((n, groups), half) if symmetric else torch.randint(1, 1 << bits, (n, groups))
    scales = (torch.rand(n, groups) * 0.5 + 0.1).div(1 << bits).half()
    of = torch.arange(k) // group if index is None else index.long()
    return q, scales, zeros, (q.double() - zeros.double()[:, of]) * scales.double()[:, of]


AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(n, k, group=32):
    q, scales, zeros, w = codes(n, k, 4, group, False)
    return dict(qweight=words(q.T, 4, AWQ), qzeros=words(zeros.T, 4, AWQ), scales=scales.T.contiguous()), w


def gptq(n, k, bits=4, group=32, v1=True, symmetric=False, act=False):
    group = k if group == -1 else group
    index = ((torch.arange(k) * 37 + 5) % k // group).int() if act else None
    q, scales, zeros, w = codes(n, k, bits, group, symmetric, index)
    tensors = dict(
        qweight=words(q, bits).T.contiguous(), qzeros=words((zeros - int(v1)).T, bits), scales=scales.T.contiguous(),
        bias=torch.zeros(n).half(),
    )  # fmt: skip
    return tensors | ({} if index is None else dict(g_idx=index)), w


def packed(n, k, bits=4, group=32, symmetric=True, act=False):
    group = k if group == -1 else group
    index = ((torch.arange(k) * 37 + 5) % k // group).int() if act else None
    q, scales, zeros, w = codes(n, k, bits, group, symmetric, index)
    tensors = dict(weight_packed=words(q, bits), weight_scale=scales, weight_shape=torch.tensor([n, k]))
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return tensors | ({} if index is None else dict(weight_g_idx=index)), w


def int8(n, k, tensor=False):
    q = torch.randint(-128, 128, (n, k)).to(torch.int8)
    scale = torch.rand(1 if tensor else n, 1) / 500 + 1e-3
    tensors = dict(weight=q, weight_scale=scale.flatten() if tensor else scale, input_scale=torch.ones(1))
    return tensors, q.double() * scale.double()


def fp8(n, k, rows=1, columns=0, name="weight_scale"):
    columns = columns or k
    rows = rows or n
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // rows), -(-k // columns)) / 10 + 0.01
    each = scale.double()[torch.arange(n) // rows][:, torch.arange(k) // columns]
    return {"weight": weight, name: scale}, weight.double() * each


def ct(**weights):
    group = dict(targets=["Linear"], weights=weights)
    return dict(quant_method="compressed-tensors", format="x-quantized".replace("x", "int"), config_groups=dict(group_0=group),
                ignore=["lm_head", "re:visual.*"])  # fmt: skip


GPTQ = dict(quant_method="gptq", bits=4, group_size=32)
FORMATS = {
    "awq": (awq, dict(quant_method="awq", bits=4, group_size=32, version="GEMM"), "int4 g32"),
    "gptq": (gptq, GPTQ, "int4 g32"),
    "gptq v2": (lambda n, k: gptq(n, k, v1=False), GPTQ | dict(checkpoint_format="gptq_v2"), "int4 g32"),
    "gptq act": (lambda n, k: gptq(n, k, act=True), GPTQ | dict(desc_act=True), "int4 g32"),
    "gptq row": (lambda n, k: gptq(n, k, group=-1), GPTQ | dict(group_size=-1), "int4 g128"),
    "gptq 16": (lambda n, k: gptq(n, k, group=16), GPTQ | dict(group_size=16), "float32"),
    "gptq 8": (lambda n, k: gptq(n, k, 8, -1, symmetric=True), GPTQ | dict(bits=8, group_size=-1), "int8"),
    "gptq 8 groups": (lambda n, k: gptq(n, k, 8), GPTQ | dict(bits=8), "float32"),
    "packed": (packed, ct(num_bits=4, strategy="group", group_size=32), "int4 g32"),
    "packed zeros": (
        lambda n, k: packed(n, k, symmetric=False),
        ct(num_bits=4, strategy="group", group_size=32, symmetric=False),
        "int4 g32",
    ),
    "packed act": (
        lambda n, k: packed(n, k, act=True),
        ct(num_bits=4, strategy="group", group_size=32),
        "int4 g32",
    ),
    "packed row": (lambda n, k: packed(n, k, group=-1), ct(num_bits=4, strategy="channel"), "int4 g128"),
    "packed 8": (lambda n, k: packed(n, k, 8, -1), ct(num_bits=8, strategy="channel"), "int8"),
    "int8": (int8, ct(num_bits=8, strategy="channel"), "int8"),
    "int8 tensor": (lambda n, k: int8(n, k, True), ct(num_bits=8, strategy="tensor"), "int8"),
    "ct fp8": (fp8, ct(num_bits=8, type="float", strategy="channel"), "float32"),
    "ct fp8 tensor": (lambda n, k: fp8(n, k, 0), ct(num_bits=8, type="float", strategy="tensor"), "float32"),
    "ct fp8 block": (
        lambda n, k: fp8(n, k, 48, 40),
        ct(num_bits=8, type="float", strategy="block", block_structure=[48, 40]),
        "float32",
    ),
    "fp8": (lambda n, k: fp8(n, k, 0), dict(quant_method="fp8"), "float32"),
    "fp8 block": (
        lambda n, k: fp8(n, k, 48, 40, "weight_scale_inv"),
        dict(quant_method="fp8", weight_block_size=[48, 40]),
        "float32",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), TEXT, VISION, std=0.1, dtype=torch.float32)


def quantised(plain, folder, make, config, modules=tuple(LINEARS)):
    """A copy whose `modules` are stored as `make` says; returns what they stand for."""
    torch.manual_seed(1)
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors, weights = load_file(plain / "model.safetensors"), {}
    for module in modules:
        stored, weights[module] = make(*tensors.pop(f"{module}.weight").shape)
        bias = stored.pop("bias", None)
        if bias is not None and f"{module}.bias" not in tensors:
            tensors[f"{module}.bias"] = bias
        tensors |= {f"{module}.{name}": value.contiguous() for name, value in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    settings_ = json.loads((folder / "config.json").read_text()) | dict(quantization_config=config)
    (folder / "config.json").write_text(json.dumps(settings_))
    return weights


def load(folder, kind="reference", **options):
    chosen = kernels.select(kind, CPU, torch.float32)
    return load_model(folder, read_config(folder), chosen, CPU, torch.float32, **options)


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_stands_for_its_weights(plain, tmp_path, form):
    make, config, runs = FORMATS[form]
    weights = quantised(plain, tmp_path, make, config)
    checkpoint = Checkpoint(tmp_path, read_config(tmp_path))
    assert checkpoint.stored.keys() == {m.replace("model.", "text.") for m in LINEARS}
    for module, wanted in weights.items():
        found = read_weight(checkpoint, module.replace("model.", "text."))
        found = found if isinstance(found, torch.Tensor) else found.dequantized(torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    model = load(tmp_path)
    assert model.checkpoint.endswith(f"the decoder runs in {runs}")
    assert "vision plain" in model.checkpoint
    layer = model.decoder.layers[0]
    stacks = [
        (layer.qkv, LINEARS[:3]),
        (layer.out, LINEARS[3:4]),
        (layer.gate_up, LINEARS[4:6]),
        (layer.down, LINEARS[6:]),
    ]
    for packed_, names in stacks:
        wanted = torch.cat([weights[name] for name in names])
        torch.testing.assert_close(dequantize_reference(packed_).double(), wanted, rtol=1e-6, atol=1e-9)
    native = load(tmp_path, "native").decoder.layers[0]
    x = torch.randn(5, 64)
    reference = kernels.select("reference", CPU, torch.float32).linear(x, layer.qkv)
    torch.testing.assert_close(kernels.select("native", CPU, torch.float32).linear(x, native.qkv), reference)


def test_parts_stored_differently_become_plain(plain, tmp_path):
    weights = quantised(plain, tmp_path, awq, FORMATS["awq"][1], LINEARS[1:])
    qkv = load(tmp_path, quantize="int8").decoder.layers[0].qkv
    assert qkv.scheme == "plain"
    torch.testing.assert_close(qkv.weight[64:96].double(), weights[LINEARS[1]], rtol=1e-6, atol=0)


def test_quantize_concerns_what_was_left_plain(plain, tmp_path):
    quantised(plain, tmp_path, awq, FORMATS["awq"][1])
    model = load(tmp_path, quantize="int8")
    assert model.decoder.layers[0].down.scheme == "int4"
    assert {model.decoder.embed_tokens.scheme, model.vision.blocks[0].down.scheme} == {"int8"}


def test_the_towers_layers_are_not_the_decoders(plain, tmp_path):
    """Settings by module, in another dialect than the tensors' names: the tower in int8, the decoder in int4."""
    tower = ["visual.blocks.0.mlp.gate_proj", "visual.blocks.0.mlp.up_proj", "visual.blocks.0.mlp.down_proj"]
    both = LINEARS + tower
    config = ct(num_bits=4, strategy="group", group_size=32) | dict(
        ignore=["lm_head"], format="mixed-precision"
    )
    groups = config["config_groups"]
    groups["group_0"]["targets"] = [r"re:model\.language_model\.layers\.\d+\..*_proj$"]
    groups["group_1"] = dict(
        targets=[r"re:model\.visual\..*(gate|up|down)_proj"], weights=dict(num_bits=8, strategy="channel")
    )
    makes = iter([packed] * len(LINEARS) + [int8] * len(tower))
    quantised(plain, tmp_path, lambda n, k: next(makes)(n, k), config, both)
    model = load(tmp_path)
    assert model.decoder.layers[0].gate_up.scheme == "int4"
    assert model.vision.blocks[0].gate_up.scheme == "int8"
    assert "text int4 g32, vision int8 and plain" in model.checkpoint


def test_the_wide_form_stands_beside(plain, tmp_path):
    quantised(plain, tmp_path, packed, FORMATS["packed"][1])
    wide = {
        name: int8(*shape)[0]
        for name, shape in ((LINEARS[3], (64, 64)), (LINEARS[4], (128, 64)), (LINEARS[5], (128, 64)))
    }
    save_file(
        {f"{m}.{kind}": t[kind] for m, t in wide.items() for kind in ("weight", "weight_scale")},
        tmp_path / "pagemill-wide.safetensors",
    )
    layer = load(tmp_path).decoder.layers[0]
    assert layer.qkv.wide is None
    assert layer.gate_up.wide is not None
    x, run = torch.randn(64, 64), kernels.select("reference", CPU, torch.float32).linear
    assert torch.equal(run(x, layer.out), run(x, layer.out.wide))
    assert torch.equal(run(x[1:], layer.out), run(x[1:], replace(layer.out, wide=None)))


REFUSED = {
    "bitsandbytes": (dict(quant_method="bitsandbytes"), "'bitsandbytes' is not supported; use"),
    "gemv": (dict(quant_method="awq", version="gemv"), "AWQ's gemv layout is not supported"),
    "marlin": (GPTQ | dict(checkpoint_format="marlin"), "GPTQ's marlin layout"),
    "3 bits": (GPTQ | dict(bits=3), "bits 3 is not supported"),
    "negative": (GPTQ | dict(group_size=-5), "group_size -5 is not supported"),
    "not an object": (["awq"], "should be a JSON object"),
    "sparse": (ct(num_bits=8) | dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparse format"),
    "fp4": (ct(num_bits=4) | dict(format="nvfp4-pack-quantized"), "the format nvfp4-pack-quantized"),
    "no groups": (dict(quant_method="compressed-tensors"), "config_groups is missing"),
    "block": (dict(quant_method="fp8", weight_block_size=[0, 128]), "should be two sizes"),
    "other method": (FORMATS["fp8"][1], "is stored as qweight, but quantization_config says fp8"),
    "other group": (FORMATS["awq"][1] | dict(group_size=64), r"qzeros is I32 .* expected I32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings_are_named(plain, tmp_path, case):
    config, expected = REFUSED[case]
    quantised(plain, tmp_path, awq, config)
    with pytest.raises(CheckpointError, match=expected):
        load(tmp_path)


def first(name):
    return f"{LINEARS[0]}.{name}"


DAMAGE = {
    "no scales": ("gptq", lambda t: t.pop(first("scales")), "q_proj.scales is missing"),
    "scales' shape": (
        "awq",
        lambda t: t.update({first("scales"): torch.ones(3, 64).half()}),
        "q_proj.scales is F16",
    ),
    "not finite": (
        "awq",
        lambda t: t[first("scales")].fill_(torch.inf),
        "q_proj has scales that are not finite",
    ),
    "g_idx": (
        "gptq act",
        lambda t: t[first("g_idx")].fill_(2),
        r"q_proj.g_idx names groups 2..2, and there are 0..1",
    ),
    "negative g_idx": ("gptq act", lambda t: t[first("g_idx")][:1].fill_(-7), "q_proj.g_idx names groups -7"),
    "shape": ("packed", lambda t: t[first("weight_shape")].fill_(-1), "weight_shape says"),
    "no zeros": ("packed zeros", lambda t: t.pop(first("weight_zero_point")), "weight_zero_point is missing"),
    "stranger": ("packed", lambda t: t.update({first("lora"): torch.ones(1)}), "do not belong.*lora"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors_are_named(plain, tmp_path, case):
    form, damage, expected = DAMAGE[case]
    quantised(plain, tmp_path, *FORMATS[form][:2])
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=expected):
        load(tmp_path)


def test_packed_weights_are_kept_by_what_is_stored(plain, tmp_path, monkeypatch):
    """Mapped by the next start, sorted columns included; and another meaning of the same tensors is another file."""
    monkeypatch.setenv("PAGEMILL_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    quantised(plain, folder, *FORMATS["gptq act"][:2])
    one, two = (load(folder, "native", weight_cache="on") for _ in range(2))
    assert two.weights.startswith("mapped from")
    x, run = torch.randn(3, 64), kernels.select("native", CPU, torch.float32).linear
    assert one.decoder.layers[0].qkv.order is not None
    assert torch.equal(run(x, one.decoder.layers[0].qkv), run(x, two.decoder.layers[0].qkv))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder, "native", weight_cache="on").weights.startswith("packed at start")


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_the_engine_reads_a_page(tmp_path, form):
    """The embedded model, stored in 8 bits or rounded to 4: the text is that of the dequantised model, or near."""
    source = find_checkpoint("pagemill-tiny")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, dequantised = load_file(source / "model.safetensors"), {}
    names = [n.removesuffix(".weight") for n in tensors if ".layers." in n and n.endswith("_proj.weight")]
    dequantised = dict(tensors)
    for name in names:
        w = tensors.pop(f"{name}.weight").float()
        if form == "int8":
            scale = w.abs().amax(1, keepdim=True) / 127
            q = (w / scale).round().to(torch.int8)
            tensors |= {f"{name}.weight": q, f"{name}.weight_scale": scale}
            dequantised[f"{name}.weight"] = q.float() * scale
        elif form == "fp8":
            q = (w * 64).to(torch.float8_e4m3fn)
            tensors |= {f"{name}.weight": q, f"{name}.weight_scale": torch.tensor([1 / 64])}
            dequantised[f"{name}.weight"] = q.float() / 64
        else:
            groups = w.unflatten(1, (-1, 32))
            scale = (groups.abs().amax(-1) / 7.5).half().float()
            q = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).flatten(1)
            tensors |= {f"{name}.weight_packed": words(q, 4), f"{name}.weight_scale": scale.half()}
            dequantised[f"{name}.weight"] = ((q.unflatten(1, (-1, 32)) - 8) * scale[..., None]).flatten(1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "int8": ct(num_bits=8, strategy="channel"),
        "int4": ct(num_bits=4, strategy="group", group_size=32),
        "fp8": ct(num_bits=8, type="float", strategy="tensor"),
    }[form]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    plain_folder = tmp_path / "plain"
    plain_folder.mkdir()
    for file in tmp_path.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (plain_folder / file.name).write_bytes(file.read_bytes())
    (plain_folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({n: t.clone() for n, t in dequantised.items()}, plain_folder / "model.safetensors")
    page = Path(__file__).parents[2] / "bench" / "pages" / "form_24.png"
    texts = []
    for folder in (tmp_path, plain_folder):
        with Engine.from_pretrained(str(folder), dtype="float32", num_threads=1) as engine:
            texts.append(next(iter(engine.read(page))).text)
    assert len(texts[0]) > 50
    assert distance(texts[0], texts[1]) <= (0 if form == "fp8" else 0.1 * len(texts[1]))


GOLDEN = {
    "packed g32": Stored("packed", 4, 1, 32),
    "packed zeros": Stored("packed", 4, 1, 128, symmetric=False),
    "packed row": Stored("packed", 4),
    "packed 8": Stored("packed", 8),
    "int8": Stored("integers", 8),
    "naive": Stored("integers", 4, 1, 64),
    "fp8 block": Stored("fp8", 8, 4, 128),
    "awq": Stored("awq", 4, 1, 64, symmetric=False),
    "gptq": Stored("gptq", 4, 1, 64, symmetric=False, zero_offset=1),
    "gptq 8": Stored("gptq", 8, 1, 64, symmetric=False, zero_offset=1),
}


class OneModule:
    """A checkpoint of one module, "m"."""

    def __init__(self, tensors, stored, shape):
        self.tensors, self.stored, self.shapes = tensors, {"m": stored}, {"m.weight": shape}

    def read(self, name):
        return self.tensors[name.removeprefix("m.")]

    def has(self, name):
        return name.removeprefix("m.") in self.tensors

    def name_of(self, module):
        return module


@pytest.mark.parametrize("form", GOLDEN)
def test_the_libraries_own_weights(form):
    """Packed and dequantised by compressed-tensors, AutoAWQ and AutoGPTQ (`tests/golden/make_quantized.py`)."""
    stored = load_file(Path(__file__).parents[1] / "golden" / "quantized.safetensors")
    tensors = {name.split("/")[1]: value for name, value in stored.items() if name.split("/")[0] == form}
    wanted = tensors.pop("wanted")
    shape = (tensors["scales"].shape[1], 256) if "scales" in tensors else tuple(wanted.shape)
    found = read_weight(OneModule(tensors, GOLDEN[form], shape), "m")
    found = found if isinstance(found, torch.Tensor) else found.dequantized(torch.float32)
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=2e-6, atol=1e-7)


def test_old_exporters_settings_are_found(plain, tmp_path):
    quantised(plain, tmp_path, gptq, None)
    (tmp_path / "quantize_config.json").write_text(json.dumps(dict(bits=4, group_size=32, sym=False)))
    assert what_is_stored(Checkpoint(tmp_path, read_config(tmp_path))).startswith(
        "gptq: vocabulary plain, text int4 g32"
    )


@given(st.lists(st.integers(0, 15), min_size=16, max_size=16))
@settings(max_examples=30, deadline=None)
def test_words_round_trip(values):
    values = torch.tensor([values])
    assert torch.equal(awq_nibbles(words(values, 4, AWQ)).long(), values)
    assert torch.equal(nibbles(words(values, 4)).flatten(1).long(), values)
    assert torch.equal(fields(words(values * 17, 8), 8).flatten(1).long(), values * 17)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|1)\.mlp\.(gate|up)_proj$",
        "visual.*",
        ".*lm_head",
        r"^(?!.*visual).*proj$",
        "(a*)*",
        r"[^v].*\d",
    ],
)
def test_patterns_match_as_the_library_does(pattern):
    for name in (
        "model.layers.0.mlp.gate_proj",
        "visual.blocks.11.attn.qkv",
        "lm_head",
        "model.visual.merger.mlp.0",
        "",
    ):
        assert Pattern(pattern).match(name) == bool(re.match(pattern, name))


@pytest.mark.parametrize(
    "pattern", ["(a|a)" * 100 + "b", ".*" * 300 + "b", "(" * 15 + "a*" + ")*" * 15 + "b", "(a", "a{1,999}"]
)
def test_no_pattern_hangs(pattern):
    try:
        assert not Pattern(pattern).match("a" * 60)
    except ValueError as error:
        assert str(error).startswith(("it ", "its "))  # noqa: PT017
