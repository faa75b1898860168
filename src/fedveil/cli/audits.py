"""Commands that look at a run afterwards: audit, report, compare, trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.cli.app import Debug, app, say, wide_console
from fedveil.errors import AuditError, ConfigurationError
from fedveil.files import write_whole
from fedveil.screen import PlainConsole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.config import Config
    from fedveil.federation import Federation
    from fedveil.run import Audit

Run = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]

_RUN, _BASE, _NONE = "run", "base", "none"


@app.command()
def audit(
    run: Run,
    full: Annotated[
        bool, typer.Option("--full", help="Try everything: longer, and more coalitions.")
    ] = False,
    public: Annotated[
        str,
        typer.Option(
            help='What anybody can get: "run" (what it says itself: the public model that it '
            'released, else nothing), "base" (what it began with), "none", or a model.'
        ),
    ] = _RUN,
    coalition: Annotated[
        list[int] | None,
        typer.Option(
            help="How many clients pool what they were sent; may be given several times.",
            show_default="1 and 3",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Try what an attacker would with exactly the bytes that clients were sent.

    The run must have kept its messages ([bold]keep_messages[/bold]) and have a
    test set. Writes audit.json and report.html into the run folder, in which no run
    may be at work.

    [bold]Examples[/bold]

      fedveil audit runs/federation

      fedveil audit runs/federation --full --public base

      fedveil audit runs/federation --coalition 1 --coalition 5
    """
    from fedveil.audit import Evidence
    from fedveil.audit import audit as attack
    from fedveil.report.console.audit_table import attack_table, check_lines, inferred_line
    from fedveil.report.page import write_page
    from fedveil.run import Manifest
    from fedveil.run.folder import RunFolder

    console = PlainConsole()
    Manifest.read(run)  # a folder that is none is not made
    # What is audited must not grow meanwhile: a round under way has messages and no record.
    with RunFolder(run).held("audit") as place:
        evidence = Evidence(run)
        with console.status("reading the run") as status:
            config, federation = _reopen(run)
            stage = federation.stage(_public(public, config, federation))

            def tell(what: str) -> None:
                status.update(what)

            found = attack(evidence, stage, full=full, coalitions=coalition or None, tell=tell)
        place.claim("audit.json")
        path = found.write(run)
        page = write_page(run)
    _show(found)
    wide_console().print(attack_table(found))
    if (guess := inferred_line(found)) is not None:
        say(console, guess)
    for line in check_lines(found):
        console.print(line, soft_wrap=True)
    say(console, "what no figure here speaks for is on the page, and in docs/audit.md")
    console.print()
    say(console, f"figures: {path}")
    say(console, f"page: {page}")


@app.command()
def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN/report.html")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one page about a run: what was learned, and what was shown to whom.

    The page needs no network and nothing beside it. It names clients and shows
    how good the model is: it is the owner's to show.

    [bold]Examples[/bold]

      fedveil report runs/federation
    """
    from fedveil.report.page import write_page

    say(PlainConsole(), f"page: {write_page(run, out)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    plot: Annotated[
        Path | None,
        typer.Option(help="A picture to write: .png, .svg or .pdf.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Set runs of one task side by side: what they reach, and what they leak.

    [bold]Examples[/bold]

      fedveil compare runs/fedavg runs/fedqsn --plot frontier.png
    """
    from fedveil.report.compare import compare as set_side_by_side
    from fedveil.report.console.comparison_table import comparison_table
    from fedveil.report.pictures import plot_frontier

    comparison = set_side_by_side(runs)
    wide_console().print(comparison_table(comparison))
    if plot is not None:
        plot_frontier(comparison, plot)
        say(PlainConsole(), f"picture: {plot}")


@app.command()
def trace(
    run: Run,
    file: Annotated[
        Path,
        typer.Argument(
            help="A model that somebody published: a .safetensors or .npz file, or a folder.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            help="What withheld units may have been filled from: "
            '"base" (what the run began with), "none", or a model file or folder.'
        ),
    ] = _BASE,
    out: Annotated[
        Path | None, typer.Option(help="Write every figure to this JSON file.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Say which client's proxy a published model came from, with a p-value against chance.

    The masks are the fingerprints, so the run must have kept its messages.
    The file is read and never executed. Read docs/tracing.md before anybody
    is accused.

    [bold]Examples[/bold]

      fedveil trace runs/federation leaked.safetensors

      fedveil trace runs/federation leaked/ --base public-model/ --out trace.json
    """
    from fedveil.audit import Evidence
    from fedveil.audit.tracing import read_model
    from fedveil.audit.tracing import trace as follow
    from fedveil.report.console.audit_table import trace_table

    console, evidence, leaked = PlainConsole(), Evidence(run), read_model(file)
    with console.status("comparing") as status:

        def tell(what: str) -> None:
            status.update(what)

        found = follow(evidence, leaked, base=_filling(base, run), tell=tell)
    console.print(found.sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(found.granularity, markup=False, highlight=False, soft_wrap=True)
    console.print()
    wide_console().print(trace_table(found))
    if out is not None:
        write_whole(out, json.dumps(found.to_json(), indent=1) + "\n", AuditError)
        say(console, f"figures: {out}")


def _show(found: Audit) -> None:
    console = PlainConsole()
    console.print()
    console.print(found.sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _filling(name: str, run: Path) -> Mapping[str, Tensor] | None:
    """The public model whose values may stand in for withheld units."""
    from fedveil.audit.tracing import read_model
    from fedveil.state import read_state

    if name == _NONE:
        return None
    if name != _BASE:
        return read_model(name)
    try:
        return read_state(_reopen(run)[1].released)
    except AuditError as error:
        fix = "Give the public base with --base FILE, or say --base none."
        raise error.within(fix=fix) from error


def _reopen(run: Path) -> tuple[Config, Federation]:
    """The federation of a run, as its file describes it.

    Raises:
        AuditError: No file describes it, or the file has gone.
    """
    from fedveil.config import build, load_config
    from fedveil.run import Manifest

    file = Manifest.read(run).config_file
    if file is None or not Path(file).is_file():
        raise AuditError(
            "Nothing says what data and model this run was of",
            expected="a run of a configuration file (fedveil run)",
            found="none" if file is None else f"{file}, which is not there",
            where=str(run),
            fix="From Python: fedveil.audit.audit(Evidence(run), federation.stage(public)).",
        )
    config = load_config(file).change(out=str(run.absolute()))
    return config, build(config)


def _public(name: str, config: Config, federation: Federation) -> nn.Module | None:
    """What is public beside what the run released in its model's place; None if nothing is."""
    if name in (_RUN, _NONE):
        return None
    if name == _BASE:
        return federation.released
    from fedveil.config.sources import load_rows
    from fedveil.hub.models import load_model

    if name == config.model.name and not config.model.new_head:
        raise ConfigurationError(
            "This is the base itself", found=repr(name), fix=f"Say --public {_BASE}."
        )
    other = config.model.model_copy(update={"name": name})
    classes = load_rows(config).names
    return load_model(
        other, config.data.task, classes, config.path.parent, seed=config.federation.seed
    )
