"""How far the exposure ledger goes, kept apart from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedveil.errors import CheckpointError
from fedveil.files import read_record, write_whole

__all__ = ["EMPTY", "HEAD", "NAME", "RESTORE", "Head", "link_of"]

NAME, HEAD = "exposure.jsonl", "exposure.head"
FORMAT = 1
"""Of the head. A ledger whose lines are not chained is of the version before there was one."""

_HEAD_BYTES = 256
"""Of the head's file: always as long, and less than what a disk writes at once."""

RESTORE = (
    f"Every release must be listed: restore {NAME} and {HEAD} from a copy, or begin a new run."
)


@dataclass(frozen=True)
class Head:
    """How far the ledger goes, kept apart from it: a ledger that was cut off is then seen.

    Attributes:
        lines: Lines that it has at least.
        size: Their bytes.
        last: The link that a line after them carries.
    """

    lines: int
    size: int
    last: str

    @classmethod
    def read(cls, path: Path) -> Head | None:
        """The head in a file; None if there is no file.

        Raises:
            CheckpointError: It cannot be read.
        """
        if not path.exists():
            return None
        absent = CheckpointError("The head of the exposure ledger has gone", where=str(path))
        try:
            return read_record(path, FORMAT, cls._of, CheckpointError, absent)
        except CheckpointError as error:
            raise CheckpointError(
                "The head of the exposure ledger cannot be used",
                found=error.found or error.problem,
                where=str(path),
                fix=RESTORE,
            ) from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Head:
        head = cls(**values)
        if type(head.lines) is not int or type(head.size) is not int or type(head.last) is not str:
            raise TypeError("a number of lines, one of bytes, and a link are needed")
        return head

    def write(self, path: Path) -> None:
        """Write it, whole or not at all.

        An earlier one of the same length is written over in place, and not waited for: after a
        power cut the older head may be there, beyond which the ledger may have more lines. A file
        of its own for every release would take three times as long as the release's line.

        Raises:
            CheckpointError: It cannot be written.
            OSError: Likewise.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}).ljust(_HEAD_BYTES - 1) + "\n"
        if path.exists() and path.stat().st_size == len(text):
            with path.open("r+b", buffering=0) as file:
                file.write(text.encode())
        else:
            write_whole(path, text, CheckpointError)

    def __str__(self) -> str:
        return f"{self.lines}:{self.last}"

    def after(self, lines: Sequence[bytes]) -> Head:
        """The head once these lines were appended."""
        size = self.size + sum(map(len, lines))
        last = link_of(lines[-1]) if lines else self.last
        return Head(self.lines + len(lines), size, last)


def link_of(data: bytes) -> str:
    """What the line after these bytes carries of them."""
    return hashlib.sha256(data).hexdigest()


EMPTY = Head(0, 0, link_of(b""))
