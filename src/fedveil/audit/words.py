"""What an audit found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedveil.audit.attacks.registry import title_of
from fedveil.run.findings import (
    ALARM,
    BASE,
    NAMED,
    NOT_APPLICABLE,
    NOTHING,
    RELEASED,
    SIMULATED,
    Attacked,
    Audit,
    Checked,
    furthest,
)  # fmt: skip
from fedveil.tasks.metrics import metric_named

__all__ = ["NOT_PROTECTED", "sentence", "title"]

NOT_PROTECTED: Final = (
    "Attacks show what is possible at least: a better attacker may reach more.",
    "What was released was released: an attacker may wait for better methods, or for another "
    "proxy from the next run.",
    "The base that the federation began with is protected only as far as it was not released and "
    "is not public.",
    "The clients' data are not looked at here: what updates tell of them is another question.",
    "Whoever attacks with more data than the clients have needs less of what was released.",
)

_NOTHING: Final = 0.005
"""Shares below this are not worth a word."""

_ORIGINS: Final = {
    "public": "the public model",
    SIMULATED: "proxies that they made of the public model themselves",
}


_ASSUMED: Final = {
    NOTHING: " Nothing was taken for public but what everybody was sent.",
    RELEASED: " The public model that was released in the place of yours was taken for public.",
    BASE: " Your base was taken for public.",
    NAMED: " The public model that you named was taken for public.",
}


def title(attack: Attacked) -> str:
    """What was done, for people who were not there."""
    parts = [title_of(attack.attack)]
    if not attack.released:
        parts.append(f"from {_ORIGINS.get(attack.holes, attack.holes)}")
    elif attack.holes:
        parts.append(f"holes: {attack.holes}")
    if attack.polish:
        parts.append(title_of(attack.polish))
    return ", ".join(parts)


def sentence(audit: Audit) -> str:
    """The answer to "what did my partners learn of my model?"."""
    metric = metric_named(audit.metric)
    top = metric.words(audit.models["global"], at_length=True)
    alone, together = _strongest_of(audit, 1), audit.strongest
    text = f"Your model reaches {top}, your base {metric.words(audit.models['base'])}"
    text += "; lower is better." if metric.lower_is_better else "."
    if alone is not None:
        text += f" With what it was sent the best-informed client gets to {_reached(audit, alone)}."
    if alone is not None and together is not None and len(together.clients) > 1:
        count = len(together.clients)
        text += f" {count} clients who pool everything get to {_reached(audit, together)}."
    if together is None:
        text += " No attack was tried: what clients can make of what they were sent is not known."
    if _all_can_simulate(audit):
        text += " All that they were sent anybody can make of the public model, byte for byte."
    text += _ASSUMED.get(audit.assumed, "")
    if audit.doubt is not None:
        text += f" {audit.doubt}"
    return text + _of_checks(audit)


def _all_can_simulate(audit: Audit) -> bool:
    """Whether each coalition that attacked could have made by itself what it was sent."""
    attackers = {attack.clients for attack in audit.attacks}
    simulators = {attack.clients for attack in audit.attacks if attack.holes == SIMULATED}
    return bool(attackers) and attackers == simulators


def _of_checks(audit: Audit) -> str:
    """How many checks raise an alarm, and how many were not made; nothing of the others."""
    text, count = "", len(audit.checks)
    if raised := audit.answering(ALARM):
        text += f" {len(raised)} of {count} checks raise an alarm: {_named(raised)}."
    if not_made := audit.answering(NOT_APPLICABLE):
        text += f" {len(not_made)} of {count} checks do not apply: {_named(not_made)}."
    return text


def _named(checks: Sequence[Checked]) -> str:
    return ", ".join(one.check for one in checks)


def _reached(audit: Audit, attack: Attacked) -> str:
    """How far an attack got, and how far the same clients get without it."""
    metric = metric_named(audit.metric)
    text = metric.words(attack.measures)
    own = audit.own_of(attack.clients)
    if own is None:
        return text
    alone = metric.words(own)
    if attack.leak is not None and attack.leak < _NOTHING:
        return f"{text}, no further than without a released byte ({alone})"
    if attack.leak is None:
        return f"{text}, and to {alone} without a released byte: your model is not ahead of that"
    text += f", and to {alone} without a released byte"
    text += f": {attack.leak:.0%} of what your model is ahead of that has leaked".replace("%", " %")
    if attack.gain_shown is not None:
        shown = f"{attack.gain_shown:.0%}".replace("%", " %")
        text += f", and {'none' if attack.gain_shown < _NOTHING else shown}"
        text += " of what the federation added to your base"
    return text


def _strongest_of(audit: Audit, clients: int) -> Attacked | None:
    tried = (a for a in audit.attacks if a.released and len(a.clients) == clients)
    return furthest(tried, audit.metric)
