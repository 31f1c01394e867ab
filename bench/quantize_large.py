"""What `pagemill quantize` takes on a checkpoint of the 3B shape, and the error that its layers are left with.

    python bench/make_checkpoint.py --preset 3b -o FOLDER
    python bench/quantize_large.py FOLDER

The first block of the tower and the first layer of the decoder are calibrated on drawn pages and rounded by every scheme; the
whole takes as many times that as there are blocks. Weights are noise, and so are the errors: what matters is how they compare.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import environment
import torch
from large import draw_page

from pagemill.cost.meters import MemoryMeter
from pagemill.model.config import read_config
from pagemill.model.prompt import Prompter
from pagemill.model.rope import mrope_positions
from pagemill.model.weights import Checkpoint
from pagemill.pages.preprocess import ImageProcessor
from pagemill.quantize.make import SCHEMES, Job, quantise_unit
from pagemill.quantize.walk import CalibrationPage, Walk

PAGE_PX = (728, 1036)
ANSWER = 256  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=16)
    args = parser.parse_args()
    config = read_config(args.folder)
    processor = ImageProcessor.from_folder(args.folder)
    prompter = Prompter(args.folder, config.text.vocab_size, config.image_token_id)
    pages = []
    random = torch.Generator().manual_seed(0)
    for seed in range(args.pages):
        image = processor.prepare(draw_page(*PAGE_PX, seed))
        words = torch.randint(0, 2000, (ANSWER,), generator=random).tolist()
        tokens, (start,) = prompter.expand([1, config.image_token_id, 1, *words], [image.num_tokens])
        merge = config.vision.spatial_merge_size
        positions, _ = mrope_positions(len(tokens), [(start, image.grid)], merge)
        pages.append(CalibrationPage(tokens, positions, start, image.patches, image.levels, image.grid))
    environment.show(environment.describe())
    print(
        f"pages: {len(pages)}, tokens: {sum(len(p.token_ids) for p in pages)}, patches: {sum(len(p.patches) for p in pages)}\n"
    )
    print("| scheme | block | layers | s, inputs | s, rounding | peak, GB | error | nearest |")
    print("|---|---|--:|--:|--:|--:|---|---|")
    checkpoint = Checkpoint(args.folder, config)
    counts = {"vision.blocks.0": config.vision.depth, "text.layers.0": config.text.num_layers}
    for scheme in SCHEMES:
        job = Job(args.folder, config, Path("unused"), scheme)
        walk = Walk(config, pages, checkpoint.read)
        walk.begin()
        total = 0.0
        for unit, count in counts.items():
            memory, begun = MemoryMeter(), time.perf_counter()
            weights = walk.weights(unit)
            fed = walk.run(unit, weights, products=job.text == "int4" and unit.startswith("text."))
            walked = time.perf_counter()
            _, _, report = quantise_unit(job, unit, weights, fed)
            ended = time.perf_counter()
            total += count * (ended - begun)
            errors, nearest = (
                ", ".join(f"{one[kind]:.1e}" for one in report.layers.values())
                for kind in ("error", "nearest")
            )
            print(
                f"| {scheme} | {unit} | {count} | {walked - begun:.1f} | {ended - walked:.1f} | {memory.peak() / 1e9:.1f} "
                f"| {errors} | {nearest} |",
                flush=True,
            )
        print(f"| {scheme} | all, by these | | | {total / 60:.0f} min | | | |", flush=True)


if __name__ == "__main__":
    main()
