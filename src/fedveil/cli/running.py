"""Commands that run federations: run, demo."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.cli.app import Debug, File, app, say
from fedveil.errors import CheckpointError, ConfigurationError
from fedveil.screen import PlainConsole

if TYPE_CHECKING:
    from fedveil.config import Config
    from fedveil.federation import Result

Workers = Annotated[int | None, typer.Option(min=1, help="Client processes.", show_default=False)]


class Engine(Enum):
    """Where clients of a federation on one machine run."""

    IN_PROCESS = "in-process"
    FLOWER_SIMULATION = "flower-simulation"


class DemoTask(Enum):
    """What the demo is about."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"


@app.command()
def run(
    file: File,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue after the last finished round.")
    ] = False,
    from_round: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --resume: go back to this round, and run those after it anew.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run from the run folder first.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds in all.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default=False)] = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Try it with a tiny random model and a few rows; keep nothing."
        ),
    ] = False,
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

      fedveil run federation.toml --resume --from-round 4   [dim]without what came after[/dim]

      fedveil run federation.toml --dry-run   [dim]in a minute, without downloads[/dim]
    """
    from fedveil.config import load_config, open_secret
    from fedveil.run.folder import RunFolder

    folder = str(out.absolute()) if out is not None else None
    config = load_config(file).change(rounds=rounds, workers=workers, out=folder)
    if dry_run:
        _rehearse(config, PlainConsole())
        return
    _check_return(from_round, config.federation.rounds, resume=resume, overwrite=overwrite)
    _check_folder(config, resume=resume, overwrite=overwrite)
    console = PlainConsole()
    # Until the last result is written nobody else may work in the folder.
    with RunFolder(config.out).held() as place:
        place.check(_results(config))
        fresh = not config.secret_path.exists()
        open_secret(config)
        say(console, f"secret: {config.secret_path}" + (" (new: keep it, keep it safe)" * fresh))
        result = _work(
            config, console, engine, resume=resume, from_round=from_round, overwrite=overwrite
        )
        _report(console, config, result)


def _work(
    config: Config,
    console: Console,
    engine: Engine,
    *,
    resume: bool,
    from_round: int | None,
    overwrite: bool,
) -> Result:
    """Run the federation of a file, wherever its clients are."""
    from fedveil.config import build
    from fedveil.engine.trackers import watched
    from fedveil.report.console import ConsoleProgress

    with (
        ConsoleProgress(console) as progress,
        watched(progress, config.out, config.federation.track) as observer,
    ):
        federation = build(config, observer=observer)
        if federation.likeness is not None:
            say(console, federation.likeness.words)
        wanted = config.federation.rounds
        if engine is Engine.FLOWER_SIMULATION:
            from fedveil.flower import simulate

            processes = config.federation.workers
            return simulate(
                federation,
                wanted,
                resume=resume,
                from_round=from_round,
                overwrite=overwrite,
                processes=processes,
            )
        return federation.run(wanted, resume=resume, from_round=from_round, overwrite=overwrite)


@app.command()
def demo(
    task: Annotated[
        DemoTask, typer.Option(help="Tell classes of articles apart, or write headlines for them.")
    ] = DemoTask.CLASSIFICATION,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/demo")
    ] = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Fine-tune a text classifier with ten clients, by four methods side by side.

    Real articles and a real model, from packages; no network and no account. See docs/data.md for
    what to install first. With --task generation, four clients teach a language model of 135
    million parameters to write headlines, with LoRA, by three methods.

    [bold]Examples[/bold]

      fedveil demo

      fedveil demo --task generation

      fedveil demo --out runs/demo --workers 4
    """
    from fedveil.demo import run_demo, run_generation_demo

    run = run_demo if task is DemoTask.CLASSIFICATION else run_generation_demo
    name = "demo" if task is DemoTask.CLASSIFICATION else "demo-generation"
    run(out or Path("runs") / name, workers or min(2, os.cpu_count() or 1), PlainConsole())


def _rehearse(config: Config, console: Console) -> None:
    """Run everything that a file says, small, in a folder that is gone afterwards."""
    from fedveil.config import answer_test, build, rehearse
    from fedveil.report.console import ConsoleProgress

    class Progress(ConsoleProgress):
        def base_doubted(self, reason: str) -> None:
            """A random model need not be better than chance."""

    with TemporaryDirectory(prefix="fedveil-") as folder, Progress(console) as progress:
        rehearsal = rehearse(config, Path(folder))
        say(console, f"dry run: {rehearsal.model}; {rehearsal.data}")
        small = rehearsal.config
        result = build(small, observer=progress).run(small.federation.rounds)
        if small.generation is not None:
            answer_test(small, result.global_model)
    say(
        console,
        "The file holds together. The figures mean nothing, and nothing was kept. What a dry run "
        "cannot tell: whether names on the hub exist, and how much time and memory the model "
        "takes.",
    )


def _check_return(from_round: int | None, rounds: int, *, resume: bool, overwrite: bool) -> None:
    """Whether a run can go back to a round, in the words of the command line."""
    if from_round is None:
        return
    if overwrite:
        raise ConfigurationError(
            "--overwrite and --from-round contradict each other", fix="Leave one out."
        )
    if not resume:
        raise ConfigurationError(
            "--from-round needs --resume",
            fix="Only a run that is continued can go back to a round.",
        )
    if from_round >= rounds:
        raise ConfigurationError(
            "Nothing would be run",
            expected=f"--from-round below {rounds}, the number of rounds",
            found=str(from_round),
        )


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


def _results(config: Config) -> list[str]:
    """What the command writes at the end: it must not turn out then that something is there."""
    answers = [] if config.generation is None else ["answers.jsonl"]
    return ["model", "summary.json", "summary.png", *answers]


def _report(console: Console, config: Config, result: Result) -> None:
    from fedveil.config import save_model
    from fedveil.report import summarize, write_summary
    from fedveil.report.console import table
    from fedveil.report.pictures import plot
    from fedveil.run.folder import RunFolder

    seconds = sum(record.seconds for record in result.rounds)
    schemes = {config.scheme_name: summarize(config.scheme_name, result, seconds=seconds)}
    model = save_model(config, result.global_model)
    if config.generation is not None:
        schemes[config.scheme_name]["generation"] = _generate(console, config, result)
    summary: dict[str, Any] = {"fp32_bytes": result.parameters_bytes, "schemes": schemes}
    place = RunFolder(config.out)
    place.claim("summary.json")
    figures = write_summary(config.out, result.parameters_bytes, schemes)
    plot(summary, place.claim("summary.png"))
    console.print()
    console.print(table(summary))
    console.print()
    say(console, f"figures: {figures}, {config.out / 'metrics.jsonl'}")
    say(console, f"picture: {config.out / 'summary.png'}")
    say(console, f"your tuned model: {model}")


def _generate(console: Console, config: Config, result: Result) -> dict[str, float]:
    """Let the tuned model answer the test set; its scores."""
    from fedveil.config import answer_test
    from fedveil.report import show_answers, write_answers
    from fedveil.run.folder import RunFolder

    with console.status("The tuned model answers the test set"):
        answers = answer_test(config, result.global_model)
    RunFolder(config.out).claim("answers.jsonl")
    path = write_answers(config.out, answers)
    console.print()
    console.print(show_answers(answers))
    say(console, f"all answers: {path}")
    return answers.scores
