"""Commands about models and messages: units, inspect, statistics, merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedveil.cli.app import Debug, app, complain, say, wide_console
from fedveil.errors import ConfigurationError, UnknownArchitectureError
from fedveil.screen import PlainConsole

TextColumn = Annotated[str, typer.Option("--text", help="The column of texts.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a text; the rest is cut off.")]
Examples = Annotated[int, typer.Option(min=1, help="Texts to look at, at most.")]


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

    MODEL is a folder, a name on the hub, "module:function", or a configuration file. The units are
    tried: the model is run, to see that nothing of a withheld unit is left.

    [bold]Examples[/bold]

      fedveil units ./my-model

      fedveil units ./my-model --choice neurons

      fedveil units federation.toml
    """
    from fedveil.config.file import load_config
    from fedveil.config.rules import register_named_rule
    from fedveil.hub.models import load_untouched
    from fedveil.removal import try_removal
    from fedveil.report.console.describe import unit_table
    from fedveil.state import read_state
    from fedveil.units import find_units, tried_units
    from fedveil.units.trial import UntriedError

    name, folder, withholds = model, Path.cwd(), True
    if model.endswith(".toml"):
        config = load_config(model)
        name, folder = config.model.name, config.path.parent
        facts = config.scheme.facts()
        withholds = bool(facts.server_mask or facts.client_mask)
        choice = choice or getattr(config.scheme, "units", None)
        register_named_rule(config)
    owned, wanted = load_untouched(name, folder), choice or "mlp"
    try:
        groups = find_units(owned, wanted)
    except UnknownArchitectureError as error:
        if withholds:
            raise
        why = f"No units are known ({error.problem}), and none are needed"
        say(wide_console(), f"{why}: this file withholds none.")
        return
    if not withholds:
        say(wide_console(), "This file withholds none of these: clients are sent all of the model.")
    wide_console().print(unit_table(read_state(owned), groups))
    if not withholds:
        return
    try:
        try_removal(owned, tried_units(owned, wanted))
        say(
            wide_console(),
            "Tried on the model: nothing of a withheld unit is left in what is sent.",
        )
    except UntriedError as error:
        complain("Not tried", f"{error.found}. A run tries them with its data.")


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
    from fedveil.report.console.describe import message_table
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
    reading, console = Reading(text, max_length, settings), PlainConsole()
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

    console = PlainConsole()
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
        complain("warning", warning)
    for folder in merged.folders:
        say(console, f"merged model: {folder}")


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
