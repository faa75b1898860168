"""Exactly the bytes that clients received, as a run has kept them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedveil.errors import AuditError, FedveilError
from fedveil.run.manifest import Manifest
from fedveil.run.shown import Proxy
from fedveil.wire import Message

__all__ = ["Evidence", "Kept"]

_ROUND = re.compile(r"round-(\d{6})")
_FILE = re.compile(r"(.+)\.([a-z]+)\.safetensors")


@dataclass(frozen=True, order=True)
class Kept:
    """One message on disk.

    Attributes:
        round: From 1.
        client: Who was sent it, or sent it.
        kind: "proxy" on the way down, "update" on the way up; of anything else fedveil sends none.
        path: Where it is.
    """

    round: int
    client: str
    kind: str
    path: Path

    def read(self) -> Message:
        """The message, checked.

        Raises:
            AuditError: It cannot be read, was altered, or is not the one that the file's name says.
        """
        try:
            message = Message.from_bytes(self.path.read_bytes())
        except OSError as error:
            raise AuditError(
                "A kept message cannot be read", found=str(error), where=str(self.path)
            ) from error
        except FedveilError as error:
            raise AuditError(
                "A kept message is damaged or was altered",
                found=str(error),
                where=str(self.path),
                fix="An audit is of the bytes that were sent: restore the file, or run again.",
            ) from error
        found = (message.kind, message.round, message.client)
        if found != (self.kind, self.round, self.client):
            raise AuditError(
                "A kept message is not the one that its name says",
                expected=f"{self.kind} of round {self.round} and client {self.client}",
                found="{} of round {} and client {}".format(*found),
                where=str(self.path),
            )
        return message


class Evidence:
    """The messages of a run, in the order of rounds.

    Args:
        folder: The run folder; messages are in ``messages``, where ``keep_messages`` puts them.

    Raises:
        AuditError: No message was kept.
        CheckpointError: It is not the folder of a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._kept = sorted(_find(self.folder / "messages"))
        if not any(kept.kind == "proxy" for kept in self._kept):
            raise AuditError(
                "The run has kept no messages",
                expected=f"messages in {self.folder / 'messages'}",
                where=str(self.folder),
                fix="Run it with keep_messages=True ([federation] keep_messages in its file).",
            )

    @property
    def unread(self) -> list[Path]:
        """Files among the messages whose names are not those of messages: nobody reads them."""
        known = {kept.path for kept in self._kept}
        found = (self.folder / "messages").rglob("*")
        return sorted(path for path in found if path.is_file() and path not in known)

    @property
    def clients(self) -> list[str]:
        """All clients that were sent a proxy, sorted."""
        return sorted({kept.client for kept in self._kept if kept.kind == "proxy"})

    @property
    def rounds(self) -> list[int]:
        """All rounds in which proxies were sent, ascending."""
        return sorted({kept.round for kept in self._kept if kept.kind == "proxy"})

    def proxies(self, clients: Collection[str] | None = None) -> list[Kept]:
        """What some clients were sent, oldest first; by default what all were."""
        return self._of_kind("proxy", clients)

    def down(self) -> list[Kept]:
        """Everything that was sent to clients, of whatever kind."""
        return [kept for kept in self._kept if kept.kind != "update"]

    def updates(self, clients: Collection[str] | None = None) -> list[Kept]:
        """What some clients returned, oldest first."""
        return self._of_kind("update", clients)

    def open(self, kept: Kept) -> Proxy:
        """What a kept proxy shows."""
        return Proxy(kept.read(), self.manifest)

    def _of_kind(self, kind: str, clients: Collection[str] | None) -> list[Kept]:
        return [
            kept
            for kept in self._kept
            if kept.kind == kind and (clients is None or kept.client in clients)
        ]


def _find(folder: Path) -> list[Kept]:
    found = []
    for path in sorted(folder.glob("*/*.safetensors")):
        rounds, file = _ROUND.fullmatch(path.parent.name), _FILE.fullmatch(path.name)
        if rounds and file:
            found.append(Kept(int(rounds[1]), file[1], file[2], path))
    return found
