"""The commands about cost: `pagemill bench`, `compare`, `simulate` and `report`."""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from pagemill.cli.common import (
    EXIT_PAGE_FAILED,
    DebugOption,
    DeviceOption,
    DTypeOption,
    KvCacheDTypeOption,
    KvCacheOption,
    MaxNewTokensOption,
    ModelOption,
    QuantizeOption,
    app,
    make_engine,
    not_nan,
    resolution_word,
    say,
    sentences,
    stderr,
)
from pagemill.errors import ConfigError, printable


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
    model: ModelOption = "pagemill-tiny",
    device: DeviceOption = "cpu",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=4096, metavar="N", help="Pages in the model at a time.")
    ] = 32,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            min=1e-6,
            max=1e6,
            callback=not_nan,
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
            help="One run for each value of concurrency, rate, dtype, quantize, resolution, guard, drafts, threads, ...; "
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
            "--resolution", callback=resolution_word, metavar="auto|full|N", help="As in `pagemill read`."
        ),
    ] = "auto",
    max_new_tokens: MaxNewTokensOption = None,
    kv_cache_gb: KvCacheOption = None,
    kv_cache_dtype: KvCacheDTypeOption = "auto",
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
    debug: DebugOption = False,
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
    with sentences(debug):
        from pagemill.cost import bench as measure
        from pagemill.cost import workload as asked

        base = asked.Settings(
            model=model,
            dtype=dtype,
            quantize=quantize,
            device=device,
            concurrency=concurrency,
            rate=rate,
            guard=guard,
            guidance=guidance,
            drafts=drafts,
            resolution=resolution,
            max_new_tokens=max_new_tokens,
            kv_cache_gb=kv_cache_gb,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
        )
        runs = asked.sweep(base, sweep or [])
        paid = None if price is None else asked.price_of(price)
        if output is not None:
            measure.check_writable(output)
        load = asked.load_workload(
            inputs or [], pages=pages, truth=truth, seed=seed, warmup=warmup, repeats=repeats
        )
        with measure.Progress(stderr, len(runs), load) as progress:
            result = measure.bench(
                load,
                runs,
                load=lambda settings: make_engine(settings.model, **settings.engine_options()),
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
    max_new_tokens: MaxNewTokensOption = None,
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
            callback=not_nan,
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
            callback=not_nan,
            metavar="N",
            help="PDF rendering for others than pagemill.",
        ),
    ] = 150.0,
    device: DeviceOption = "cpu",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="RESULT.json", help="File to write, after every engine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: DebugOption = False,
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
    with sentences(debug):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `make_engine`
        from pagemill.cost import compare as comparison
        from pagemill.cost.bench import Progress, check_writable, write
        from pagemill.cost.engines import ReadOptions, parse_engine
        from pagemill.cost.workload import Workload

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
            quantize=quantize,
        )
        with Progress(stderr, len(specs), Workload([], pages.refs, len(pages.refs))) as progress:
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
        str,
        typer.Option(
            "--precision",
            metavar="NAME",
            help="bfloat16 or float32; int8 or int4, as --quantize makes them; fp8, w8a8 or w4a16: the decoder alone.",
        ),
    ] = "bfloat16",
    kv_cache_dtype: KvCacheDTypeOption = "auto",
    pages: Annotated[
        int, typer.Option("--pages", min=1, max=100_000_000, metavar="N", help="Pages to read.")
    ] = 10_000,
    image_tokens: Annotated[
        float,
        typer.Option(
            "--image-tokens", min=1, max=1e5, callback=not_nan, metavar="N", help="Of a page, on average."
        ),
    ] = 1518,
    output_tokens: Annotated[
        float,
        typer.Option(
            "--output-tokens", min=1, max=1e5, callback=not_nan, metavar="N", help="Of a page, on average."
        ),
    ] = 700,
    spread: Annotated[
        float,
        typer.Option(
            "--spread",
            min=0,
            max=3,
            callback=not_nan,
            metavar="X",
            help="Log-normal scatter of output tokens: sigma.",
        ),
    ] = 0.4,
    degeneration: Annotated[
        float,
        typer.Option(
            "--degeneration", min=0, max=1, callback=not_nan, metavar="X", help="Share of looping pages."
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
            callback=not_nan,
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
            callback=not_nan,
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
            callback=not_nan,
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
    debug: DebugOption = False,
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
    with sentences(debug):
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
            kv_cache_dtype=kv_cache_dtype,
            concurrency=ask.integers("concurrency", concurrency),
            kv_cache_gb=(None,) if kv_cache_gb is None else ask.numbers("kv-cache-gb", kv_cache_gb),
            guards=ask.guards(guard),
            price=price,
            utilisation=utilisation,
            pages_per_month=pages_per_month,
            against=against,
        )
        with stderr.status("simulating") as status:
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
            callback=not_nan,
            metavar="X",
            help="Price of the machine, for results that state none.",
        ),
    ] = None,
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="Heading of the page.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what was written.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write results as one HTML page: a verdict, quality against cost, stages, pages in time, sweeps.

    The page needs no network and carries published prices and scores beside the results, with their sources.

    [bold]Examples[/]

        pagemill report sweep.json compare.json -o report.html

        pagemill report sweep.json --usd-per-hour 0.71 --pages-per-month 500k
    """
    with sentences(debug):
        from pagemill.cost.report import write

        size = write(
            results,
            output,
            pages_per_month=_pages_per_month(pages_per_month),
            usd_per_hour=usd_per_hour,
            title=title,
        )
        if not quiet:
            say(f"{printable(output)}: {size / 1e6:.1f} MB, needs no network.")
