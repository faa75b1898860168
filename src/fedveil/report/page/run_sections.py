"""The sections of a report that say what a run did: key figures, bytes, rounds, configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedveil.report.curves import best, byte_lines, loss_lines
from fedveil.report.page.charts import Chart, draw
from fedveil.report.page.markup import Html, Node, table, tag
from fedveil.report.reading import RunFolder
from fedveil.report.words import (
    DASH,
    human_bytes,
    human_measure,
    human_percent,
    human_seconds,
    share,
)
from fedveil.run import RoundRecord

__all__ = [
    "clients", "configuration", "key_figures", "on_adapters", "rounds", "traffic", "words",
]  # fmt: skip

_MANY = 25
"""Longer tables are folded away until somebody asks for them."""

_LONGEST = 500
"""Characters of a setting; what is longer is cut."""

_WORDS = (
    ("global model", "the owner's, in full precision; it never leaves the server"),
    ("unit", "a neuron, head or channel: the thing that is hidden or released whole"),
    ("server model", "the global model without the units that are withheld from everybody"),
    ("proxy", "what a client is sent: some units withheld, the rest in few bits"),
    ("update", "what a client returns: its trained proxy minus the proxy"),
    ("exposure", "how much of the model a client has been sent so far"),
    ("leak", "(attack - own) / (global - own): own is the attacker's best without released bytes"),
    ("base", "the owner's model before the first round"),
)
_LOSS_WORDS = (
    ("loss", "how much the right answers surprise the model: lower is better"),
    ("nats per token", "the unit of a loss: minus the logarithm of the chance that the model gives "
     "to a token of a right answer, on average"),
    ("perplexity", "e to the loss: among so many tokens it might as well have guessed; 1 is best"),
)  # fmt: skip


def key_figures(run: RunFolder) -> Html:
    """The handful of numbers that answer most questions."""
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value)) for name, value in _key_figures(run)],
        class_="key",
    )


def on_adapters(run: RunFolder) -> Html | None:
    """What "model" means on the page of a run whose clients hold the backbone; else nothing."""
    if not run.is_of_adapter:
        return None
    return tag(
        "p",
        "With this scheme every client holds the backbone, and only the adapter on it is sent. "
        "Shares, bytes and numbers of the model are those of the adapter.",
        class_="aid",
    )


def traffic(run: RunFolder) -> Node:
    """Bytes per client and round."""
    lines = byte_lines(run)
    if not lines:
        return tag("p", "No round is on record, so nothing is known of bytes.")
    reading = (
        "How to read it: the mean over the clients of each round; the whole model in float32 "
        f"would be {human_bytes(run.fp32_bytes)} each way."
    )
    chart = Chart("bytes", "Bytes per client and round", "rounds", "bytes", "bytes", from_zero=True)
    return tag("div", draw(chart, lines, reading), class_="figures")


def _more(share: float | None) -> str:
    return human_percent(None if share is None else 100 * share, sign=True)


def clients(run: RunFolder) -> Node:
    """One row per client: what it was sent, and what it holds by it."""
    exposure, rows = run.exposure, list[Sequence[Node]]()
    for name in sorted({*exposure, *(n for r in run.records for n in r.bytes_down)}):
        down = [r.bytes_down[name] for r in run.records if name in r.bytes_down]
        up = [r.bytes_up[name] for r in run.records if name in r.bytes_up]
        total = sum(down) if down else (run.audit.bytes_down.get(name) if run.audit else None)
        one = exposure.get(name)
        rows.append((
            tag("span", name, class_="name"),
            str(len(down)) if run.records else DASH,
            human_bytes(total),
            human_bytes(sum(up)) if run.records else DASH,
            human_percent(100 * one.share, sign=True) if one else DASH,
            f"{one.bits:.1f}" if one else DASH,
            _more(one.next if one and run.audit else None),
        ))  # fmt: skip
    header = (
        "Client", "Proxies sent", "Bytes down", "Bytes up", "Model shown", "Bits per parameter",
        "One more would show",
    )  # fmt: skip
    whole = table("Per client, over all rounds", header, rows, numeric=range(1, 7))
    return _folded(whole, len(rows), f"All {len(rows)} clients, one by one")


def rounds(run: RunFolder) -> Node:
    """Losses over rounds, every round in numbers, and whose replies were not used."""
    if not run.records:
        return tag("p", "No round is on record: there is no metrics.jsonl, or it is empty.")
    parts, metric = list[Node](), run.metric
    if lines := loss_lines(run):
        reading = (
            "How to read it: falling lines mean that the model fits the clients' data better; "
            "training losses are means over the clients of a round."
        )
        unit, form = (metric.unit, "nats") if metric.lower_is_better else ("nats", "")
        picture = draw(Chart("losses", "Losses over rounds", "rounds", unit, form), lines, reading)
        parts.append(tag("div", picture, class_="figures"))
    views = ("global", "server_model", "proxy_before", "proxy_after")
    header = (
        "Round", "Clients", "Not used", "Refused", "Global", "Server model", "Proxy received",
        "Proxy trained", "Down", "Up", "Time",
    )  # fmt: skip
    rows = [
        [
            *map(str, (r.round, len(r.bytes_down), len(r.failed), len(r.refused))),
            *(human_measure(metric.of(r.measures.get(view, {})), metric) for view in views),
            human_bytes(sum(r.bytes_down.values())),
            human_bytes(sum(r.bytes_up.values())),
            human_seconds(r.seconds),
        ]
        for r in run.records
    ]  # fmt: skip
    what = f"losses ({metric.unit})" if metric.lower_is_better else "accuracies"
    whole = table(f"Per round: {what}, bytes in all", header, rows, numeric=range(11))
    parts.append(_folded(whole, len(rows), f"All {len(rows)} rounds in numbers"))
    parts.append(_left_out(run.records))
    return parts


def configuration(run: RunFolder) -> Node:
    """Every setting that decides the result."""
    rows = [
        (name, tag("span", _short(value), class_="wordy"))
        for name, value in _settings(run.manifest.configuration)
    ]
    return table("Settings of the run", ("Setting", "Value"), rows)


def words(run: RunFolder) -> Html:
    """What the page's words mean."""
    meanings = _WORDS + (_LOSS_WORDS if run.metric.lower_is_better else ())
    return table("What the words of this page mean", ("Word", "Meaning"), meanings)


def _key_figures(run: RunFolder) -> Iterator[tuple[str, str]]:
    metric, audit = run.metric, run.audit
    measures = audit.models.get("global", {}) if audit else {}
    if not measures and run.records:
        measures = run.records[-1].measures.get("global", {})
    yield "Global model", human_measure(metric.of(measures), metric)
    if audit:
        released = [attack for attack in audit.attacks if attack.released]
        strongest = best(released, metric)
        if strongest:
            reached = metric.of(strongest.measures)
            yield f"Strongest attack ({strongest.attack})", human_measure(reached, metric)
            yield "Its leak", _percent(strongest.leak)
            yield "Gain it shows", _percent(strongest.gain_shown)
            own, base, end = (
                metric.of(one) for one in (audit.own, audit.models.get("base", {}), measures)
            )
            if own is not None and base is not None and end is not None:
                yield "Gain of own work alone", _percent(metric.share(own, base, end))
        yield "Without released bytes", human_measure(metric.of(audit.own), metric)
    exposure = run.exposure
    if exposure:
        yield "Most shown to one client", _percent(max(one.share for one in exposure.values()))
    yield "Rounds", f"{run.rounds}, not finished" if run.at_work else str(run.rounds)
    down = [count for record in run.records for count in record.bytes_down.values()]
    if down:
        mean = sum(down) / len(down)
        part = human_percent(share(mean, run.fp32_bytes), sign=True)
        yield f"A proxy, {part} of float32", human_bytes(mean)
    what = "adapter" if run.is_of_adapter else "model"
    yield f"Numbers in the {what}", f"{run.manifest.parameters:,}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def _folded(content: Html, rows: int, label: str) -> Html:
    if rows <= _MANY:
        return content
    return tag("details", tag("summary", label), content)


def _left_out(records: Sequence[RoundRecord]) -> Html | None:
    rows = [
        (str(record.round), name, what, reason)
        for record in records
        for what, reasons in (
            ("not used", record.failed),
            ("counted for less", record.bounded),
            ("not sent", record.refused),
            ("not applied", {"all": record.rejected} if record.rejected else {}),
        )
        for name, reason in sorted(reasons.items())
    ]
    if not rows:
        return None
    whole = table(
        "Replies that were not used or counted for less, and proxies that were not sent",
        ("Round", "Client", "What", "Why"), rows,
    )  # fmt: skip
    return _folded(whole, len(rows), f"{len(rows)} replies not used or cut, proxies not sent")


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


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
