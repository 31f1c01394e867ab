"""A checkpoint of true size: seconds and memory to load it, and seconds a page by stage.

    python bench/make_checkpoint.py --preset 3b -o /tmp/random-3b
    python bench/large.py --checkpoint /tmp/random-3b --dtype bfloat16

Each dtype runs in a process of its own, so that the peak of one load is not hidden by another's. The peak is the kernel's own
high-water mark (VmHWM: everything resident, the mapped files of the checkpoint and the interpreter with its libraries included),
given as a ratio of the weights' bytes in the compute dtype. Weights are random: end tokens are ignored, and every page gets the
same number of new tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import environment
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from pagemill import Engine, Request, SamplingParams
from pagemill.model.config import read_config
from pagemill.model.loader import find_checkpoint
from pagemill.model.weights import expected_shapes

STAGES = ("prepare", "queued", "vision", "prefill", "decode")
_GB = 1e9


def draw_page(width: int, height: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return uint8 `[height, width, 3]`: lines of random words in black on white."""
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for y in range(24, height - 24, 18):
        words = [
            "".join(rng.choices("abcdefghilmnoprstuvz", k=rng.randint(1, 9))) for _ in range(width // 45)
        ]
        draw.text((32, y), " ".join(words), fill="black", font=font)
    return np.asarray(image)


def resident() -> dict[str, int]:
    """Return this process's resident bytes: VmHWM (the peak), VmRSS, and its parts RssAnon and RssFile."""
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return {name: int(fields[name].split()[0]) * 1024 for name in names}


class PeakSampler:
    """Follows the parts of the resident memory, whose peaks the kernel does not keep, in a thread."""

    def __init__(self, interval_s: float = 0.02) -> None:
        self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, args=(interval_s,), daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample(self) -> None:
        self.peak = {name: max(value, self.peak[name]) for name, value in resident().items()}

    def _follow(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self._sample()


def weight_bytes(checkpoint: str, dtype: str) -> int:
    """Return the bytes of a checkpoint's weights in `dtype`, a tied head counted once."""
    shapes = expected_shapes(read_config(find_checkpoint(checkpoint)))
    return sum(math.prod(shape) for shape in shapes.values()) * getattr(torch, dtype).itemsize


def measure(dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load the checkpoint and read the pages, in a process that has done nothing before."""
    before = resident()
    with PeakSampler() as sampler:
        engine = Engine.from_pretrained(
            args.checkpoint,
            dtype=dtype,
            kernels=args.kernels,
            weight_cache=args.weight_cache,
            num_threads=args.threads,
            max_num_seqs=args.concurrency,
            kv_cache_bytes=args.kv_cache_mb << 20,
        )
    loaded = resident()
    weights = weight_bytes(args.checkpoint, dtype)
    result: dict[str, Any] = {
        "dtype": dtype,
        "load_seconds": engine.load_seconds,
        "weight_bytes": weights,
        "before_load": before,
        "peak_of_load": sampler.peak,
        "after_load": loaded,
        "peak_ratio": sampler.peak["VmHWM"] / weights,
        "peak_ratio_without_interpreter": (sampler.peak["VmHWM"] - before["VmRSS"]) / weights,
        "engine": engine.describe(),
    }
    if not args.pages:
        engine.close()
        return result
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    pages = [draw_page(args.width, args.height, seed) for seed in range(args.pages)]
    with engine:
        started = time.perf_counter()
        outputs = engine.generate([Request(engine.page_prompt, [page]) for page in pages], params)
        seconds = time.perf_counter() - started
    if failed := [output.error for output in outputs if output.error]:
        raise RuntimeError(failed[0])
    result["seconds_a_page"] = seconds / len(pages)
    result["stages"] = {
        stage: statistics.median(asdict(output.seconds)[stage] for output in outputs) for stage in STAGES
    }
    result["tokens"] = asdict(outputs[0].tokens)
    result["peak_with_pages"] = resident()
    return result


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    peak, after = result["peak_of_load"], result["after_load"]
    print(f"\n{result['dtype']}")
    print(f"  weights            {result['weight_bytes'] / _GB:.2f} GB in this dtype")
    print(f"  load               {result['load_seconds']:.1f} s; weights {result['engine']['weights']}")
    print(
        f"  peak of loading    {peak['VmHWM'] / _GB:.2f} GB, {result['peak_ratio']:.3f} of the weights "
        f"({result['peak_ratio_without_interpreter']:.3f} without the {result['before_load']['VmRSS'] / _GB:.2f} GB before it); "
        f"its parts at most {peak['RssAnon'] / _GB:.2f} GB anonymous, {peak['RssFile'] / _GB:.2f} GB of files"
    )
    print(
        f"  after loading      {after['VmRSS'] / _GB:.2f} GB: {after['RssAnon'] / _GB:.2f} anonymous, "
        f"{after['RssFile'] / _GB:.2f} of files; a KV cache of {args.kv_cache_mb << 20:,} bytes is part of all of these"
    )
    if args.pages:
        tokens = result["tokens"]
        print(
            f"  a page             {result['seconds_a_page']:.1f} s ({args.pages} pages, {args.concurrency} at a time; "
            f"{tokens['image']} image, {tokens['prompt']} prompt, {tokens['output']} new tokens)"
        )
        print(
            "  stages (median)    " + ", ".join(f"{name} {s:.2f} s" for name, s in result["stages"].items())
        )
        print(f"  peak with pages    {result['peak_with_pages']['VmHWM'] / _GB:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder written by make_checkpoint.py")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], nargs="+", default=["bfloat16"])
    parser.add_argument("--kernels", choices=["auto", "reference", "native", "triton"], default="auto")
    parser.add_argument(
        "--weight-cache",
        choices=["auto", "on", "off"],
        default="off",
        help="keep the packed weights, and map them in the next run (default off: pack)",
    )
    parser.add_argument("--pages", type=int, default=2, help="0 only loads (default 2)")
    parser.add_argument(
        "--concurrency", type=int, default=1, help="pages at a time (default 1: clean stages)"
    )
    parser.add_argument("--width", type=int, default=728)
    parser.add_argument("--height", type=int, default=1036)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-mb", type=int, default=128, help="KV cache in MiB (default 128)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()

    where = environment.describe()
    environment.show(where)
    print(f"{args.checkpoint}, pages of {args.width} x {args.height} px, {args.threads} threads")
    results = []
    for dtype in args.dtype:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            results.append(fresh.submit(measure, dtype, args).result())
        show(results[-1], args)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"environment": where, "options": vars(args), "results": results}, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
