"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fedveil.errors import CheckpointError, ConfigurationError, FedveilError

if TYPE_CHECKING:
    from torch import nn

    from fedveil.config import Config
    from fedveil.federation import Result

__all__ = ["main"]

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
            _complain(
                "interrupted", "finished rounds are kept; continue with --resume" if kept else ""
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # whoever read our output has had enough: typer ends silently
        except (FedveilError, OSError) as error:
            if _debug:
                traceback.print_exc()
            _complain("error", str(error))
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
    app(arguments, prog_name="fedveil")


def _complain(word: str, message: str) -> None:
    # Text, not markup: messages hold brackets.
    line = Text.assemble((word, "bold red"), f": {message}" if message else "")
    Console(stderr=True).print(line, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        import fedveil

        print(f"fedveil {fedveil.__version__}")
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
Workers = Annotated[int | None, typer.Option(min=1, help="Client processes.", show_default=False)]


@app.callback()
def _start(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
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


@app.command()
def run(
    file: File,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue after the last finished round.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run from the run folder first.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds in all.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default=False)] = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Run the federation that a TOML file describes (see docs/configuration.md).

    Options take precedence over the file.

    [bold]Examples[/bold]

      fedveil run federation.toml

      fedveil run federation.toml --rounds 10 --workers 4

      fedveil run federation.toml --resume    [dim]after an interruption[/dim]
    """
    from fedveil.config import build, load_config, open_secret
    from fedveil.report import ConsoleProgress

    folder = str(out.absolute()) if out is not None else None
    config = load_config(file).change(rounds=rounds, workers=workers, out=folder)
    _check_folder(config, resume=resume, overwrite=overwrite)
    console = Console()
    fresh = not config.secret_path.exists()
    open_secret(config)
    _say(console, f"secret: {config.secret_path}" + (" (new: keep it, keep it safe)" * fresh))
    with ConsoleProgress(console) as progress:
        federation = build(config, observer=progress)
        result = federation.run(config.federation.rounds, resume=resume, overwrite=overwrite)
    _report(console, config, result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Fine-tune a text classifier with ten clients, by four methods side by side.

    Real articles and a real model, from packages; no network and no account. See docs/data.md for
    what to install first.

    [bold]Examples[/bold]

      fedveil demo

      fedveil demo --out runs/demo --workers 4
    """
    from fedveil.demo import run_demo

    run_demo(out, workers or min(2, os.cpu_count() or 1), Console())


@app.command()
def units(
    model: Annotated[
        str,
        typer.Argument(
            help="The model.",
            show_default=False,
        ),
    ],
    choice: Annotated[
        str | None,
        typer.Option(
            help="Which units: neurons, mlp or columns; the file's own, or mlp, by default.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show which units of a model a proxy can withhold.

    MODEL is a folder, a name on the hub, "module:function", or a configuration file.

    [bold]Examples[/bold]

      fedveil units ./my-model

      fedveil units ./my-model --choice neurons

      fedveil units federation.toml
    """
    from fedveil.config.file import load_config
    from fedveil.config.models import load_untouched
    from fedveil.report.describe import unit_table
    from fedveil.state import read_state
    from fedveil.units import find_units

    name, folder = model, Path.cwd()
    if model.endswith(".toml"):
        config = load_config(model)
        name, folder = config.model.name, config.path.parent
        choice = choice or getattr(config.scheme, "units", None)
    owned = load_untouched(name, folder)
    _wide_console().print(unit_table(read_state(owned), find_units(owned, choice or "mlp")))


@app.command()
def inspect(
    message: Annotated[
        Path,
        typer.Argument(help="A message that a run has kept, or a client has.", show_default=False),
    ],
    debug: Debug = False,
) -> None:
    """Show what is in a message: what exactly leaves one side for the other.

    Messages are kept in the run folder if [bold]keep_messages[/bold] is set.

    [bold]Examples[/bold]

      fedveil inspect runs/federation/messages/round-000001/client-00.proxy.safetensors
    """
    from fedveil.report.describe import message_table
    from fedveil.wire import Message

    if not message.is_file():
        raise ConfigurationError("There is no such file", where=str(message))
    data = message.read_bytes()
    _wide_console().print(message_table(Message.from_bytes(data), len(data)))


def _check_folder(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Say what is in the way before anything is loaded."""
    if resume and overwrite:
        raise ConfigurationError(
            "--resume and --overwrite contradict each other", fix="Leave one out."
        )
    earlier = config.out / "checkpoints"
    if not resume and not overwrite and earlier.is_dir() and any(earlier.iterdir()):
        raise CheckpointError(
            "The run folder already holds a run",
            where=str(config.out),
            fix="Continue it with --resume, replace it with --overwrite, or name another with "
            "--out.",
        )


def _report(console: Console, config: Config, result: Result) -> None:
    from fedveil.report import plot, summarize, table, write_summary

    seconds = sum(record.seconds for record in result.rounds)
    schemes = {config.scheme_name: summarize(config.scheme_name, result, seconds=seconds)}
    summary: dict[str, Any] = {"fp32_bytes": result.parameters_bytes, "schemes": schemes}
    figures = write_summary(config.out, result.parameters_bytes, schemes)
    plot(summary, config.out / "summary.png")
    model = _save_model(config, result.global_model)
    console.print()
    console.print(table(summary))
    console.print()
    _say(console, f"figures: {figures}, {config.out / 'metrics.jsonl'}")
    _say(console, f"picture: {config.out / 'summary.png'}")
    _say(console, f"your tuned model: {model}")


def _save_model(config: Config, model: nn.Module) -> Path:
    """The model in its own format, or its tensors; a folder that is there is whole."""
    from fedveil.config.building import tokenizer_name
    from fedveil.config.models import load_tokenizer, quiet_transformers

    folder, aside = config.out / "model", config.out / "model.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if hasattr(model, "save_pretrained"):
        with quiet_transformers():
            model.save_pretrained(aside)  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        save_model(model, str(aside / "model.safetensors"))
    if config.data.task == "text-classification":
        load_tokenizer(tokenizer_name(config), config.path.parent).save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _wide_console() -> Console:
    """A console for tables with long names: where no screen sets a width, they are not folded."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)
