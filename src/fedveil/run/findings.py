"""What an audit finds, as values: the file ``audit.json`` in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from fedveil.errors import AuditError
from fedveil.files import read_record, write_whole
from fedveil.tasks.metrics import metric_named

__all__ = [
    "ALARM", "BASE", "NAMED", "NOTHING", "NOT_APPLICABLE", "OWN_DATA", "RELEASED", "SIMULATED",
    "SOUND", "Attacked", "Audit", "Checked", "ClientExposure", "Outcome", "UpdateGuess", "furthest",
]  # fmt: skip

FORMAT = 3
NAME = "audit.json"

Outcome = Literal["alarm", "sound", "not applicable"]
ALARM: Final = "alarm"
SOUND: Final = "sound"
NOT_APPLICABLE: Final = "not applicable"

OWN_DATA: Final = "own data alone"
"""What stands in the place of an attack where no released byte was used."""
SIMULATED: Final = "simulated"
"""What such work began with, if it was proxies that attackers made themselves."""

NOTHING: Final = "nothing"
RELEASED: Final = "what the run released"
BASE: Final = "base"
NAMED: Final = "another model"

Measures = Mapping[str, float]
"""On the owner's test set: ``accuracy`` in percent and ``loss`` in nats; of language models both
per answer token, and ``perplexity``."""


@dataclass(frozen=True)
class Attacked:
    """One attack with one set of bytes.

    Attributes:
        attack: What was made of messages, by the name of the attack, as "pooling"; without released
            bytes "own data alone".
        clients: Whose bytes were pooled: one client, or a coalition.
        rounds: In how many rounds they were sent something.
        released: Whether any released bytes were used; the attacker's own work alone if not.
        holes: What stands where nothing was released: "zeros", "public" or "base". Without
            released bytes what was begun with: "public", "nothing", or "simulated" proxies.
        polish: What was done afterwards, by the name of the attack, as "fine-tuning"; or "".
        measures: What the stolen model reaches.
        leak: ``(attack - own) / (global - own)``, which is the same share whether more is better
            or, as of losses, less; None where it means nothing.
        gain_shown: ``(attack - base) / (global - base)``; None where it means nothing.
        error_released: Relative error of the weights on released units,
            ``|stolen - global| / |global|``; None without weights to compare.
        error_withheld: The same on units that these clients never got.
        note: What to know about it.
    """

    attack: str
    clients: tuple[str, ...]
    rounds: int
    released: bool
    holes: str
    polish: str
    measures: Measures
    leak: float | None = None
    gain_shown: float | None = None
    error_released: float | None = None
    error_withheld: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Checked:
    """A check of the messages, and what it answers.

    Attributes:
        check: Which, as "withheld units".
        outcome: "alarm" if what should never be was found; "sound" if it was looked for, and is not
            in what was looked at; "not applicable" if there was nothing to look at, or nothing says
            what to look for. What was not looked at is never sound.
        found: In words: what is wrong, and where; what was looked at, and how much of it; or why
            nothing was.
    """

    check: str
    outcome: Outcome
    found: str

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"a check that answers {self.outcome!r}")

    @property
    def raised(self) -> bool:
        """Whether what should never be was found."""
        return self.outcome == ALARM


@dataclass(frozen=True)
class ClientExposure:
    """What one client was shown.

    Attributes:
        share: Of the model's parameters, from 0 to 1, by the end.
        bits: Bits per parameter of the whole model.
        after: The share after each round in which something was sent, by round.
        next: What one more release is expected to add to the share; None if the scheme does not say
            how it draws masks.
    """

    share: float
    bits: float
    after: Mapping[int, float]
    next: float | None


@dataclass(frozen=True)
class UpdateGuess:
    """A guess of what the other clients contributed to one round.

    Attributes:
        client: Who guesses.
        round: The round that is guessed at; the client was sent a proxy in it and in the next one.
        cosine: Between the guess and the mean of the others' updates, on the elements that it was
            shown twice: 1 is certainty, 0 is chance.
        share: Of the model's weights that the guess is about, from 0 to 1.
    """

    client: str
    round: int
    cosine: float
    share: float


@dataclass(frozen=True)
class Audit:
    """Everything that an audit found.

    Attributes:
        sentence: The answer to "what did my partners learn of my model?", in words.
        scheme: Its name and settings.
        rounds: Rounds that the audited messages are of.
        metric: Which measure leaks are computed from: "accuracy" or, of language models, "loss".
        models: Measures of the owner's models: ``base``, ``public``, ``global``, ``server_model``.
        attacks: All attacks, strongest last within their kind.
        checks: All checks of the messages, whatever they answer.
        exposure: By client.
        coalitions: Share of the parameters that the largest coalition of each size holds, by size.
        inferred: What the client who saw most infers of the others' updates, by round; empty if no
            updates were kept, or no two rounds in a row were sent.
        bytes_down: Bytes that each client was sent in all.
        full: Whether everything was tried, or the quick set.
        seconds: How long it took.
        not_protected: What no figure here speaks for, one sentence each.
        assumed: What was taken for public, from which attackers begin: "nothing", "what the run
            released" in the place of the owner's model, its "base", or "another model" that the
            owner named. Empty: nobody wrote it down.
        doubt: In words, that the base is no better than chance; None if it is better.
    """

    sentence: str
    scheme: Mapping[str, Any]
    rounds: int
    metric: str
    models: Mapping[str, Measures]
    attacks: Sequence[Attacked]
    checks: Sequence[Checked]
    exposure: Mapping[str, ClientExposure]
    coalitions: Mapping[int, float] = field(default_factory=dict)
    inferred: Sequence[UpdateGuess] = ()
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    full: bool = False
    seconds: float = 0.0
    not_protected: Sequence[str] = ()
    assumed: str = ""
    doubt: str | None = None

    def answering(self, outcome: Outcome) -> list[Checked]:
        """The checks that gave one answer."""
        return [one for one in self.checks if one.outcome == outcome]

    @property
    def strongest(self) -> Attacked | None:
        """The attack that got furthest with released bytes."""
        return furthest((attack for attack in self.attacks if attack.released), self.metric)

    @property
    def own(self) -> Measures:
        """The best that the strongest attacker reaches without a released byte, if it is known."""
        strongest = self.strongest
        return {} if strongest is None else self.own_of(strongest.clients) or {}

    def own_of(self, clients: tuple[str, ...]) -> Measures | None:
        """The best that some clients reach without a released byte; None if it was not tried."""
        alone = (a for a in self.attacks if not a.released and a.clients == tuple(clients))
        best = furthest(alone, self.metric)
        return None if best is None else best.measures

    def write(self, folder: Path) -> Path:
        """Write ``audit.json``, whole or not at all; returns its path.

        Raises:
            AuditError: It cannot be written.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)
        write_whole(folder / NAME, text + "\n", AuditError)
        return folder / NAME

    @classmethod
    def read(cls, folder: Path) -> Audit:
        """What :meth:`write` wrote.

        Raises:
            AuditError: There is none, or it is damaged or of another version.
        """
        absent = AuditError(
            "The run has not been audited", where=str(folder), fix=f"Run: fedveil audit {folder}"
        )
        # Format 1 called sound what nobody had looked at, and does not say of what. Format 2 has
        # other names of attacks.
        again = f"Audit the run again: fedveil audit {folder}"
        return read_record(folder / NAME, FORMAT, cls._from_json, AuditError, absent, again)

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> Audit:
        return cls(
            **{
                **values,
                "attacks": [
                    Attacked(**{**attack, "clients": tuple(attack["clients"])})
                    for attack in values["attacks"]
                ],
                "checks": [Checked(**one) for one in values["checks"]],
                "exposure": {
                    name: ClientExposure(**{**one, "after": _by_number(one["after"])})
                    for name, one in values["exposure"].items()
                },
                "coalitions": _by_number(values["coalitions"]),
                "inferred": [UpdateGuess(**guess) for guess in values["inferred"]],
            }
        )


def furthest(attacks: Iterable[Attacked], metric: str) -> Attacked | None:
    """The attack that got furthest, by the metric of this name; None if none was measured."""
    return metric_named(metric).best(attacks, lambda attack: attack.measures)


def _by_number(values: Mapping[str, float]) -> dict[int, float]:
    return {int(number): value for number, value in values.items()}
