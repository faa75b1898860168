"""Commands that make a federation over machines ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.app import Debug, File, app, say
from fedveil.errors import ConfigurationError
from fedveil.screen import PlainConsole

if TYPE_CHECKING:
    from fedveil.deploy.checking import Survey

deploy = typer.Typer(
    help="A federation over machines, on Flower: keys, settings, programs, instructions.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(deploy, name="deploy")


@deploy.command()
def init(
    file: File,
    host: Annotated[
        str,
        typer.Option(
            help="Name or IP address by which clients reach you; 127.0.0.1 to try it here.",
            show_default=False,
        ),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the SuperLink.")] = 9092,
    public_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of what stands in front of it (nginx.conf).")
    ] = 443,
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("deployment"),
    debug: Debug = False,
) -> None:
    """Write a folder for the owner and one for each client.

    The file names the clients in its table [bold]\\[partners][/bold]. Every folder has
    a README with the commands to type.

    [bold]Examples[/bold]

      fedveil deploy init federation.toml --host fl.example.org

      fedveil deploy init federation.toml --host 127.0.0.1
    """
    from fedveil.config import load_config
    from fedveil.deploy import Address, write_deployment
    from fedveil.deploy.architecture import given_to_clients

    console, address = PlainConsole(), Address(host, port, public_port)
    config = load_config(file)
    with console.status("writing keys and settings"):
        owner, *partners = write_deployment(config, address, out)
    say(console, f"yours: {owner}, and its README.md says how to go on")
    for line in given_to_clients(config):
        say(console, line)
    for folder in partners:
        say(console, f"for {folder.name}: {folder} (holds a private key: hand it over safely)")
    if not address.is_local:
        say(
            console,
            f"Let nobody but this machine reach port {port}: whoever does can run programs here. "
            f"{owner / 'nginx.conf'} lets clients through to what they need.",
        )


@deploy.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder that the owner gave you.")] = Path(),
    approve: Annotated[
        bool,
        typer.Option("--approve", help="Allow what is shown to run here, with these very bytes."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what would run on a client's machine, and say whether it is ready.

    Whatever somebody else has written is run only once you have read and approved it: code that the
    model's settings name, and scripts other than fedveil's own. Do this before you run any of it.

    [bold]Examples[/bold]

      fedveil deploy check .

      fedveil deploy check . --approve
    """
    from fedveil.config import build_workplace, load_config
    from fedveil.deploy.checking import Survey

    console = PlainConsole()
    config = load_config(folder / "partner.toml")
    _look(console, Survey.of(config), approve=approve)
    for name in ("node.key", "ca.crt", "supernode.sh"):
        if not (folder / name).is_file():
            raise ConfigurationError(
                "A file is missing", found=f"no {name}", where=str(folder),
                fix="The owner's folder for you has it.",
            )  # fmt: skip
    if (folder / "node.key").stat().st_mode & 0o077:
        raise ConfigurationError(
            "Others can read the key", where=str(folder / "node.key"),
            fix=f"chmod 600 {folder / 'node.key'}",
        )  # fmt: skip
    place = build_workplace(config)
    for name, trainer in place.trainers.items():
        say(console, f"{name} is ready: {trainer.examples} examples")


def _look(console: Console, survey: Survey, *, approve: bool) -> None:
    """Show what would run, and go on only if it may."""
    if approve:
        survey.approve()
    for line in survey.lines():
        say(console, line)
    lacks = survey.approvals().lacks(survey.files, survey.functions)
    if lacks:
        raise ConfigurationError(
            "Not all that would run here is approved",
            expected="an approval of these very bytes",
            found=f"none for {', '.join(lacks)}",
            where=str(survey.config.path.parent),
            fix="Read it; then `fedveil deploy check --approve` allows it, as the user who is to "
            "run it.",
        )
    if approve:
        say(console, f"approved, in {survey.approvals().path}")
