"""What a report's templates are given: the run, and what is computed of it, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from fedveil.report.console.audit_table import by_outcome
from fedveil.report.curves import (
    MOST_ATTACKS,
    Line,
    attack_name,
    best,
    byte_lines,
    coalition_lines,
    loss_lines,
    round_lines,
)
from fedveil.report.page.charts import Chart, chart
from fedveil.report.page.heatmap import heat_map, most_shown
from fedveil.report.reading import RunFolder
from fedveil.report.words import DASH, human_bytes, human_measure, human_percent, share
from fedveil.run import Attacked, Audit, RoundRecord
from fedveil.run.findings import ALARM
from fedveil.tasks.metrics import Measures, Metric

__all__ = ["contents"]

_LONGEST = 500
"""Characters of a setting; what is longer is cut."""


def contents(run: RunFolder) -> dict[str, Any]:
    """Everything that a page shows, by the names that its templates use.

    Raises:
        CheckpointError: The run's exposure ledger is damaged.
    """
    audit, exposure = run.audit, run.exposure
    ranked = _ranked(audit.attacks, run.metric) if audit else []
    return {
        "run": run,
        "audit": audit,
        "metric": run.metric,
        "audit_command": f"fedveil audit {quote(str(run.folder))}",
        "alarms": audit.answering(ALARM) if audit else [],
        "key_figures": list(_key_figures(run)),
        "charts": _charts(run),
        "most_attacks": MOST_ATTACKS,
        "heat": heat_map(exposure, run.rounds if audit else 0) if exposure else None,
        "most_shown": most_shown(exposure) if exposure else None,
        "attacks": ranked,
        "leading": _leading(ranked),
        "checks": by_outcome(audit.checks) if audit else [],
        "clients": _clients(run),
        "left_out": _left_out(run.records),
        "settings": [(name, _cut(value)) for name, value in _settings(run.manifest.configuration)],
    }


def _charts(run: RunFolder) -> dict[str, Chart | None]:
    """The pictures by name; None in the place of one that has nothing to show."""
    metric = run.metric
    form = {"%": "percent", "nats per token": "nats"}.get(metric.unit, "")
    loss = (metric.unit, "nats") if metric.lower_is_better else ("nats", "")
    held = _held(run.audit) if run.audit and run.exposure else []
    drawn = "% of the model's numbers", held, "percent"
    return {
        "rounds": chart("rounds", metric.axis, round_lines(run), form),
        "coalitions": chart("coalitions", metric.axis, coalition_lines(run), form),
        "held": chart("held", *drawn, from_zero=True),
        "bytes": chart("bytes", "bytes", byte_lines(run), "bytes", from_zero=True),
        "losses": chart("losses", loss[0], loss_lines(run), loss[1]),
    }


def _held(audit: Audit) -> list[Line]:
    held = sorted(audit.coalitions.items())
    points = tuple((size, 100 * part) for size, part in held if math.isfinite(part))
    return [Line("the coalition that holds most", "coalition", points)] if points else []


def _key_figures(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The handful of numbers that answer most questions."""
    metric, audit = run.metric, run.audit
    measures = audit.models.get("global", {}) if audit else {}
    if not measures and run.records:
        measures = run.records[-1].measures.get("global", {})
    yield "Global model", human_measure(metric.of(measures), metric)
    if audit:
        yield from _found_by(audit, metric, measures)
    if run.exposure:
        yield "Most shown to one client", _whole(max(one.share for one in run.exposure.values()))
    yield "Rounds", f"{run.rounds}, not finished" if run.at_work else str(run.rounds)
    down = [count for record in run.records for count in record.bytes_down.values()]
    if down:
        mean = sum(down) / len(down)
        part = human_percent(share(mean, run.fp32_bytes), sign=True)
        yield f"A proxy, {part} of float32", human_bytes(mean)
    what = "adapter" if run.is_of_adapter else "model"
    yield f"Numbers in the {what}", f"{run.manifest.parameters:,}"


def _found_by(audit: Audit, metric: Metric, measures: Measures) -> Iterator[tuple[str, str]]:
    strongest = best((attack for attack in audit.attacks if attack.released), metric)
    own, base, end = (metric.of(one) for one in (audit.own, audit.models.get("base", {}), measures))
    if strongest:
        reached = human_measure(metric.of(strongest.measures), metric)
        yield f"Strongest attack ({strongest.attack})", reached
        yield "Its leak", _whole(strongest.leak)
        yield "Gain it shows", _whole(strongest.gain_shown)
        if own is not None and base is not None and end is not None:
            yield "Gain of own work alone", _whole(metric.share(own, base, end))
    yield "Without released bytes", human_measure(own, metric)


def _whole(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def _ranked(attacks: Sequence[Attacked], metric: Metric) -> list[Attacked]:
    """The strongest first, and what was not measured last."""
    rest, ranked = list(attacks), []
    while (strongest := best(rest, metric)) is not None:
        ranked.append(strongest)
        rest.remove(strongest)
    return ranked + rest


def _leading(ranked: Sequence[Attacked]) -> list[Attacked]:
    """The strongest attack of each kind."""
    first = {(attack_name(attack), attack.released): attack for attack in reversed(ranked)}
    return [attack for attack in ranked if attack in first.values()]


@dataclass(frozen=True)
class Client:
    """What a client was sent, and what it holds by it; None stands for what is not known."""

    name: str
    sent: int
    down: float | None
    up: float | None
    shown: float | None
    bits: float | None
    next: float | None


def _clients(run: RunFolder) -> list[Client]:
    names = {*run.exposure, *(name for record in run.records for name in record.bytes_down)}
    return [_client(run, name) for name in sorted(names)]


def _client(run: RunFolder, name: str) -> Client:
    down = [r.bytes_down[name] for r in run.records if name in r.bytes_down]
    up = sum(r.bytes_up.get(name, 0) for r in run.records) if run.records else None
    audited = run.audit.bytes_down.get(name) if run.audit else None
    total = sum(down) if down else audited
    one = run.exposure.get(name)
    if one is None:
        return Client(name, len(down), total, up, None, None, None)
    coming = one.next if run.audit else None
    return Client(name, len(down), total, up, one.share, one.bits, coming)


def _left_out(records: Sequence[RoundRecord]) -> list[tuple[int, str, str, str]]:
    """Round, client, what was done with its message, and why."""
    return [
        (record.round, name, what, reason)
        for record in records
        for what, reasons in (
            ("not used", record.failed),
            ("counted for less", record.bounded),
            ("not sent", record.refused),
            ("not applied", {"all": record.rejected} if record.rejected else {}),
        )
        for name, reason in sorted(reasons.items())
    ]


def _settings(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings under dotted names; the list of clients as how many there are."""
    for key, value in values.items():
        name = f"{above}{key}"
        if name == "clients" and isinstance(value, Mapping):
            counts = [n for n in value.values() if isinstance(n, int | float) and math.isfinite(n)]
            yield name, f"{len(value)}{_sizes(counts)}"
        elif isinstance(value, Mapping) and value and len(above) < _LONGEST:
            yield from _settings(value, f"{name}.")
        else:
            yield name, _plain(value)


def _sizes(counts: Sequence[float]) -> str:
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    return f", {least} examples each" if least == most else f", {least} to {most} examples each"


def _plain(value: object) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or DASH
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
