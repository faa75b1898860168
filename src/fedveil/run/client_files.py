"""What simulated clients keep between rounds: a file each, for the last rounds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedveil.errors import CheckpointError
from fedveil.files import PRIVATE_FOLDER, make_private, whole_file
from fedveil.shards import save_private
from fedveil.state import StateDict

__all__ = ["ClientFiles"]

_FILE = re.compile(r"round-\d{6,}\.(safetensors(\.unfinished)?|unfinished)")


@dataclass(frozen=True)
class ClientFiles:
    """Each client's memory after each round that may still be needed.

    A round that is run again after a crash starts from what clients knew before it: what a round
    leaves is a file of its own, and files go when a later round is in a checkpoint.

    Attributes:
        folder: One folder per client is made in it, which only the owner of the process may enter.

    Does NOT protect: in a simulation clients' memories lie on the owner's disk. They are parts of
    the clients' updates.
    """

    folder: Path

    def recall(self, client: str, number: int) -> StateDict:
        """What a client knew before round ``number``.

        Raises:
            CheckpointError: If it cannot be read.
        """
        known = [path for path in self._files(client) if _round(path) < number]
        if not known:
            return {}
        try:
            return load_file(known[-1])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "What a client kept from an earlier round cannot be read",
                found=str(error),
                where=str(known[-1]),
                fix="Start the run anew.",
            ) from error

    def keep(self, client: str, number: int, memory: StateDict) -> None:
        """Remember what a client knows after round ``number``.

        Raises:
            CheckpointError: If it cannot be written.
        """
        path = self.folder / client / f"round-{number:06d}.safetensors"
        try:
            make_private(self.folder)
            make_private(path.parent)
            path.parent.chmod(PRIVATE_FOLDER)  # earlier versions made it for all to read
            with whole_file(path) as aside:
                save_private(memory, aside)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "What a client keeps for later rounds could not be written",
                found=str(error),
                where=str(path),
                fix="Free some space and run again with resume.",
            ) from error

    def settle(self, oldest: int) -> None:
        """Nobody goes back beyond round ``oldest``: forget what only earlier rounds needed."""
        for client in self._clients():
            for path in [path for path in self._files(client.name) if _round(path) <= oldest][:-1]:
                path.unlink(missing_ok=True)

    def drop_after(self, number: int) -> None:
        """Forget what clients learned after round ``number``: it is run anew."""
        for client in self._clients():
            for path in self._files(client.name):
                if _round(path) > number:
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything. What is there besides, and is nobody's memory, stays."""
        for client in self._clients():
            for path in client.iterdir() if client.is_dir() else ():
                if _FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            with suppress(OSError):
                client.rmdir()  # not if something else is in it

    def _clients(self) -> Iterable[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _files(self, client: str) -> list[Path]:
        return sorted((self.folder / client).glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
