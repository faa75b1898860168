"""The exposure ledger of a run, opened and held against everything else that tells of releases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedveil.errors import CheckpointError
from fedveil.run.exposure import Exposure
from fedveil.run.folder import RunFolder
from fedveil.run.manifest import Manifest
from fedveil.run.records import RoundRecord

__all__ = ["check_ledger", "open_ledger"]

_ROUNDING = 1e-9
_KEPT = re.compile(r"round-(\d+)/(.+)\.proxy\.safetensors")
"""A proxy that was kept, under ``messages``."""


def open_ledger(manifest: Manifest, folder: RunFolder, records: Iterable[RoundRecord]) -> Exposure:
    """The ledger of a run that begins or goes on, before anything is released.

    Args:
        manifest: Of the run.
        folder: Of the run.
        records: Its finished rounds.

    Raises:
        CheckpointError: It was lost, cut off or altered, or lists less than was released.
    """
    if lost := folder.lost_ledger():
        raise _listed_too_little(folder.path, "the ledger that the run has begun", lost[0])
    exposure, records = Exposure(manifest, folder.path), list(records)
    check_ledger(exposure, records, folder.path)
    if not records and not exposure.clients and (shown := _shown_before(folder.path)):
        raise _listed_too_little(folder.path, f"the releases of round {shown}", "no ledger")
    for name in ("exposure.head", "exposure.jsonl"):
        folder.claim(name)
    exposure.begin()
    folder.ledger_begun()
    return exposure


def check_ledger(exposure: Exposure, records: Iterable[RoundRecord], folder: Path) -> None:
    """Whether a ledger lists everything that finished rounds and kept messages say was released.

    It may list more: what was released in rounds that a crash has cut short, or that were given up.

    Raises:
        CheckpointError: It does not.
    """
    listed = {(number, client) for number, client, _ in exposure.releases()}
    for number, client in _released(records, folder):
        if (number, client) not in listed:
            raise _listed_too_little(folder, f"the release to {client} in round {number}", "none")
    for record in records:
        if record.ledger is not None and not exposure.had(record.ledger):
            raise _listed_too_little(
                folder, f"the lines that were there after round {record.round}", "others"
            )
        for client, share in record.exposed.items():
            if exposure.share([client]) < share - _ROUNDING:
                raise _listed_too_little(
                    folder,
                    f"{share:.1%} of the model for {client}",
                    f"{exposure.share([client]):.1%}",
                )


def _shown_before(folder: Path) -> int | None:
    """A round of which metrics.jsonl says that something was shown; None if there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["exposed"]:
                return int(values["round"])
        except (KeyError, TypeError, ValueError):
            continue  # nobody's record
    return None


def _released(records: Iterable[RoundRecord], folder: Path) -> Iterator[tuple[int, str]]:
    for record in records:
        # Of a version before there was a ledger nothing can be held against it.
        yield from ((record.round, client) for client in record.bytes_down if record.exposed)
    messages = folder / "messages"
    for path in sorted(messages.glob("round-*/*.proxy.safetensors")):
        if kept := _KEPT.fullmatch(path.relative_to(messages).as_posix()):
            yield int(kept[1]), kept[2]


def _listed_too_little(folder: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "The exposure ledger does not list everything that was released",
        expected=expected,
        found=found,
        where=str(folder / "exposure.jsonl"),
        fix="Restore exposure.jsonl and exposure.head from a copy, or begin a new run.",
    )
