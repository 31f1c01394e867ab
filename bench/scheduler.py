"""What scheduling itself costs: 256 running sequences, a null model.

    python bench/scheduler.py

Times `Scheduler.schedule` and `Scheduler.update` (with block publishing) of decode steps, and the layout that the
runner makes from a plan, in microseconds a step: median, and the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from types import SimpleNamespace

import numpy as np

from pagemill.cache import BlockPool, ImageCache
from pagemill.decode.control import Control
from pagemill.decode.sampler import SamplingParams
from pagemill.runner import Runner
from pagemill.scheduler import Scheduler
from pagemill.sequence import Sequence, SequenceImage


def sequence(i: int, prompt: int, image: int, output: int) -> Sequence:
    params = SamplingParams()
    return Sequence(
        id=i, token_ids=[7] * prompt, num_prompt=prompt,
        images=[SequenceImage(
                4, image, (1, 2, 2 * image), i.to_bytes(16, "little"), np.empty((3, 0), np.float32), np.empty((0, 0), np.uint8)
            )],
        positions=np.zeros((3, prompt), np.int32), position_delta=0, params=params, max_tokens=prompt + output,
        stop_ids=frozenset({1, 2}), control=Control(params),
    )  # fmt: skip


def measure(num_seqs: int, steps: int, block_size: int) -> dict[str, list[float]]:
    prompt, image, output = 420, 400, steps + 64
    blocks = BlockPool(num_seqs * (-(-(prompt + output) // block_size) + 1), block_size)
    images: ImageCache[int] = ImageCache(image * num_seqs)
    scheduler = Scheduler(
        blocks, images, max_num_seqs=num_seqs, max_step_tokens=8192, max_step_image_tokens=image * num_seqs
    )
    scheduler.predictor.mean, scheduler.predictor.deviation = output / image, 0.0
    runner = Runner.__new__(Runner)  # the layout needs no model and no KV memory
    runner.block_size, runner.images, runner.device = block_size, SimpleNamespace(), "cpu"
    runner._block_tables = np.zeros((num_seqs, -(-(prompt + output) // block_size)), np.int32)
    for i in range(num_seqs):
        scheduler.add(sequence(i, prompt, image, output))
    seconds: dict[str, list[float]] = {"schedule": [], "update": [], "schedule + update": [], "layout": []}
    while len(seconds["update"]) < steps:
        t0 = time.perf_counter()
        plan = scheduler.schedule()
        t1 = time.perf_counter()
        decoding = len(plan.work) == num_seqs and all(work.num_tokens == 1 for work in plan.work)
        if decoding:
            t2 = time.perf_counter()
            runner._lay_out(plan)
            seconds["layout"].append(time.perf_counter() - t2)
        last = sum(work.drafted >= 0 for work in plan.work)
        tokens, logprobs = [[5]] * last, [[0.0]] * last
        t3 = time.perf_counter()
        scheduler.update(plan, tokens, logprobs)
        t4 = time.perf_counter()
        if decoding:
            seconds["schedule"].append(t1 - t0)
            seconds["update"].append(t4 - t3)
            seconds["schedule + update"].append(t1 - t0 + t4 - t3)
    scheduler.check()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    result = {}
    for name, values in measure(args.sequences, args.steps, args.block_size).items():
        quantiles = statistics.quantiles([1e6 * v for v in values], n=10)
        result[name] = dict(p20=quantiles[1], median=statistics.median(values) * 1e6, p80=quantiles[7])
        row = result[name]
        print(f"{name:18} {row['median']:7.0f} us a step   (p20 {row['p20']:.0f}, p80 {row['p80']:.0f})")
    print(
        f"{args.sequences} sequences, {args.steps} decode steps, Python {platform.python_version()}, {platform.machine()}"
    )
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
