"""Files that are written whole or not at all, and records of a known format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedveil.errors import FedveilError

__all__ = ["read_record", "write_whole"]

Record = TypeVar("Record")


def write_whole(path: Path, text: str, error: type[FedveilError], fix: str = "") -> None:
    """Write a text file beside its place, and put it there once it is complete.

    Folders that are missing are made.

    Raises:
        FedveilError: Of the given class: it cannot be written; what was there before still is.
    """
    aside = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as problem:
        if aside.is_file():
            aside.unlink()
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
) -> Record:
    """Read a JSON object that says of which format it is.

    Args:
        path: The file.
        form: The format that is known: its "format".
        make: Makes a record of the other values.
        error: The class of what is raised.
        absent: What is raised if there is no file.

    Raises:
        FedveilError: Of the given class: it is absent, cannot be read, is of another format, or
            damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise absent from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path.name} cannot be read", found=str(problem), where=str(path)) from problem
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != form:
        raise error(
            f"{path.name} is of another version of fedveil",
            expected=f"format {form}",
            found=repr(found)[:80],
            where=str(path),
        )
    try:
        return make(values)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise error(f"{path.name} is damaged", found=repr(problem), where=str(path)) from problem
