"""Commands that make a federation over machines ready."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.cli import Debug, File, app, say
from fedveil.errors import ConfigurationError

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

    console, address = Console(), Address(host, port, public_port)
    config = load_config(file)
    with console.status("writing keys and settings"):
        owner, *partners = write_deployment(config, address, out)
    say(console, f"yours: {owner}, and its README.md says how to go on")
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
    debug: Debug = False,
) -> None:
    """Say whether a client's machine is ready: data, architecture, key, certificate.

    [bold]Examples[/bold]

      fedveil deploy check .
    """
    from fedveil.config import build_workplace, load_config

    console = Console()
    config = load_config(folder / "partner.toml")
    place = build_workplace(config)
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
    for name, trainer in place.trainers.items():
        say(console, f"{name} is ready: {trainer.examples} examples")
