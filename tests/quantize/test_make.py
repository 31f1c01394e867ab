"""Quantised checkpoints of a small random model, read back by a decoder written from the format's description."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_checkpoint import PRESETS, write_checkpoint
from safetensors.torch import load_file
from typer.testing import CliRunner

from pagemill import kernels
from pagemill.cli import app
from pagemill.errors import PagemillError
from pagemill.kernels.pixels import normalisation
from pagemill.model.config import read_config
from pagemill.model.loader import load_model
from pagemill.model.rope import mrope_positions
from pagemill.model.weights import canonical_name
from pagemill.quantize import make as making
from pagemill.quantize.make import Job, make
from pagemill.quantize.walk import CalibrationPage, Walk, feeds, units

CPU = torch.device("cpu")
SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
_TEXT, _VISION = PRESETS["micro"]
_TEXT = dict(_TEXT, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
_VISION = dict(_VISION, hidden_size=32, intermediate_size=64, out_hidden_size=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), _TEXT, _VISION, std=0.2)


@pytest.fixture(scope="module")
def pages():
    random = np.random.default_rng(0)
    levels = normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    made = []
    for h, w in ((8, 12), (6, 4)):
        count = h * w // 4
        tokens = [3, *[2046] * count, *random.integers(0, 2000, 40).tolist()]
        positions, _ = mrope_positions(len(tokens), [(1, (1, h, w))], 2)
        patches = random.integers(0, 256, (h * w, 588), dtype=np.uint8)
        made.append(CalibrationPage(tokens, positions, 1, patches, levels, (1, h, w)))
    return made


def job(model, out, scheme="int4-awq", **options):
    return Job(model, read_config(model), out, scheme, 32, **options)


def tensors(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(index.values())):
        found |= load_file(folder / file)
    assert found.keys() == index.keys()
    return found


def unpack(words, count):
    """Signed 4-bit integers of int32 words, eight a word, the lowest bits first, stored plus 8."""
    nibbles = [(words.numpy().view(np.uint32) >> (4 * i)) & 15 for i in range(8)]
    return torch.from_numpy(np.stack(nibbles, -1).reshape(len(words), -1)[:, :count].astype(np.int32) - 8)


def decoded(folder):
    """Every tensor of a compressed-tensors checkpoint as plain weights."""
    stored, plain = tensors(folder), {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            n, k = stored[f"{module}.weight_shape"].tolist()
            scale = stored[f"{module}.weight_scale"].float()
            zero = unpack(stored[f"{module}.weight_zero_point"].T.contiguous(), n).T
            group = k // scale.shape[1]
            q = unpack(tensor, k).view(n, -1, group)
            plain[f"{module}.weight"] = ((q - zero[..., None]) * scale[..., None]).view(n, k)
        elif kind == "weight" and f"{module}.weight_scale" in stored:
            plain[name] = tensor.float() * stored[f"{module}.weight_scale"].float()
        elif kind in ("weight", "bias"):
            plain[name] = tensor
    return plain


def logits(folder, weights, pages, tmp_path):
    """What a model of these weights makes of the pages, in float32."""
    copy = tmp_path / "plain"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    settings = json.loads((copy / "config.json").read_text())
    settings.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(settings))
    from safetensors.torch import save_file

    save_file(
        {name: w.to(torch.float32).contiguous() for name, w in weights.items()}, copy / "model.safetensors"
    )
    config = read_config(copy)
    read = load_model(copy, config, kernels.select("auto", CPU, torch.float32), CPU, torch.float32)
    walk = Walk(config, pages, lambda name: weights_by_canonical(weights)[name])
    walk.begin()
    for unit in units(config):
        walk.run(unit, walk.weights(unit))
    rows = [
        k
        for state in walk.states
        for k in [kernels.select("auto", CPU, torch.float32).rms_norm(state, read.decoder.norm, 1e-6)]
    ]
    return torch.cat(rows) @ weights_by_canonical(weights)["text.embed_tokens.weight"].float().T


def weights_by_canonical(weights):
    return {canonical_name(name): w for name, w in weights.items()}


def off(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("scheme", "bound", "formats"),
    [
        ("int4-awq", 0.35, {"pack-quantized", "int-quantized"}),
        ("mixed", 0.35, {"pack-quantized", "int-quantized"}),
        ("int8", 0.04, {"int-quantized"}),
        ("fp8", 0.15, {"float-quantized"}),
    ],
)
def test_a_checkpoint_is_what_the_format_says(model, pages, tmp_path, scheme, bound, formats):
    out = tmp_path / "out"
    seen = []
    card = make(job(model, out, scheme), pages, {"note": 1}, lambda *progress: seen.append(progress))
    assert not (tmp_path / "out.partial").exists()
    assert [unit for unit, _, _ in seen] == [*units(read_config(model)), "the rest"]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = settings["config_groups"].values()
    assert {group["format"] for group in groups} == formats
    assert settings["format"] == ("mixed-precision" if len(formats) == 2 else next(iter(formats)))
    original = load_file(model / "model.safetensors")
    plain = decoded(out)
    assert plain.keys() == original.keys()
    layers = [
        f"{unit}.{layer}.weight"
        for unit in units(read_config(model))
        for of in feeds(unit).values()
        for layer in of
    ]
    changed = {canonical_name(n) for n in original if not torch.equal(plain[n], original[n])}
    assert set(layers) <= changed
    wanted = logits(model, original, pages, tmp_path)
    assert off(logits(out, plain, pages, tmp_path), wanted) < bound
    assert card["note"] == 1
    assert card["bytes"] < card["bytes_before"]
    assert json.loads((out / making.CARD_FILE).read_text()) == card
    wide = out / making.WIDE_FILE
    assert wide.exists() == (scheme == "mixed")
    if scheme == "mixed":
        forms = load_file(wide)
        for name, tensor in forms.items():
            if name.endswith(".weight"):
                assert tensor.dtype == torch.int8
                full = tensor.float() * forms[f"{name}_scale"]
                assert off(full, plain[name]) < 0.2
                plain[name] = full
        assert len(forms) == 2 * 7 * 2
        assert off(logits(out, plain, pages, tmp_path), wanted) < 0.04


def test_factors_change_nothing_but_rounding(model, pages):
    """A block with its factors folded in, and not rounded, computes what it did."""
    task = job(model, Path("unused"))
    config = task.config
    from pagemill.model.weights import Checkpoint

    checkpoint = Checkpoint(model, config)
    walk, again = (Walk(config, pages, checkpoint.read) for _ in range(2))
    walk.begin()
    again.begin()
    for unit in units(config):
        weights = walk.weights(unit)
        plain = {name: w.clone() for name, w in weights.items()}
        fed = walk.run(unit, weights, products=True)
        making.quantise_unit(task, unit, weights, fed)
        assert any(not torch.equal(weights[name], plain[name]) for name in weights)
        for name in weights:
            if "norm" in name:  # what is written in bfloat16 is what was folded
                assert torch.equal(weights[name], weights[name].to(torch.bfloat16).float())
        again.run(unit, weights)
        for ours, theirs in zip(again.states, walk.states, strict=True):
            assert off(ours, theirs) < 1e-4


def test_a_run_that_was_killed_goes_on_where_it_was(model, pages, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make(job(model, whole, "mixed"), pages, {})
    names = units(read_config(model))
    started = []

    class Killed(BaseException):
        pass

    for last in (names[1], names[2], "the rest"):

        def stop(unit, done, total, last=last):
            started.append(unit)
            if unit == last:
                raise Killed

        with pytest.raises(Killed):
            make(job(model, cut, "mixed"), pages, {}, stop)
        assert not cut.exists()
    with pytest.raises(PagemillError, match="another model, other pages or other options"):
        make(job(model, cut, "int8"), pages, {})
    with pytest.raises(PagemillError, match="another model, other pages or other options"):
        make(job(model, cut, "mixed"), pages[:1], {})
    partial = tmp_path / "cut.partial"
    joined = making._join_wide

    def join(folder, count):  # killed between two of the last deletions
        joined(folder, count)
        shutil.copy(folder / "model-00001-of-00005.safetensors", folder / "wide-003.safetensors")
        raise Killed

    monkeypatch.setattr(making, "_join_wide", join)
    with pytest.raises(Killed):
        make(job(model, cut, "mixed"), pages, {})
    monkeypatch.setattr(making, "_join_wide", joined)
    with pytest.raises(Killed):
        make(
            job(model, cut, "mixed"), pages, {}, complete=lambda folder, card: (_ for _ in ()).throw(Killed())
        )
    assert partial.exists()
    assert not cut.exists()
    for torn in (".pagemill-0.tmp", ".tmpA1b2C3"):  # of a writer that was killed; the second is safetensors'
        (partial / torn).touch()
    make(job(model, cut, "mixed"), pages, {}, lambda unit, done, total: started.append(unit))
    assert [unit for unit in started if unit != "the rest"] == [
        names[0], names[1], names[1], names[2], names[2], *names[3:],
    ]  # fmt: skip
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert {p.stat().st_mode & 0o777 for p in cut.iterdir()} == {
        (whole / "config.json").stat().st_mode & 0o777
    }
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.name).read_bytes()


def test_what_cannot_be_made_is_told_before_anything_is_written(model, pages, tmp_path):
    out = tmp_path / "out"
    config = read_config(model)
    quantised = tmp_path / "quantised"
    shutil.copytree(model, quantised)
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq"}
    (quantised / "config.json").write_text(json.dumps(settings))
    for given, sentence in (
        (Job(model, config, out, "int4-awq", 128), "do not divide the decoder's hidden size 64"),
        (Job(model, config, out, "int4-awq", 48), "group size should be 32, 64 or 128"),
        (Job(model, config, out, "int3", 32), "scheme should be one of"),
        (Job(quantised, config, out, "int8"), "quantised already"),
        (Job(model, config, tmp_path, "int8"), "exists"),
    ):
        with pytest.raises(PagemillError, match=sentence):
            make(given, pages, {})
    with pytest.raises(PagemillError, match="no calibration page"):
        make(job(model, out), [], {})
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_pages_that_leave_a_layer_unused_are_refused(model, pages, tmp_path):
    folder = tmp_path / "dead"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    (dead,) = [n for n in weights if n.endswith("layers.1.mlp.up_proj.weight")]
    weights[dead].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PagemillError, match=r"do not exercise text\.layers\.1\.mlp\.down_proj"):
        make(job(folder, tmp_path / "out"), pages, {})
    assert not (tmp_path / "out").exists()


def test_a_layer_that_8_bits_do_not_fit_stays_as_it_is(model, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "LARGEST_ERROR", 0.0)
    card = make(job(model, tmp_path / "out"), pages, {})
    assert "visual.blocks.0.attn.qkv" in card["plain"]
    assert not any("layers" in name for name in card["plain"])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"re:.*visual\.blocks\.0\.attn\.qkv$" in settings["ignore"]
    stored = tensors(tmp_path / "out")
    assert all(t.dtype == torch.bfloat16 for n, t in stored.items() if "visual" in n)


def test_scales_of_a_float8_cache_are_those_of_the_pages(model, pages, tmp_path):
    make(job(model, tmp_path / "out", "int8", kv_scales=True), pages, {})
    stored = tensors(tmp_path / "out")
    card = json.loads((tmp_path / "out" / making.CARD_FILE).read_text())
    for i in range(2):
        seen = card["blocks"][f"text.layers.{i}"]["keys"]
        for kind in ("k", "v"):
            (scale,) = [t for n, t in stored.items() if n.endswith(f"layers.{i}.self_attn.{kind}_scale")]
            assert scale.item() == pytest.approx(max(seen["keys" if kind == "k" else "values"]) / 448)


def test_the_command_line(model, tmp_path):
    out = tmp_path / "out"
    page, truth = str(SAMPLES / "form_24.png"), str(SAMPLES / "truth.jsonl")
    asked = [
        "quantize",
        str(model),
        "--scheme",
        "int4-awq",
        "--group-size",
        "32",
        "--pages",
        page,
        "--truth",
        truth,
    ]
    run = CliRunner().invoke(app, [*asked, "-o", str(out)])
    assert run.exit_code == 0, run.output
    card = (out / "README.md").read_text()
    assert "text.layers.1.mlp.down_proj | int4" in card
    assert "1 pages" in card
    run = CliRunner().invoke(app, [*asked, "-o", str(out)])
    assert run.exit_code == 2
    assert "exists" in run.output
    run = CliRunner().invoke(
        app, ["quantize", str(model), "--pages", str(tmp_path / "none"), "-o", str(tmp_path / "b")]
    )
    assert run.exit_code == 2
    assert "Traceback" not in run.output
    run = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "b"), "--score", page])
    assert run.exit_code == 2
    assert "go together" in run.output
