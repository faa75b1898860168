"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from fedveil.errors import CheckpointError, ConfigurationError, FedveilError

if TYPE_CHECKING:
    from fedveil.config import Config
    from fedveil.federation import Result

__all__ = ["Debug", "app", "main", "say", "wide_console"]

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


class Engine(Enum):
    """Where clients of a federation on one machine run."""

    IN_PROCESS = "in-process"
    FLOWER_SIMULATION = "flower-simulation"


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
        import platform

        import torch

        import fedveil
        from fedveil.quantization import kernels

        print(f"fedveil {fedveil.__version__}")
        print(f"Python {platform.python_version()}, torch {torch.__version__}, {kernels()} kernels")
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
TextColumn = Annotated[str, typer.Option("--text", help="The column of texts.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a text; the rest is cut off.")]
Examples = Annotated[int, typer.Option(min=1, help="Texts to look at, at most.")]


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
    engine: Annotated[
        Engine, typer.Option(help="Where clients run: in worker processes, or in Flower's on Ray.")
    ] = Engine.IN_PROCESS,
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
    say(console, f"secret: {config.secret_path}" + (" (new: keep it, keep it safe)" * fresh))
    with ConsoleProgress(console) as progress:
        federation = build(config, observer=progress)
        wanted = config.federation.rounds
        if engine is Engine.FLOWER_SIMULATION:
            from fedveil.flower import simulate

            processes = config.federation.workers
            result = simulate(
                federation, wanted, resume=resume, overwrite=overwrite, processes=processes
            )
        else:
            result = federation.run(wanted, resume=resume, overwrite=overwrite)
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
    wide_console().print(unit_table(read_state(owned), find_units(owned, choice or "mlp")))


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
    wide_console().print(message_table(Message.from_bytes(data), len(data)))


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="A text classifier.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(help="Texts like those that it was trained on.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    method: Annotated[str, typer.Option(help="What for: regmean or fisher.")] = "regmean",
    text: TextColumn = "text",
    max_length: MaxLength = 128,
    examples: Examples = 256,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="A pattern of weights not to measure; repeatable.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a trained model on data that cannot be shown, for others to merge it by.

    MODEL is a folder or a name on the hub; data are a csv, json, jsonl or parquet file, or a hub
    name. Labels are not needed. The file holds statistics of the data, and docs/merging.md says
    what they reveal.

    [bold]Examples[/bold]

      fedveil statistics ./my-model --data train.csv --out my-model.statistics

      fedveil statistics ./my-model --data train.csv --exclude "*.layer.0.*" --out s.statistics
    """
    from fedveil.aggregation import RegMean
    from fedveil.merging.folders import Reading, measure, open_classifier
    from fedveil.report.words import human_bytes

    if out.exists() and not (overwrite and out.is_file()):
        raise ConfigurationError(
            "There is such a file already", where=str(out), fix="Replace it with --overwrite."
        )
    settings = RegMean(examples=examples, exclude=tuple(exclude or ()))
    reading, console = Reading(text, max_length, settings), Console()
    with _bars(console) as show:
        classifier = open_classifier(model)
        measured = measure(classifier, data, method, reading, show(f"statistics of {model}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    measured.save(out)
    size = human_bytes(out.stat().st_size)
    say(console, f"{method} statistics of {measured.examples} examples: {out} ({size})")


@app.command()
def merge(
    models: Annotated[
        list[str], typer.Argument(help="Text classifiers, two or more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder for the result.", show_default=False)],
    statistics: Annotated[
        list[Path] | None,
        typer.Option(help="A file of statistics; once per model, in order.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Or data to take them from; once per model.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="regmean, fisher or mean.")] = "regmean",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A pattern of tensors not to merge; repeatable.", show_default=False),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="How much a model counts; once per model. By default the examples of its "
            "statistics.",
            show_default=False,
        ),
    ] = None,
    off_diagonal: Annotated[
        float, typer.Option(help="RegMean's factor of a Gram's off-diagonals, 0 to 1.")
    ] = 0.9,
    text: TextColumn = "text",
    max_length: MaxLength = 128,
    examples: Examples = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Merge trained models into one without training: RegMean, Fisher merging or the mean.

    MODELS are folders or names on the hub, all fine-tuned from the same one. What they do not share
    (heads for different classes) stays each model's own, and there is one result per model.

    [bold]Examples[/bold]

      fedveil merge ./topics ./ratings --data topics.csv --data ratings.csv --out merged

      fedveil merge ./a ./b --statistics a.statistics --statistics b.statistics --out merged

      fedveil merge ./a ./b --method mean --keep "classifier.*" --out merged
    """
    from fedveil.aggregation import RegMean
    from fedveil.merging.folders import Reading, merge_folders

    console = Console()
    settings = RegMean(examples=examples, off_diagonal=off_diagonal)
    with _bars(console) as show:
        merged = merge_folders(
            models,
            out,
            method=method,
            statistics=statistics or [],
            data=data or [],
            keep=keep or [],
            weights=weight or [],
            reading=Reading(text, max_length, settings),
            overwrite=overwrite,
            show=show,
        )
    say(console, f"merged {len(merged.common.merged)} tensors of {len(models)} models by {method}")
    if merged.common.kept:
        say(console, f"kept as each model's own: {', '.join(merged.common.kept)}")
    for warning in merged.warnings:
        _complain("warning", warning)
    for folder in merged.folders:
        say(console, f"merged model: {folder}")


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
    from fedveil.config import save_model
    from fedveil.report import plot, summarize, table, write_summary

    seconds = sum(record.seconds for record in result.rounds)
    schemes = {config.scheme_name: summarize(config.scheme_name, result, seconds=seconds)}
    summary: dict[str, Any] = {"fp32_bytes": result.parameters_bytes, "schemes": schemes}
    figures = write_summary(config.out, result.parameters_bytes, schemes)
    plot(summary, config.out / "summary.png")
    model = save_model(config, result.global_model)
    console.print()
    console.print(table(summary))
    console.print()
    say(console, f"figures: {figures}, {config.out / 'metrics.jsonl'}")
    say(console, f"picture: {config.out / 'summary.png'}")
    say(console, f"your tuned model: {model}")


def say(console: Console, line: str) -> None:
    """Print a line as it is, without markup."""
    console.print(Text(line), soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Begins to show something long, by its title: a bar on a terminal, anywhere else one line."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def begin(title: str) -> Callable[[int, int], None]:
            if not console.is_terminal:
                say(console, title)
            task = progress.add_task(escape(title), total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield begin


def wide_console() -> Console:
    """A console for tables with long names: where no screen sets a width, they are not folded."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


from fedveil.cli import audits, deploying  # noqa: E402, F401  commands register themselves
