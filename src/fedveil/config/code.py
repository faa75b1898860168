"""Code that a client's file names: shown, approved by the client, and run from the approved bytes.

The folder that an owner gives to a client may hold code of the owner's: a `NAME.py` that a setting
names as "NAME:function". It runs on the client's machine, so it runs only if the client has
approved those very bytes. Approvals are kept away from that folder, among the settings of the user
who gave them: whoever makes the folder cannot put an approval into it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fedveil.config.file import Config
from fedveil.errors import ConfigurationError
from fedveil.files import read_record, write_whole
from fedveil.hub.settings import is_function

__all__ = ["Approvals", "Approved", "Code", "Piece", "code_of", "read_piece", "refuse_own_path"]

_FORMAT = 1
_LARGEST = 1 << 20
"""Bytes of a file of code: more than anybody would read before approving it."""


@dataclass(frozen=True)
class Piece:
    """A file as it was read, once.

    Attributes:
        path: Where it was.
        data: Its bytes, which are what is shown, approved and run.
    """

    path: Path
    data: bytes

    @property
    def digest(self) -> str:
        """The SHA-256 of its bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def read_piece(path: Path) -> Piece:
    """Read a file that holds code.

    Raises:
        ConfigurationError: It cannot be read, or is too large for anybody to have read it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigurationError(
            "A file of code cannot be read", found=str(error), where=str(path)
        ) from error
    if len(data) > _LARGEST:
        raise ConfigurationError(
            "A file of code is too large to be approved by anybody who reads it",
            expected=f"at most {_LARGEST} bytes",
            where=str(path),
        )
    return Piece(path, data)


@dataclass(frozen=True)
class Code:
    """All code that a client's file names.

    Attributes:
        files: Files of the folder, by their names.
        functions: "module:function" of modules that are installed.
    """

    files: Mapping[str, Piece]
    functions: tuple[str, ...]


def code_of(config: Config) -> Code:
    """What a client's file names that would be imported. Nothing is imported to find out.

    A `NAME.py` in the folder comes before a module of that name that is installed, and is one file:
    packages and other files of the folder are not found.

    Raises:
        ConfigurationError: There is no such file and no such module, or a file cannot be read.
    """
    files: dict[str, Piece] = {}
    functions = []
    for name in dict.fromkeys(_named(config)):
        module = name.partition(":")[0]
        path = config.path.parent / f"{module}.py"
        if "." not in module and (path.is_symlink() or path.exists()):
            files[path.name] = files.get(path.name) or read_piece(path)
        elif _is_installed(module.partition(".")[0]):
            functions.append(name)
        else:
            raise ConfigurationError(
                "A function is neither in the folder nor installed",
                expected=f"a file {path.name}" if "." not in module else "a module",
                where=f"{config.path.name}: {name}",
                fix="Ask the owner for the file, or install the package that has it.",
            )
    return Code(files, tuple(functions))


def _named(config: Config) -> Iterable[str]:
    for name in (config.model.name, config.data.transform, config.model.rule):
        if name is not None and is_function(name):
            yield name


def _is_installed(module: str) -> bool:
    """Whether there is such a module at the top level; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Approvals:
    """What this user has approved to run for one folder.

    Attributes:
        path: Where that is kept: mode 0600, under ``$XDG_CONFIG_HOME`` or ``~/.config``.
        files: SHA-256 of files in the folder, by their names.
        functions: "module:function" of modules that are installed.
    """

    path: Path
    files: Mapping[str, str] = field(default_factory=dict)
    functions: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Approvals:
        """Those of a folder; none, if nothing was approved yet.

        Raises:
            ConfigurationError: They cannot be read, or others could have written them.
        """
        path = _approvals_file(folder)
        if not path.exists():
            return cls(path)
        _refuse_written_by_others(path)

        def make(values: dict[str, Any]) -> Approvals:
            files, functions = dict(values["files"]), tuple(values["functions"])
            if not all(isinstance(one, str) for one in (*files, *files.values(), *functions)):
                raise ValueError("a name or a hash is no text")
            return cls(path, files, functions)

        absent = ConfigurationError("The approvals are gone", where=str(path))
        return read_record(path, _FORMAT, make, ConfigurationError, absent)

    def lacks(self, files: Iterable[Piece], functions: Iterable[str]) -> list[str]:
        """Names of what is not approved, or not as it is now."""
        odd = [piece.path.name for piece in files if not self.has(piece)]
        return [*odd, *(name for name in functions if name not in self.functions)]

    def has(self, piece: Piece) -> bool:
        """Whether a file is approved with these very bytes."""
        return self.files.get(piece.path.name) == piece.digest

    def keep(self, folder: Path, files: Iterable[Piece], functions: Iterable[str]) -> None:
        """Approve this and nothing else, for this folder.

        Raises:
            ConfigurationError: It cannot be written.
        """
        values = {
            "format": _FORMAT,
            "folder": str(folder.resolve()),
            "files": {piece.path.name: piece.digest for piece in files},
            "functions": list(functions),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.parent.chmod(0o700)  # before there is anything in it
            text = json.dumps(values, indent=1) + "\n"
            write_whole(self.path, text, ConfigurationError)
        except OSError as error:
            raise ConfigurationError(
                "The approvals cannot be written", found=str(error), where=str(self.path)
            ) from error


def _approvals_file(folder: Path) -> Path:
    home = os.environ.get("XDG_CONFIG_HOME")
    base = Path(home) if home else Path.home() / ".config"
    place = folder.resolve()
    name = re.sub(r"[^\w.-]", "_", place.name)[:60]
    mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    found = base.absolute() / "fedveil" / "approvals" / f"{name}-{mark}.json"
    if found.resolve().is_relative_to(place):
        raise ConfigurationError(
            "Approvals would lie in the folder that is to be approved",
            expected="a place that whoever made the folder cannot write to",
            where=str(found),
            fix="Set XDG_CONFIG_HOME or HOME to another folder.",
        )
    return found


def _refuse_written_by_others(path: Path) -> None:
    for one in (path, path.parent) if os.name == "posix" else ():
        status = one.stat()
        if status.st_mode & 0o022 or status.st_uid not in (os.getuid(), 0):
            raise ConfigurationError(
                "Others can write the approvals",
                expected="a file and a folder that only you can write to",
                where=str(one),
                fix=f"Look at what is approved, then: chmod go-w {one}",
            )


class Approved:
    """Functions of approved code, for a client's program.

    Args:
        config: The client's file.

    Does NOT protect from code that was approved: it may do what the program may.

    Raises:
        ConfigurationError: Something that the file names is not approved, or has changed since; or
            Python would look for modules in the folder.
    """

    def __init__(self, config: Config) -> None:
        folder = config.path.parent
        refuse_own_path(folder)
        self._code, self._folder = code_of(config), folder
        self._modules: dict[str, ModuleType] = {}
        if self._code.files or self._code.functions:
            self._check(Approvals.of(folder))

    def function(self, name: str) -> Callable[..., Any]:
        """The function that "module:function" names; see :meth:`named`.

        Raises:
            ConfigurationError: As there; or it is no function.
        """
        function = self.named(name)
        if not callable(function):
            raise ConfigurationError("A name in a file is that of no function", where=name)
        return function

    def named(self, name: str) -> object:
        """What "module:NAME" names.

        A file is not looked up as a module: its approved bytes are compiled and run, and the folder
        it lies in is on no path. Other files beside it are found by nobody.

        Raises:
            ConfigurationError: It is nothing that was approved, or cannot be imported.
        """
        module_name, _, function_name = name.partition(":")
        piece = self._code.files.get(f"{module_name}.py")
        if piece is None and name not in self._code.functions:
            raise ConfigurationError("A function is not approved", where=name)
        try:
            module = importlib.import_module(module_name) if piece is None else self._run(piece)
        except Exception as error:
            raise ConfigurationError(
                "Approved code cannot be imported",
                found=f"{type(error).__name__}: {error}",
                where=name,
                fix="A file of the owner's can import what is installed, and no other file.",
            ) from error
        named: object = getattr(module, function_name, None)
        if named is None:
            raise ConfigurationError(
                f"The module has no function {function_name!r}",
                where=str(getattr(module, "__file__", module_name)),
            )
        return named

    def _run(self, piece: Piece) -> ModuleType:
        """The module that a file makes, run once."""
        known = self._modules.get(piece.path.name)
        if known is not None:
            return known
        # A name of its own: it must not stand in for an installed module.
        module = ModuleType(f"fedveil_approved_{piece.digest[:16]}")
        module.__file__ = str(piece.path)
        code = compile(piece.data, str(piece.path), "exec", dont_inherit=True)
        sys.modules[module.__name__] = module  # dataclasses, for one, look there
        exec(code, module.__dict__)  # noqa: S102  approved, byte for byte
        self._modules[piece.path.name] = module
        return module

    def _check(self, approvals: Approvals) -> None:
        how = (
            f"Read it. `fedveil deploy check {self._folder}` shows all that would run here; with "
            "--approve you allow it, as the user who runs it."
        )
        for name, piece in self._code.files.items():
            before = approvals.files.get(name)
            if before is None:
                raise ConfigurationError(
                    "Code from the owner's folder is not approved, and is not run",
                    expected="an approval of these very bytes",
                    found=f"none for sha256 {piece.digest} ({len(piece.data)} bytes)",
                    where=str(piece.path),
                    fix=how,
                )
            if before != piece.digest:
                raise ConfigurationError(
                    "Code has changed since it was approved, and is not run",
                    expected=f"sha256 {before}",
                    found=f"sha256 {piece.digest}",
                    where=str(piece.path),
                    fix=how,
                )
        for function in self._code.functions:
            if function not in approvals.functions:
                raise ConfigurationError(
                    "A function that the file names is not approved, and is not run",
                    expected="an approval",
                    found=f"none for {function}, of an installed module",
                    where=str(self._folder / "partner.toml"),
                    fix=how,
                )


def refuse_own_path(folder: Path) -> None:
    """Raise if Python looks for modules in a folder that somebody else has filled.

    A file of a library's name in it would be imported in the library's place. What lies under
    Python's own prefix is excepted: an environment may be in the folder.

    Raises:
        ConfigurationError: It does.
    """
    inside, prefix = folder.resolve(), Path(sys.prefix).resolve()
    for entry in sys.path:
        place = Path(entry or ".").resolve()
        if place.is_relative_to(inside) and not place.is_relative_to(prefix):
            raise ConfigurationError(
                "Python would import any file from the owner's folder",
                expected="a path without it",
                found=repr(entry),
                where="sys.path",
                fix="Unset PYTHONPATH (an empty entry means the current folder), and start the "
                "program as `fedveil`, not as `python -m fedveil`.",
            )
