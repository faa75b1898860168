"""Files that are written whole or not at all, for their owner's eyes only; records of a format.

What fedveil writes is somebody's property: files have mode 0600 and folders 0700, whatever the
umask says. Where the system has no such modes (Windows) they are as its folders are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from fedveil.errors import FedveilError

__all__ = [
    "PRIVATE_FILE",
    "PRIVATE_FOLDER",
    "make_private",
    "private_file",
    "read_record",
    "sync",
    "whole_file",
    "write_whole",
]

PRIVATE_FILE: Final = 0o600
PRIVATE_FOLDER: Final = 0o700

Record = TypeVar("Record")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter; one that is there stays as it is.

    Folders above it that are missing are made as the system makes them.
    """
    folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)


def private_file(path: Path) -> BinaryIO:
    """A new, empty file that only its owner may read, to be written; one that is there is replaced.

    It has its mode before it has any content.
    """
    path.unlink(missing_ok=True)
    binary = getattr(os, "O_BINARY", 0)  # Windows would change line ends
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, PRIVATE_FILE)
    return os.fdopen(handle, "wb")


def sync(path: Path) -> None:
    """Have the system write a file or folder to disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A file to write into that takes its place when all went well; else what was there still is.

    Only its owner may read it, whoever writes it. Folders that are missing are made, the last one
    likewise.

    Args:
        path: The place.
        synced: Whether it is on disk before it takes its place. Only what nothing later relies on
            may do without.

    Raises:
        OSError: It cannot be made, or put in place.
    """
    aside = path.with_name(f"{path.name}.unfinished")
    make_private(path.parent)
    try:
        private_file(aside).close()
        yield aside
        aside.chmod(PRIVATE_FILE)
        if synced:
            sync(aside)
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def write_whole(
    path: Path,
    content: str | bytes | bytearray | memoryview,
    error: type[FedveilError],
    fix: str = "",
    *,
    synced: bool = True,
) -> None:
    """Write a file beside its place, and put it there once it is complete.

    Only its owner may read it. Folders that are missing are made, the last one likewise.

    Args:
        path: The file.
        content: Text is written in UTF-8.
        error: The class of what is raised.
        fix: What to do if it cannot be written.
        synced: Whether it is on disk before it takes its place. Only what nothing later relies on
            may do without.

    Raises:
        FedveilError: Of the given class: it cannot be written; what was there before still is.
    """
    try:
        with whole_file(path, synced=synced) as aside:
            aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as problem:
        raise error(
            f"{path.name} could not be written",
            found=str(problem),
            where=str(path.parent),
            fix=fix,
        ) from problem


def read_record(
    path: Path,
    form: int,
    make: Callable[[dict[str, Any]], Record],
    error: type[FedveilError],
    absent: FedveilError,
    fix: str = "",
) -> Record:
    """Read a JSON object that says of which format it is.

    Args:
        path: The file.
        form: The format that is known: its "format".
        make: Makes a record of the other values.
        error: The class of what is raised.
        absent: What is raised if there is no file.
        fix: What to do about a file that cannot be used.

    Raises:
        FedveilError: Of the given class: it is absent, cannot be read, is of another format, or
            damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise absent from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(
            f"{path.name} cannot be read", found=str(problem), where=str(path), fix=fix
        ) from problem
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != form:
        raise error(
            f"{path.name} is of another version of fedveil",
            expected=f"format {form}",
            found=repr(found)[:80],
            where=str(path),
            fix=fix,
        )
    try:
        return make(values)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise error(
            f"{path.name} is damaged", found=repr(problem), where=str(path), fix=fix
        ) from problem
