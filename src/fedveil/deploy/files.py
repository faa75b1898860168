"""Files of a deployment: never written over, private ones for their owner's eyes only."""

from __future__ import annotations

import os
from pathlib import Path

from fedveil.errors import ConfigurationError

__all__ = ["write_private", "write_program", "write_public"]


def write_private(path: Path, data: bytes) -> None:
    """A file that only its owner may read (mode 0600)."""
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes | str) -> None:
    """A file that anybody may read (mode 0644)."""
    _write(path, data, 0o644)


def write_program(path: Path, text: str) -> None:
    """A file that may be run (mode 0755)."""
    _write(path, text, 0o755)


def _write(path: Path, data: bytes | str, mode: int) -> None:
    """Write a new file; it has its mode before it has its content.

    Raises:
        ConfigurationError: There is one already, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(place, "wb") as file:
            os.fchmod(place, mode)  # whatever the umask says
            file.write(data.encode() if isinstance(data, str) else data)
    except FileExistsError:
        raise ConfigurationError(
            "A file of a deployment is there already",
            where=str(path),
            fix="Keys are never replaced: choose another folder, or remove this one first.",
        ) from None
    except OSError as error:
        raise ConfigurationError(
            "A file of a deployment cannot be written", found=str(error), where=str(path)
        ) from error
