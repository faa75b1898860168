"""The folder of a run: what in it is fedveil's, and who is at work there."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from filelock import BaseFileLock, FileLock, Timeout

from fedveil.errors import CheckpointError, FedveilWarning
from fedveil.files import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    make_private,
    read_record,
    sync,
    write_whole,
)

__all__ = ["RunFolder"]

_HOME: Final = ".fedveil"
_MARKER, _WRITTEN, _LOCK, _HOLDER = "folder.json", "written", "lock", "holder.json"
_CLEARING, _CLIENTS = "clearing", "clients"
FORMAT = 1
_LEDGER = ("exposure.jsonl", "exposure.head")

RESULTS: Final = (
    "summary.json", "summary.png", "report.html", "audit.json", "answers.jsonl", "model",
)  # fmt: skip
"""What says how a run ended: the first to go, so that no new run is taken for the old one."""

RECORDS: Final = ("run.json", "metrics.jsonl", "checkpoints", *_LEDGER)
"""What every run writes."""

_ORDER: Final = (
    "run.json", *RESULTS, "metrics.jsonl", "mlflow-run", "tensorboard", "messages", "checkpoints",
    *_LEDGER,
)  # fmt: skip
"""Everything that is ever written under a name of its own, in the order in which it goes."""

_MEMORY = re.compile(r"[\w.-]+(/round-\d{6,}\.(safetensors(\.unfinished)?|unfinished))?")
_INSIDE: Final = {
    "messages": re.compile(r"round-\d{6,}(/[\w.-]+\.[a-z]+\.safetensors(\.unfinished)?)?"),
    "checkpoints": re.compile(
        r"((unfinished|replaced)-)?(round|unfinished)-\d{6,}"
        r"(/(state\.json|part-\d{5,}|model.*\.safetensors(\.index\.json)?))?"
    ),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
}
"""What fedveil puts into its folders; what is beside it stays. ``model`` is its as a whole."""

_HELD: ContextVar[frozenset[Path]] = ContextVar("held run folders", default=frozenset())
"""Folders that whoever is running this holds: it may take them again, and nobody else may."""


class RunFolder:
    """The one owner of a run folder. Nothing is written over or deleted that fedveil did not write.

    Everything that fedveil keeps for itself is in ``.fedveil/``: a marker that says that the folder
    is the folder of a run, the names of what was written into it, a lock, and what clients keep
    between rounds. A name that is taken by something else is an error before anything happens; an
    empty folder of that name is not in the way.

    One run or audit at a time holds a folder: on one machine the lock is the system's, which takes
    it back from a process that dies, however it dies. Over NFS it holds between machines where the
    server grants locks. Where the file system has none at all there is a warning, and only the
    exposure ledger tells that another run writes to it.

    Folders that earlier versions made have no marker. What is in them is taken for fedveil's if
    ``run.json`` is one of its files, each thing by itself and only if it is what a run writes.

    Does NOT protect: ``model/`` is fedveil's as a whole once it has written it, with what was put
    beside the model later. Who may write to the folder can write the marker.

    Args:
        path: The folder; made when it is held.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._home = self.path / _HOME

    @property
    def memories(self) -> Path:
        """Where clients of a simulation keep what they keep between rounds."""
        return self._home / _CLIENTS

    @contextmanager
    def held(self, work: str = "run") -> Iterator[RunFolder]:
        """Keep others out until the context ends; whoever holds it may hold it once more.

        Args:
            work: What is done meanwhile: a "run", or an "audit" of one; told to who is kept out.

        Raises:
            CheckpointError: Somebody else holds it, or it cannot be made.
        """
        key = self.path.resolve()
        if key in _HELD.get():
            yield self
            return
        lock = self._lock(work)
        _HELD.set(_HELD.get() | {key})
        try:
            yield self
        finally:
            _HELD.set(_HELD.get() - {key})
            if lock is not None:
                self._let_go(lock)

    def prepare(self, names: Collection[str] = (), *, overwrite: bool = False) -> None:
        """Make the folder ready for a run. To be called by who holds it.

        Args:
            names: What the run will write; nothing of these names may be somebody else's.
            overwrite: Remove what an earlier run wrote.

        Raises:
            CheckpointError: Something is in the way; then nothing was written or removed.
        """
        self._take_up({*RECORDS, *names})
        if overwrite or (self._home / _CLEARING).exists():
            self._clear()

    def check(self, names: Collection[str]) -> None:
        """Say what is in the way of files of these names; nothing is written.

        Raises:
            CheckpointError: Something that fedveil did not write is.
        """
        ours = self._written() if self._is_marked() else self._of_earlier_version()
        taken = [name for name in sorted(names) if name not in ours and self._is_taken(name)]
        if taken:
            raise self._in_the_way(taken)

    def claim(self, name: str) -> Path:
        """A place that is about to be written: from now on it is fedveil's.

        Raises:
            CheckpointError: Something else is there.
        """
        self._take_up({name})
        if name not in self._written():
            self._note(name)
        return self.path / name

    def claim_folder(self, name: str) -> Path:
        """The same of a folder, which is made, and which nobody else may enter.

        Raises:
            CheckpointError: Something else is there, or it cannot be made.
        """
        path = self.claim(name)
        with self._explained("could not be made", path):
            make_private(path)
            path.chmod(PRIVATE_FOLDER)
        return path

    def _take_up(self, names: Collection[str]) -> None:
        """Check that names are free or fedveil's own, and mark the folder if it is not yet."""
        self.check(names)
        if not self._is_marked():
            ours = self._of_earlier_version()
            self._mark(ours)
            self._move_memories()
            self._close_to_others(ours)

    def lost_ledger(self) -> list[str]:
        """Which files of the exposure ledger are not there though the run has begun them."""
        if _BEGUN not in self._written():
            return []
        return [name for name in _LEDGER if not (self.path / name).exists()]

    def ledger_begun(self) -> None:
        """Remember that the exposure ledger is there: if it is not, later on, it was lost."""
        if _BEGUN not in self._written():
            self._note(_BEGUN)

    def run_is_at_work(self) -> bool:
        """Whether a run in another process holds the folder now; False where that is unknown."""
        if self.path.resolve() in _HELD.get() or not (self._home / _LOCK).is_file():
            return False
        lock = FileLock(self._home / _LOCK, mode=PRIVATE_FILE, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return self._holder().get("work") != "audit"
        except (OSError, NotImplementedError):  # no right to, or a file system without locks
            return False
        lock.release()
        return False

    def _lock(self, work: str) -> BaseFileLock | None:
        if self._home.exists() and not self._is_home():
            raise self._in_the_way([_HOME])
        with self._explained("cannot be used", self.path):
            make_private(self.path)
            make_private(self._home)
        lock = FileLock(self._home / _LOCK, mode=PRIVATE_FILE, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise self._busy() from None
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"The file system of {self.path} has no locks ({error}): see to it that no other "
                "run writes into this folder.",
                FedveilWarning,
                stacklevel=4,
            )
            return None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {
            "process": os.getpid(), "host": socket.gethostname(), "since": now, "work": work,
        }  # fmt: skip
        write_whole(self._home / _HOLDER, json.dumps(holder), CheckpointError, synced=False)
        return lock

    def _let_go(self, lock: BaseFileLock) -> None:
        with suppress(OSError):
            (self._home / _HOLDER).unlink(missing_ok=True)
            if not (self._home / _MARKER).exists():  # nothing came of it: no trace is left
                (self._home / _LOCK).unlink(missing_ok=True)
        lock.release()
        if not (self._home / _MARKER).exists():
            with suppress(OSError):
                self._home.rmdir()

    def _is_home(self) -> bool:
        """Whether what is called .fedveil is fedveil's: marked, or not yet more than locked."""
        if (self._home / _MARKER).is_file():
            return True
        if not self._home.is_dir():
            return False
        unmarked = {_LOCK, _HOLDER, _WRITTEN, _MARKER}
        return {p.name.removesuffix(".unfinished") for p in self._home.iterdir()} <= unmarked

    def _busy(self) -> CheckpointError:
        told, found = self._holder(), "another process"
        with suppress(KeyError):
            found = f"process {told['process']} on {told['host']}, since {told['since']}"
        what = "An audit" if told.get("work") == "audit" else "A run"
        return CheckpointError(
            f"{what} is at work in this folder",
            found=found,
            where=str(self.path),
            fix="Wait until it is done, or use another folder. What has died holds nothing.",
        )

    def _holder(self) -> dict[str, Any]:
        """What who holds the folder says of itself; empty if nothing can be read."""
        with suppress(OSError, ValueError):
            told = json.loads((self._home / _HOLDER).read_text(encoding="utf-8"))
            return told if isinstance(told, dict) else {}
        return {}

    def _is_marked(self) -> bool:
        marker = self._home / _MARKER
        if not marker.exists():
            return False
        absent = CheckpointError("The marker of the run folder has gone", where=str(marker))
        read_record(marker, FORMAT, lambda values: values["id"], CheckpointError, absent)
        return True

    def _mark(self, names: Collection[str]) -> None:
        """Make it the folder of a run, in which these names are fedveil's."""
        with self._explained("cannot be used", self.path):
            make_private(self.path)
            make_private(self._home)
        text = "".join(f"{name}\n" for name in sorted(names))
        write_whole(self._home / _WRITTEN, text, CheckpointError)
        marker = {"format": FORMAT, "what": "the folder of a fedveil run", "id": _new_id()}
        write_whole(self._home / _MARKER, json.dumps(marker) + "\n", CheckpointError)

    def _written(self) -> set[str]:
        path = self._home / _WRITTEN
        try:
            return set(path.read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            return set()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                "What fedveil has written into the run folder cannot be told",
                found=str(error),
                where=str(path),
                fix="Restore the file, or use another folder.",
            ) from error

    def _note(self, name: str) -> None:
        """One more name, on disk before anything is called so."""
        path = self._home / _WRITTEN
        with (
            self._explained("cannot be written to", path),
            path.open("a", encoding="utf-8") as file,
        ):
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())

    def _is_taken(self, name: str) -> bool:
        path = self.path / name
        if path.is_dir():
            return any(path.iterdir())
        return path.exists() or path.is_symlink()

    def _in_the_way(self, names: Collection[str]) -> CheckpointError:
        return CheckpointError(
            "Something that no run of fedveil wrote is in the way",
            expected="none of the names that a run writes to, or its own files",
            found=", ".join(names),
            where=str(self.path),
            fix="Nothing was changed. Use another folder (out), or move it away.",
        )

    def _clear(self) -> None:
        """Remove what was written, and nothing else. What a crash interrupts is finished later.

        With the first step the folder stops being that of the old run, for whoever reads it.
        """
        with self._explained("could not be removed", self.path):
            write_whole(self._home / _CLEARING, "", CheckpointError)
            written = self._written()
            # Of a result it is enough that it is one: whoever keeps it takes it for the new run's.
            written |= {name for name in RESULTS if name in _LOOKS and self._looks_ours(name)}
            for name in _ORDER:
                if name in written:
                    self._remove(name)
            _remove_inside(self.memories, _MEMORY)
            # A folder stays, and stays fedveil's, where somebody else has put something into it.
            self._mark({n for n in written & _INSIDE.keys() if (self.path / n).exists()})
            (self._home / _CLEARING).unlink(missing_ok=True)
            sync(self._home)

    def _remove(self, name: str) -> None:
        path = self.path / name
        if pattern := _INSIDE.get(name):
            _remove_inside(path, pattern)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if name == "model":
            for aside in ("unfinished-model", "replaced-model"):
                shutil.rmtree(self.path / aside, ignore_errors=True)

    def _of_earlier_version(self) -> set[str]:
        """Names that a version without a marker has written to."""
        if not _is_json(self.path / "run.json", {"format", "configuration", "tensors"}):
            return set()
        found = {name for name in _LOOKS if self._looks_ours(name)}
        if "summary.json" in found:  # the same command wrote both, after the model
            found |= {name for name in ("summary.png", "model") if (self.path / name).exists()}
        return found

    def _looks_ours(self, name: str) -> bool:
        return _LOOKS[name](self.path / name)

    def _move_memories(self) -> None:
        """What clients of the run kept was beside the rest, in earlier versions."""
        old = self.path / _CLIENTS
        for path in sorted(old.glob("*/round-*.safetensors")):
            name = path.relative_to(old)
            if not _MEMORY.fullmatch(name.as_posix()) or name.parts[0] not in self._clients():
                continue
            with self._explained("could not be moved", path):
                make_private(self.memories)
                make_private(self.memories / name.parent)
                path.replace(self.memories / name)
        for folder in (*old.glob("*"), old):
            with suppress(OSError):
                folder.rmdir()  # not if something else is in it

    def _clients(self) -> Collection[str]:
        try:
            named = json.loads(_text(self.path / "run.json"))["configuration"]["clients"]
        except (KeyError, TypeError, ValueError):
            return ()
        return named if isinstance(named, dict) else ()

    def _close_to_others(self, names: Collection[str]) -> None:
        """What an earlier version wrote for all to read is its owner's alone from now on."""
        for path in (self.path / name for name in names):
            for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
                if not one.is_symlink():
                    with suppress(OSError):
                        one.chmod(PRIVATE_FOLDER if one.is_dir() else PRIVATE_FILE)

    @contextmanager
    def _explained(self, what: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"The run folder {what}",
                found=str(error),
                where=str(path),
                fix="Look for free space and the right to write there.",
            ) from error


_BEGUN: Final = "(the exposure ledger was begun)"
"""Stands among the names: no file is called so."""


def _new_id() -> str:
    return secrets.token_hex(16)


def _remove_inside(folder: Path, pattern: re.Pattern[str]) -> None:
    """Remove what is called as fedveil calls it, and folders that are empty then."""
    paths = sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else []
    for path in paths:
        if not pattern.fullmatch(path.relative_to(folder).as_posix()):
            continue
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not if something else is in it
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _is_json(path: Path, keys: Collection[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    return path.is_file() and _has(_text(path), keys)


def _is_lines(path: Path, *keys: Collection[str]) -> bool:
    """Whether a file's first line is a JSON object with one of these sets of keys, or empty."""
    if not path.is_file():
        return False
    text = _text(path)
    first = text.split("\n", 1)[0]
    return not text or any(_has(first, some) for some in keys)


def _is_folder(path: Path, pattern: re.Pattern[str]) -> bool:
    """Whether a folder holds something that fedveil calls so."""
    return path.is_dir() and any(pattern.fullmatch(one.name) for one in path.iterdir())


def _has(text: str, keys: Collection[str]) -> bool:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and set(keys) <= values.keys()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "?"


_LOOKS: Final[dict[str, Callable[[Path], bool]]] = {
    "run.json": lambda path: _is_json(path, {"format", "configuration", "tensors"}),
    "summary.json": lambda path: _is_json(path, {"fp32_bytes", "schemes"}),
    "audit.json": lambda path: _is_json(path, {"format", "sentence", "attacks"}),
    "report.html": lambda path: "<title>fedveil report: " in _text(path),
    "answers.jsonl": lambda path: _is_lines(path, {"prompt", "references", "answer"}),
    "metrics.jsonl": lambda path: _is_lines(path, {"round", "bytes_down"}),
    "exposure.jsonl": lambda path: _is_lines(path, {"shown", "units"}, {"sealed"}),
    "exposure.head": lambda path: _is_json(path, {"lines", "size", "last"}),
    "mlflow-run": lambda path: bool(re.fullmatch(r"[0-9a-f]{32}\s*", _text(path))),
    "tensorboard": lambda path: _is_folder(path, _INSIDE["tensorboard"]),
    "messages": lambda path: _is_folder(path, _INSIDE["messages"]),
    "checkpoints": lambda path: _is_folder(path, _INSIDE["checkpoints"]),
}
"""How each is told from what somebody else has called so, in a folder without a marker."""
