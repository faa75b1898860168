"""A finished round on disk, written so that a crash at any moment leaves the last one whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedveil.engine.records import RoundRecord
from fedveil.errors import CheckpointError, FedveilError
from fedveil.schemes import ServerState
from fedveil.shards import SHARD_BYTES, model_files, open_shards, whole_folder, write_shards

__all__ = ["Checkpoint", "CheckpointFolder"]

FORMAT = 2
# Of the first format there was one model file only, written and summed up in the same way.
READABLE = (1, FORMAT)
VALUES = "state.json"
_NAME = re.compile(r"round-(\d{6})")
# Of earlier rounds, and of tries that a crash has cut short, by earlier versions too.
_OURS = re.compile(r"(round|unfinished|(unfinished|replaced)-round)-\d{6}")


@dataclass(frozen=True)
class Checkpoint:
    """A finished round: the server's state, the records so far, the configuration they belong to.

    Does NOT protect: it holds the global model in full precision. The secret is not in it.
    """

    state: ServerState
    records: list[RoundRecord]
    configuration: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run. Only the newest is kept, and the one before until it is safe.

    Args:
        folder: Made when the first is saved.
        shard_bytes: Most bytes of a file of tensors, unless one tensor has more.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes

    def newest(self) -> Path | None:
        """The newest finished checkpoint, or None."""
        return next(reversed(self._finished()), None)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint aside, make sure that it is on disk, then put it in place at once.

        Raises:
            CheckpointError: If it cannot be written (a full disk); the one before is untouched.
        """
        number = len(checkpoint.records)
        target = self._folder / f"round-{number:06d}"
        before = self.newest()
        try:
            with whole_folder(target) as aside:
                self._write(aside, checkpoint)
        except (OSError, SafetensorError) as error:
            kept = f"Round {int(before.name[6:])} is kept" if before else "Nothing was lost on disk"
            raise CheckpointError(
                f"Round {number} could not be saved",
                found=str(error),
                where=str(self._folder),
                fix=f"{kept}: free some space and run again with resume.",
            ) from error
        for older in self._folder.iterdir():
            if older != target and _OURS.fullmatch(older.name):
                shutil.rmtree(older, ignore_errors=True)

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

    def load(self, configuration: Mapping[str, Any]) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none; its tensors are maps of its files.

        Raises:
            CheckpointError: If it is damaged, or belongs to another configuration.
        """
        path = self.newest()
        if path is None:
            return None
        try:
            values = json.loads((path / VALUES).read_text(encoding="utf-8"))
            if values["format"] not in READABLE:
                raise _other_version(path, values["format"])
            if _digest(path, values) != values["digest"]:
                raise _damaged(path, "its content is not what was written")
            tensors = open_shards(path)
            records = [RoundRecord.from_json(record) for record in values["records"]]
            found, scheme = values["configuration"], values["scheme"]
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, FedveilError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        _check_same(found, json.loads(json.dumps(configuration)), path)
        return Checkpoint(ServerState(tensors, scheme), records, found)


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


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is damaged", found=found, where=str(path), fix="Start the run anew."
    )


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    for key in sorted(set(found) | set(wanted)):
        if found.get(key) != wanted.get(key):
            raise CheckpointError(
                f"The checkpoint belongs to another configuration: {key!r} differs",
                expected=str(wanted.get(key)),
                found=str(found.get(key)),
                where=str(path),
                fix="Resume with the configuration it was begun with, or use another folder.",
            )
