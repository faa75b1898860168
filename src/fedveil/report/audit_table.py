"""What an audit found, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from fedveil.audit import Attacked, Audit
from fedveil.audit.words import title

__all__ = ["alarm_lines", "attack_table"]


def attack_table(audit: Audit) -> Table:
    """One line per attack with all that was sent; the strongest of each coalition is bold."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("Attackers")
    table.add_column("What they do", overflow="fold")
    for name in ("Rounds", audit.metric.capitalize(), "Leak", "Gain shown"):
        table.add_column(name, justify="right")
    for clients in dict.fromkeys(attack.clients for attack in audit.attacks):
        tried = [attack for attack in audit.attacks if attack.clients == clients]
        rounds = max(attack.rounds for attack in tried)
        shown = [attack for attack in tried if attack.rounds in (0, rounds)]
        best = max(shown, key=lambda attack: attack.measures[audit.metric])
        for number, attack in enumerate(shown):
            who = _who(clients) if number == 0 else ""
            table.add_row(
                who, *_cells(attack, audit.metric), style="bold" if attack is best else ""
            )
    return table


def alarm_lines(audit: Audit) -> Iterator[Text]:
    """One line per check, alarms first."""
    for alarm in sorted(audit.alarms, key=lambda alarm: not alarm.raised):
        word, style = ("ALARM", "bold red") if alarm.raised else ("sound", "green")
        yield Text.assemble((word, style), f"  {alarm.check}: {alarm.found}")


def _cells(attack: Attacked, metric: str) -> tuple[str, str, str, str, str]:
    return (
        title(attack),
        str(attack.rounds) if attack.rounds else "–",
        f"{attack.measures[metric]:.1f}",
        _share(attack.leak if attack.released else None),
        _share(attack.gain_shown),
    )


def _who(clients: tuple[str, ...]) -> str:
    return clients[0] if len(clients) == 1 else f"{len(clients)} clients"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
