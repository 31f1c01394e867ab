"""`pagemill quantize`: a quantised checkpoint from a model and pages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pagemill.cli.common import DebugOption, app, say, sentences, stderr
from pagemill.errors import ConfigError, printable


@app.command(
    epilog="[bold]Exit code[/] 0: made. 2: wrong usage, a checkpoint or page that cannot be used, or no room; 130: interrupted. "
    "What is whole stays in DIR.partial, and the same command goes on from there."
)
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="pagemill-tiny, a folder, or a Hugging Face id.")
    ],
    pages: Annotated[
        list[str],
        typer.Option(
            "--pages", "-p", metavar="INPUT", help="Calibration pages: a file, folder or glob; repeatable."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    scheme: Annotated[
        Literal["int4-awq", "int8", "fp8", "mixed"],
        typer.Option(
            "--scheme",
            help="int4-awq: the decoder in 4 bits, the vision tower in 8. int8: both in 8. fp8: both in e4m3. mixed: as "
            "int4-awq, and the decoder in 8 bits too, for many rows at a time.",
        ),
    ] = "int8",
    group_size: Annotated[
        int, typer.Option("--group-size", metavar="32|64|128", help="Columns that share a scale in 4 bits.")
    ] = 128,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=10_000, metavar="N", help="Most calibration pages taken.")
    ] = 32,
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth",
            metavar="TRUTH.jsonl",
            help="What the calibration pages say; by default the model reads them first.",
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score", metavar="INPUT", help="Other pages, scored before and after; needs --score-truth."
        ),
    ] = None,
    score_truth: Annotated[
        str | None, typer.Option("--score-truth", metavar="TRUTH.jsonl", help="What those pages say.")
    ] = None,
    kv_scales: Annotated[
        bool,
        typer.Option(
            "--kv-scales", help="Also write scales for a float8 KV cache, which other engines want."
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Make a quantised checkpoint, calibrated on your own pages.

    The result is a compressed-tensors checkpoint, which pagemill, transformers and vLLM read, with a card (README.md): what was
    rounded, the error of every layer, the score before and after. A run that was stopped goes on at the block where it was.

    [bold]Examples[/]

        pagemill quantize Dharma-AI/Dharma-OCR-LITE --scheme int4-awq --pages scans/ -o dharma-int4

        pagemill quantize pagemill-tiny --scheme int8 -p calibration/ --score heldout/ --score-truth truth.jsonl -o tiny-int8
    """
    with sentences(debug):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `make_engine`
        if (score is None) != (score_truth is None):
            raise ConfigError("--score and --score-truth go together: pages, and what they say.")
        from pagemill import __version__
        from pagemill.cost.meters import MemoryMeter
        from pagemill.model.config import read_config
        from pagemill.model.loader import find_checkpoint
        from pagemill.quantize import calibrate, card, make

        folder = find_checkpoint(model)
        config = read_config(folder)
        job = make.Job(folder, config, output, scheme, group_size, kv_scales)
        make.check(job)
        held_out = None
        if score and score_truth:
            from pagemill.cost.compare import select_pages

            held_out = select_pages(score, score_truth)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
            console=stderr, transient=True,
        ) as progress:  # fmt: skip
            refs, answers = _answers(progress, model, pages, limit, truth)
            prepared = calibrate.prepare(model, folder, config, refs, answers)
            task = progress.add_task("quantising")

            def on_unit(unit: str, done: int, total: int) -> None:
                progress.update(task, description=f"quantising {unit}", completed=done, total=total)

            described: dict[str, Any] = {
                "pagemill": __version__,
                "model": printable(model),
                "calibration": {
                    "pages": len(prepared),
                    "tokens": sum(len(page.token_ids) for page in prepared),
                    "patches": sum(len(page.patches) for page in prepared),
                    "sources": [f"{printable(Path(ref.source).name)}:{ref.page}" for ref in refs],
                },
            }
            memory = MemoryMeter()

            def complete(made_in: Path, made: dict[str, Any]) -> None:
                made["peak_memory_bytes"] = memory.peak()
                if held_out is not None:
                    progress.update(task, description="scoring", total=None)
                    made["score"] = _scores(held_out, model, made_in)
                card.write_readme(made_in, made)

            made = make.make(job, prepared, described, on_unit, complete)
        say(
            f"[bold]{escape(printable(str(output)))}[/]: {made['bytes'] / 1e9:.3g} GB, {made['bytes_before'] / 1e9:.3g} before; "
            "its README.md is the card.",
            markup=True,
        )
        if "score" in made:
            before, after = (made["score"][when]["benchmark_score"] for when in ("before", "after"))
            say(f"benchmark_score {before:.4f} before, {after:.4f} after, on {made['score']['pages']} pages")


def _answers(
    progress: Progress, model: str, pages: list[str], limit: int, truth: str | None
) -> tuple[list[Any], list[Any]]:
    """The calibration pages, and what each says."""
    from pagemill.quantize import calibrate

    if truth is not None:
        from pagemill.cost.compare import select_pages

        known = select_pages(pages, truth)
        chosen = calibrate.spread(list(zip(known.refs, known.truths, strict=True)), limit)
        answers = [{name: row.fields.get(name) for name in row.order} for _, row in chosen]
        return [ref for ref, _ in chosen], answers
    refs = calibrate.find_pages(pages, limit)
    task = progress.add_task("reading calibration pages", total=len(refs))
    read = calibrate.read_answers(model, refs, lambda: progress.advance(task))
    progress.remove_task(task)
    return refs, read


def _scores(pages: Any, model: str, made: Path) -> dict[str, Any]:
    """Quality of the model before and after, on the same pages."""
    from pagemill.cost.compare import compare
    from pagemill.cost.engines import ReadOptions, parse_engine

    result = compare(pages, [parse_engine(f"before={model}"), parse_engine(f"after={made}")], ReadOptions())
    for run in result["runs"]:
        if run["error"] or run["quality"] is None:
            raise ConfigError(f"{run['name']}: {run['error'] or 'no page could be scored'}")
    before, after = (run["quality"] for run in result["runs"])
    keys = ("benchmark_score", "low", "high", "cer", "degeneration_rate")
    return {
        "pages": len(pages.refs),
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
    }
