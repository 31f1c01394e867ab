"""What all commands share: options, how an engine is loaded, and every error as one sentence with an exit code."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from pagemill.errors import ConfigError, PagemillError, printable

if TYPE_CHECKING:
    from pagemill.decode.guidance import Regex
    from pagemill.engine import Engine
    from pagemill.fleet import Fleet

EXIT_PAGE_FAILED = 1
EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

_LARGEST_SCHEMA = 1_000_000  # characters

app = typer.Typer(
    help="Document pages into structured text. Start with [bold]pagemill read scan.png[/].",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stderr = Console(stderr=True)


Device = Literal["cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float32"]
KvCacheDType = Literal["auto", "int8", "fp8"]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|DIR|ID",
        help="pagemill-tiny (embedded), a folder, or a Hugging Face id.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="LIST",
        help="Several devices, as in cuda:0,cuda:1: each loads the model in a process of its own, and reads pages as it is free.",
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option("--dtype", help="Arithmetic; auto is what the checkpoint is stored in."),
]
QuantizeOption = Annotated[
    Literal["none", "int8", "int4"],
    typer.Option(
        "--quantize",
        help="Round the weights while loading: int8, or int4 (the decoder; the rest int8). Faster, and smaller.",
    ),
]
WeightCacheOption = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(
        "--weight-cache",
        help="Keep the packed weights in the user's cache folder, for later starts to map; auto does from 1 GB on.",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def not_nan(value: float | None) -> float | None:
    """Refuse nan, which passes every range."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number.")
    return value


StallSecondsOption = Annotated[
    float | None,
    typer.Option(
        "--stall-seconds",
        min=5,
        callback=not_nan,
        metavar="X",
        help="With --devices: a device that ends no step in so long hangs, and its process is begun anew; inf waits for ever. "
        "By default 300 on a GPU, 3600 on a CPU; ten times that before its first page.",
    ),
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer for a page.")
]
KvCacheOption = Annotated[
    float | None,
    typer.Option(
        "--kv-cache-gb",
        min=0,
        max=1e6,
        callback=not_nan,
        metavar="X",
        help="Memory for the KV cache, in GB.",
    ),
]
KvCacheDTypeOption = Annotated[
    KvCacheDType,
    typer.Option(
        "--kv-cache-dtype",
        help="What the KV cache is stored in; auto is the arithmetic; int8 and fp8 (newer GPUs) hold twice the pages.",
    ),
]


def resolution_word(value: str) -> str:
    """Check what --resolution says."""
    if value not in ("auto", "full") and not (value.isdecimal() and 28 <= int(value) <= 20000):
        raise typer.BadParameter("give auto, full, or the pixels of the longest side, from 28 to 20000.")
    return value


def read_guidance(value: str) -> str | dict[str, Any] | Regex:
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


def load_engine(
    model: str,
    device: Device,
    dtype: DType,
    *,
    quantize: str = "none",
    weight_cache: str = "auto",
    concurrency: int | None = None,
    kv_cache_gb: float | None = None,
    kv_cache_dtype: KvCacheDType = "auto",
) -> Engine:
    """Load a model with the options that most commands have."""
    options = engine_options(dtype, quantize, weight_cache, concurrency, kv_cache_gb, kv_cache_dtype)
    return make_engine(model, device=device, **options)


def load_fleet(
    model: str, devices: str, dtype: DType, *, stall_seconds: float | None = None, **options: Any
) -> Fleet:
    """Load a model on each of `devices`, names with commas between; `options` are those of `engine_options`."""
    from pagemill.fleet import Fleet

    names = [name.strip() for name in devices.split(",")]
    options = engine_options(dtype, **options)
    return Fleet.from_pretrained(model, devices=names, stall_seconds=stall_seconds, **options)


def engine_options(
    dtype: DType,
    quantize: str = "none",
    weight_cache: str = "auto",
    concurrency: int | None = None,
    kv_cache_gb: float | None = None,
    kv_cache_dtype: KvCacheDType = "auto",
) -> dict[str, Any]:
    """Return what the options of a command are called in `EngineConfig`."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantize": quantize,
        "weight_cache": weight_cache,
        "kv_cache_dtype": kv_cache_dtype,
    }
    if concurrency is not None:
        options["max_num_seqs"] = concurrency
    if kv_cache_gb is not None:
        options["kv_cache_bytes"] = int(kv_cache_gb * 1e9)
    return options


def make_engine(model: str, **options: Any) -> Engine:
    """Load a model; `options` are those of `Engine.from_pretrained`."""
    # Torch's OpenMP threads would spin between its operations and take the cores from the native kernels'
    # own threads. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pagemill.engine import Engine

    return Engine.from_pretrained(model, **options)


def loading(model: str) -> AbstractContextManager[object]:
    """Say that a model is being loaded, while it is."""
    return stderr.status(f"loading {escape(printable(model))}")


@contextmanager
def sentences(debug: bool) -> Iterator[None]:
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
        say_error(str(error))
        raise typer.Exit(EXIT_USAGE) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_out_of_memory(error):
            say_error(
                "there is not enough memory: lower --concurrency and --kv-cache-gb, or take a smaller model."
            )
            raise typer.Exit(EXIT_USAGE) from None
        hint = "" if debug else " (--debug shows where)"
        say_error(f"{type(error).__name__}: {error}; this is a bug in pagemill{hint}.")
        raise typer.Exit(EXIT_BUG) from None


def _is_out_of_memory(error: Exception) -> bool:
    # torch says so in the text of a RuntimeError, on CPU and on GPU.
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def say_error(text: str) -> None:
    """Say what went wrong."""
    say(f"[red]error:[/] {escape(printable(text))}", markup=True)


def say(text: str, *, markup: bool = False) -> None:
    """Print a line on standard error."""
    stderr.print(text, markup=markup, highlight=False, soft_wrap=True)
