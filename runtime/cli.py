"""The command line: `pagemill read`, `describe`, `score`, `bench`, `compare` and `simulate`."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagemill import __version__
from pagemill.errors import ConfigError, PagemillError, printable

if TYPE_CHECKING:
    from pagemill.decode.guidance import Regex
    from pagemill.engine import Engine
    from pagemill.jobs import Output

EXIT_PAGE_FAILED = 1
EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

_LARGEST_SCHEMA = 1_000_000  # characters
_LONGEST_COMMAND = 500  # characters that are still worth repeating

app = typer.Typer(
    help="Document pages into structured text. Start with [bold]pagemill read scan.png[/].",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_stderr = Console(stderr=True)


_Device = Literal["cpu", "cuda"]
_DType = Literal["auto", "bfloat16", "float32"]

_Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|DIR|ID",
        help="pagemill-tiny (embedded), a folder, or a Hugging Face id.",
    ),
]
_DeviceOption = Annotated[_Device, typer.Option("--device", help="Where the model runs.")]
_DTypeOption = Annotated[
    _DType,
    typer.Option("--dtype", help="Arithmetic; auto is what the checkpoint is stored in."),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _number(value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # it passes every range
        raise typer.BadParameter("nan is not a number.")
    return value


def _resolution(value: str) -> str:
    if value not in ("auto", "full") and not (value.isdecimal() and 28 <= int(value) <= 20000):
        raise typer.BadParameter("give auto, full, or the pixels of the longest side, from 28 to 20000.")
    return value


def _guidance(value: str) -> str | dict[str, Any] | Regex:
    """What --guidance says: a word, a regular expression, or the JSON schema of a file."""
    if value in ("auto", "page", "off"):
        return value
    if value.startswith("regex:"):
        from pagemill.decode.guidance import Regex

        return Regex(value.removeprefix("regex:"))
    try:
        with open(value, encoding="utf-8") as file:
            text = file.read(_LARGEST_SCHEMA + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--guidance {value}: give page, off, or a file with a JSON schema ({error})."
        ) from None
    if len(text) > _LARGEST_SCHEMA:
        raise ConfigError(f"--guidance {value}: the schema is larger than {_LARGEST_SCHEMA} characters.")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--guidance {value} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"--guidance {value} should hold a JSON schema, an object.")
    return schema


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pagemill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="[bold]Exit code[/] 0: every page was read (degenerate pages count as read, with a warning). "
    "1: a page failed. 2: wrong usage, configuration or checkpoint, or the output cannot be written. "
    "70: a bug in pagemill. 130: interrupted. 141: the program that read standard output went away."
)
def read(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, PDF and TIFF files, folders, or globs.")
    ],
    model: _Model = "pagemill-tiny",
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
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer for a page.")
    ] = None,
    dpi: Annotated[
        float | None,
        typer.Option(
            "--dpi",
            min=1,
            max=2400,
            callback=_number,
            metavar="N",
            help="PDF rendering; by default what the model likes.",
        ),
    ] = None,
    resolution: Annotated[
        str,
        typer.Option(
            "--resolution",
            callback=_resolution,
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
    device: _DeviceOption = "cpu",
    dtype: _DTypeOption = "auto",
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option("--quantize", help="Quantise the weights (not supported yet)."),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, max=4096, metavar="N", help="Pages in the model at a time."),
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(
            "--kv-cache-gb",
            min=0,
            max=1e6,
            callback=_number,
            metavar="X",
            help="Memory for the KV cache, in GB.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    debug: _Debug = False,
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

        pagemill read book.pdf --format txt | less
    """
    with _sentences(debug):
        if quantize is not None:
            raise ConfigError(
                f"--quantize {quantize} is not supported yet: leave it out to run the checkpoint as it is."
            )
        conforming = _guidance(guidance)
        # Here and below: what is slow to import waits until it is needed, so that --help is instant.
        from pagemill.jobs import list_inputs, open_output, run
        from pagemill.jobs.progress import ProgressReport, summary

        found = list_inputs(inputs)
        if found.repeated and not quiet:
            _say(f"{found.repeated} of the inputs name a file a second time: each file is read once.")
        with open_output(output, format, resume=resume, overwrite=overwrite, sources=found.sources) as target:
            already = target.statuses.total()
            if already and not quiet:
                pages = "page is" if already == 1 else "pages are"
                _say(f"{already} {pages} in {printable(target.name)} already.")
            if target.note is not None and not quiet:
                _say(printable(target.note))
            to_terminal = not target.resumable and sys.stdout.isatty()
            live = _stderr.is_terminal and not quiet and not to_terminal
            with _loading(model) if live else nullcontext():
                engine = _load(model, device, dtype, concurrency=concurrency, kv_cache_gb=kv_cache_gb)
            with engine:
                from pagemill.decode.sampler import SamplingParams

                params = SamplingParams(
                    max_new_tokens=max_new_tokens,
                    guidance=conforming,
                    guard=guard,
                    drafts=drafts,
                )
                report = ProgressReport(_stderr, found, already=already, live=live)
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
                except KeyboardInterrupt:
                    _say(_how_to_resume(target, sys.argv[1:]))
                    raise
            if not quiet:
                _say(summary(totals, target.name))
            if totals.failed:
                raise typer.Exit(EXIT_PAGE_FAILED)


@app.command()
def describe(
    model: _Model = "pagemill-tiny",
    device: _DeviceOption = "cpu",
    dtype: _DTypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, also on a terminal.")] = False,
    debug: _Debug = False,
) -> None:
    """Load a model and print what would run: dtype, kernels, memory. JSON when not on a terminal."""
    with _sentences(debug):
        with _load(model, device, dtype) as engine:
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
    debug: _Debug = False,
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
    with _sentences(debug):
        from pagemill.score import report, show

        result = report(truth, read)
        if as_json:
            print(json.dumps(result, indent=1), flush=True)
        else:
            Console().print(show(result))


@app.command(
    epilog="[bold]Exit code[/] 0: measured. 1: a page failed. 2: wrong usage, configuration or checkpoint, no page to read, or "
    "the result cannot be written."
)
def bench(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT...]",
            help="Pages to read; by default the sample pages of the source tree, which are scored too.",
        ),
    ] = None,
    model: _Model = "pagemill-tiny",
    device: _DeviceOption = "cpu",
    dtype: _DTypeOption = "auto",
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=4096, metavar="N", help="Pages in the model at a time.")
    ] = 32,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            min=1e-6,
            max=1e6,
            callback=_number,
            metavar="R",
            help="Pages that arrive in a second, at random; by default all are there.",
        ),
    ] = None,
    pages: Annotated[
        int | None,
        typer.Option(
            "--pages", min=1, metavar="N", help="Pages of a run; more than there are repeat them, cold."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="NAME=A,B,...",
            help="One run for each value of concurrency, rate, dtype, resolution, guard, guidance, drafts, threads, ...; "
            "several sweeps multiply.",
        ),
    ] = None,
    guard: Annotated[
        Literal["rescue", "stop", "off"], typer.Option("--guard", help="As in `pagemill read`.")
    ] = "rescue",
    guidance: Annotated[
        Literal["auto", "page", "off"], typer.Option("--guidance", help="As in `pagemill read`.")
    ] = "auto",
    drafts: Annotated[
        Literal["auto", "off"], typer.Option("--drafts", help="As in `pagemill read`.")
    ] = "auto",
    resolution: Annotated[
        str,
        typer.Option(
            "--resolution", callback=_resolution, metavar="auto|full|N", help="As in `pagemill read`."
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer for a page.")
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(
            "--kv-cache-gb",
            min=0,
            max=1e6,
            callback=_number,
            metavar="X",
            help="Memory for the KV cache, in GB.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=4096, metavar="N", help="Threads of the kernels.")
    ] = None,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, metavar="N", help="Pages read before a run, not counted.")
    ] = 2,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, max=1000, metavar="N", help="Runs of a point; the median counts."),
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of the order and the arrivals of pages.")
    ] = 0,
    price: Annotated[
        str | None,
        typer.Option(
            "--price",
            metavar="USD|GPU:PROVIDER",
            help="What the machine costs an hour: dollars, or a price in the reference data (l4:aws, h100-sxm:spot).",
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option("--truth", metavar="TRUTH.jsonl", help="What the pages say, as for `pagemill score`."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="RESULT.json", help="File to write, after every run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: _Debug = False,
) -> None:
    """Measure pages a second, latency and cost on this machine.

    Reads pages and reports how fast they came out, when the first token
    was there, where a page's time went, what was wasted, and what it costs.

    [bold]Examples[/]

        pagemill bench

        pagemill bench scans/ --truth truth.jsonl --price 0.35 -o result.json

        pagemill bench --sweep concurrency=1,4,16 --sweep dtype=float32,bfloat16

        pagemill bench --sweep rate=0.5,1,2,3 --pages 200
    """
    with _sentences(debug):
        from pagemill.cost import bench as measure

        base = measure.Settings(
            model=model,
            dtype=dtype,
            device=device,
            concurrency=concurrency,
            rate=rate,
            guard=guard,
            guidance=guidance,
            drafts=drafts,
            resolution=resolution,
            max_new_tokens=max_new_tokens,
            kv_cache_gb=kv_cache_gb,
            threads=threads,
        )
        runs = measure.sweep(base, sweep or [])
        paid = None if price is None else measure.price_of(price)
        if output is not None:
            measure.check_writable(output)
        load = measure.load_workload(
            inputs or [], pages=pages, truth=truth, seed=seed, warmup=warmup, repeats=repeats
        )
        with measure.Progress(_stderr, len(runs), load) as progress:
            result = measure.bench(
                load,
                runs,
                load=lambda settings: _engine(settings.model, **settings.engine_options()),
                price=paid,
                on_run=progress.on_run,
                on_page=progress.on_page,
                on_result=None if output is None else lambda result: measure.write(result, output),
            )
        if as_json:
            print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)
        else:
            Console().print(measure.show(result))
        if any(run["failed"] for run in result["runs"]):
            raise typer.Exit(EXIT_PAGE_FAILED)


@app.command(
    epilog="[bold]Exit code[/] 0: every engine read every page. 1: an engine could not be used, or a page failed. "
    "2: wrong usage, no page with a truth, or the result cannot be written."
)
def compare(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, PDF and TIFF files, folders, or globs.")
    ],
    truth: Annotated[
        str,
        typer.Option("--truth", metavar="TRUTH.jsonl", help="What the pages say, as for `pagemill score`."),
    ],
    engine: Annotated[
        list[str],
        typer.Option(
            "--engine",
            "-e",
            metavar="NAME=SPEC",
            help="A model of pagemill, openai:URL#MODEL, command:PROGRAM with {image}, or python:MODULE:FUNCTION. "
            "Give it once for each engine.",
        ),
    ],
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="[NAME=]PRICE",
            help="What an engine costs: dollars an hour or GPU:PROVIDER, as for `pagemill bench`, USD/page, or "
            "INPUT+OUTPUT/Mtoken. Without NAME, of all that have none.",
        ),
    ] = None,
    alignment: Annotated[
        bool,
        typer.Option(
            "--alignment",
            help="For pagemill's engines: bits per character of the truth, given the page (nothing is generated).",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer for a page.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            min=1,
            max=4096,
            metavar="N",
            help="Pages in an engine at a time; by default 32 for pagemill, 8 for an endpoint, one a core for a program, "
            "1 for a callable.",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            max=86400,
            callback=_number,
            metavar="S",
            help="Seconds for a page of an endpoint or a program.",
        ),
    ] = 300.0,
    dpi: Annotated[
        float,
        typer.Option(
            "--dpi",
            min=1,
            max=2400,
            callback=_number,
            metavar="N",
            help="PDF rendering for others than pagemill.",
        ),
    ] = 150.0,
    device: _DeviceOption = "cpu",
    dtype: _DTypeOption = "auto",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="RESULT.json", help="File to write, after every engine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: _Debug = False,
) -> None:
    """Read the same pages with several engines: quality, stability, speed and cost side by side.

    Pages without a row in TRUTH.jsonl are not read.
    An engine that cannot be used costs itself alone, and so does a page that fails.

    [bold]Examples[/]

        pagemill compare scans/ --truth truth.jsonl -e tiny=pagemill-tiny -e "Tesseract=command:tesseract {image} - -l por"

        pagemill compare scans/ --truth truth.jsonl -e vllm=openai:http://localhost:8000/v1#Dharma-AI/Dharma-OCR-LITE
        --price vllm=1.99 -o result.json

        pagemill compare scans/ --truth truth.jsonl -e a=./checkpoint-a -e b=./checkpoint-b --alignment
    """
    with _sentences(debug):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `_engine`
        from pagemill.cost import compare as comparison
        from pagemill.cost.bench import Progress, Workload, check_writable, write
        from pagemill.cost.engines import ReadOptions, parse_engine

        specs = [parse_engine(given) for given in engine]
        names = [spec.name for spec in specs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two engines are called {twice}: give each its own NAME=.")
        prices = comparison.parse_prices(price or [], names)
        if output is not None:
            check_writable(output)
        pages = comparison.select_pages(inputs, truth)
        options = ReadOptions(
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            dpi=dpi,
            timeout=timeout,
            device=device,
            dtype=dtype,
        )
        with Progress(_stderr, len(specs), Workload([], pages.refs, len(pages.refs))) as progress:
            result = comparison.compare(
                pages,
                specs,
                options,
                prices=prices,
                alignment=alignment,
                workload={"inputs": inputs, "truth": truth},
                on_run=progress.on_run,
                on_page=progress.on_page,
                on_result=None if output is None else lambda result: write(result, output),
            )
        if as_json:
            print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)
        else:
            Console().print(comparison.show(result))
        if any(run["failed"] or run["error"] for run in result["runs"]):
            raise typer.Exit(EXIT_PAGE_FAILED)


@app.command(
    epilog="[bold]Exit code[/] 0: simulated. 2: wrong usage, an unknown device, price or shape, or pages that cannot fit."
)
def simulate(
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="ID,...", help="GPUs of the reference data, or files of measured machines."
        ),
    ] = "h100-sxm",
    shape: Annotated[
        str,
        typer.Option(
            "--shape", metavar="3b|7b|DIR", help="Shape of the model, or a folder with a config.json."
        ),
    ] = "3b",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="bfloat16, fp8, int8, int4 or float32.")
    ] = "bfloat16",
    pages: Annotated[
        int, typer.Option("--pages", min=1, max=100_000_000, metavar="N", help="Pages to read.")
    ] = 10_000,
    image_tokens: Annotated[
        float,
        typer.Option(
            "--image-tokens", min=1, max=1e5, callback=_number, metavar="N", help="Of a page, on average."
        ),
    ] = 1518,
    output_tokens: Annotated[
        float,
        typer.Option(
            "--output-tokens", min=1, max=1e5, callback=_number, metavar="N", help="Of a page, on average."
        ),
    ] = 700,
    spread: Annotated[
        float,
        typer.Option(
            "--spread",
            min=0,
            max=3,
            callback=_number,
            metavar="X",
            help="Log-normal scatter of output tokens: sigma.",
        ),
    ] = 0.4,
    degeneration: Annotated[
        float,
        typer.Option(
            "--degeneration", min=0, max=1, callback=_number, metavar="X", help="Share of looping pages."
        ),
    ] = 0.002,
    guard: Annotated[
        str, typer.Option("--guard", metavar="NAME,...", help="What is done about loops: off, stop, rescue.")
    ] = "rescue",
    detect_tokens: Annotated[
        int,
        typer.Option(
            "--detect-tokens", min=1, metavar="N", help="Tokens of a loop until the guard finds it."
        ),
    ] = 300,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, max=1_000_000, metavar="N", help="Where a loop ends at the latest."
        ),
    ] = 8192,
    concurrency: Annotated[
        str, typer.Option("--concurrency", metavar="N,...", help="Pages in the batch at a time.")
    ] = "128",
    kv_cache_gb: Annotated[
        str | None,
        typer.Option(
            "--kv-cache-gb", metavar="X,...", help="Memory for the KV cache; by default what is left."
        ),
    ] = None,
    pages_per_day: Annotated[
        float | None,
        typer.Option(
            "--pages-per-day",
            min=1e-6,
            max=1e12,
            callback=_number,
            metavar="N",
            help="Pages arrive at random; by default all are there.",
        ),
    ] = None,
    day: Annotated[
        Literal["flat", "office"], typer.Option("--day", help="How arrivals spread over a day.")
    ] = "flat",
    order: Annotated[
        Literal["arrival", "shortest", "longest", "oracle"],
        typer.Option("--order", help="Of pages that are all there; oracle: longest output first."),
    ] = "arrival",
    price: Annotated[
        str,
        typer.Option(
            "--price",
            metavar="USD|KIND|PROVIDER",
            help="Dollars an hour, or on-demand, spot, serverless, or a provider.",
        ),
    ] = "on-demand",
    utilisation: Annotated[
        float,
        typer.Option(
            "--utilisation",
            min=0.001,
            max=1,
            callback=_number,
            metavar="X",
            help="Share of paid time in which pages are read.",
        ),
    ] = 0.7,
    pages_per_month: Annotated[
        float,
        typer.Option(
            "--pages-per-month",
            min=1,
            max=1e15,
            callback=_number,
            metavar="N",
            help="To say how many devices it takes.",
        ),
    ] = 1e6,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="API", help="A hosted service to hold the cost against."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Hold the cost model against published speeds, and stop.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of lengths, loops and arrivals.")
    ] = 0,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="RESULT.json", help="File to write.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: _Debug = False,
) -> None:
    """Say what a GPU would do with your pages, without one.

    The engine's own scheduler and KV cache run, with the cost model's time in place of a
    model. Lists are separated by commas; every combination is one run.

    [bold]Examples[/]

        pagemill simulate --device l4,l40s,h100-sxm --concurrency 32,128

        pagemill simulate --degeneration 0.0242 --guard off,stop,rescue --shape 7b --device l40s

        pagemill simulate --pages-per-day 500000 --day office --price spot --against aws/Textract

        pagemill simulate --published
    """
    with _sentences(debug):
        from pagemill.cost import scenario as ask
        from pagemill.cost.bench import check_writable, write
        from pagemill.cost.model import PageStats
        from pagemill.cost.simulator import Degeneration, Workload

        if published:
            Console().print(ask.show_published())
            return
        if output is not None:
            check_writable(output)
        scenario = ask.Scenario(
            workload=Workload(
                pages=pages,
                stats=PageStats(image_tokens, output_tokens, output_sigma=spread),
                degeneration=Degeneration(degeneration, detect_tokens=detect_tokens),
                max_new_tokens=max_new_tokens,
                pages_per_day=pages_per_day,
                day_profile=ask.OFFICE_DAY if day == "office" else (1.0,) * 24,
                order=order,
                seed=seed,
            ),
            devices=ask.words(device),
            shape=shape,
            precision=precision,
            concurrency=ask.integers("concurrency", concurrency),
            kv_cache_gb=(None,) if kv_cache_gb is None else ask.numbers("kv-cache-gb", kv_cache_gb),
            guards=ask.guards(guard),
            price=price,
            utilisation=utilisation,
            pages_per_month=pages_per_month,
            against=against,
        )
        with _stderr.status("simulating") as status:
            result = ask.answer(scenario, on_run=lambda name: status.update(f"simulating {escape(name)}"))
        if output is not None:
            write(result, output)
        if as_json:
            print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)
        else:
            Console().print(ask.show(result))


def _pages_per_month(value: str) -> int:
    """What --pages-per-month says: a count, with k, M or G for thousands, millions and billions."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(value[-1:].lower(), 1)
    digits = value if factor == 1 else value[:-1].rstrip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12 and int(digits)):
        raise ConfigError(f"--pages-per-month {value}: give a count of pages, such as 250000, 500k or 2M.")
    return int(digits) * factor


@app.command(
    epilog="[bold]Exit code[/] 0: the page was written. 2: a result file cannot be read or is not of this version, or the page "
    "cannot be written."
)
def report(
    results: Annotated[
        list[str],
        typer.Argument(metavar="RESULTS.json...", help="What bench, compare and simulate wrote."),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="Page to write; an older report is replaced.")
    ] = "report.html",
    pages_per_month: Annotated[
        str, typer.Option("--pages-per-month", metavar="N", help="Volume of the verdict, such as 500k or 2M.")
    ] = "2M",
    usd_per_hour: Annotated[
        float | None,
        typer.Option(
            "--usd-per-hour",
            min=0,
            max=1e6,
            callback=_number,
            metavar="X",
            help="Price of the machine, for results that state none.",
        ),
    ] = None,
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="Heading of the page.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what was written.")] = False,
    debug: _Debug = False,
) -> None:
    """Write results as one HTML page: a verdict, quality against cost, stages, pages in time, sweeps.

    The page needs no network and carries published prices and scores beside the results, with their sources.

    [bold]Examples[/]

        pagemill report sweep.json compare.json -o report.html

        pagemill report sweep.json --usd-per-hour 0.71 --pages-per-month 500k
    """
    with _sentences(debug):
        from pagemill.cost.report import write

        size = write(
            results,
            output,
            pages_per_month=_pages_per_month(pages_per_month),
            usd_per_hour=usd_per_hour,
            title=title,
        )
        if not quiet:
            _say(f"{printable(output)}: {size / 1e6:.1f} MB, needs no network.")


def main() -> None:
    """Run the command line."""
    _interrupt_once_then_quit()
    app()


def _load(
    model: str,
    device: _Device,
    dtype: _DType,
    *,
    concurrency: int | None = None,
    kv_cache_gb: float | None = None,
) -> Engine:
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if concurrency is not None:
        options["max_num_seqs"] = concurrency
    if kv_cache_gb is not None:
        options["kv_cache_bytes"] = int(kv_cache_gb * 1e9)
    return _engine(model, **options)


def _engine(model: str, **options: Any) -> Engine:
    # Torch's OpenMP threads would spin between its operations and take the cores from the native kernels'
    # own threads. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pagemill.engine import Engine

    return Engine.from_pretrained(model, **options)


def _loading(model: str) -> AbstractContextManager[object]:
    return _stderr.status(f"loading {escape(printable(model))}")


@contextmanager
def _sentences(debug: bool) -> Iterator[None]:
    """Turn every error into one sentence on standard error and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(EXIT_PIPE_CLOSED) from None
    except PagemillError as error:
        if debug:
            traceback.print_exc()
        _error(str(error))
        raise typer.Exit(EXIT_USAGE) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_out_of_memory(error):
            _error(
                "there is not enough memory: lower --concurrency and --kv-cache-gb, or take a smaller model."
            )
            raise typer.Exit(EXIT_USAGE) from None
        hint = "" if debug else " (--debug shows where)"
        _error(f"{type(error).__name__}: {error}; this is a bug in pagemill{hint}.")
        raise typer.Exit(EXIT_BUG) from None


def _is_out_of_memory(error: Exception) -> bool:
    # torch says so in the text of a RuntimeError, on CPU and on GPU.
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def _error(text: str) -> None:
    _say(f"[red]error:[/] {escape(printable(text))}", markup=True)


def _say(text: str, *, markup: bool = False) -> None:
    _stderr.print(text, markup=markup, highlight=False, soft_wrap=True)


def _how_to_resume(output: Output, arguments: list[str]) -> str:
    if not output.resumable:
        return "interrupted."
    again = [argument for argument in arguments if argument != "--overwrite"]
    if "--resume" not in again:
        again.append("--resume")
    command = printable(shlex.join(["pagemill", *again]))
    if len(command) > _LONGEST_COMMAND:
        return "interrupted; finished pages are safe. Go on with the same command and --resume."
    return f"interrupted; finished pages are safe. Go on with: {command}"


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _interrupt_once_then_quit() -> None:
    """Make the first Ctrl-C a KeyboardInterrupt, which winds up; the second one leaves at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell that starts us in the background has it ignored
    interrupted = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            _stderr.show_cursor(True)
            os._exit(EXIT_INTERRUPTED)
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
