"""Attacks by name: what the audit tries, and what tables and pages say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

from fedveil.audit.attacks.coalition import Coalition, Simulated, Stolen
from fedveil.errors import ConfigurationError
from fedveil.run.findings import UpdateGuess

__all__ = [
    "MESSAGES", "MODEL", "PUBLIC", "UPDATES", "Attack", "Beginning", "Finding", "attack_names",
    "attacks", "register_attack", "title_of",
]  # fmt: skip

Beginning = Literal["messages", "model", "public", "updates"]
MESSAGES: Final = "messages"
MODEL: Final = "model"
PUBLIC: Final = "public"
UPDATES: Final = "updates"

Finding = Stolen | Simulated | UpdateGuess
"""What an attack finds: a model, or that anybody can make the messages, or others' updates."""

Run = Callable[[Coalition], Iterator[Finding]]
"""The signature of every attack."""

_F = TypeVar("_F", bound=Finding)
_R = TypeVar("_R", bound=Callable[[Coalition], Iterator[Finding]])


@dataclass(frozen=True)
class Attack:
    """An attack that the audit knows.

    Attributes:
        name: As in ``audit.json``, tables and docs.
        title: What was done, to stand in a list of steps.
        does: One sentence of what the attacker does, without its subject.
        source: Where it is from, or that it is ours.
        begins: With what: "messages" that were sent, a "model" that was made of them, what is
            "public", or the "updates" that show between two messages.
        run: The attack itself.
        quick: Whether a quick audit tries it, too. Attacks on messages that are quick are tried
            after every round as well, and attacks on a model begin with the best that they make.
        alone: Whether it needs no released byte, so that clients can do the same with their own
            data and what is public: that is the floor under every leak.
    """

    name: str
    title: str
    does: str
    source: str
    begins: Beginning
    run: Run
    quick: bool = False
    alone: bool = False

    def on(self, coalition: Coalition, kind: type[_F]) -> Iterator[_F]:
        """Try it, one finding after another.

        Args:
            coalition: Who attacks, and with what.
            kind: The class of what is to be found.

        Raises:
            ConfigurationError: It finds something else.
        """
        for found in self.run(coalition):
            if not isinstance(found, kind):
                raise ConfigurationError(
                    "An attack finds what nobody looks for",
                    expected=f"{kind.__name__}, as of all attacks that begin with {self.begins}",
                    found=type(found).__name__,
                    where=f"the attack {self.name!r}",
                    fix="Yield that, or register the attack with another beginning.",
                )
            yield found


_ATTACKS: dict[str, Attack] = {}


def register_attack(
    name: str,
    *,
    title: str,
    does: str,
    source: str,
    begins: Beginning,
    quick: bool = False,
    alone: bool = False,
) -> Callable[[_R], _R]:
    """Function decorator: make an attack known, so that every audit from then on tries it.

    Args:
        name: As of :class:`Attack`, and so are the others.
        title: What was done.
        does: One sentence.
        source: Where it is from.
        begins: With what.
        quick: Whether a quick audit tries it.
        alone: Whether it needs no released byte.

    Raises:
        ConfigurationError: A text is missing, there is no such beginning, or the name is taken.
    """
    for field, text in {"name": name, "title": title, "does": does, "source": source}.items():
        if not text.strip():
            raise ConfigurationError(
                "An attack does not say what it is",
                expected=f"a text as {field}",
                found=repr(text),
                where=f"register_attack({name!r}, ...)",
            )
    if begins not in get_args(Beginning):
        raise ConfigurationError(
            "An attack begins with what there is not",
            expected=" or ".join(get_args(Beginning)),
            found=repr(begins),
            where=f"register_attack({name!r}, ...)",
        )

    def register(run: _R) -> _R:
        known = _ATTACKS.get(name)
        if known is not None and known.run.__module__ != run.__module__:
            raise ConfigurationError(
                "Two attacks have one name",
                expected="a name that no other attack has",
                found=repr(name),
                where=f"{known.run.__module__} and {run.__module__}",
                fix="Register one of them by another name.",
            )
        _ATTACKS[name] = Attack(name, title, does, source, begins, run, quick, alone)
        return run

    return register


def attacks(begins: Beginning, *, full: bool = True) -> tuple[Attack, ...]:
    """All known attacks that begin with something: quick ones first, then by name.

    Args:
        begins: With what.
        full: Whether those are wanted, too, that a quick audit leaves out.
    """
    known = [one for one in _ATTACKS.values() if one.begins == begins and (full or one.quick)]
    return tuple(sorted(known, key=lambda one: (not one.quick, one.name)))


def attack_names() -> tuple[str, ...]:
    """The names of all known attacks."""
    return tuple(sorted(_ATTACKS))


def title_of(name: str) -> str:
    """What an attack did; of one that is not known here, its name."""
    return _ATTACKS[name].title if name in _ATTACKS else name
