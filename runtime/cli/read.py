"""The commands about pages: `pagemill read`, `describe` and `score`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagemill.cli.common import (
    EXIT_PAGE_FAILED,
    DebugOption,
    DeviceOption,
    DevicesOption,
    DTypeOption,
    KvCacheDTypeOption,
    KvCacheOption,
    MaxNewTokensOption,
    ModelOption,
    QuantizeOption,
    StallSecondsOption,
    WeightCacheOption,
    app,
    load_engine,
    load_fleet,
    loading,
    not_nan,
    read_guidance,
    resolution_word,
    say,
    sentences,
    stderr,
)
from pagemill.errors import ConfigError, DeviceError, printable

if TYPE_CHECKING:
    from pagemill.engine import Engine
    from pagemill.fleet import Fleet
    from pagemill.jobs import Output

_LONGEST_COMMAND = 500  # characters that are still worth repeating


@app.command(
    epilog="[bold]Exit code[/] 0: every page was read (degenerate pages count as read, with a warning). "
    "1: a page failed. 2: wrong usage, configuration or checkpoint, a device that is lost, or an output that cannot be written. "
    "70: a bug in pagemill. 130: interrupted. 141: the program that read standard output went away."
)
def read(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, PDF and TIFF files, folders, or globs.")
    ],
    model: ModelOption = "pagemill-tiny",
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="File to write; - is standard output.")
    ] = "-",
    format: Annotated[
        Literal["jsonl", "json", "md", "txt"] | None,
        typer.Option("--format", help="By default what the suffix of OUT says; jsonl for standard output."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with OUT, from the same folder: pages it holds are not read again."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    max_new_tokens: MaxNewTokensOption = None,
    dpi: Annotated[
        float | None,
        typer.Option(
            "--dpi",
            min=1,
            max=2400,
            callback=not_nan,
            metavar="N",
            help="PDF rendering; by default what the model likes.",
        ),
    ] = None,
    resolution: Annotated[
        str,
        typer.Option(
            "--resolution",
            callback=resolution_word,
            metavar="auto|full|N",
            help="auto scales a page so that its text has the height that the model reads best, full shows it as it is, "
            "N makes its longest side N pixels.",
        ),
    ] = "auto",
    crop: Annotated[bool, typer.Option("--crop", help="Cut off empty margins.")] = False,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance",
            metavar="page|off|SCHEMA.json|regex:PATTERN",
            help="What the output conforms to: the page's own JSON, nothing, a JSON schema in a file, or a regular "
            "expression. By default page for models that write such JSON.",
        ),
    ] = "auto",
    guard: Annotated[
        Literal["rescue", "stop", "off"],
        typer.Option(
            "--guard", help="What happens to a repetition loop: rolled back and avoided, ended, or nothing."
        ),
    ] = "rescue",
    drafts: Annotated[
        Literal["auto", "off"],
        typer.Option("--drafts", help="Verify several guessed tokens at a time; the output is the same."),
    ] = "auto",
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    stall_seconds: StallSecondsOption = None,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", min=1, max=4096, metavar="N", help="Pages in a device's model at a time."
        ),
    ] = None,
    kv_cache_gb: KvCacheOption = None,
    kv_cache_dtype: KvCacheDTypeOption = "auto",
    weight_cache: WeightCacheOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    debug: DebugOption = False,
) -> None:
    """Read pages and write one record a page.

    A record is on disk before its page counts as done.
    A run that was stopped, even by kill -9, goes on with --resume:
    no page is lost or written twice. Go on in the folder where the run began:
    from another one, relative names would be other files, and --resume refuses.
    One bad page never takes the others down. A file named twice is read once.

    [bold]Examples[/]

        pagemill read scan.png

        pagemill read scans/ contract.pdf -o pages.jsonl

        pagemill read scans/ contract.pdf -o pages.jsonl --resume

        pagemill read "inbox/*.pdf" -o inbox.md --model ./checkpoint

        pagemill read scans/ -o pages.jsonl --devices cuda:0,cuda:1

        pagemill read book.pdf --format txt | less
    """
    with sentences(debug):
        conforming = read_guidance(guidance)
        if devices is not None and device != "cpu":
            raise ConfigError("--device and --devices exclude each other.")
        if stall_seconds is not None and devices is None:
            raise ConfigError("--stall-seconds needs --devices: a process of its own can be ended.")
        # Here and below: what is slow to import waits until it is needed, so that --help is instant.
        from pagemill.jobs import list_inputs, open_output, run
        from pagemill.jobs.progress import ProgressReport, summary

        found = list_inputs(inputs)
        if found.repeated and not quiet:
            say(f"{found.repeated} of the inputs name a file a second time: each file is read once.")
        with open_output(output, format, resume=resume, overwrite=overwrite, sources=found.sources) as target:
            already = target.statuses.total()
            if already and not quiet:
                pages = "page is" if already == 1 else "pages are"
                say(f"{already} {pages} in {printable(target.name)} already.")
            if target.note is not None and not quiet:
                say(printable(target.note))
            to_terminal = not target.resumable and sys.stdout.isatty()
            live = stderr.is_terminal and not quiet and not to_terminal
            options: dict[str, Any] = {
                "quantize": quantize,
                "weight_cache": weight_cache,
                "concurrency": concurrency,
                "kv_cache_gb": kv_cache_gb,
                "kv_cache_dtype": kv_cache_dtype,
            }
            engine: Engine | Fleet
            with loading(model) if live else nullcontext():
                if devices is None:
                    engine = load_engine(model, device, dtype, **options)
                else:
                    engine = load_fleet(model, devices, dtype, stall_seconds=stall_seconds, **options)
            with engine:
                from pagemill.decode.sampler import SamplingParams

                params = SamplingParams(
                    max_new_tokens=max_new_tokens,
                    guidance=conforming,
                    guard=guard,
                    drafts=drafts,
                )
                report = ProgressReport(stderr, found, already=already, live=live)
                on_page = None if quiet else report.on_page
                try:
                    with report if not quiet else nullcontext():
                        totals = run(
                            engine,
                            found,
                            target,
                            on_page=on_page,
                            params=params,
                            dpi=dpi,
                            resolution=resolution if resolution in ("auto", "full") else int(resolution),
                            crop=crop,
                        )
                except (KeyboardInterrupt, DeviceError) as stop:
                    why = "stopped, for no device is left" if isinstance(stop, DeviceError) else "interrupted"
                    say(_how_to_resume(why, target, sys.argv[1:]))
                    raise
            if not quiet:
                say(summary(totals, target.name))
            if totals.failed:
                raise typer.Exit(EXIT_PAGE_FAILED)


@app.command()
def describe(
    model: ModelOption = "pagemill-tiny",
    device: DeviceOption = "cpu",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    weight_cache: WeightCacheOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, also on a terminal.")] = False,
    debug: DebugOption = False,
) -> None:
    """Load a model and print what would run: dtype, kernels, memory. JSON when not on a terminal."""
    with sentences(debug):
        with load_engine(model, device, dtype, quantize=quantize, weight_cache=weight_cache) as engine:
            facts = engine.describe()
        if as_json or not sys.stdout.isatty():
            print(json.dumps(facts, indent=2, ensure_ascii=False, default=str), flush=True)
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        for name, value in _flat(facts):
            table.add_row(escape(name), escape(value))
        Console().print(table)


@app.command(
    epilog="[bold]Exit code[/] 0: scored; rows without a counterpart are reported. 2: a file cannot be read, a line is broken, "
    "or the files have no page in common."
)
def score(
    truth: Annotated[
        str, typer.Argument(metavar="TRUTH.jsonl", help="What the pages say: `truth` or `assistant` rows.")
    ],
    read: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="What was read: records, or rows with `raw` output.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Score records against the truth by the metric of the DharmaOCR benchmark.

    benchmark_score is the mean of Levenshtein ratio and BLEU-4. Beside it stand
    character and word error rates, scores by field, rates of degenerate pages
    and of valid JSON, the worst pages, and 95 % intervals.

    Pages are matched by path, else by file name, and page number.
    What has no counterpart is not scored but reported; a failed page counts as empty.

    [bold]A row of TRUTH.jsonl[/], or one of the benchmark itself

        {"file": "scan.png", "page": 1, "truth": {"header": ..., "text": ...}}

        {"id": 17, "assistant": "{...}"}
    """
    with sentences(debug):
        from pagemill.score import report, show

        result = report(truth, read)
        if as_json:
            print(json.dumps(result, indent=1), flush=True)
        else:
            Console().print(show(result))


def _how_to_resume(why: str, output: Output, arguments: list[str]) -> str:
    if not output.resumable:
        return f"{why}."
    again = [argument for argument in arguments if argument != "--overwrite"]
    if "--resume" not in again:
        again.append("--resume")
    command = printable(shlex.join(["pagemill", *again]))
    if len(command) > _LONGEST_COMMAND:
        return f"{why}; finished pages are safe. Go on with the same command and --resume."
    return f"{why}; finished pages are safe. Go on with: {command}"


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
