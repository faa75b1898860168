"""Files of a deployment: never written over, private ones for their owner's eyes only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedveil.errors import ConfigurationError

__all__ = ["to_toml", "write_private", "write_program", "write_public"]


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables as a file of TOML, whatever texts are in them: what is read of it is what was given.

    Args:
        tables: Values of TOML; tuples, which become arrays; settings that are dataclasses, which
            become tables, or a word if they have nothing but a name; and None, which is left out.

    Raises:
        ConfigurationError: A value is none that TOML has, such as half a character of UTF-16.
    """
    try:
        text = "\n".join(map(_table, tables, tables.values()))
        text.encode()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            "A setting cannot be written in TOML",
            expected="texts of whole characters, numbers, true and false, dates, and arrays and "
            "tables of these",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return text


def _table(title: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"[{_key(title)}]", *_settings(values), ""])


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(one)}" for key, one in values.items() if one is not None]


def _key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def _value(value: Any) -> str:
    """A value in one line, so that whoever edits the file finds a setting where its name is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        named = {"name": getattr(value, "name", None), **fields}
        return _value(named["name"] if set(named) == {"name"} else named)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_settings(value))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").removesuffix("\n")


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
        encoded = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            "A file of a deployment cannot be written: it would name a path that is no text",
            expected="paths in UTF-8",
            found=f"{error.object[max(0, error.start - 20) : error.end + 20]!r}",
            where=str(path),
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(place, "wb") as file:
            os.fchmod(place, mode)  # whatever the umask says
            file.write(encoded)
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
