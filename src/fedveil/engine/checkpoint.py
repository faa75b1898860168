"""A finished round on disk, written so that a crash at any moment leaves the last one whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedveil.engine.records import RoundRecord
from fedveil.errors import CheckpointError
from fedveil.schemes import ServerState

__all__ = ["Checkpoint", "CheckpointFolder"]

FORMAT = 1
TENSORS, VALUES = "model.safetensors", "state.json"
_NAME = re.compile(r"round-(\d{6})")


@dataclass(frozen=True)
class Checkpoint:
    """A finished round: the server's state, the records so far, the configuration they belong to.

    Does NOT protect: it holds the global model in full precision. The secret is not in it.
    """

    state: ServerState
    records: list[RoundRecord]
    configuration: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run. Only the newest is kept, and the one before until it is safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        aside = self._folder / f"unfinished-{number:06d}"
        before = self.newest()
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _write(aside, checkpoint)
            aside.rename(target)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = f"Round {int(before.name[6:])} is kept" if before else "Nothing was lost on disk"
            raise CheckpointError(
                f"Round {number} could not be saved",
                found=str(error),
                where=str(self._folder),
                fix=f"{kept}: free some space and run again with resume.",
            ) from error
        for older in self._finished():
            if older != target:
                shutil.rmtree(older, ignore_errors=True)

    def _finished(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def load(self, configuration: Mapping[str, Any]) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none.

        Raises:
            CheckpointError: If it is damaged, or belongs to another configuration.
        """
        path = self.newest()
        if path is None:
            return None
        try:
            values = json.loads((path / VALUES).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(
                    "The checkpoint is of another version of fedveil",
                    expected=f"format {FORMAT}",
                    found=str(values["format"]),
                    where=str(path),
                )
            if _digest(path / TENSORS, values) != values["digest"]:
                raise _damaged(path, "its content is not what was written")
            tensors = load_file(path / TENSORS)
            records = [RoundRecord.from_json(record) for record in values["records"]]
            found, scheme = values["configuration"], values["scheme"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        _check_same(found, json.loads(json.dumps(configuration)), path)
        return Checkpoint(ServerState(tensors, scheme), records, found)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.state.tensors, folder / TENSORS)
    values = {
        "format": FORMAT,
        "scheme": checkpoint.state.values,
        "configuration": checkpoint.configuration,
        "records": [record.to_json() for record in checkpoint.records],
    }
    values["digest"] = _digest(folder / TENSORS, values)
    (folder / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")
    for path in (folder / TENSORS, folder / VALUES, folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(tensors: Path, values: Mapping[str, Any]) -> str:
    """A checksum over the weights and everything else; against accidents, not against forgers."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    with tensors.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256")
    whole.update(json.dumps(rest, sort_keys=True).encode())
    return whole.hexdigest()


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
