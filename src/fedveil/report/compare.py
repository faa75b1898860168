"""Several runs side by side: what each is worth to its owner, and what it gave away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.errors import ConfigurationError
from fedveil.report.curves import best
from fedveil.report.reading import RunFolder
from fedveil.tasks.metrics import Metric, metric_in

__all__ = ["Compared", "Comparison", "Value", "compare", "mean_of", "values_of"]

# What may differ between two runs of one scheme: the dice, and what was drawn by them.
_DRAWN = frozenset({"seed", "secret", "model", "clients"})
# Two measurements of one model on one test set agree to this share; on two test sets they do not.
_SAME = 0.005


@dataclass(frozen=True)
class Compared:
    """One run in a comparison; what is not known is None.

    Attributes:
        folder: Where it lies.
        label: Its scheme, and those of its settings in which the runs differ.
        seed: As it was configured.
        rounds: How many are finished.
        audited: Whether its audit is there.
        final: What the global model reaches.
        base: The same of the base.
        own: What an attacker reaches without a released byte.
        attack: What the strongest attacker reaches with them.
        attack_name: Which attack that is.
        leak: Its leak.
        gain_shown: Its share of what the rounds added to the base.
        shown: The largest share of the model that one client was sent, from 0 to 1.
        bytes_down: Mean per client and round.
        bytes_up: Mean per client and round.
    """

    folder: Path
    label: str
    seed: object
    rounds: int
    audited: bool
    final: float | None
    base: float | None
    own: float | None
    attack: float | None
    attack_name: str
    leak: float | None
    gain_shown: float | None
    shown: float | None
    bytes_down: float | None
    bytes_up: float | None


Value = Callable[[Compared], float | None]
"""One figure of a run."""


@dataclass(frozen=True)
class Comparison:
    """Runs of one task.

    Attributes:
        runs: Those of one label follow one another.
        metric: The name of the measure that they are compared by; see
            :func:`~fedveil.tasks.metrics.metric_named`.
        notes: What to know before believing it, a sentence each.
    """

    runs: tuple[Compared, ...]
    metric: str
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Each once, in the order of their first runs."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    def of(self, label: str) -> tuple[Compared, ...]:
        """All runs of a label: the same recipe with several seeds."""
        return tuple(run for run in self.runs if run.label == label)


def compare(folders: Sequence[Path]) -> Comparison:
    """Read runs and put those of one recipe together.

    That all are measured on one test set is not written down anywhere. What shows that they are not
    is an error: other tensors, another measure, the same base with other results. A run without an
    audit is taken in, as not audited.

    Args:
        folders: Of the runs, at least one.

    Raises:
        ConfigurationError: There are none, one is given twice, or they are not of one task.
        CheckpointError: One is not the folder of a run, or is damaged.
        AuditError: The audit of one is damaged.
    """
    if not folders:
        raise ConfigurationError("There is nothing to compare", expected="at least 1 run folder")
    runs = [RunFolder.read(folder) for folder in folders]
    _check_different(folders)
    metric = _metric(runs)
    for run in runs[1:]:
        _check_task(runs[0], run)
    for place, run in enumerate(runs):
        for other in runs[place + 1 :]:
            _check_base(run, other, metric)
    labels = _labels(runs)
    rows = [_compared(run, label, metric) for run, label in zip(runs, labels, strict=True)]
    order = list(dict.fromkeys(labels))
    rows.sort(key=lambda row: order.index(row.label))
    return Comparison(tuple(rows), metric.name, tuple(_notes(runs)))


def values_of(runs: Sequence[Compared], value: Value) -> list[float]:
    """A figure of each run of which it is known."""
    return [found for run in runs if (found := value(run)) is not None]


def mean_of(runs: Sequence[Compared], value: Value) -> float | None:
    """Its mean over these runs; None if it is known of none."""
    return _mean(values_of(runs, value))


def _compared(run: RunFolder, label: str, metric: Metric) -> Compared:
    audit = run.audit
    last = run.records[-1].measures.get("global", {}) if run.records else {}
    final = metric.of(audit.models.get("global", {})) if audit else None
    strongest = best([a for a in audit.attacks if a.released], metric) if audit else None
    shown = [one.share for one in run.exposure.values()]
    return Compared(
        folder=run.folder,
        label=label,
        seed=run.manifest.configuration.get("seed"),
        rounds=run.rounds,
        audited=audit is not None,
        final=metric.of(last) if final is None else final,
        base=_base(run, metric),
        own=metric.of(audit.own) if audit else None,
        attack=metric.of(strongest.measures) if strongest else None,
        attack_name=strongest.attack if strongest else "",
        leak=strongest.leak if strongest else None,
        gain_shown=strongest.gain_shown if strongest else None,
        shown=max(shown, default=None),
        bytes_down=_mean([n for record in run.records for n in record.bytes_down.values()]),
        bytes_up=_mean([n for record in run.records for n in record.bytes_up.values()]),
    )


def _base(run: RunFolder, metric: Metric) -> float | None:
    if run.audit is not None:
        return metric.of(run.audit.models.get("base", {}))
    return run.figure("base") if run.metric == metric else None


def _metric(runs: Sequence[RunFolder]) -> Metric:
    found = {run.metric: run.name for run in runs if run.is_measured}
    if len(found) > 1:
        raise ConfigurationError(
            "The runs are judged by different measures",
            expected="one measure for all",
            found=", ".join(sorted(f"{metric.name} in {name}" for metric, name in found.items())),
            fix="Compare runs of one task, or audit them again by one measure.",
        )
    return next(iter(found), metric_in())


def _check_different(folders: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigurationError(
                "A run is compared with itself", found=f"{folder} twice", fix="Give it once."
            )
        seen.add(folder.resolve())


def _check_task(first: RunFolder, other: RunFolder) -> None:
    ours, theirs = first.manifest.tensors, other.manifest.tensors
    odd = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if odd:
        expected, found = ours.get(odd[0]), theirs.get(odd[0])
        raise ConfigurationError(
            "The runs are of different models, so their figures do not compare",
            expected=f"{odd[0]} as in {first.folder}: {expected.shape if expected else 'none'}",
            found=str(found.shape) if found else "none",
            where=str(other.folder),
            fix="Compare runs of one model and one task.",
        )


def _check_base(run: RunFolder, other: RunFolder, metric: Metric) -> None:
    """One base has one result on one test set."""
    if run.manifest.configuration.get("model") != other.manifest.configuration.get("model"):
        return
    ours, theirs = _base(run, metric), _base(other, metric)
    if ours is None or theirs is None or math.isclose(ours, theirs, rel_tol=_SAME):
        return
    raise ConfigurationError(
        "The runs were measured on different test sets: the same base reaches something else",
        expected=f"{metric.name} {metric.exact(ours)}, as in {run.folder}",
        found=metric.exact(theirs),
        where=str(other.folder),
        fix="Audit all of them with one test set.",
    )


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    notes = []
    if len({str(run.manifest.configuration.get("model")) for run in runs}) > 1:
        notes.append(
            "The runs start from different bases, so whether they share a test set was not checked."
        )
    if going := [run.name for run in runs if run.at_work]:
        notes.append(f"Not finished, a run is at work: {', '.join(going)}.")
    if missing := [run.name for run in runs if run.audit is None]:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        notes.append(f"Not audited, so nothing is known of what they leak: {few}.")
    return notes


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """The scheme's name, and the settings by which it differs from others of the name."""
    recipes = [_recipe(run.manifest.configuration) | {"rounds": str(run.rounds)} for run in runs]
    names = [str(run.scheme.get("name", "unknown")) for run in runs]
    labels = []
    for name, recipe in zip(names, recipes, strict=True):
        peers = [other for n, other in zip(names, recipes, strict=True) if n == name]
        keys = sorted({key for other in peers for key in other})
        odd = [key for key in keys if len({other.get(key) for other in peers}) > 1]
        settings = [f"{key.split('.')[-1]}={recipe.get(key, 'unset')}" for key in odd]
        labels.append(" ".join([name, ", ".join(settings)]) if settings else name)
    return labels


def _recipe(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Everything but what was drawn, under dotted names."""
    recipe: dict[str, str] = {}
    for key, value in values.items():
        if not above and key in _DRAWN:
            continue
        if isinstance(value, Mapping):
            recipe |= _recipe(value, f"{above}{key}.")
        else:
            recipe[f"{above}{key}"] = json.dumps(value).strip('"')
    return recipe


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
