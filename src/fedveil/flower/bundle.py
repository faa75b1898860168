"""What a Flower app is, looked at as data: nothing of it is written to disk, imported or run.

Flower copies an app to every node as a bundle, a zip archive. That of a fedveil federation holds a
`pyproject.toml` which names programs of the installed library, and nothing else.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from fedveil.errors import ProtocolError

__all__ = ["CLIENT", "check_bundle"]

CLIENT = "fedveil.flower.apps:client"
"""The client program of every fedveil federation."""

_SETTINGS = "pyproject.toml"
_FILES = frozenset({_SETTINGS, ".info/CONTENT", "README.md", "LICENSE"})
_LARGEST = 256 * 1024
"""Bytes of a bundle, and of any file in it; ours has 700."""

_PROJECT = frozenset({
    "name", "version", "description", "license", "readme", "authors", "maintainers", "keywords",
    "classifiers", "urls", "requires-python", "dependencies",
})  # fmt: skip
_BUILD = {"requires": ["hatchling"], "build-backend": "hatchling.build"}
_SHOWN = 80


def check_bundle(data: bytes) -> None:
    """Raise unless a bundle is that of a fedveil federation, which carries no code.

    Args:
        data: The bundle, as it came.

    Raises:
        ProtocolError: It holds other files, names another client program, wants something
            installed, or is no bundle. The error says what was found first.

    Does NOT protect by itself: what does is that nobody runs anything of a bundle, whether it
    passes or not. It says to a client what it was sent, and that it takes no part in that.
    """
    if len(data) > _LARGEST:
        raise _refused(f"at most {_LARGEST} bytes", f"{len(data)} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_files(archive.infolist())
            text = _read(archive, _SETTINGS)
        settings = tomllib.loads(text.decode("utf-8"))
    except (
        zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError,
        OSError, RecursionError,
    ) as error:  # fmt: skip
        found = f"{type(error).__name__}: {error}"
        raise _refused("a zip archive with a pyproject.toml", found) from error
    _check_settings(settings)


def _check_files(files: list[zipfile.ZipInfo]) -> None:
    names = [file.filename for file in files]
    others = [name for name in names if name not in _FILES]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise _refused("no code: a pyproject.toml alone", f"the file {_shown(others[0])}{more}")
    if len(set(names)) < len(names):
        raise _refused("each file once", "a file twice")
    if _SETTINGS not in names:
        raise _refused("a pyproject.toml", "none")
    for file in files:
        if file.file_size > _LARGEST:
            raise _refused(
                f"at most {_LARGEST} bytes", f"{file.filename} of {file.file_size} bytes"
            )


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file's bytes, of which no more are unpacked than are allowed, whatever its head says."""
    with archive.open(name) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise _refused(f"at most {_LARGEST} bytes", f"more, in {name}")
    return text


def _check_settings(settings: Mapping[str, Any]) -> None:
    _check_keys(settings, frozenset({"build-system", "project", "tool"}), "")
    if settings.get("build-system", _BUILD) != _BUILD:
        raise _refused("hatchling as build-backend", "another one", "[build-system]")
    project = _table(settings, "project")
    _check_keys(project, _PROJECT, "[project]")
    if project.get("dependencies", []) != []:
        found = _shown(project["dependencies"])
        raise _refused("nothing to install", found, "[project] dependencies")
    tool = _table(settings, "tool")
    _check_keys(tool, frozenset({"flwr"}), "[tool]")
    flower = _table(tool, "flwr", "[tool.flwr]")
    _check_keys(flower, frozenset({"app"}), "[tool.flwr]")
    app = _table(flower, "app", "[tool.flwr.app]")
    _check_keys(app, frozenset({"publisher", "components"}), "[tool.flwr.app]")
    components = _table(app, "components", "[tool.flwr.app.components]")
    where = "[tool.flwr.app.components]"
    _check_keys(components, frozenset({"serverapp", "clientapp"}), where)
    if components.get("clientapp") != CLIENT:
        raise _refused(
            f'clientapp = "{CLIENT}"', _shown(components.get("clientapp")), f"{where} clientapp"
        )


def _table(of: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    found = of.get(key)
    if not isinstance(found, dict):
        raise _refused("a table", _shown(found), where or f"[{key}]")
    return found


def _check_keys(table: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    others = sorted(table.keys() - known)
    if others:
        raise _refused("nothing else than fedveil's own", _shown(others[0]), where)


def _shown(value: object) -> str:
    """What a stranger wrote, so that it cannot pass for another line of a log."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refused(expected: str, found: str, where: str = "") -> ProtocolError:
    place = f"its {_SETTINGS}, {where}" if where else "the app"
    plain = found if found.isprintable() else ascii(found)
    return ProtocolError(
        "The app is not fedveil's own", expected=expected, found=plain[:200], where=place
    )
