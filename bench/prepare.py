"""Pages prepared per second: decode, and resize + normalise + patch, by number of threads.

The page is A4 at 200 DPI (1654 x 2339 px), the target 1288 px on its long side. Every stage runs in threads of one
process, as in the engine; Hugging Face's PIL image processor runs in the same session on the same page. Each number is
the median over `--rounds` rounds, with the 20th and 80th percentile, and the milliseconds of processor time that a page
took: on a machine that is busy with other work, that it does not grow with the threads shows that the stage scales.

    python bench/prepare.py [--threads 1,2] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from rich.console import Console
from rich.table import Table

import pagemill._native as _native
from pagemill.kernels.patchify import patchify
from pagemill.pages.preprocess import ImageProcessor, smart_resize
from pagemill.pages.source import PageRef, load_page

A4_AT_200_DPI = (1654, 2339)
MAX_PIXELS = 1288 * 924
SAMPLES = Path(__file__).parent / "pages"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args()
    counts = [int(count) for count in options.threads.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        stages = make_stages(Path(folder))
        results = [
            {"stage": name, "threads": count, **measure(stage, count, pages, options.rounds)}
            for name, (stage, pages) in stages.items()
            for count in counts
        ]
    report = {"machine": machine(), "results": results}
    show(report, counts)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def make_stages(folder: Path) -> dict[str, tuple[Callable[[], object], int]]:
    """Return each stage's work on one page, and how many pages a thread does in one round."""
    with Image.open(SAMPLES / "prose_00.png") as sample:
        picture = sample.convert("RGB").resize(A4_AT_200_DPI, Image.Resampling.LANCZOS)
    rgb = np.asarray(picture)
    picture.save(folder / "page.jpg", quality=85)
    picture.save(folder / "page.png")
    picture.save(folder / "scan.pdf", resolution=200.0, quality=85)
    processor = ImageProcessor(max_pixels=MAX_PIXELS)
    height, width = smart_resize(rgb.shape[0], rgb.shape[1], max_pixels=MAX_PIXELS)
    digital = SAMPLES / "digital_3p.pdf"
    digital_dpi = 72.0 * A4_AT_200_DPI[1] / load_page(PageRef(str(digital), 1), 72.0).shape[0]

    def load(name: Path, dpi: float = 200.0) -> Callable[[], object]:
        return lambda: load_page(PageRef(str(name), 1), dpi)

    stages: dict[str, tuple[Callable[[], object], int]] = {
        f"patchify to {width}x{height}, native": (
            lambda: patchify(rgb, height, width),
            16,
        ),
        "patchify and content hash": (lambda: processor.prepare(rgb), 16),
        "patchify, reference": (
            lambda: patchify(rgb, height, width, kernel="reference"),
            3,
        ),
        "Hugging Face PIL image processor": (hugging_face(picture), 3),
        "decode JPEG": (load(folder / "page.jpg"), 8),
        "decode PNG": (load(folder / "page.png"), 8),
        "render PDF, a scan": (load(folder / "scan.pdf"), 4),
        "render PDF, text": (load(digital, digital_dpi), 4),
        "JPEG to patches and hash": (
            lambda: processor.prepare(load_page(PageRef(str(folder / "page.jpg"), 1), 200.0)),
            8,
        ),
    }
    return stages


def hugging_face(picture: Image.Image) -> Callable[[], object]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=MAX_PIXELS)
    return lambda: processor(images=[picture], return_tensors="np")


def measure(stage: Callable[[], object], threads: int, pages: int, rounds: int) -> dict[str, float]:
    """Return pages per second: median and 20th and 80th percentile over the rounds, after one to warm up; and processor time."""

    def work(_: int) -> None:
        for _ in range(pages):
            stage()

    rates, cpu_ms = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            list(pool.map(work, range(threads)))
            rates.append(threads * pages / (time.perf_counter() - start))
            cpu_ms.append((time.process_time() - cpu_start) * 1e3 / (threads * pages))
    spread = statistics.quantiles(rates[1:], n=5, method="inclusive")
    return {
        "pages_per_s": statistics.median(rates[1:]),
        "p20": spread[0],
        "p80": spread[-1],
        "cpu_ms_per_page": statistics.median(cpu_ms[1:]),
    }


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": _native.isa(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def show(report: dict[str, Any], counts: list[int]) -> None:
    table = Table(title="Pages per second: median (p20-p80), and processor time per page")
    table.add_column("stage")
    for count in counts:
        table.add_column(f"{count} thread{'s' * (count > 1)}", justify="right")
    rows: dict[str, list[str]] = {}
    for result in report["results"]:
        cell = f"{result['pages_per_s']:.1f} ({result['p20']:.1f}-{result['p80']:.1f}) {result['cpu_ms_per_page']:.1f} ms"
        rows.setdefault(result["stage"], []).append(cell)
    for stage, cells in rows.items():
        table.add_row(stage, *cells)
    console = Console(width=110)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))


if __name__ == "__main__":
    main()
