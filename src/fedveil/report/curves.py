"""The lines of a report's pictures: which there are, and what they say."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedveil.report.reading import RunFolder
from fedveil.run import Attacked
from fedveil.tasks.metrics import Metric, metric_named

__all__ = [
    "MOST_ATTACKS", "Line", "attack_name", "best", "byte_lines", "coalition_lines", "loss_lines",
    "round_lines",
]  # fmt: skip

_LOSS = metric_named("loss")

_VIEWS = {
    "global": "global model (never leaves the owner)",
    "server_model": "server model",
    "proxy_before": "proxy as received",
    "proxy_after": "proxy after local training",
}
MOST_ATTACKS = 6
"""Kinds of attack in one picture; the page has as many looks for them."""

_LEVELS = {"base": "base (before any round)", "public": "public model"}


@dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        name: In the legend.
        look: Which it is, as "global"; "attack" for an attacker.
        points: x and y, by ascending x.
        is_level: Whether its one value holds everywhere, so that it is drawn from side to side.
    """

    name: str
    look: str
    points: tuple[tuple[float, float], ...]
    is_level: bool = False


def best(attacks: Iterable[Attacked], metric: Metric) -> Attacked | None:
    """The attack that got furthest; None if none was measured."""
    return metric.best(attacks, lambda attack: attack.measures)


def attack_name(attack: Attacked) -> str:
    """An attack and what was done afterwards, such as "pooling + fine-tuning"."""
    return f"{attack.attack} + {attack.polish}" if attack.polish else attack.attack


def round_lines(run: RunFolder) -> list[Line]:
    """What models, proxies and single attackers reach, against rounds."""
    lines = []
    for view, name in _VIEWS.items():
        measured = (
            (record.round, run.metric.of(record.measures.get(view, {}))) for record in run.records
        )
        lines.append(Line(name, view, _points(measured)))
    if not lines[0].points:  # the run measured nothing, its audit perhaps did
        lines = _final(run)
    single = [attack for attack in _attacks(run) if len(attack.clients) == 1]
    lines += _attackers(single, run.metric, lambda attack: attack.rounds)
    alone = dict(_alone(run)).get(1, run.metric.of(run.audit.own) if run.audit else None)
    own = _level("attacker without a released byte", "own", alone)
    return _drawn([*lines, *_levels(run), own])


def coalition_lines(run: RunFolder) -> list[Line]:
    """What coalitions reach, against their size, beside the final models; nothing of one size."""
    attacks = _attacks(run)
    if len({len(attack.clients) for attack in attacks}) < 2:
        return []
    attackers = _attackers(attacks, run.metric, lambda attack: len(attack.clients))
    own = Line("attackers without a released byte", "own", _points(_alone(run)))
    return _drawn([*_final(run), *attackers, *_levels(run), own]) if attackers else []


def loss_lines(run: RunFolder) -> list[Line]:
    """Losses in nats, against rounds: of clients in training, of models on the test set."""
    lines = [
        Line(
            f"clients in training, {when} batch of the round",
            field,
            _points((record.round, _mean(getattr(record, field))) for record in run.records),
        )
        for when, field in (("first", "loss_first"), ("last", "loss_last"))
    ]
    for view, name in (("global", "global model"), ("server_model", "server model")):
        measured = ((r.round, _LOSS.of(r.measures.get(view, {}))) for r in run.records)
        lines.append(Line(f"{name}, test set", view, _points(measured)))
    return _drawn(lines)


def byte_lines(run: RunFolder) -> list[Line]:
    """Mean bytes per client, against rounds."""
    return _drawn(
        Line(name, field, _points((r.round, _mean(getattr(r, field))) for r in run.records))
        for name, field in (
            ("down: the proxy", "bytes_down"),
            ("up: the update", "bytes_up"),
        )
    )


def _attacks(run: RunFolder) -> list[Attacked]:
    return [attack for attack in run.audit.attacks if attack.released] if run.audit else []


def _attackers(
    attacks: Iterable[Attacked], metric: Metric, place: Callable[[Attacked], float]
) -> list[Line]:
    """One line per kind of attack: the best of its kind at each place."""
    kinds: dict[str, dict[float, list[Attacked]]] = defaultdict(lambda: defaultdict(list))
    for attack in attacks:
        kinds[attack_name(attack)][place(attack)].append(attack)
    lines = []
    for name, places in kinds.items():
        strongest = ((x, best(some, metric)) for x, some in sorted(places.items()))
        points = _points((x, metric.of(a.measures)) for x, a in strongest if a is not None)
        lines.append(Line(f"attack: {name}", "attack", points))
    return _furthest(_drawn(lines), metric)


def _furthest(lines: list[Line], metric: Metric) -> list[Line]:
    """The few that end furthest: more could not be told apart."""
    return sorted(lines, key=lambda line: metric.lead(0.0, line.points[-1][1]))[:MOST_ATTACKS]


def _final(run: RunFolder) -> list[Line]:
    """The owner's final models and the last proxies, as levels."""
    measures = dict(run.records[-1].measures) if run.records else {}
    measures |= {key: dict(value) for key, value in (run.audit.models if run.audit else {}).items()}
    return [
        _level(name, view, run.metric.of(measures.get(view, {}))) for view, name in _VIEWS.items()
    ]


def _levels(run: RunFolder) -> list[Line]:
    models = run.audit.models if run.audit else {}
    values = {key: run.metric.of(models.get(key, {})) for key in _LEVELS}
    values["base"] = values["base"] if run.audit else run.figure("base")
    return [
        *(_level(name, key, values[key]) for key, name in _LEVELS.items()),
        _level("own data alone (mean of the clients)", "own_data", run.figure("own_data")),
    ]


def _alone(run: RunFolder) -> list[tuple[int, float | None]]:
    """What coalitions reach without a released byte, by their size."""
    tried: dict[int, list[Attacked]] = defaultdict(list)
    for attack in run.audit.attacks if run.audit else ():
        if not attack.released:
            tried[len(attack.clients)].append(attack)
    found = ((size, best(attacks, run.metric)) for size, attacks in sorted(tried.items()))
    return [(size, run.metric.of(one.measures)) for size, one in found if one is not None]


def _level(name: str, look: str, value: float | None) -> Line:
    return Line(name, look, _points([(0, value)]), is_level=True)


def _points(pairs: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in pairs if y is not None)


def _drawn(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.points]


def _mean(values: Mapping[str, float]) -> float | None:
    numbers = [value for value in values.values() if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else None
