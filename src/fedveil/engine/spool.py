"""Replies of a round that wait until all have come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

from fedveil.errors import CheckpointError

__all__ = ["Spool"]

_IN_MEMORY = 64 * 2**20
"""Bytes that are kept in memory; what is more is on disk."""


class Spool:
    """Bytes of one round's replies by client, in the order in which they came.

    One file for all of them, without a name, which nobody else can open and which is gone with the
    process. Use it as a context manager.

    Args:
        folder: Where the file lies; None for the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        where = None if folder is None else str(folder)
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY, dir=where)  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}

    def keep(self, client: str, data: bytearray | memoryview) -> None:
        """Keep a reply.

        Raises:
            CheckpointError: There is no room for it.
        """
        try:
            begin = self._file.tell()
            self._file.write(data)
        except OSError as error:
            raise CheckpointError(
                "A reply could not be kept until the others have come",
                found=str(error),
                where=str(self._folder or "the folder of temporary files"),
                fix="The round before is in the checkpoint: free some space and run with resume.",
            ) from error
        self._places[client] = begin, len(data)

    def replies(self) -> Iterator[tuple[str, bytearray]]:
        """Clients and their replies, each in memory of its own."""
        for client, (begin, size) in self._places.items():
            reply = bytearray(size)
            self._file.seek(begin)
            self._file.readinto(reply)
            yield client, reply

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
