"""What simulated clients keep between rounds: a file each, for the last rounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedveil.errors import CheckpointError
from fedveil.state import StateDict

__all__ = ["ClientFiles"]


@dataclass(frozen=True)
class ClientFiles:
    """Each client's memory after each round that may still be needed.

    A round that is run again after a crash starts from what clients knew before it: what a round
    leaves is a file of its own, and files go when a later round is in a checkpoint.

    Attributes:
        folder: One folder per client is made in it.

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
        aside = path.with_suffix(".unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(memory, aside)
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                aside.unlink()
            raise CheckpointError(
                "What a client keeps for later rounds could not be written",
                found=str(error),
                where=str(path),
                fix="Free some space and run again with resume.",
            ) from error

    def settle(self, number: int) -> None:
        """Round ``number`` is safe: forget what only earlier rounds, or crashed ones, needed."""
        for client in self._clients():
            files = self._files(client.name)
            needed = [path for path in files if _round(path) <= number][-1:]
            for path in files:
                if path not in needed:
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clients(self) -> Iterable[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _files(self, client: str) -> list[Path]:
        return sorted((self.folder / client).glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
