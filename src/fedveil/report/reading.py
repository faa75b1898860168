"""What the folder of a run holds, read for a report and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedveil.errors import AuditError, CheckpointError
from fedveil.run import Audit, ClientExposure, Exposure, Manifest, RoundRecord
from fedveil.run.folder import RunFolder as OwnedFolder
from fedveil.run.ledger import check_ledger
from fedveil.schemes import scheme_class, scheme_names
from fedveil.tasks.metrics import Metric, metric_in, metric_named

__all__ = ["RunFolder"]

_FLOAT32_BYTES = 4
_OF_BEFORE = ("base", "own_data")
"""Figures that no round changes."""
_RECORD, _AUDIT = TypeAdapter(RoundRecord), TypeAdapter(Audit)


@dataclass(frozen=True)
class RunFolder:
    """A run, as far as it has got and as far as it was audited.

    Attributes:
        folder: Where it lies.
        manifest: What it is about.
        records: Its finished rounds.
        audit: What its audit found; None if it was never audited.
        figures: What ``summary.json`` says of it; empty if there is none.
        at_work: Whether it was going on when it was read, so that nothing of it is final.
    """

    folder: Path
    manifest: Manifest
    records: tuple[RoundRecord, ...]
    audit: Audit | None
    figures: Mapping[str, Any]
    at_work: bool = False

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Read a run's folder; nothing in it is changed.

        Raises:
            CheckpointError: It is not the folder of a run, or one of its files is damaged.
            AuditError: Its audit is damaged or of another version.
        """
        at_work = OwnedFolder(folder).run_is_at_work()
        manifest = _read_manifest(folder)
        scheme = _mapping(manifest.configuration.get("scheme"))
        records = _read_records(folder / "metrics.jsonl")
        figures = _read_figures(folder / "summary.json", str(scheme.get("name")), len(records))
        return cls(folder, manifest, records, _read_audit(folder), figures, at_work)

    @property
    def name(self) -> str:
        """What to call the run: its folder's name."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def scheme(self) -> Mapping[str, Any]:
        """Name and settings of its scheme."""
        return _mapping(self.manifest.configuration.get("scheme"))

    @property
    def is_of_adapter(self) -> bool:
        """Whether an adapter is all that the scheme releases: its clients hold the rest."""
        name = self.scheme.get("name")
        return name in scheme_names() and scheme_class(str(name)).clients_hold_rest

    @property
    def rounds(self) -> int:
        """Rounds that are finished or, where no record is left of them, that were audited."""
        if self.records:
            return self.records[-1].round
        return self.audit.rounds if self.audit else 0

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the model in float32, with which messages are compared."""
        return _FLOAT32_BYTES * self.manifest.parameters

    @property
    def metric(self) -> Metric:
        """What models are compared by; accuracy, or the loss of a language model, where nothing
        was audited."""
        if self.audit:
            return metric_named(self.audit.metric)
        return metric_in(*self._measured)

    @property
    def is_measured(self) -> bool:
        """Whether it is known by what its models are compared."""
        return self.audit is not None or bool(self._measured)

    def figure(self, name: str) -> float | None:
        """What ``summary.json`` says of a model; None if nothing, or by another metric."""
        if self.figures.get("metric", "accuracy") != self.metric.name:
            return None
        return self.figures.get(name)

    @property
    def _measured(self) -> list[Mapping[str, float]]:
        return [one for record in self.records for one in record.measures.values()]

    @cached_property
    def exposure(self) -> Mapping[str, ClientExposure]:
        """By client, what it was shown: from the audit or else from the ledger.

        Raises:
            CheckpointError: The ledger is damaged, or lists less than was released.
        """
        if self.audit is not None:
            return self.audit.exposure
        exposure = Exposure(self.manifest, self.folder)
        check_ledger(exposure, self.records, self.folder)
        return {
            client: ClientExposure(
                exposure.share([client]),
                exposure.mean_bits([client]),
                exposure.history(client),
                0.0,
            )
            for client in exposure.clients
        }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_manifest(folder: Path) -> Manifest:
    found = ""
    try:
        manifest = Manifest.read(folder)
        if isinstance(manifest.configuration, Mapping) and manifest.parameters >= 0:
            return manifest
    except (AttributeError, RecursionError, TypeError) as error:  # JSON, but of another shape
        found = repr(error)[:200]
    raise CheckpointError(
        "run.json is damaged",
        expected="a configuration, tensors and unit groups",
        found=found or "a configuration that is none",
        where=str(folder / "run.json"),
        fix="Restore the file, or run again.",
    )


def _read_records(path: Path) -> tuple[RoundRecord, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "text in UTF-8", str(error)) from error
    records: list[RoundRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _RECORD.validate_python(json.loads(line))
        except (ValueError, ValidationError, RecursionError) as error:
            raise _damaged(f"{path}, line {number}", "the record of a round", error) from error
        if record.round != number:
            found = f"round {record.round}"
            raise _damaged(f"{path}, line {number}", f"round {number}", found)
        records.append(record)
    return tuple(records)


def _read_audit(folder: Path) -> Audit | None:
    if not (folder / "audit.json").exists():
        return None
    try:
        # It may be whole and yet hold a text where a number belongs.
        return _AUDIT.validate_python(asdict(Audit.read(folder)))
    except (ValidationError, AttributeError, RecursionError, TypeError) as error:
        raise AuditError(
            "The audit is damaged",
            expected="values of the kinds that an audit writes",
            found=_first(error),
            where=str(folder / "audit.json"),
            fix=f"Audit the run again: fedveil audit {folder}",
        ) from error


def _read_figures(path: Path, scheme: str, rounds: int) -> Mapping[str, Any]:
    """The figures of this run's own scheme; a summary may be of several.

    A run that went on after it was summed up is not where it was then: only what is of before round
    1 holds as long as it is not summed up anew.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "text in UTF-8", str(error)) from error
    try:
        schemes = dict(json.loads(text)["schemes"])
        found = schemes.get(scheme) or (next(iter(schemes.values())) if len(schemes) == 1 else {})
        of_now = rounds in (0, len(found.get("rounds") or range(rounds)))
        return {
            name: value
            for name, value in dict(found).items()
            if name == "metric" or (_is_number(value) and (of_now or name in _OF_BEFORE))
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, "figures by scheme", error) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _damaged(where: Path | str, expected: str, found: Exception | str) -> CheckpointError:
    return CheckpointError(
        "A file of the run is damaged",
        expected=expected,
        found=found if isinstance(found, str) else _first(found),
        where=str(where),
        fix="Restore it, or continue the run with resume, which writes it anew.",
    )


def _first(error: Exception) -> str:
    """The first thing that is wrong, and where in the file."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"[:200]
    return repr(error)[:200]
