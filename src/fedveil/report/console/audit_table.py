"""What an audit or a trace found, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from fedveil.audit.tracing import Match, Trace
from fedveil.audit.words import title
from fedveil.report.words import human_measure
from fedveil.run import Attacked, Audit, Checked
from fedveil.run.findings import ALARM, NOT_APPLICABLE, SOUND, Outcome
from fedveil.tasks.metrics import Metric, metric_named

__all__ = ["attack_table", "by_outcome", "check_lines", "inferred_line", "trace_table"]

_OTHERS = 3
_HIGH = 99
# In the order of what there is to do about it.
_LOOKS: Mapping[Outcome, tuple[str, str]] = {
    ALARM: ("ALARM", "bold red"),
    NOT_APPLICABLE: (NOT_APPLICABLE, "dim"),
    SOUND: (SOUND, "green"),
}


def attack_table(audit: Audit) -> Table:
    """One line per attack with all that was sent; the strongest of each coalition is bold."""
    metric = metric_named(audit.metric)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, caption_justify="left", caption_style="")
    if metric.lower_is_better:
        table.caption = Text(f"{metric.caption.capitalize()}.")
    table.add_column("Attackers")
    table.add_column("What they do", overflow="fold")
    for name in ("Rounds", metric.name.capitalize(), "Leak", "Gain shown"):
        table.add_column(name, justify="right")
    for clients in dict.fromkeys(attack.clients for attack in audit.attacks):
        tried = [attack for attack in audit.attacks if attack.clients == clients]
        rounds = max(attack.rounds for attack in tried)
        shown = [attack for attack in tried if attack.rounds in (0, rounds)]
        best = metric.best(shown, lambda attack: attack.measures)
        for number, attack in enumerate(shown):
            who = _who(clients) if number == 0 else ""
            table.add_row(who, *_cells(attack, metric), style="bold" if attack is best else "")
    return table


def check_lines(audit: Audit) -> Iterator[Text]:
    """One line per check: alarms, then what was not checked, then what is sound."""
    for one in by_outcome(audit.checks):
        word, style = _LOOKS[one.outcome]
        yield Text.assemble((word, style), f"  {one.check}: {one.found}")


def by_outcome(checks: Iterable[Checked]) -> list[Checked]:
    """Alarms first, then what was not checked, then what is sound."""
    return sorted(checks, key=lambda one: [*_LOOKS].index(one.outcome))


def trace_table(found: Trace) -> Table:
    """Suspects, surest first; then the best of those who are not accused, to compare."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("Clients", overflow="fold")
    table.add_column("Rounds", overflow="fold")
    for name in ("Chance at most", "Share of file", "Contrast"):
        table.add_column(name, justify="right")
    table.add_column("")
    accused = {client for match in found.suspects for client in match.clients}
    others: dict[tuple[str, ...], Match] = {}
    for match in found.scores:
        if not accused & set(match.clients):
            others.setdefault(match.clients, match)
    for match in found.suspects:
        table.add_row(*_match_cells(match), "suspect", style="bold")
    for match in list(others.values())[:_OTHERS]:
        table.add_row(*_match_cells(match), "not accused", style="dim")
    return table


def _match_cells(match: Match) -> tuple[str, ...]:
    chance = f"10^{match.log10_p:.0f}" if match.log10_p < -4 else f"{10**match.log10_p:.2g}"
    return (
        ", ".join(match.clients),
        ", ".join(map(str, match.rounds)),
        chance,
        f"{match.share:.0%}",
        f"{match.contrast:.1f}" if match.contrast < _HIGH else f"> {_HIGH}",
    )


def inferred_line(audit: Audit) -> str | None:
    """How well a client guesses what others contributed; None if that was not looked at."""
    if not audit.inferred:
        return None
    best = max(audit.inferred, key=lambda guess: guess.cosine)
    return (
        f"{best.client} guesses what others contributed to round {best.round} with cosine "
        f"{best.cosine:.2f} on {best.share:.0%} of the weights"
    )


def _cells(attack: Attacked, metric: Metric) -> tuple[str, str, str, str, str]:
    return (
        title(attack),
        str(attack.rounds) if attack.rounds else "–",
        human_measure(metric.of(attack.measures), metric, sign=False),
        _share(attack.leak if attack.released else None),
        _share(attack.gain_shown),
    )


def _who(clients: tuple[str, ...]) -> str:
    return clients[0] if len(clients) == 1 else f"{len(clients)} clients"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
