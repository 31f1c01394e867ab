"""Pages per second of the engine against transformers `generate`: same pages, same checkpoint, same greedy tokens, one run.

    python bench/compare_hf.py

The clock runs from image files on the disk to text, for every reader; loading the model is outside it. Readers take turns, so
that a noisy machine disturbs all alike; the table gives medians over the repeats, and the slowest and fastest.

transformers: sdpa attention, the Pillow image processor, inference mode, end tokens honoured. Static batches are left-padded and
made of pages sorted by size, so that padding is least. Each repeat of the engine gets a fresh engine: its prefix cache knows no
page and no prompt. The tokens of all readers are compared with those of transformers one page at a time; where float32 differs,
the table says how close transformers' own two best logits were there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import environment
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from pagemill import Engine, Request, SamplingParams
from pagemill.model.loader import find_checkpoint
from pagemill.model.prompt import page_messages, read_profile


class Answer(NamedTuple):
    """One page as read: its tokens, the end token included, and its text."""

    tokens: list[int]
    text: str


class Transformers:
    """The checkpoint in transformers, as its documentation has it."""

    def __init__(self, name: str, dtype: str, max_new_tokens: int) -> None:
        folder = find_checkpoint(name)
        self.max_new_tokens = max_new_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(
            folder, backend="pil"
        )  # the default needs torchvision
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.messages = page_messages(read_profile(folder, name))

    def read(self, files: list[Path], batch_size: int) -> dict[Path, Answer]:
        """Read pages in static batches of the pages most alike in size."""
        if batch_size > 1:
            files = sorted(files, key=_pixels)
        answers: dict[Path, Answer] = {}
        for i in range(0, len(files), batch_size):
            answers |= self._read_batch(files[i : i + batch_size])
        return answers

    @torch.inference_mode()
    def _read_batch(self, files: list[Path]) -> dict[Path, Answer]:
        inputs = self._inputs(files)
        out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = [self._until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return {file: Answer(*answer) for file, *answer in zip(files, new, texts, strict=True)}

    def _inputs(self, files: list[Path]) -> dict[str, torch.Tensor]:
        prompt = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        head, tail = (self.tokenizer(part)["input_ids"] for part in prompt.split("<|image_pad|>"))
        pixels = self.images(images=[Image.open(file).convert("RGB") for file in files], return_tensors="pt")
        placeholder = self.model.config.image_token_id
        counts = (pixels["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist()
        rows = [head + [placeholder] * n + tail for n in counts]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == placeholder).int(),
            "pixel_values": pixels["pixel_values"].to(self.model.dtype),
            "image_grid_thw": pixels["image_grid_thw"],
        }

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self.model.generation_config.eos_token_id]
        return tokens[: ends[0] + 1] if ends else tokens

    @torch.inference_mode()
    def gap(self, file: Path, tokens: list[int]) -> float:
        """Return how far apart the two best logits of the token after `tokens` are."""
        inputs = self._inputs([file])
        forced = torch.tensor([tokens], dtype=torch.long)
        for name, value in (
            ("input_ids", forced),
            ("attention_mask", forced * 0 + 1),
            ("mm_token_type_ids", forced * 0),
        ):
            inputs[name] = torch.cat([inputs[name], value.to(inputs[name].dtype)], dim=1)
        best = self.model(**inputs, logits_to_keep=1).logits[0, -1].float().topk(2).values
        return float(best[0] - best[1])


def read_with_engine(
    name: str, dtype: str, files: list[Path], concurrency: int, max_new_tokens: int, threads: int
) -> tuple[float, dict[Path, Answer]]:
    """Read pages with a fresh engine; return the seconds without its loading, and the answers."""
    with Engine.from_pretrained(name, dtype=dtype, max_num_seqs=concurrency, num_threads=threads) as engine:
        started = time.perf_counter()
        requests = [Request(engine.page_prompt, [str(file)]) for file in files]
        outputs = engine.generate(requests, SamplingParams(max_new_tokens=max_new_tokens))
        seconds = time.perf_counter() - started
    for file, output in zip(files, outputs, strict=True):
        if output.error:
            raise RuntimeError(f"{file}: {output.error}")
    return seconds, {f: Answer(o.token_ids, o.text) for f, o in zip(files, outputs, strict=True)}


@dataclass
class Reader:
    """One row of the table."""

    name: str
    dtype: str
    run: Callable[[list[Path]], tuple[float, dict[Path, Answer]]]
    seconds: list[float] = field(default_factory=list)
    answers: dict[Path, Answer] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _pixels(file: Path) -> int:
    with Image.open(file) as image:
        return image.width * image.height


def sample_pages(count: int) -> list[Path]:
    """Return `count` of the sample pages, taken evenly from all kinds."""
    files = sorted(environment.PAGES.glob("*_[0-9][0-9].png"))
    if not 1 <= count <= len(files):
        raise SystemExit(f"--pages should be from 1 to {len(files)}, got {count}")
    return [files[i * len(files) // count] for i in range(count)]


def make_readers(dtype: str, hf: Transformers, args: argparse.Namespace) -> list[Reader]:
    def with_transformers(batch_size: int) -> Callable[[list[Path]], tuple[float, dict[Path, Answer]]]:
        def run(files: list[Path]) -> tuple[float, dict[Path, Answer]]:
            torch.set_num_threads(args.threads)
            started = time.perf_counter()
            answers = hf.read(files, batch_size)
            return time.perf_counter() - started, answers

        return run

    def with_engine(concurrency: int) -> Callable[[list[Path]], tuple[float, dict[Path, Answer]]]:
        return lambda files: read_with_engine(
            args.model, dtype, files, concurrency, args.max_new_tokens, args.threads
        )

    return [
        Reader("transformers, batch 1", dtype, with_transformers(1)),
        Reader("transformers, batches of 8", dtype, with_transformers(8)),
        *(Reader(f"pagemill, concurrency {n}", dtype, with_engine(n)) for n in (1, 8, 16)),
    ]


def compare_tokens(reader: Reader, base: Reader) -> dict[str, int]:
    """Return the pages that `reader` read otherwise than `base`, with the place of the first token that differs."""
    different = {}
    for file, answer in reader.answers.items():
        ours, theirs = answer.tokens, base.answers[file].tokens
        if ours != theirs:
            shorter = min(len(ours), len(theirs))
            different[file.name] = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    return different


def report(
    readers: list[Reader], files: list[Path], gap: Callable[[Path, list[int]], float]
) -> list[dict[str, Any]]:
    """Print the rows of one dtype and what differs; return both as plain data."""
    base, static = readers[:2]
    rows = []
    for reader in readers:
        pages_s = [len(files) / s for s in reader.seconds]
        different = compare_tokens(reader, base)
        count = sum(len(answer.tokens) for answer in reader.answers.values())
        row: dict[str, Any] = {
            "reader": reader.name,
            "dtype": reader.dtype,
            "pages_per_s": {"median": len(files) / reader.median, "min": min(pages_s), "max": max(pages_s)},
            "output_tokens": count,
            "output_tokens_per_s": count / reader.median,
            "times_batch_1": base.median / reader.median,
            "times_batches_of_8": static.median / reader.median,
            "seconds": reader.seconds,
            "different_pages": different,
        }
        if reader.dtype == "float32":
            row["logit_gaps"] = {
                name: gap(file, base.answers[file].tokens[: different[name]])
                for file in files
                if (name := file.name) in different
            }
        rows.append(row)
        print(
            f"{reader.name:28}{reader.dtype:>9}{len(files) / reader.median:9.3f}  "
            f"{f'({min(pages_s):.3f} to {max(pages_s):.3f})':20}{row['output_tokens_per_s']:9.0f}"
            f"{row['times_batch_1']:9.2f}x{row['times_batches_of_8']:9.2f}x{len(files) - len(different):8} of {len(files)}"
        )
    for row in rows:
        for name, gap_there in row.get("logit_gaps", {}).items():
            print(
                f"  {row['reader']}: {name} differs from output token {row['different_pages'][name]}, "
                f"where transformers' two best logits are {gap_there:.2g} apart"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny", help="embedded model, folder or hub id")
    parser.add_argument(
        "--pages", type=int, default=24, help="how many sample pages, of all kinds (default 24)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    files = sample_pages(args.pages)
    where = environment.describe("transformers")
    environment.show(where)
    print(
        f"{args.model}, {len(files)} pages, greedy, at most {args.max_new_tokens} new tokens, {args.threads} threads, "
        f"{args.repeats} repeats, image files to text"
    )
    if os.getloadavg()[0] > 0.5:
        print(
            "WARNING: other programs are running. OpenMP, which transformers computes with, loses most by that; "
            "the ratios below flatter pagemill."
        )
    print(f"\n{'':37}{'pages/s':>9}  {'':20}{'tokens/s':>9}{'vs batch 1':>10}{'vs 8':>10}{'same tokens':>14}")
    rows = []
    for dtype in args.dtype:
        hf = Transformers(args.model, dtype, args.max_new_tokens)
        readers = make_readers(dtype, hf, args)
        for reader in (readers[0], readers[2]):
            reader.run(files[:1])  # first calls set up threads and libraries
        for _ in range(args.repeats):
            for reader in readers:
                seconds, reader.answers = reader.run(files)
                reader.seconds.append(seconds)
        rows += report(readers, files, hf.gap)
    if args.json:
        result = {
            "environment": where,
            "options": vars(args),
            "pages": [file.name for file in files],
            "readers": rows,
        }
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
