"""What a page costs and scores at each size: image tokens against benchmark_score.

    python bench/resolution.py [--parts heights,samples,dpi,ink] [--pages 36] [--threads 1] [--json FILE]

heights  The clean sample pages, each scaled so that its text bodies (pagemill.pages.ink) are 5 to 20 pixels high. The best height
         for the least tokens is what a checkpoint's `text_height` should say.
dpi      The texts of 12 sample pages set in 10-point type on A6 sheets, rendered at 100 to 600 DPI, read with resolution `full`
         (every pixel that the checkpoint takes) and `auto` (by the height of the text), as images and as PDF pages.
samples  The clean and the hard sample pages, `full` and `auto`.
ink      What measuring costs, on A4 pages of 10-point text; and how far the output budget lies above the truth.

benchmark_score and CER are those of the fields of the records, as in bench/score.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import environment

from pagemill import Engine, Request, SamplingParams
from pagemill.decode.page import is_degenerate, parse_page
from pagemill.pages.fit import FitOptions, Resolution, fit_page, fit_pixels
from pagemill.pages.ink import measure_ink, plausible_output_chars
from pagemill.pages.preprocess import PreparedImage
from pagemill.pages.source import PageRef, load_page
from pagemill.score import joined, score_text

HEIGHTS = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20)
DPIS = (100, 150, 200, 300, 400, 600)
CLEAN = ("form", "legal", "prose")
A4, A6 = (595, 842), (298, 420)  # points
POINTS = 10


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
        f"{label:34}{row['image_tokens']:10.0f}{row['benchmark_score']:10.3f}{100 * row['cer']:8.1f} %"
        f"{100 * row['degeneration_rate']:8.1f} %{row['seconds_a_page']:9.2f}",
        flush=True,
    )


def head(title: str) -> None:
    print(f"\n{title}\n{'':34}{'tokens':>10}{'score':>10}{'CER':>10}{'degen.':>10}{'s/page':>9}")


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
    """Read typeset sheets rendered at each of `DPIS`, as images and as the PDF that they are."""
    rows = [row for row in read_rows("truth.jsonl") if row["file"].startswith(CLEAN)][::3]
    head(
        f"{len(rows)} A6 sheets of {POINTS}-point type, rendered at a DPI (preferred height {preferred:g} px)"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sheets = Path(folder, "sheets.pdf")
        sheets.write_bytes(typeset([lines_of(row["truth"]) for row in rows], *A6, POINTS))
        for dpi in DPIS:
            for options in sizes(preferred):
                for kind in ("image", "PDF")[: 1 + (options.resolution == "auto")]:
                    pages = []
                    for number, row in enumerate(rows, 1):
                        ref = PageRef(str(sheets), number)
                        if kind == "PDF":
                            image, _ = fit_page(ref, dpi, options, engine.processor)
                        else:
                            image, _ = fit_pixels(load_page(ref, dpi), options, engine.processor)
                        pages.append(Page(row["file"], image, joined(row["truth"])))
                    found.append(report(engine, params, f"{dpi} dpi, {kind}", options, pages))
    return found


def sizes(preferred: float) -> list[FitOptions]:
    resolutions: tuple[Resolution, ...] = ("full", "auto")
    return [FitOptions(resolution, preferred_height=preferred) for resolution in resolutions] + [
        FitOptions("auto", crop=True, preferred_height=preferred)
    ]


def report(
    engine: Engine, params: SamplingParams, what: str, options: FitOptions, pages: list[Page]
) -> dict[str, Any]:
    row = read(engine, params, pages)
    label = f"{options.resolution}{', cropped' if options.crop else ''}"
    show(f"{what}, {label}", row)
    return {"pages of": what, "resolution": label} | row


def lines_of(truth: dict[str, str | None]) -> list[str]:
    """Return a page's lines: header, text, footer, with empty lines between them."""
    parts = [(truth[name] or "").splitlines() for name in ("header", "text", "footer")]
    return [*parts[0], *[""] * bool(parts[0]), *parts[1], *[""] * bool(parts[2]), *parts[2]]


def typeset(sheets: Sequence[Sequence[str]], width: int, height: int, points: float) -> bytes:
    """Return a PDF of `width` x `height` points with the given lines on each sheet, in Helvetica of `points` an em."""
    count = len(sheets)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {count}/Kids[{kids}]>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, lines in enumerate(sheets):
        text = "".join(
            "({}) '\n".format(line.translate({ord(c): "\\" + c for c in "\\()"})) for line in lines
        )
        content = (
            f"BT /F {points} Tf {1.35 * points} TL {points * 1.5} {height - points} Td\n{text}ET".encode(
                "cp1252"
            )
        )
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {width} {height}]"
            f"/Resources<</Font<</F 3 0 R>>>>/Contents {5 + 2 * i} 0 R>>".encode(),
            b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        ]
    pdf, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(pdf))
        pdf += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return (
        pdf
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(pdf)}\n%%EOF\n"
        ).encode()
    )


def cost() -> list[dict[str, float]]:
    """Measure an A4 page of 10-point text at usual resolutions."""
    print(f"\nmeasure_ink, A4\n{'dpi':>8}{'pixels':>14}{'ms':>8}{'height':>10}{'of type':>10}")
    lines = [line for row in read_rows("truth.jsonl") for line in (row["truth"]["text"] or "").splitlines()]
    wide = ["  ".join(pair) for pair in zip(lines[:110:2], lines[1:110:2], strict=True)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder, "a4.pdf")
        sheet.write_bytes(typeset([wide], *A4, POINTS))
        for dpi in (72, 150, 300, 600):
            times = []
            for _ in range(9):  # a page loaded, measured and dropped, as in the engine
                rgb = load_page(PageRef(str(sheet), 1), dpi)
                started = time.thread_time()
                ink = measure_ink(rgb)
                times.append(1e3 * (time.thread_time() - started))
                shape = rgb.shape
                del rgb
            em = (ink.text_height or 0.0) / (POINTS * dpi / 72)
            ms = statistics.median(times)
            print(f"{dpi:8}{shape[1]:8}x{shape[0]:<5}{ms:8.1f}{ink.text_height or 0:10.1f}{em:10.3f}")
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
