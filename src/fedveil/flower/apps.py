"""The two programs that a fedveil federation's app names: `fedveil.flower.apps:server`, `:client`.

Flower copies an app's code and settings to every node, so there is neither in the app: programs
are those of the installed library, and what each has is in a file on its own machine. Flower starts
the owner's. The client's is not started by the scripts of `fedveil deploy init`, which let nothing
of an app decide what runs (:mod:`fedveil.flower.serving`): it is for SuperNodes of one's own, which
install and start whatever app they are sent.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.config import Config, build, build_workplace, load_config, save_model
from fedveil.engine.patience import Patience
from fedveil.engine.trackers import watched
from fedveil.errors import ConfigurationError
from fedveil.federation import Result
from fedveil.flower.agreement import settings_of
from fedveil.flower.client import Partner, client_app
from fedveil.flower.crew import FlowerCrew
from fedveil.flower.directory import ByKey
from fedveil.report.console import ConsoleProgress
from fedveil.run.folder import RunFolder

__all__ = ["FEDERATION", "PARTNER", "client", "find_partner", "run", "server"]

FEDERATION = "FEDVEIL_FEDERATION"
"""The environment variable that names the owner's file on the owner's machine: no client has it."""
PARTNER = "fedveil"
"""The key of a SuperNode's --node-config that names the client's file."""


def run(config: Config, grid: Grid) -> Result:
    """Run the owner's federation until its last round; what is finished is not repeated.

    Args:
        config: The owner's file, with [partners].
        grid: Flower's connection to the nodes.

    Raises:
        ConfigurationError: The file names no partners, or a key is missing.
        FedveilError: As of :meth:`fedveil.Federation.run`.
    """
    table = config.partners
    if table is None:
        raise ConfigurationError(
            "The file names no clients on other machines",
            expected="a table [partners]",
            where=str(config.path),
        )
    folder = config.resolve(table.keys)
    directory = ByKey({name: _read_key(folder / f"{name}.pub") for name in table.names})
    patience = Patience(table.deadline, table.quorum, table.give_up)
    # What is printed here the owner sees: Flower passes it on to where the run was started.
    with (
        RunFolder(config.out).held() as place,
        ConsoleProgress() as progress,
        watched(progress, config.out, config.federation.track) as observer,
    ):
        place.check(["model"])  # it must not turn out at the end that something is there
        federation = build(config, observer=observer)
        common = settings_of(
            federation.scheme, federation.training, federation.task, federation.released
        )
        crew = FlowerCrew(grid, directory, patience, progress.waiting, common)
        result = federation.run(config.federation.rounds, resume=True, crew=crew)
        model = save_model(config, result.global_model)
    print(f"your tuned model: {model}")
    return result


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            "A client's public key cannot be read",
            found=str(error),
            where=str(path),
            fix="It is the .pub file beside the private key of the client's SuperNode.",
        ) from error


server = ServerApp()


@server.main()
def _main(grid: Grid, context: Context) -> None:
    path = os.environ.get(FEDERATION)
    if not path:
        raise ConfigurationError(
            "The owner's file is not named",
            expected=f"the environment variable {FEDERATION}",
            found="none",
            fix="It must be set where the SuperLink is started.",
        )
    run(load_config(path), grid)


@lru_cache(maxsize=1)
def _partner(path: str) -> Partner:
    config = load_config(path)
    return partner_of(config)


def partner_of(config: Config) -> Partner:
    """What a client has, of its own file.

    Raises:
        FedveilError: As of :func:`~fedveil.config.build_workplace`.
    """
    place = build_workplace(config)
    common = settings_of(config.scheme, config.training, place.task, place.architecture)
    return Partner(config.whose().name, place, config.whose().threads, common)


def find_partner(context: Context) -> Partner:
    """What the client on this machine has.

    Raises:
        FedveilError: Its file is not named, or what it names cannot be used.
    """
    path = context.node_config.get(PARTNER)
    if not isinstance(path, str):
        raise ConfigurationError(
            "The client's file is not named",
            expected=f"--node-config '{PARTNER}=\"/path/to/partner.toml\"'",
            found="none",
        )
    return _partner(path)


client = client_app(find_partner)
