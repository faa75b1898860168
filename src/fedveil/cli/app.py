"""The program: its group of commands, its errors and warnings, and what commands share."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fedveil.errors import FedveilError, FedveilWarning
from fedveil.printable import one_line, printable
from fedveil.screen import PlainConsole

__all__ = ["Debug", "File", "app", "complain", "main", "say", "wide_console"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

_WIDE = 200

# Read by the libraries as they are imported. A user who wants the reports can ask for them.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Group(TyperGroup):
    """Commands whose errors become one clear message and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = ctx.invoked_subcommand == "run"
            complain(
                "interrupted", "finished rounds are kept; continue with --resume" if kept else ""
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # whoever read our output has had enough: typer ends silently
        except (FedveilError, OSError) as error:
            if _debug:
                traceback.print_exc()
            complain("error", str(error))
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


app = typer.Typer(
    name="fedveil",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, or the error's code after one clear message on stderr."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("default", FedveilWarning)
        warnings.showwarning = partial(_show_warning, set())
        app(arguments, prog_name="fedveil")


def _show_warning(
    told: set[str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are meant for whoever runs a command; others for who wrote the library."""
    if issubclass(category, FedveilWarning):
        if str(message) not in told:
            complain("warning", str(message))
        told.add(str(message))
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(printable(text))


def complain(word: str, message: str) -> None:
    """Print an error or a warning on stderr, without markup."""
    # Text, not markup: messages hold brackets.
    line = Text.assemble((word, "bold red"), f": {printable(message)}" if message else "")
    PlainConsole(stderr=True).print(line, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        import platform

        import torch

        import fedveil
        from fedveil.quantization import kernels_in_use

        print(f"fedveil {fedveil.__version__}")
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        print(f"{versions}, {kernels_in_use()} kernels")
        raise typer.Exit


def _set_debug(wanted: bool) -> None:
    global _debug
    _debug = _debug or wanted


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_set_debug, expose_value=False, help="Show where an error came from."
    ),
]
File = Annotated[Path, typer.Argument(help="The configuration file.", show_default=False)]


@app.callback()
def _start(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version, and which kernels do the work.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on other people's data: the data stay with them, the model with you.

    Clients receive only a [bold]proxy[/bold] of the model: some units withheld, the rest quantized.

    [bold]Examples[/bold]

      fedveil demo                   [dim]four methods side by side[/dim]

      fedveil run federation.toml    [dim]your model, your data[/dim]

      fedveil units ./my-model       [dim]what would be withheld[/dim]
    """


def say(console: Console, line: str) -> None:
    """Print a line as it is, without markup."""
    console.print(Text(one_line(line)), soft_wrap=True)


def wide_console() -> Console:
    """A console for tables with long names: where no screen sets a width, they are not folded."""
    console = PlainConsole()
    return console if console.is_terminal or "COLUMNS" in os.environ else PlainConsole(width=_WIDE)
