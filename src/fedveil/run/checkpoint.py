"""A finished round on disk, written so that a crash at any moment leaves the last one whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedveil.errors import CheckpointError, FedveilError, FedveilWarning
from fedveil.run.records import RoundRecord
from fedveil.schemes import ServerState
from fedveil.shards import SHARD_BYTES, model_files, open_shards, whole_folder, write_shards

__all__ = ["KEPT", "Checkpoint", "CheckpointFolder"]

FORMAT = 2
# Of the first format there was one model file only, written and summed up in the same way.
READABLE = (1, FORMAT)
VALUES = "state.json"
KEPT = 3
"""Checkpoints of so many rounds are kept unless told."""
CHANGEABLE = ("bounds", "clients")
"""What may differ from there on if somebody goes back to a round: it does not change what was."""
_NAME = re.compile(r"round-(\d{6})")
# Of earlier rounds, and of tries that a crash has cut short, by earlier versions too.
_OURS = re.compile(r"(round|unfinished|(unfinished|replaced)-round)-\d{6}")


class DamagedError(CheckpointError):
    """A checkpoint is not what was written; another one may be."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished round: the server's state, the records so far, the configuration they belong to.

    Does NOT protect: it holds the global model in full precision. The secret is not in it.
    """

    state: ServerState
    records: list[RoundRecord]
    configuration: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run: those of the last rounds.

    Args:
        folder: Made when the first is saved.
        shard_bytes: Most bytes of a file of tensors, unless one tensor has more.
        keep: Of how many rounds checkpoints are kept. Each holds the model in float32: a round that
            turns out to have done harm can be gone back from, as long as one before it is there.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, keep: int = KEPT) -> None:
        self._folder, self._shard_bytes, self._keep = folder, shard_bytes, keep

    def newest(self) -> Path | None:
        """The newest finished checkpoint, or None."""
        return next(reversed(self._finished()), None)

    def rounds(self) -> list[int]:
        """Of which rounds there are checkpoints, ascending."""
        return [_number(path) for path in self._finished()]

    def nbytes(self) -> int:
        """Bytes of the newest checkpoint on disk; 0 if there is none."""
        newest = self.newest()
        return 0 if newest is None else sum(file.stat().st_size for file in newest.iterdir())

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint aside, make sure that it is on disk, then put it in place at once.

        Those of later rounds go first: they are of rounds that are being run anew.

        Raises:
            CheckpointError: If it cannot be written (a full disk); those before are untouched.
        """
        number = len(checkpoint.records)
        target = self._folder / f"round-{number:06d}"
        self.drop_after(number)
        before = next((path for path in reversed(self._finished()) if path != target), None)
        try:
            with whole_folder(target) as aside:
                self._write(aside, checkpoint)
        except (OSError, SafetensorError) as error:
            kept = f"Round {_number(before)} is kept" if before else "Nothing was lost on disk"
            raise CheckpointError(
                f"Round {number} could not be saved",
                found=str(error),
                where=str(self._folder),
                fix=f"{kept}: free some space and run again with resume.",
            ) from error
        self._tidy()

    def drop_after(self, number: int) -> None:
        """Remove the checkpoints of rounds after this one."""
        for path in self._finished():
            if _number(path) > number:
                shutil.rmtree(path, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove the oldest, and what tries that a crash has cut short have left."""
        kept = self._finished()[-self._keep :]
        for path in self._folder.iterdir():
            if path not in kept and _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        write_shards(checkpoint.state.tensors, folder, shard_bytes=self._shard_bytes)
        values = {
            "format": FORMAT,
            "scheme": checkpoint.state.values,
            "configuration": checkpoint.configuration,
            "records": [record.to_json() for record in checkpoint.records],
        }
        values["digest"] = _digest(folder, values)
        (folder / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def _finished(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def load(
        self, configuration: Mapping[str, Any], number: int | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        A damaged one is passed over, with a warning, for the one before. Tensors are maps of files.

        Args:
            configuration: What it must agree with.
            number: Of which round; None for the newest. Who goes back to a round by its number may
                leave clients out from there on, and change the bounds.

        Raises:
            CheckpointError: It belongs to another configuration, there is none of that round, or
                all are damaged.
        """
        if number is not None:
            return self._of_round(configuration, number)
        damage: tuple[int, DamagedError] | None = None
        for path in reversed(self._finished()):
            try:
                checkpoint = _read(path)
            except DamagedError as error:
                damage = damage or (_number(path), error)
                continue
            if damage is not None:
                warnings.warn(
                    f"The checkpoint of round {damage[0]} is damaged ({damage[1].found}). "
                    f"Going on after round {_number(path)}.",
                    FedveilWarning,
                    stacklevel=2,
                )
            _check_same(checkpoint.configuration, configuration, path)
            return checkpoint
        if damage is not None:
            raise damage[1]
        return None

    def _of_round(self, configuration: Mapping[str, Any], number: int) -> Checkpoint:
        path = self._folder / f"round-{number:06d}"
        if not path.is_dir():
            raise CheckpointError(
                f"There is no checkpoint of round {number}",
                expected=" or ".join(map(str, self.rounds())) or "a finished round",
                found=str(number),
                where=str(self._folder),
                fix=f"Checkpoints of the last {self._keep} rounds are kept (`checkpoints` in "
                "[federation]).",
            )
        checkpoint = _read(path)
        _check_same(checkpoint.configuration, configuration, path, free=CHANGEABLE)
        return checkpoint


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round-"))


def _read(path: Path) -> Checkpoint:
    """A checkpoint, whosever it is.

    Raises:
        DamagedError: It is not what was written.
        CheckpointError: It is of another version.
    """
    try:
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
        if values["format"] not in READABLE:
            raise _other_version(path, values["format"])
        if _digest(path, values) != values["digest"]:
            raise _damaged(path, "its content is not what was written")
        tensors = open_shards(path)
        records = [RoundRecord.from_json(record) for record in values["records"]]
        return Checkpoint(ServerState(tensors, values["scheme"]), records, values["configuration"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, FedveilError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _digest(folder: Path, values: Mapping[str, Any]) -> str:
    """A checksum over the weights and everything else; against accidents, not against forgers."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    whole = hashlib.sha256()
    for path in model_files(folder):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)  # goes on with the same sum
    whole.update(json.dumps(rest, sort_keys=True).encode())
    return whole.hexdigest()


def _other_version(path: Path, found: object) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is of another version of fedveil",
        expected=f"format {' or '.join(map(str, READABLE))}",
        found=str(found),
        where=str(path),
    )


def _damaged(path: Path, found: str) -> DamagedError:
    return DamagedError(
        "The checkpoint is damaged",
        found=found,
        where=str(path),
        fix="Restore it, or go on from one of an earlier round.",
    )


def _check_same(
    found: Mapping[str, Any],
    configuration: Mapping[str, Any],
    path: Path,
    free: Collection[str] = (),
) -> None:
    wanted = json.loads(json.dumps(configuration))
    for key in sorted((set(found) | set(wanted)) - set(free)):
        if found.get(key) != wanted.get(key):
            fix = "Resume with the configuration it was begun with, or use another folder"
            if key in CHANGEABLE:
                fix += ", or go back with --from-round N, from where clients and bounds may differ"
            raise CheckpointError(
                f"The checkpoint belongs to another configuration: {key!r} differs",
                expected=str(wanted.get(key)),
                found=str(found.get(key)),
                where=str(path),
                fix=f"{fix}.",
            )
