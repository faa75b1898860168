"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fedveil.errors import FedveilError

__all__ = ["write_whole"]


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
