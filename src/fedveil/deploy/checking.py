"""What would run in the folder that an owner gave to a client, and what decides that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedveil.config import Config
from fedveil.config.code import Approvals, Piece, code_of, read_piece
from fedveil.deploy.init import PROGRAMS, programs_of
from fedveil.printable import one_line

__all__ = ["Survey"]

_ADDRESS = re.compile(r"FEDVEIL_SUPERLINK:-([\w.:\[\]-]+)\}")
_PORT = re.compile(r"FEDVEIL_PORT:-([0-9]{1,5})\}")
_NAME = re.compile(r"[\w][\w .@-]*")
# What docker compose reads without being told, and what a shell, a service manager or Python would.
_RUN = ("*compose*.y*ml", ".env", "*.sh", "*.service", "Dockerfile*")
_KNOWN = {
    "partner.toml",
    "node.key",
    "ca.crt",
    "README.md",
    "architecture",
    "tokenizer",
    "flwr",
    "memory",
}


@dataclass(frozen=True)
class Survey:
    """All in a client's folder that would run, as it was read once.

    Attributes:
        config: The client's file.
        programs: Scripts, units and container files that are word for word what this fedveil
            writes: nothing in them is the owner's but the client's name and the owner's address.
        files: Files that are run and that somebody has written: code, or another script.
        functions: "module:function" of installed modules that a setting names.
        others: Names of whatever else is there.
    """

    config: Config
    programs: tuple[str, ...]
    files: tuple[Piece, ...]
    functions: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, config: Config) -> Survey:
        """Look at the folder of a client's file. Nothing in it is run or imported.

        Raises:
            ConfigurationError: It is an owner's file, a file cannot be read, or a function cannot
                be found.
        """
        name, folder = config.whose().name, config.path.parent
        code = code_of(config)
        scripts = {path.name: read_piece(path) for path in _scripts(folder)}
        ours = _ours(name, scripts)
        programs = tuple(name for name in scripts if name in ours)
        foreign = tuple(piece for name, piece in scripts.items() if name not in ours)
        files = (*foreign, *(piece for name, piece in code.files.items() if name not in scripts))
        seen = {*_KNOWN, *scripts, *code.files, *Path(config.data.train or "").parts[:1]}
        others = sorted(path.name for path in folder.iterdir() if path.name not in seen)
        return cls(config, programs, files, code.functions, tuple(others))

    def approvals(self) -> Approvals:
        """What this user has approved for the folder."""
        return Approvals.of(self.config.path.parent)

    def approve(self) -> None:
        """Approve what is in this survey, with the bytes that it has read, and nothing else.

        Raises:
            ConfigurationError: It cannot be kept.
        """
        folder = self.config.path.parent
        Approvals.of(folder).keep(folder, self.files, self.functions)

    def lines(self) -> Iterator[str]:
        """The survey, as it is shown to whoever is to approve it."""
        approvals, folder = self.approvals(), self.config.path.parent
        yield f"What runs here, or decides what runs ({folder}):"
        for name in self.programs:
            yield f"  {name}: as this fedveil writes it, word for word"
        for piece in self.files:
            before = approvals.files.get(piece.path.name, piece.digest)
            state = "approved" if approvals.has(piece) else "NOT APPROVED"
            if before != piece.digest:
                state = "CHANGED since it was approved"
            what = "code" if piece.path.suffix == ".py" else "not as this fedveil writes it"
            yield f"  {one_line(str(piece.path))}: {what}, {len(piece.data)} bytes, {state}"
            yield f"    sha256 {piece.digest}"
            if before != piece.digest:
                yield f"    approved was sha256 {before}"
        for function in self.functions:
            state = "approved" if function in approvals.functions else "NOT APPROVED"
            yield f"  {function}: a function of an installed module, {state}"
        yield f"  partner.toml: {', '.join(_settings(self.config))}"
        if self.others:
            names = ", ".join(map(ascii, self.others[:10]))
            yield f"  also there, and run by nothing of fedveil's: {names}"


def _scripts(folder: Path) -> Sequence[Path]:
    found = {path for pattern in (*PROGRAMS, *_RUN) for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.is_dir())


def _ours(name: str, scripts: dict[str, Piece]) -> set[str]:
    """Names of scripts that are as this fedveil writes them for a client of this name."""
    script = scripts.get("supernode.sh")
    text = script.data.decode("utf-8", "replace") if script else ""
    address, port = _ADDRESS.search(text), _PORT.search(text)
    if address is None or port is None or not _NAME.fullmatch(name):
        return set()
    programs = programs_of(name, address[1], int(port[1]))
    own = {file: text.encode() for file, text in programs.items()}
    return {file for file, piece in scripts.items() if own.get(file) == piece.data}


def _settings(config: Config) -> Iterator[str]:
    """The settings that decide what is loaded, and how clients train."""
    model = config.model
    yield f"model {model.name!r}"
    for key in ("tokenizer", "adapter", "lora", "rule"):
        if (value := getattr(model, key)) is not None:
            yield f"{key} {value!r}"
    if config.data.transform is not None:
        yield f"transform {config.data.transform!r}"
    yield f"data {config.data.train!r}"
    if config.scheme.client().remembers:
        yield f"memory {config.whose().memory!r}"
    yield f"task {config.data.task!r}"
    yield f"scheme {config.scheme_name!r}"
