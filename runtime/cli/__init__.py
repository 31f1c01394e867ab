"""The command line: `pagemill read`, `describe`, `score`, `quantize`, `tune`, and `bench`, `compare`, `simulate`, `report`."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Annotated

import typer

from pagemill import __version__
from pagemill.cli import cost, quantize, read, tune  # noqa: F401, they add their commands to `app`
from pagemill.cli.common import EXIT_INTERRUPTED, app, stderr

__all__ = ["app", "main"]


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


def main() -> None:
    """Run the command line."""
    _interrupt_once_then_quit()
    app()


def _interrupt_once_then_quit() -> None:
    """Make the first Ctrl-C a KeyboardInterrupt, which winds up; the second one leaves at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell that starts us in the background has it ignored
    interrupted = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            stderr.show_cursor(True)
            os._exit(EXIT_INTERRUPTED)
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
