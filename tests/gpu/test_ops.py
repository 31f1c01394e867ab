"""The Triton kernels as `select` gives them, against the reference under the same contract; and a page read with them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_checkpoint import PRESETS, write_checkpoint
from micro import IMAGE, Ask, World, drain
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pagemill import Engine, SamplingParams
from pagemill.errors import KernelUnavailable
from pagemill.kernels import QUANTISED_KV, Kernels, LayerCache, Scheme, kv_scale_shape, select
from pagemill.kernels.gpu import linear, tuned
from pagemill.model.config import read_config
from pagemill.model.decoder import RaggedBatch
from pagemill.model.loader import load_model
from tests.gpu.conftest import DEVICE, ON_GPU, needs_fp8

PAGE = Path(__file__).parents[2] / "bench" / "pages" / "form_24.png"


@pytest.fixture(scope="module")
def triton() -> Kernels:
    return select("triton", DEVICE, torch.float32)


@pytest.fixture(scope="module")
def reference() -> Kernels:
    return select("reference", DEVICE, torch.float32)


def off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return ((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("scheme", "bound"), [("plain", 1e-6), ("int8", 1e-6), ("int4", 0.02)])
@pytest.mark.parametrize("rows", [0, 1, 20, 70])
def test_linear(triton: Kernels, reference: Kernels, rows: int, scheme: Scheme, bound: float) -> None:
    """int4 keeps its activations in the compute dtype, where the CPU rounds them to 8 bits."""
    x = torch.randn(rows, 100)
    weight, bias = torch.randn(90, 100), torch.randn(90)
    residual = torch.randn(rows, 90)
    parts = [weight[:50], weight[50:]]
    ours = triton.pack_linear(parts, bias, scheme=scheme, group=32)
    theirs = reference.pack_linear(parts, bias, scheme=scheme, group=32)
    assert off(triton.linear(x, ours), reference.linear(x, theirs)) < bound
    assert (
        off(triton.linear(x, ours, out_float32=True), reference.linear(x, theirs, out_float32=True)) < bound
    )
    wanted = reference.linear(x, theirs, residual=residual.clone())
    found = residual.clone()
    assert triton.linear(x, ours, residual=found) is found
    assert off(found, wanted) < bound
    gate, up = weight.chunk(2)
    ours = triton.pack_swiglu(gate, up, bias, scheme=scheme, group=32)
    theirs = reference.pack_swiglu(gate, up, bias, scheme=scheme, group=32)
    assert off(triton.linear_swiglu(x, ours), reference.linear_swiglu(x, theirs)) < bound


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
def test_rows_of_zeros(triton: Kernels, scheme: Scheme) -> None:
    """Of x and of W, whose scales they leave without a size: the bias, exactly; also behind a norm."""
    x, weight, bias = torch.randn(20, 100), torch.randn(90, 100), torch.randn(90)
    x[7], weight[3], weight[50], weight[8, 32:64] = 0, 0, 0, 0
    packed = triton.pack_linear(weight, bias, scheme=scheme, group=32)
    pair = triton.pack_swiglu(*weight.chunk(2), bias, scheme=scheme, group=32)
    gated = torch.nn.functional.silu(bias[:45].double()) * bias[45:].double()
    for norm in (None, (torch.randn(100), 1e-6)):
        found = triton.linear(x, packed, norm=norm)
        assert found.isfinite().all()
        assert torch.equal(found[7], bias)
        assert torch.equal(found[:, [3, 50]], bias[[3, 50]].expand(20, 2))
        assert (found[:, 8] != bias[8]).sum() == 19
        assert off(triton.linear_swiglu(x, pair, norm=norm)[7], gated.float()) < 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_int4_of_very_many_rows(triton: Kernels, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a plain weight gives what groups give, but for the order of sums; an int8 twin goes before it."""
    x, weight, bias = torch.randn(20, 100), torch.randn(2 * 40, 100), torch.randn(2 * 40)
    parts = list(weight.chunk(2))
    pack = (
        triton.pack_swiglu
        if gated
        else lambda *parts, **how: triton.pack_linear(parts[:2], *parts[2:], **how)
    )
    op = triton.linear_swiglu if gated else triton.linear
    packed, twin = (pack(*parts, bias, scheme=scheme) for scheme in ("int4", "int8"))
    both = replace(packed, wide=twin)
    before, wide = op(x, packed), op(x, twin)
    monkeypatch.setattr(tuned, "plain_rows", lambda card: 20)
    monkeypatch.setattr(tuned, "wide_rows", lambda card: 20)
    unpacked: list[object] = []
    unpack = linear.unpack_int4
    monkeypatch.setattr(linear, "unpack_int4", lambda *given: unpacked.append(given) or unpack(*given))
    assert off(op(x, packed), before) < 1e-6
    assert len(unpacked) == 1
    assert torch.equal(op(x[:19], packed), before[:19])
    assert torch.equal(op(x, both), wide)
    assert len(unpacked) == 1


def test_weights_that_are_int4_already(triton: Kernels, reference: Kernels) -> None:
    q = torch.randint(0, 16, (60, 100), dtype=torch.uint8)
    scales, zeros = torch.rand(60, 4), torch.randint(0, 16, (60, 4), dtype=torch.uint8)
    x = torch.randn(3, 100)
    for gated, op in ((False, "linear"), (True, "linear_swiglu")):
        y = [
            getattr(k, op)(x, k.pack_quantized(q, scales, zeros, None, group=32, gated=gated))
            for k in (triton, reference)
        ]
        assert off(*y) < 0.02
    with pytest.raises(ValueError, match="zeros"):
        triton.pack_quantized(q, scales, zeros + 16, None, group=32)


@needs_fp8
def test_weights_that_are_fp8_already(triton: Kernels) -> None:
    """Rows of x are rounded to e4m3, too: against that in float64."""
    q, scales, bias = torch.randn(60, 100).to(torch.float8_e4m3fn), torch.rand(60) + 0.1, torch.randn(60)
    x = torch.randn(3, 100)
    step = x.abs().amax(1, keepdim=True) / 448
    rounded = (x / step).to(torch.float8_e4m3fn).double() * step
    wanted = (rounded @ (q.double() * scales.double()[:, None]).T + bias).float()
    packed = triton.pack_quantized(q, scales, None, bias)
    assert packed.scheme == "fp8"
    assert off(triton.linear(x, packed), wanted) < 1e-5
    gate, up = wanted.double().chunk(2, 1)
    pair = triton.pack_quantized(q, scales, None, bias, gated=True)
    assert off(triton.linear_swiglu(x, pair), (torch.nn.functional.silu(gate) * up).float()) < 1e-5
    ids = torch.tensor([3, 0, 59])
    assert torch.equal(triton.embed(ids, packed), q[ids].float() * scales[ids, None])
    with pytest.raises(ValueError, match="scales"):
        triton.pack_quantized(q, scales[:, None], None, None)
    with pytest.raises(ValueError, match="None beside float8"):
        triton.pack_quantized(q, scales, None, None, order=torch.arange(100))


def as_fp8(folder: Path) -> None:
    """Store the decoder's layers in e4m3: a scale a row, but for gate and up: one of the tensor; and down in blocks."""
    tensors, groups = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "layers." in name and name.endswith("_proj.weight")]:
        weight, module = tensors.pop(name).float(), name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        strategy = {"gate_proj": "tensor", "up_proj": "tensor", "down_proj": "block"}.get(kind, "channel")
        scale = {
            "channel": weight.abs().amax(1, keepdim=True) / 448,
            "tensor": weight.abs().max().view(1) / 448,
            "block": torch.full((-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)), 0.01),
        }[strategy]
        q = (weight / (0.01 if strategy == "block" else scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {f"{module}.weight": q, f"{module}.weight_scale": scale}
        weights = dict(num_bits=8, type="float", strategy=strategy)
        if strategy == "block":
            weights["block_structure"] = [16, 16]
        group = groups.setdefault(strategy, dict(targets=[], weights=weights))
        group["targets"].append(module)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="compressed-tensors", config_groups=groups)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@needs_fp8
def test_a_checkpoint_in_fp8_is_multiplied_in_fp8(tmp_path: Path) -> None:
    """Where scales are of rows or the tensor; blocks become the compute dtype. The reference multiplies what they stand for."""
    logits = []
    for kind in ("triton", "reference"):
        folder = write_checkpoint(tmp_path / kind, *PRESETS["micro"], std=0.25, dtype=torch.float32)
        as_fp8(folder)
        config, kernels = read_config(folder), select(kind, DEVICE, torch.float32)
        model = load_model(folder, config, kernels, DEVICE, torch.float32)
        layer, text = model.decoder.layers[0], config.text
        found = [each.scheme for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        assert found == (["fp8"] * 3 + ["plain"] if kind == "triton" else ["plain"] * 4)
        assert ("float32 and fp8" in model.checkpoint) == (kind == "triton")
        k_shape, v_shape = kernels.kv_cache_shapes(2, text.num_kv_heads, text.head_dim, 16)
        cache = [LayerCache(torch.zeros(k_shape), torch.zeros(v_shape)) for _ in range(text.num_layers)]
        rows = torch.arange(9)
        batch = RaggedBatch(
            token_ids=rows,
            positions=rows.expand(3, 9).contiguous(),
            max_position=8,
            slots=rows,
            query_start=torch.tensor([0, 9], dtype=torch.int32),
            context_lens=torch.tensor([9], dtype=torch.int32),
            block_tables=torch.tensor([[0]], dtype=torch.int32),
            logit_rows=rows,
        )
        logits.append(model.decoder(batch, cache))
    assert off(*logits) < 0.2  # scales of other rows: 0.8


@pytest.mark.parametrize("scheme", ["plain", "int8"])
def test_embedding(triton: Kernels, reference: Kernels, scheme: Scheme) -> None:
    weight, ids = torch.randn(50, 100), torch.tensor([3, 0, 49, 3])
    index, images = torch.tensor([-1, 1, -1, 0], dtype=torch.int32), torch.randn(2, 100)
    for given in ((), (index, images)):
        rows = [k.embed(ids, k.pack_linear(weight, None, scheme=scheme), *given) for k in (triton, reference)]
        assert torch.equal(*rows)


def test_angles_and_pixels(triton: Kernels, reference: Kernels) -> None:
    positions, axis = torch.randint(0, 30, (3, 7)), torch.randint(0, 3, (20,))
    tables = torch.randn(2, 30, 20).unbind(0)
    for found, wanted in zip(
        triton.mrope_angles(positions, axis, *tables),
        reference.mrope_angles(positions, axis, *tables),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    patches = torch.randint(0, 256, (9, 3 * 400), dtype=torch.uint8)
    order, levels = torch.randperm(9)[:5], torch.randn(3, 256)
    ours, theirs = torch.full((2, 5, 2 * 3 * 400), torch.nan).unbind(0)
    triton.pixel_values(patches, order, levels, 2, ours)
    reference.pixel_values(patches, order, levels, 2, theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 1e-6),
        (torch.int8, 0.01),
        pytest.param(torch.float8_e4m3fn, 0.01, marks=needs_fp8),
    ],
)
def test_attention_over_the_cache_that_it_wrote(
    triton: Kernels, reference: Kernels, dtype: torch.dtype, bound: float
) -> None:
    """Two sequences, a prefill and a decode step, each through its own cache layout."""
    heads, kv_heads, head_dim, block = 8, 2, 32, 4
    slots = torch.tensor([20, 21, 22, 23, 4, 5, 12])  # sequence 0: blocks 5, 1; sequence 1: block 3
    qkv = torch.randn(7, (heads + 2 * kv_heads) * head_dim)
    cos, sin = torch.randn(2, 7, head_dim // 2).unbind(0)
    tables = torch.tensor([[5, 1], [3, 7]], dtype=torch.int32)
    query_start, lens = torch.tensor([0, 6, 7], dtype=torch.int32), torch.tensor([6, 1], dtype=torch.int32)
    found = []
    for kernels in (triton, reference):
        caches = [torch.zeros(s, dtype=dtype) for s in kernels.kv_cache_shapes(8, kv_heads, head_dim, block)]
        if dtype in QUANTISED_KV:
            caches += [torch.zeros(kv_scale_shape(8, kv_heads, block)) for _ in range(2)]
        k, v, *scales = caches
        q = kernels.rotary_cache(qkv.clone(), cos, sin, slots, k, v, heads, kv_heads, *scales)
        found.append(kernels.paged_attention(q, k, v, tables, query_start, lens, 0.2, *scales))
    assert off(*found) < bound


def test_attention_of_segments(triton: Kernels, reference: Kernels) -> None:
    q, k, v = torch.randn(3, 30, 2, 80).unbind(0)
    offsets = torch.tensor([0, 1, 1, 20, 30], dtype=torch.int32)
    found, wanted = (kernels.varlen_attention(q, k, v, offsets, 0.1) for kernels in (triton, reference))
    assert off(found, wanted) < 1e-6


@pytest.mark.skipif(ON_GPU, reason="of the interpreter")
def test_only_what_the_interpreter_can_do_is_taken() -> None:
    with pytest.raises(KernelUnavailable, match="use float32"):
        select("triton", DEVICE, torch.bfloat16)


@pytest.mark.usefixtures("whole_engine")
def test_a_page_is_read_as_with_the_reference(tmp_path: Path) -> None:
    crop = tmp_path / "crop.png"
    with Image.open(PAGE) as page:
        page.convert("RGB").crop((0, 0, 300, 90)).save(crop)
    texts = []
    for kernels in ("triton", "reference"):
        options = dict(device=str(DEVICE), dtype="float32", kernels=kernels, max_num_seqs=1)
        with Engine.from_pretrained(**options) as engine:
            assert all(kernels in kind for kind in engine.describe()["kernels"].values())
            (result,) = engine.read(str(crop), params=SamplingParams(max_new_tokens=6))
            texts.append((result.raw, result.error))
    assert texts[0] == texts[1]
    assert texts[0][0]
    assert texts[0][1] is None


@needs_fp8
def test_requests_with_fp8_keys_and_values_are_read_as_with_the_reference(tmp_path: Path) -> None:
    """Prompts with images of a random model: prefilled in chunks, decoded together, beginnings shared."""
    requests = [Ask((3, IMAGE, 1, 2, 4), (3,), 5), Ask((3, IMAGE, 1, 2, 5), (3,), 3), Ask((5, 1), (), 4)]
    outputs = []
    for kernels in ("triton", "reference"):
        world = World(tmp_path / kernels, kernels)
        core = world.core(kv_cache_dtype="fp8", max_step_tokens=8, block_size=2)
        sequences = [world.add(core, request) for request in requests]
        drain(core)
        outputs.append([seq.output_ids for seq in sequences])
    assert outputs[0] == outputs[1]
    assert [len(ids) for ids in outputs[0]] == [5, 3, 4]


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_a_norm_before_a_product_is_the_norm_and_the_product(
    triton: Kernels, rows: int, scheme: Scheme
) -> None:
    """Quantised in the norm's pass or after it: the same bits."""
    x, weight, residual = torch.randn(rows, 2, 100)[:, 1], torch.randn(90, 100), torch.randn(rows, 90)
    norm = torch.randn(100), 1e-6
    normed = triton.rms_norm(x, *norm)
    packed = triton.pack_linear(weight, None, scheme=scheme, group=32)
    wanted = triton.linear(normed, packed, residual=residual.clone())
    assert torch.equal(triton.linear(x, packed, residual=residual.clone(), norm=norm), wanted)
    pair = triton.pack_swiglu(*weight.chunk(2), None, scheme=scheme, group=32)
    assert torch.equal(triton.linear_swiglu(x, pair, norm=norm), triton.linear_swiglu(normed, pair))


def test_a_norm_before_a_product_of_two_forms_and_sorted_columns(triton: Kernels) -> None:
    """Columns are gathered after the norm, which a form without an order would quantise."""
    q, order = torch.randint(0, 16, (40, 64), dtype=torch.uint8), torch.randperm(64)
    narrow = triton.pack_quantized(
        q, torch.rand(40, 2), torch.full_like(q[:, :2], 8), None, group=32, order=order
    )
    packed = replace(narrow, wide=triton.pack_linear(torch.randn(40, 64), None, scheme="int8"))
    norm = torch.randn(64), 1e-6
    for rows in (3, 64):
        x = torch.randn(rows, 64)
        wanted = triton.linear(triton.rms_norm(x, *norm), packed)
        assert torch.equal(triton.linear(x, packed, norm=norm), wanted)
    wide = replace(packed, order=None)
    assert torch.equal(triton.linear(x, wide, norm=norm), triton.linear(triton.rms_norm(x, *norm), wide))
