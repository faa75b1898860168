"""What a client runs on its own machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedveil.cli.app import Debug, app, say
from fedveil.errors import ConfigurationError
from fedveil.log import LOG, PlainRecords
from fedveil.screen import PlainConsole

partner = typer.Typer(
    help="A client's own programs.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(partner, name="partner")

_LINK = ("server.key", "server.pem", "ca.crt", "token", "token.new")


@partner.command()
def run(
    file: Annotated[Path, typer.Argument(help="Your file.")] = Path("partner.toml"),
    port: Annotated[
        int,
        typer.Option(min=1, max=65535, envvar="FEDVEIL_PORT", help="Of the SuperNode, here."),
    ] = 9094,
    link: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the keys by which this program and the SuperNode know each other; "
            "by default flwr/link beside the file.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Answer the messages that the SuperNode on this machine gets: train on your data.

    It stays up, with model and data loaded. Nothing of an app that the owner sends is installed,
    imported or run. [bold]supernode.sh[/bold] starts this and the SuperNode.

    [bold]Examples[/bold]

      fedveil partner run partner.toml
    """
    from fedveil.config import load_config
    from fedveil.flower.apps import partner_of
    from fedveil.flower.runtime import Runtime
    from fedveil.flower.serving import StopServing, serve

    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.WARNING)
    LOG.setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:  # what Flower logs, too
        handler.addFilter(PlainRecords())
    config = load_config(file)
    mine = partner_of(config)
    folder = link or config.path.parent / "flwr" / "link"
    token, authority = _make_link(folder)
    _reach_this_machine_directly()
    examples = mine.place.trainers[mine.name].examples
    say(PlainConsole(), f"{mine.name} is ready, with {examples} examples")

    def stop(number: int, frame: object) -> NoReturn:
        raise StopServing

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        with closing(Runtime(f"127.0.0.1:{port}", token, authority)) as source:
            serve(mine, source)
    except StopServing:
        say(PlainConsole(), f"{mine.name} has stopped")


def _make_link(folder: Path) -> tuple[bytes, bytes]:
    """New keys for the connection to the SuperNode; the token is there last, when all is ready.

    Returns:
        The token, and the certificate of whoever signed the SuperNode's.

    Raises:
        ConfigurationError: They cannot be written.
    """
    from fedveil.deploy.files import write_private
    from fedveil.deploy.keys import write_certificates

    token = secrets.token_bytes(32)
    try:
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for name in _LINK:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            "The keys to the SuperNode cannot be written", found=str(error), where=str(folder)
        ) from error
    authority = write_certificates(folder, "127.0.0.1")
    write_private(folder / "token.new", token)
    (folder / "token.new").replace(folder / "token")
    return token, authority


def _reach_this_machine_directly() -> None:
    """Whatever proxy server the way to the owner needs, the SuperNode is on this machine."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{before},127.0.0.1" if before else "127.0.0.1"
