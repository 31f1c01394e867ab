"""What drafts bring and cost: pages read with drafts and without, the same tokens either way.

    python bench/drafts.py --json bench/results/drafts.json

The pages are samples of `bench/pages`, by where guesses can come from:

digital     `digital_3p.pdf`, a PDF made by a program, with a text layer
layer       prose, legal pages and forms as the pictures of a PDF with their true text as its layer, header, text, margin, footer;
            each page a file of its own, so that the text layer is what helps
noisy       the same, one letter in twenty of the layer dropped, doubled or replaced, as a bad recognition engine leaves it
callable    the pictures alone, with the noisy text from `draft_text`
forms       the pictures of the forms: earlier pages and the page itself
scans       the pictures of prose and legal pages: as good as no source

Every measurement has a fresh engine, which knows no page. "off" and "auto" take turns; the first of the two changes from
repeat to repeat. The ratio is that of processor times (all threads of the process, one thread in the kernels), which other
programs disturb less than the clock: the median over the repeats, and the range. The next column is the same for the engine's
steps alone, without the preparation of pages. `guess` is the share of all processor time that deciding, guessing and keeping
count take, so what drafts cost where they are of no use; shares are steadier than ratios of two runs. A sequence-step is one
sequence getting tokens in one step. One page at a time, a third of the pages are read. Exits with 1 if any output token or its
log-probability differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import environment
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pagemill import Engine, SamplingParams
from pagemill.score import read_truths
from pagemill.sequence import Sequence

Drafts = Literal["off", "auto"]
Read = Callable[[npt.NDArray[np.uint8]], str]
DAMAGE = 0.05
"""Share of the characters of a noisy text that are damaged."""


def page_texts() -> dict[str, str]:
    """Return the true text of every sample page, in the order in which a text layer has it."""
    return {
        truth.name: "\n".join(
            value for field in ("header", "text", "margin", "footer") if (value := truth.fields[field])
        )
        for truth in read_truths(environment.PAGES / "truth.jsonl")
    }


def damage(text: str, seed: int) -> str:
    """Drop, double or replace `DAMAGE` of the characters."""
    rng = random.Random(seed)
    letters = "abcdefghilmnoprstuv"
    return "".join(
        rng.choice(("", c + c, rng.choice(letters))) if c != "\n" and rng.random() < DAMAGE else c
        for c in text
    )


def write_pdf(path: Path, picture: Path, text: str) -> None:
    """Write a PDF of one page: a picture, a point a pixel, and `text` over it in the invisible mode."""
    image = Image.open(picture).convert("RGB")
    width, height = image.size
    lines = text.split("\n")
    step = height / (len(lines) + 1)
    content = b"q %d 0 0 %d 0 0 cm /I Do Q BT /F %d Tf 3 Tr\n" % (width, height, max(1, int(step * 0.7)))
    for i, line in enumerate(lines, 1):
        escaped = (
            line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode("cp1252", "replace")
        )
        content += b"1 0 0 1 8 %.1f Tm (" % (height - i * step) + escaped + b") Tj\n"
    content += b"ET"
    pixels = zlib.compress(image.tobytes())
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Contents 4 0 R"
        b"/Resources<</XObject<</I 5 0 R>>/Font<</F 6 0 R>>>>>>" % (width, height),
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceRGB/BitsPerComponent 8"
        b"/Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (width, height, len(pixels), pixels),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    data, places = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj%s endobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(places) + 1
    path.write_bytes(
        data
        + b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\n" % (size, table, size)
        + b"startxref\n%d\n%%%%EOF\n" % len(data)
    )


class Case(NamedTuple):
    """Pages to read, and where guesses come from beyond the engine."""

    name: str
    files: list[str]
    draft_text: Read | None = None


def make_cases(folder: Path, count: int) -> list[Case]:
    """Return the cases, with up to `count` pages each; PDFs are written to `folder`."""
    texts = page_texts()

    def pages(*kinds: str) -> list[Path]:
        """As many of each kind, in turn."""
        kinds_of_pages = [sorted(environment.PAGES.glob(f"{kind}_[0-9][0-9].png")) for kind in kinds]
        return [page for together in zip(*kinds_of_pages, strict=True) for page in together][:count]

    mixed = pages("prose", "legal", "form")
    noisy = {page.name: damage(texts[page.name], i) for i, page in enumerate(mixed)}
    by_content: dict[bytes, str] = {}
    for page in mixed:
        write_pdf(folder / f"{page.stem}.pdf", page, texts[page.name])
        write_pdf(folder / f"{page.stem}_noisy.pdf", page, noisy[page.name])
        pixels = np.asarray(Image.open(page).convert("RGB"))
        by_content[hashlib.sha256(pixels.tobytes()).digest()] = noisy[page.name]
    return [
        Case("digital", [str(environment.PAGES / "digital_3p.pdf")]),
        Case("layer", [str(folder / f"{page.stem}.pdf") for page in mixed]),
        Case("noisy", [str(folder / f"{page.stem}_noisy.pdf") for page in mixed]),
        Case(
            "callable", list(map(str, mixed)), lambda rgb: by_content[hashlib.sha256(rgb.tobytes()).digest()]
        ),
        Case("forms", list(map(str, pages("form")))),
        Case("scans", list(map(str, pages("prose", "legal")))),
    ]


class Output(NamedTuple):
    """What must not depend on drafts."""

    finish_reason: str | None
    token_ids: list[int]
    logprobs: list[float | None]


@dataclass
class Measurement:
    """One reading of a case."""

    cpu: float
    wall: float
    step_cpu: float
    guess_cpu: float
    """Seconds: of all threads, of the clock, of the engine's thread in its steps, and there for guessing."""
    steps: int
    sequence_steps: int
    proposed: int
    accepted: int
    output_tokens: int
    outputs: dict[tuple[str, int], Output]


def measure(
    case: Case, dtype: str, concurrency: int, drafts: Drafts, args: argparse.Namespace
) -> Measurement:
    """Read a case with a fresh engine; loading is outside the times."""
    m = Measurement(0, 0, 0, 0, 0, 0, 0, 0, 0, {})
    by_sequence: list[Sequence] = []
    with Engine.from_pretrained(args.model, dtype=dtype, max_num_seqs=concurrency, num_threads=1) as engine:
        step = engine.core.step

        def counted() -> tuple[list[Sequence], list[Sequence]]:
            started = time.thread_time()
            advanced, finished = step()
            m.step_cpu += time.thread_time() - started
            m.steps += 1
            m.sequence_steps += len(advanced)
            by_sequence.extend(finished)
            return advanced, finished

        def timed(function: Callable[..., None]) -> Callable[..., None]:
            def call(*given: Any) -> None:
                started = time.thread_time()
                function(*given)
                m.guess_cpu += time.thread_time() - started

            return call

        core = engine.core
        core.step = counted  # type: ignore[method-assign]
        core._guess = timed(core._guess)  # type: ignore[method-assign]
        core.draft_budget.observe = timed(core.draft_budget.observe)  # type: ignore[method-assign]
        params = SamplingParams(max_new_tokens=args.max_new_tokens, drafts=drafts)
        cpu, wall = time.process_time(), time.perf_counter()
        pages = list(engine.read(case.files, params=params, draft_text=case.draft_text))
        m.cpu, m.wall = time.process_time() - cpu, time.perf_counter() - wall
    for page in pages:
        if page.error:
            raise SystemExit(page.error)
        m.proposed += page.drafts[0]
        m.accepted += page.drafts[1]
        m.output_tokens += page.tokens.output
    # A sequence knows its document, and the pages of one are told apart by their pictures.
    for seq in by_sequence:
        assert seq.page is not None
        key = seq.page.document, hash(seq.images[0].digest)
        logprobs = [None if math.isnan(x) else x for x in seq.logprobs]
        m.outputs[key] = Output(seq.finish_reason, seq.output_ids, logprobs)
    return m


def compare(on: Measurement, off: Measurement) -> list[str]:
    """Return the pages that came out otherwise with drafts, and what differs there."""
    if on.outputs.keys() != off.outputs.keys():
        return ["other pages"]
    different = []
    for key, theirs in off.outputs.items():
        ours, name = on.outputs[key], Path(key[0]).name
        if ours.token_ids != theirs.token_ids:
            pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
            shorter = min(len(ours.token_ids), len(theirs.token_ids))
            different.append(f"{name}: token {next((i for i, (a, b) in pairs if a != b), shorter)}")
        elif ours != theirs:
            count = sum(a != b for a, b in zip(ours.logprobs, theirs.logprobs, strict=True))
            different.append(f"{name}: {count} log-probabilities or the finish reason")
    return different


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run_case(case: Case, dtype: str, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure drafts off and auto in turn; print and return one row."""
    runs: dict[Drafts, list[Measurement]] = {"off": [], "auto": []}
    different: set[str] = set()
    for repeat in range(args.repeats):
        order: tuple[Drafts, Drafts] = ("off", "auto") if repeat % 2 == 0 else ("auto", "off")
        for drafts in order:
            runs[drafts].append(measure(case, dtype, concurrency, drafts, args))
        different.update(compare(runs["auto"][-1], runs["off"][-1]))
    off, auto = runs["off"], runs["auto"]
    pages = len(off[0].outputs)

    def ratios(of: Callable[[Measurement], float]) -> dict[str, float]:
        return spread([of(a) / of(b) for a, b in zip(off, auto, strict=True)])

    def mean(of: Callable[[Measurement], float]) -> float:
        return statistics.mean(map(of, auto))

    row: dict[str, Any] = {
        "case": case.name,
        "dtype": dtype,
        "concurrency": concurrency,
        "pages": pages,
        "output_tokens": off[0].output_tokens,
        "faster": ratios(lambda m: m.cpu),
        "faster_steps": ratios(lambda m: m.step_cpu),
        "faster_wall": ratios(lambda m: m.wall),
        "cpu_s_per_page": {k: spread([m.cpu / pages for m in v]) for k, v in runs.items()},
        "pages_per_s": {k: spread([pages / m.wall for m in v]) for k, v in runs.items()},
        "steps": {k: spread([float(m.steps) for m in v]) for k, v in runs.items()},
        "sequence_steps": {k: spread([float(m.sequence_steps) for m in v]) for k, v in runs.items()},
        "guess_share": mean(lambda m: m.guess_cpu / m.cpu),
        "proposed": mean(lambda m: m.proposed),
        "accepted": mean(lambda m: m.accepted),
        "accepted_per_step": mean(lambda m: m.accepted / m.steps),
        "accepted_per_sequence_step": mean(lambda m: m.accepted / m.sequence_steps),
        "different": sorted(different),
    }
    faster = row["faster"]
    cpu, speed = row["cpu_s_per_page"], row["pages_per_s"]
    share = row["accepted"] / row["proposed"] if row["proposed"] else 0.0
    print(
        f"{case.name:9}{dtype:>9}{concurrency:4}{pages:4}{row['steps']['off']['median']:7.0f}"
        f"{row['steps']['auto']['median']:6.0f}{row['accepted_per_step']:7.2f}"
        f"{row['accepted_per_sequence_step']:7.2f}{row['proposed']:7.0f}{share:6.0%}"
        f"{cpu['off']['median']:8.3f}{cpu['auto']['median']:7.3f}"
        f"{faster['median']:7.3f} ({faster['min']:.3f} to {faster['max']:.3f})"
        f"{row['faster_steps']['median']:7.3f}{row['guess_share']:7.1%}{speed['off']['median']:7.2f}{speed['auto']['median']:6.2f}"
        f"  {'same' if not different else f'{len(different)} DIFFER'}",
        flush=True,
    )
    for what in sorted(different):
        print(f"    {what}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pagemill-tiny", help="embedded model, folder or hub id")
    parser.add_argument("--pages", type=int, default=24, help="most pages of a case (default 24)")
    parser.add_argument("--cases", nargs="+", help="names of the cases (default all)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=768)
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    where = environment.describe()
    environment.show(where)
    print(
        f"{args.model}, greedy, at most {args.max_new_tokens} new tokens, one thread, {args.repeats} repeats\n\n"
        f"{'':26}{'steps':>13}{'accepted per':>14}{'':13}{'CPU s a page':>15}{'times faster':>15}{'':13}"
        f"{'in':>3}{'':7}{'pages/s':>13}\n{'':22}{'':4}{'off':>7}{'auto':>6}{'step':>7}{'seq.':>7}{'tried':>7}{'kept':>6}"
        f"{'off':>8}{'auto':>7}{'':25}{'steps':>7}{'guess':>7}{'off':>7}{'auto':>6}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder), args.pages)
        if unknown := set(args.cases or ()) - {case.name for case in cases}:
            parser.error(f"no case {', '.join(sorted(unknown))}")
        measure(cases[0], args.dtype[0], 1, "auto", args)  # first calls set up threads and libraries
        for dtype in args.dtype:
            for concurrency in args.concurrency:
                count = args.pages if concurrency > 1 else args.pages // 3
                rows += [
                    run_case(case._replace(files=case.files[:count]), dtype, concurrency, args)
                    for case in cases
                    if args.cases is None or case.name in args.cases
                ]
    if args.json:
        result = {"environment": where, "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if any(row["different"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
