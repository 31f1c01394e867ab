"""Loading: every dialect gives the same model, every damage one sentence."""

import json
import math
import re
import struct

import pytest
import torch
from make_checkpoint import PRESETS, write_checkpoint
from safetensors.torch import load_file, save_file

from pagemill import kernels
from pagemill.errors import CheckpointError
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint, load_model
from pagemill.model.weights import Checkpoint, expected_shapes

TEXT, VISION = PRESETS["micro"]
CPU = torch.device("cpu")


def micro(folder, **options):
    return write_checkpoint(folder, TEXT, VISION, std=0.2, **options)


def embeddings(folder, dtype=torch.float32):
    """What a checkpoint computes for one image: sensitive to every vision weight."""
    k = kernels.select("reference", CPU, dtype)
    model = load_model(folder, read_config(folder), k, CPU, dtype)
    patches = (torch.arange(16 * 588) * 37 % 256).to(torch.uint8).view(16, 588)
    levels = torch.linspace(-1, 1, 3 * 256).view(3, 256)
    image = model.vision([(patches, levels, (1, 4, 4))])[0].float()
    tokens = model.decoder.kernels.embed(torch.tensor([1, 7, 2047]), model.decoder.embed_tokens).float()
    return torch.cat([image, tokens])


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        dict(flat=False),
        dict(new_names=True),
        dict(flat=False, new_names=True, shard_bytes=20000),
        dict(dtype=torch.float32),
    ],
    ids=str,
)
def test_dialects_and_shards_give_the_same_model(tmp_path, options):
    plain = embeddings(micro(tmp_path / "plain", dtype=options.get("dtype", torch.bfloat16)))
    other = embeddings(micro(tmp_path / "other", **options))
    assert torch.equal(plain, other)
    if "shard_bytes" in options:
        assert len(list((tmp_path / "other").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_stored_dtypes(tmp_path, stored, compute):
    folder = micro(tmp_path, dtype=stored)
    exact = embeddings(micro(tmp_path / "exact", dtype=torch.float32))
    got = embeddings(folder, compute)
    rough = torch.bfloat16 in (stored, compute)
    assert torch.isfinite(got).all()
    assert (got - exact).norm() / exact.norm() < (0.05 if rough else 0.002)


def test_parameters_are_counted_as_published(tmp_path):
    """Qwen2.5-VL-3B has 824 tensors of 3,754,622,976 numbers."""
    folder = micro(tmp_path)
    text, vision = PRESETS["3b"]
    edit(folder, lambda c: c.update(text, vision_config=vision))
    shapes = expected_shapes(read_config(folder))
    assert sum(map(math.prod, shapes.values())) == 3_754_622_976
    assert len(shapes) == 824


def test_untied_head_is_read(tmp_path):
    folder = write_checkpoint(tmp_path, dict(TEXT, tie_word_embeddings=False), VISION)
    k = kernels.select("reference", CPU, torch.float32)
    model = load_model(folder, read_config(folder), k, CPU, torch.float32)
    assert model.decoder.lm_head is not model.decoder.embed_tokens


@pytest.mark.parametrize("where", ["root", "text_config"])
def test_tying_is_found_wherever_it_stands(tmp_path, where):
    text = dict(TEXT, tie_word_embeddings=where == "text_config")
    folder = write_checkpoint(tmp_path, dict(TEXT), VISION, flat=False)
    edit(folder, lambda c: c.update(text_config=text, tie_word_embeddings=where == "root"))
    assert read_config(folder).text.tie_word_embeddings
    Checkpoint(folder, read_config(folder))


def test_missing_vision_fields_take_the_class_defaults(tmp_path):
    folder = micro(tmp_path)
    edit(folder, lambda c: c.update(vision_config={"hidden_size": 1280}, hidden_size=48))
    vision = read_config(folder).vision
    assert (vision.depth, vision.intermediate_size, vision.num_heads, vision.window_cells) == (
        32,
        3420,
        16,
        4,
    )
    assert vision.full_attention_blocks == {7, 15, 23, 31}


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "missing": (
        lambda t: t.pop("visual.blocks.1.norm2.weight"),
        r"1 of \d+ weights are missing.*vision.blocks.1.norm2",
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.9.x": torch.zeros(1)}),
        r"do not belong.*model.layers.9.x",
    ),
    "unknown name": (lambda t: t.update({"adapter.x": torch.zeros(1)}), r"do not belong.*adapter.x"),
    "mis-shaped": (
        lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
        r"model.norm.weight has shape \[7\].*\[48\]",
    ),
    "integer": (
        lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
        r"stored as I8",
    ),
    "named twice": (
        lambda t: t.update({"model.language_model.norm.weight": torch.zeros(48)}),
        r"model.norm.weight and model.language_model.norm.weight|model.language_model.norm.weight and model.norm.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_wrong_tensors_are_named(tmp_path, damage):
    folder = micro(tmp_path)
    change, expected = DAMAGE[damage]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder, read_config(folder))
    assert re.search(expected, sentence(error))


def test_a_superfluous_copy_of_the_tied_head_is_accepted(tmp_path):
    folder = micro(tmp_path)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    Checkpoint(folder, read_config(folder))


@pytest.mark.parametrize("keep", [0, 4, 100, -1000], ids=str)
def test_truncated_files_are_noticed(tmp_path, keep):
    folder = micro(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(folder, read_config(folder))


def test_a_header_of_absurd_size_is_refused(tmp_path):
    folder = micro(tmp_path)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(folder, read_config(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = micro(tmp_path, shard_bytes=20000)
    (folder / "model-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.safetensors is missing"):
        Checkpoint(folder, read_config(folder))


def test_an_index_cannot_leave_its_folder(tmp_path):
    folder = micro(tmp_path, shard_bytes=20000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint(folder, read_config(folder))


def test_pickled_weights_are_never_opened(tmp_path):
    folder = micro(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        Checkpoint(folder, read_config(folder))


CONFIG_DAMAGE = {
    "wrong architecture": (
        lambda c: c.update(architectures=["LlamaForCausalLM"], model_type="llama"),
        "architecture LlamaForCausalLM is not supported",
    ),
    "negative size": (lambda c: c.update(hidden_size=-48), "hidden_size should be an integer"),
    "text for a number": (
        lambda c: c.update(num_hidden_layers="2"),
        "num_hidden_layers should be an integer",
    ),
    "absurd depth": (lambda c: c["vision_config"].update(depth=10**9), "depth should be an integer"),
    "heads do not divide": (lambda c: c.update(num_attention_heads=5), "does not divide into 5 heads"),
    "uneven GQA": (lambda c: c.update(num_key_value_heads=2), "do not share 2 key/value heads evenly"),
    "sections": (lambda c: c.update(rope_scaling={"mrope_section": [1, 2]}), "mrope_section"),
    "other rope": (lambda c: c.update(rope_scaling={"type": "yarn"}), "rope type 'yarn' is not supported"),
    "widths differ": (
        lambda c: c["vision_config"].update(out_hidden_size=64),
        "differs from the decoder's 48",
    ),
    "vision is a list": (lambda c: c.update(vision_config=[1]), "should be a JSON object"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE, ids=str)
def test_wrong_configurations_are_named(tmp_path, damage):
    folder = micro(tmp_path)
    change, expected = CONFIG_DAMAGE[damage]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=expected) as error:
        read_config(folder)
    sentence(error)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", '{"a":' * 5000], ids=lambda c: repr(c[:8]))
def test_malformed_config_files(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    sentence(error)


def test_end_tokens_come_from_the_generation_config_first(tmp_path):
    folder = micro(tmp_path)
    assert read_config(folder).eos_token_ids == {2034, 2036}
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_config(folder).eos_token_ids == {5}
    (folder / "generation_config.json").unlink()
    edit(folder, lambda c: c.update(eos_token_id=[6, 7]))
    assert read_config(folder).eos_token_ids == {6, 7}
    edit(folder, lambda c: c.pop("eos_token_id"))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read_config(folder)


def test_names_of_models():
    assert (find_checkpoint("pagemill-tiny") / "config.json").exists()
    with pytest.raises(CheckpointError, match="not the embedded pagemill-tiny, not a folder"):
        find_checkpoint("no-such-model")
    with pytest.raises(CheckpointError, match="not the embedded"):
        find_checkpoint("./no/such")
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(__file__)


def test_hub_ids_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"not in the local cache.*HF_HUB_OFFLINE is set"):
        find_checkpoint("nobody/nothing")
    # A cached snapshot is found without a network.
    repo = tmp_path / "models--nobody--cached"
    micro(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert read_config(find_checkpoint("nobody/cached")).text.hidden_size == 48
