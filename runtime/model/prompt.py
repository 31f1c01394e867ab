"""Prompts: tokenizer, chat template, and what each model wants to be asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pagemill.errors import CheckpointError, RequestError
from pagemill.model.config import read_json

_OCR_SYSTEM = (
    "You are an expert OCR system. Extract all text from the provided document image exactly as it appears, "
    "preserving the original layout and structure. Return only the extracted text with no additional commentary."
)


@dataclass(frozen=True)
class Profile:
    """How one model reads a page. A checkpoint folder can carry its own as `pagemill.json`."""

    system: str | None = None
    """System prompt; None leaves it to the chat template."""
    prompt: str | None = None
    """Text after the image in the user's turn; None sends the image alone."""
    dpi: float = 150.0
    """Resolution at which PDF pages are rendered."""
    max_new_tokens: int = 8192
    text_height: float | None = None
    """Height of text in pixels, as `pagemill.pages.ink` defines it, that the model reads best; None shows pages as they are."""
    page_json: bool = False
    """Whether it answers with a page's JSON object, so that guidance can hold it to that."""
    keys: tuple[str, ...] = ("header", "margin", "footer", "text")
    key_order: Literal["fixed", "any"] = "any"
    """fixed: the model always writes `keys` in this order."""
    optional_keys: bool = True
    """Whether it may leave keys out."""
    item_separator: str = ", "
    key_separator: str = ": "


# Prompts from the models' public material; names are compared with the end of a hub id or folder name.
PROFILES = {
    "dharma-ocr-lite": Profile(system=_OCR_SYSTEM, page_json=True),
    "dharma-ocr-full": Profile(system=_OCR_SYSTEM, page_json=True),
    "nanonets-ocr2-3b": Profile(
        prompt="Extract the text from the above document as if you were reading it naturally. Return the tables in html "
        "format. Return the equations in LaTeX representation. If there is an image in the document and image caption is "
        "not present, add a small description of the image inside the <img></img> tag; otherwise, add the image caption "
        "inside <img></img>. Watermarks should be wrapped in brackets. Ex: <watermark>OFFICIAL COPY</watermark>. Page "
        "numbers should be wrapped in brackets. Ex: <page_number>14</page_number> or <page_number>9/22</page_number>. "
        "Prefer using ☐ and ☑ for check boxes.",
        max_new_tokens=15000,
    ),
}
_GENERIC = Profile(system=_OCR_SYSTEM)


def read_profile(folder: Path, name: str) -> Profile:
    """The profile of a model: its folder's `pagemill.json`, else the one known under its name, else a plain OCR prompt."""
    path = folder / "pagemill.json"
    if not path.exists():
        return PROFILES.get(name.rstrip("/").rsplit("/", 1)[-1].lower(), _GENERIC)
    values = read_json(path)
    kinds: dict[str, tuple[type, ...]] = {
        "system": (str, type(None)), "prompt": (str, type(None)), "dpi": (int, float), "max_new_tokens": (int,),
        "text_height": (int, float, type(None)), "page_json": (bool,), "keys": (list,), "key_order": (str,),
        "optional_keys": (bool,), "item_separator": (str,), "key_separator": (str,),
    }  # fmt: skip
    for key, value in values.items():
        if key not in kinds:
            raise CheckpointError(f"{path}: unknown setting {key!r}; known are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and bool not in kinds[key]):
            raise CheckpointError(f"{path}: {key} cannot be {value!r}")
    keys = values.get("keys", Profile.keys)
    if sorted(map(str, keys)) != sorted(Profile.keys):
        raise CheckpointError(
            f"{path}: keys should hold {', '.join(Profile.keys)} in some order, not {keys!r}"
        )
    profile = Profile(**{**values, "keys": tuple(keys)})
    if not 10 <= profile.dpi <= 1200 or profile.max_new_tokens < 1:
        raise CheckpointError(f"{path}: dpi should be from 10 to 1200 and max_new_tokens at least 1")
    if profile.text_height is not None and not 2 <= profile.text_height <= 500:
        raise CheckpointError(f"{path}: text_height should be from 2 to 500 pixels, or null")
    if profile.key_order not in ("fixed", "any"):
        raise CheckpointError(f"{path}: key_order should be fixed or any, not {profile.key_order!r}")
    if profile.item_separator.strip(" ") != "," or profile.key_separator.strip(" ") != ":":
        raise CheckpointError(
            f"{path}: item_separator and key_separator should be a comma and a colon, with spaces"
        )
    return profile


class Prompter:
    """Turns chat messages into prompt tokens, and output tokens into text."""

    def __init__(self, folder: Path, vocab_size: int, image_token_id: int) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} is missing: pagemill needs the fast tokenizer's file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from None
        if self.tokenizer.get_vocab_size() > vocab_size:
            raise CheckpointError(
                f"{path} has {self.tokenizer.get_vocab_size()} tokens, config.json says {vocab_size}: another model's?"
            )
        self.image_token_id = image_token_id
        self.image_token = self.tokenizer.id_to_token(image_token_id)
        if self.image_token is None:
            raise CheckpointError(
                f"{path} has no token {image_token_id}, which config.json names as the image placeholder"
            )
        self._template = _compile(_find_template(folder), folder)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Apply the chat template. Contents are strings or lists of `{"type": "image"}` / `{"type": "text", "text": ...}`."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True)
        except Exception as error:  # a template is a program and can fail like one
            raise RequestError(f"the chat template does not take these messages: {error}") from None

    def encode(self, prompt: str, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens of a rendered prompt, the k-th image placeholder repeated `image_tokens[k]` times.

        Returns the token ids and the index of each image's first placeholder. Raises `RequestError` if the prompt
        does not have one placeholder for each image.
        """
        return self.expand(self.tokenizer.encode(prompt, add_special_tokens=False).ids, image_tokens)

    def expand(self, token_ids: Sequence[int], image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Repeat each placeholder in `token_ids`; see `encode`."""
        found = sum(token == self.image_token_id for token in token_ids)
        if found != len(image_tokens):
            raise RequestError(
                f"the prompt has {found} image placeholders ({self.image_token}) for {len(image_tokens)} images"
            )
        expanded: list[int] = []
        starts: list[int] = []
        sizes = iter(image_tokens)
        for token in token_ids:
            if token == self.image_token_id:
                starts.append(len(expanded))
                expanded += [token] * next(sizes)
            else:
                expanded.append(token)
        return expanded, starts

    def encode_text(self, text: str) -> list[int]:
        """Tokens of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of output tokens, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def page_messages(profile: Profile) -> list[dict[str, Any]]:
    """The chat that asks for one page."""
    content: list[dict[str, str]] = [{"type": "image"}]
    if profile.prompt:
        content.append({"type": "text", "text": profile.prompt})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if profile.system:
        messages.insert(0, {"role": "system", "content": profile.system})
    return messages


def _find_template(folder: Path) -> str:
    """The chat template from wherever the checkpoint keeps it: .jinja, .json, or tokenizer_config.json."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):  # several named templates
                template = next(
                    (
                        t.get("template")
                        for t in template
                        if isinstance(t, dict) and t.get("name") == "default"
                    ),
                    None,
                )
            if isinstance(template, str):
                return template
    raise CheckpointError(
        f"{folder} has no chat template (chat_template.jinja, .json, or in tokenizer_config.json)"
    )


def _tojson(value: Any, indent: int | None = None) -> str:
    # As transformers has it; jinja2's own escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _compile(source: str, folder: Path) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # A template is a stranger's program: the sandbox denies attribute access and mutation.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the chat template does not compile: {error}") from None
