"""Prompts: templates of strangers, placeholders, profiles."""

import json
import shutil

import pytest

from pagemill.errors import CheckpointError, RequestError
from pagemill.model.loader import find_checkpoint
from pagemill.model.prompt import Profile, Prompter, page_messages, read_profile

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Leia."}]}]
EXPECTED = (
    "<|im_start|>system\nOCR<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>Leia.<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(find_checkpoint("pagemill-tiny") / name, tmp_path / name)
    return tmp_path


def prompter(folder):
    return Prompter(folder, 2048, 2046)


def test_the_template_is_found_wherever_it_stands(folder):
    assert prompter(folder).render(CHAT) == EXPECTED
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert prompter(folder).render(CHAT) == EXPECTED
    (folder / "chat_template.json").unlink()
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert prompter(folder).render(CHAT) == EXPECTED
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [5]}))
    with pytest.raises(CheckpointError, match="no chat template"):
        prompter(folder)


@pytest.mark.parametrize(
    "template",
    ["{{ 1/0 }}", "{{ 10.0 ** 400 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.x.y.z }}",
     "{{ raise_exception('no images') }}", "{{ messages.__class__.__mro__ }}", "{% set x = messages.append(1) %}",
     "{{ ''.__class__.__base__.__subclasses__() }}"],
)  # fmt: skip
def test_templates_that_fail_or_reach_out_are_one_sentence(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match="chat template"):
        prompter(folder).render(CHAT)


@pytest.mark.parametrize(
    "content", [b"{% if %}", b"{{ " + b"(" * 20000, b"\xff\xfe{{"], ids=["syntax", "depth", "bytes"]
)
def test_templates_that_do_not_compile(folder, content):
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError):
        prompter(folder)


def test_templates_written_for_transformers(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}"
    )
    assert prompter(folder).render([{"role": "á<"}, {}]) == '{"role": "á<"}'


def test_placeholders_are_repeated_in_order(folder):
    p = prompter(folder)
    assert p.expand([1, 2046, 2, 2046], [2, 3]) == ([1, 2046, 2046, 2, 2046, 2046, 2046], [1, 4])
    with pytest.raises(RequestError, match=r"2 image placeholders .* for 1 images"):
        p.expand([2046, 2046], [1])
    ids, starts = p.encode(EXPECTED, [5])
    assert ids[starts[0] : starts[0] + 5] == [2046] * 5
    assert p.decode(ids) == "system\nOCR\nuser\nLeia.\nassistant\n", "special tokens are left out"


def test_foreign_tokenizers_are_refused(folder):
    with pytest.raises(CheckpointError, match="another model"):
        Prompter(folder, 100, 90)
    with pytest.raises(CheckpointError, match="no token 9999"):
        Prompter(folder, 2048, 9999)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        prompter(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        prompter(folder)


def test_profiles(tmp_path):
    assert read_profile(find_checkpoint("pagemill-tiny"), "pagemill-tiny").dpi == 72
    dharma = read_profile(tmp_path, "Dharma-AI/Dharma-OCR-LITE")
    assert [m["role"] for m in page_messages(dharma)] == ["system", "user"]
    assert page_messages(dharma)[1]["content"] == [{"type": "image"}], "the image alone"
    assert page_messages(Profile(prompt="Leia."))[0]["content"][1]["text"] == "Leia."
    for bad in ({"dpi": "72"}, {"dpi": 5}, {"color": 1}, {"max_new_tokens": 0}, {"prompt": 3}):
        (tmp_path / "pagemill.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError):
            read_profile(tmp_path, "any")
