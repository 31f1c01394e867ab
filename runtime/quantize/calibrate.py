"""Pages for calibration: what the model sees of each, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pagemill.decode.alignment import reference_answer
from pagemill.decode.sampler import SamplingParams
from pagemill.engine import Engine, page_format
from pagemill.errors import ConfigError, PagemillError, printable, sentence
from pagemill.model.config import ModelConfig
from pagemill.model.prompt import Prompter, page_messages, read_profile
from pagemill.model.rope import mrope_positions
from pagemill.pages.fit import FitOptions, fit_page
from pagemill.pages.preprocess import ImageProcessor
from pagemill.pages.source import PageRef, expand_inputs, list_pages
from pagemill.quantize.walk import CalibrationPage

T = TypeVar("T")

MAX_ANSWER_TOKENS = 1024
"""Of a page's answer that calibrate: longer ones are more of the same."""


class CalibrationError(PagemillError):
    """The calibration pages cannot be used; says why."""


def find_pages(inputs: Sequence[str], limit: int) -> list[PageRef]:
    """Return at most `limit` pages of files, folders and globs, evenly spread. Raises CalibrationError where there is none."""
    refs: list[PageRef] = []
    for source in dict.fromkeys(expand_inputs(list(inputs))):
        try:
            refs += list_pages(source)
        except PagemillError as error:
            raise CalibrationError(f"calibration page {printable(source)}: {error}") from None
    if not refs:
        raise CalibrationError("there is no calibration page; give some with --pages")
    return spread(refs, limit)


def spread(items: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` of the items, evenly spread, in their order."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_answers(model: str, refs: Sequence[PageRef], on_page: Callable[[], None]) -> list[str]:
    """Return what the model itself answers for each page; it is in memory meanwhile."""
    answers: dict[tuple[str, int], str] = {}
    with Engine.from_pretrained(model, max_num_seqs=8) as engine:
        params = SamplingParams(max_new_tokens=MAX_ANSWER_TOKENS)
        for result in engine.read(list(refs), params=params):
            if result.error is not None:
                raise CalibrationError(f"calibration page {printable(result.source)}: {result.error}")
            answers[result.source, result.page] = result.raw or ""
            on_page()
    return [answers[ref.source, ref.page] for ref in refs]


def prepare(
    model: str,
    folder: Path,
    config: ModelConfig,
    refs: Sequence[PageRef],
    answers: Iterable[str | Mapping[str, str | None]],
) -> list[CalibrationPage]:
    """Prepare pages with their answers: texts of the model, or the fields of a truth, which are written as the model would."""
    profile = read_profile(folder, model)
    form = page_format(profile)
    prompter = Prompter(folder, config.text.vocab_size, config.image_token_id)
    prompt = prompter.render(page_messages(profile))
    processor = ImageProcessor.from_folder(folder)
    fit = FitOptions(preferred_height=profile.text_height)
    pages = []
    for ref, answer in zip(refs, answers, strict=True):
        try:
            image, _ = fit_page(ref, profile.dpi, fit, processor)
        except PagemillError as error:
            raise CalibrationError(f"calibration page {printable(ref.source)}: {sentence(error)}") from None
        token_ids, (start,) = prompter.encode(prompt, [image.num_tokens])
        if not isinstance(answer, str):
            answer = reference_answer(answer, form if profile.page_json else None)
        token_ids = token_ids + prompter.encode_text(answer)[:MAX_ANSWER_TOKENS]
        if len(token_ids) > config.text.max_position_embeddings:
            raise ConfigError(
                f"calibration page {printable(ref.source)} has {len(token_ids)} tokens, the model takes "
                f"{config.text.max_position_embeddings}"
            )
        positions, _ = mrope_positions(
            len(token_ids), [(start, image.grid)], config.vision.spatial_merge_size
        )
        pages.append(CalibrationPage(token_ids, positions, start, image.patches, image.levels, image.grid))
    return pages
