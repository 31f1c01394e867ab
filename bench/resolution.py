"""What a page costs and scores at each size: image tokens against benchmark_score.

    python bench/resolution.py [--parts heights,samples,dpi,ink] [--pages 36] [--threads 1] [--json FILE]

heights  The clean sample pages, each scaled so that its text bodies (pagemill.pages.ink) are 5 to 20 pixels high. The best height
         for the least tokens is what a checkpoint's `text_height` should say.
dpi      The texts of 12 sample pages set in 10-point type on A6 sheets, drawn at 100 to 600 DPI, read with resolution `full`
         (every pixel that the checkpoint takes) and `auto` (by the height of the text). Then the digital PDF, rendered.
samples  The clean and the hard sample pages, `full` and `auto`.
ink      What measuring costs, on A4 pages of 10-point text; and how far the output budget lies above the truth.

benchmark_score and CER are those of the fields of the records, as in bench/score.py. Type is Pillow's own (Aileron), so that the
pages are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import environment
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pagemill import Engine, Request, SamplingParams
from pagemill.decode.page import is_degenerate, parse_page
from pagemill.pages.fit import FitOptions, Resolution, fit_page, fit_pixels
from pagemill.pages.ink import measure_ink, plausible_output_chars
from pagemill.pages.preprocess import PreparedImage
from pagemill.pages.source import PageRef, load_page
from pagemill.score import joined, score_text

Pixels = npt.NDArray[np.uint8]
HEIGHTS = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20)
DPIS = (100, 150, 200, 300, 400, 600)
CLEAN = ("form", "legal", "prose")
A6 = (4.13, 5.83)  # inches
POINTS = 10.0


@dataclass(frozen=True)
class Page:
    """A page at some size, and what it says."""

    name: str
    image: PreparedImage
    truth: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--parts", default="heights,samples,dpi,ink")
    parser.add_argument("--pages", type=int, default=36, help="sample pages of part heights")
    parser.add_argument("--height", type=float, default=12.0, help="preferred height of `auto`, in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment.describe("pillow", "pypdfium2", "numpy")}
    environment.show(result["environment"])
    parts = args.parts.split(",")
    if "ink" in parts:
        result["ink"] = {"cost": cost(), "budget": budget()}
    if {"heights", "samples", "dpi"} & set(parts):
        params = SamplingParams(max_new_tokens=args.max_new_tokens)
        with Engine.from_pretrained(args.model, dtype=args.dtype, num_threads=args.threads) as engine:
            if "heights" in parts:
                result["heights"] = heights(engine, params, args.pages)
            if "samples" in parts:
                result["samples"] = samples(engine, params, args.height)
            if "dpi" in parts:
                result["dpi"] = by_dpi(engine, params, args.height)
                result["pdf"] = by_dpi_pdf(engine, params, args.height)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(engine: Engine, params: SamplingParams, pages: Sequence[Page]) -> dict[str, float]:
    """Read pages; return their mean image tokens, seconds a page, and scores."""
    started = time.perf_counter()
    requests = [Request(engine.page_prompt, images=[page.image]) for page in pages]
    scores, degenerate = [], 0
    for page, output in zip(pages, engine.generate(requests, params), strict=True):
        if output.error:
            raise SystemExit(f"{page.name}: {output.error}")
        scores.append(score_text(page.truth, joined(parse_page(output.text)._asdict())))
        degenerate += is_degenerate(output.text, output.finish_reason or "error")
    return {
        "image_tokens": fmean(page.image.num_tokens for page in pages),
        "benchmark_score": fmean(s.benchmark_score for s in scores),
        "cer": fmean(s.cer for s in scores),
        "degeneration_rate": degenerate / len(pages),
        "seconds_a_page": (time.perf_counter() - started) / len(pages),
        "pages": len(pages),
    }


def show(label: str, row: dict[str, float]) -> None:
    print(
        f"{label:28}{row['image_tokens']:10.0f}{row['benchmark_score']:10.3f}{100 * row['cer']:8.1f} %"
        f"{100 * row['degeneration_rate']:8.1f} %{row['seconds_a_page']:9.2f}",
        flush=True,
    )


def head(title: str) -> None:
    print(f"\n{title}\n{'':28}{'tokens':>10}{'score':>10}{'CER':>10}{'degen.':>10}{'s/page':>9}")


def heights(engine: Engine, params: SamplingParams, count: int) -> list[dict[str, float]]:
    """Read the clean sample pages with their text brought to each of `HEIGHTS`."""
    samples = []
    rows = [row for row in read_rows("truth.jsonl") if row["file"].startswith(CLEAN)]
    for row in rows[:: max(1, len(rows) // count)]:
        rgb = load_page(PageRef(str(environment.PAGES / row["file"]), 1), 72)
        samples.append((row["file"], rgb, joined(row["truth"]), measure_ink(rgb).text_height or 0.0))
    head(f"Text height of {len(samples)} clean pages (as they are: {fmean(s[3] for s in samples):.1f} px)")

    def scaled(height: float | None) -> Iterable[Page]:
        for name, rgb, truth, own in samples:
            scale = height / own if height else 1.0
            size = engine.processor.size(*(round(side * scale) for side in rgb.shape[:2]))
            yield Page(name, engine.processor.prepare(rgb, size=size), truth)

    found = []
    for height in (None, *HEIGHTS):
        row = read(engine, params, list(scaled(height)))
        show(f"{height} px" if height else "as they are", row)
        found.append({"height": height or 0} | row)
    return found


def samples(engine: Engine, params: SamplingParams, preferred: float) -> list[dict[str, Any]]:
    """Read the sample pages as they are and by the height of their text."""
    head(f"sample pages (preferred height {preferred:g} px)")
    found = []
    for group, prefixes in {"clean": CLEAN, "hard": ("hard",)}.items():
        rows = [row for row in read_rows("truth.jsonl") if row["file"].startswith(prefixes)]
        for options in sizes(preferred):
            pages = [
                Page(row["file"], fit_sample(engine, row, 72, options), joined(row["truth"])) for row in rows
            ]
            found.append(report(engine, params, group, options, pages))
    return found


def fit_sample(engine: Engine, row: dict[str, Any], dpi: float, options: FitOptions) -> PreparedImage:
    ref = PageRef(str(environment.PAGES / row["file"]), row.get("page", 1))
    return fit_page(ref, dpi, options, engine.processor)[0]


def by_dpi(engine: Engine, params: SamplingParams, preferred: float) -> list[dict[str, Any]]:
    """Read typeset sheets drawn at each of `DPIS` with every resolution."""
    sheets = [row for row in read_rows("truth.jsonl") if row["file"].startswith(CLEAN)][::3]
    head(
        f"{len(sheets)} A6 sheets of {POINTS:.0f}-point type, drawn at a DPI (preferred height {preferred:g} px)"
    )
    found = []
    for dpi in DPIS:
        drawn = [(row["file"], draw(row["truth"], dpi), joined(row["truth"])) for row in sheets]
        for options in sizes(preferred):
            pages = [
                Page(name, fit_pixels(rgb, options, engine.processor)[0], truth) for name, rgb, truth in drawn
            ]
            found.append(report(engine, params, dpi, options, pages))
    return found


def by_dpi_pdf(engine: Engine, params: SamplingParams, preferred: float) -> list[dict[str, Any]]:
    """Read the digital PDF rendered at each of `DPIS` with every resolution."""
    rows = [row for row in read_rows("pdf_truth.jsonl") if row["text_layer"]]
    head(f"{len(rows)} pages of the digital PDF (20-point type), rendered at a DPI")
    found = []
    for dpi in (50, 72, *DPIS):
        for options in sizes(preferred):
            pages = [
                Page(row["file"], fit_sample(engine, row, dpi, options), joined(row["truth"])) for row in rows
            ]
            found.append(report(engine, params, dpi, options, pages))
    return found


def sizes(preferred: float) -> list[FitOptions]:
    resolutions: tuple[Resolution, ...] = ("full", "auto")
    return [FitOptions(resolution, preferred_height=preferred) for resolution in resolutions] + [
        FitOptions("auto", crop=True, preferred_height=preferred)
    ]


def report(
    engine: Engine, params: SamplingParams, what: object, options: FitOptions, pages: list[Page]
) -> dict[str, Any]:
    row = read(engine, params, pages)
    label = f"{options.resolution}{', cropped' if options.crop else ''}"
    show(f"{what}{' dpi' * isinstance(what, int)}, {label}", row)
    return {"pages of": what, "resolution": label} | row


def draw(truth: dict[str, str | None], dpi: float) -> Pixels:
    """Set a page's fields on an A6 sheet, line by line as they are, and return uint8 [H, W, 3]."""
    width, height = (round(side * dpi) for side in A6)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(POINTS * dpi / 72)
    line, left = 1.35 * POINTS * dpi / 72, 0.25 * dpi
    y = 0.2 * dpi
    for text in (truth["header"], truth["text"]):
        for words in (text or "").splitlines():
            pen.text((left, y), words, "black", font)
            y += line
        y += line if text else 0
    y = height - 0.2 * dpi - line * len((truth["footer"] or "").splitlines())
    pen.text((left, y), truth["footer"] or "", "black", font)
    return np.asarray(sheet)


def cost() -> list[dict[str, float]]:
    """Measure an A4 page of 10-point text at usual resolutions."""
    print(f"\nmeasure_ink, A4\n{'dpi':>8}{'pixels':>14}{'ms':>8}{'height':>10}{'of type':>10}")
    lines = [line for row in read_rows("truth.jsonl") for line in (row["truth"]["text"] or "").splitlines()]
    found = []
    for dpi in (72, 150, 300, 600):
        sheet = Image.new("RGB", (round(8.27 * dpi), round(11.69 * dpi)), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(POINTS * dpi / 72)
        for k in range(52):
            words = "  ".join((lines[2 * k % len(lines)], lines[(2 * k + 1) % len(lines)]))
            pen.text((0.7 * dpi, (0.8 + 0.19 * k) * dpi), words, "black", font)
        rgb = np.asarray(sheet)
        times = []
        for _ in range(9):
            started = time.thread_time()
            ink = measure_ink(rgb)
            times.append(1e3 * (time.thread_time() - started))
        em = (ink.text_height or 0.0) / (POINTS * dpi / 72)
        ms = statistics.median(times)
        print(f"{dpi:8}{rgb.shape[1]:8}x{rgb.shape[0]:<5}{ms:8.1f}{ink.text_height or 0:10.1f}{em:10.3f}")
        found.append({"dpi": dpi, "ms": ms, "text_height": ink.text_height or 0.0, "of_type": em})
    return found


def budget() -> dict[str, Any]:
    """Compare `plausible_output_chars` with the truth of every sample page."""
    ratios: dict[str, list[float]] = {}
    for row in samples_with_truth():
        rgb = load_page(PageRef(str(environment.PAGES / row["file"]), row.get("page", 1)), 72)
        bound = plausible_output_chars(measure_ink(rgb))
        group = row["file"].split("_")[0]
        ratios.setdefault(group, []).append(bound / len(joined(row["truth"])))
    print(
        f"\noutput budget / characters of the truth\n{'':12}{'pages':>8}{'least':>8}{'median':>8}{'most':>8}"
    )
    for group, some in ratios.items():
        print(f"{group:12}{len(some):8}{min(some):8.2f}{statistics.median(some):8.2f}{max(some):8.2f}")
    return ratios


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file beside the sample pages."""
    lines = (environment.PAGES / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def samples_with_truth() -> list[dict[str, Any]]:
    rows = read_rows("truth.jsonl") + read_rows("pdf_truth.jsonl")
    return rows + [row | {"file": f"stress/{row['file']}"} for row in read_rows("stress/truth.jsonl")]


if __name__ == "__main__":
    main()
