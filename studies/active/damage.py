"""What a hostile client breaks: accuracy lost, and models that no training brings back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil import FedAvg, FedveilError
from fedveil.schemes import Scheme
from fedveil.wire import Message, Section, Statistics
from studies.active.crew import MOST, Received, norm_of, run, updates_of
from studies.active.digits import cut_in
from studies.active.scenes import ATTACKER, Scene

__all__ = ["DAMAGES", "Broken", "Liar", "break_model", "changed", "unharmed"]

State = dict[str, Tensor]
Twist = Callable[[Received, Message], Message]
"""What a hostile client makes of what it was sent, and of the reply that it would give honestly."""


@dataclass
class Liar:
    """Sends something else than it trained."""

    twist: Twist

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        return self.twist(received, received.train())


def flipped(received: Received, honest: Message) -> Message:
    """The opposite of what it trained, a hundred times."""
    return changed(received, honest, {n: -100.0 * t for n, t in updates_of(honest).items()})


def huge(received: Received, honest: Message) -> Message:
    """A million everywhere: the most that is no absurd value."""
    return changed(received, honest, {n: torch.full_like(t, 1e6) for n, t in _all(received)})


def claiming(received: Received, honest: Message) -> Message:
    """Noise of an honest update's length, with the largest claim there is."""
    noise = _noise(received)
    length = norm_of(updates_of(honest)) / norm_of(noise)
    updates = {name: length * tensor for name, tensor in noise.items()}
    return changed(received, honest, updates, examples=MOST)


def exciting(received: Received, honest: Message) -> Message:
    """Noise, with Grams a million times as large as they are: least squares follow the largest."""
    grams = {
        name: Statistics((part.tensor * 1e6).clamp(max=1e8))
        if isinstance(part, Statistics) and name.endswith("/diagonal")
        else part
        for name, part in honest.sections.items()
        if name.startswith("gram/")
    }
    noise = _noise(received)
    length = norm_of(updates_of(honest)) / norm_of(noise)
    return changed(received, honest, {n: length * t for n, t in noise.items()}, grams)


def within(received: Received, honest: Message) -> Message:
    """The opposite of what it trained, as long and with as large a claim as the bounds allow."""
    updates = {name: -1e3 * tensor for name, tensor in updates_of(honest).items()}
    return changed(received, honest, updates, examples=MOST)


def changed(
    received: Received,
    honest: Message,
    updates: Mapping[str, Tensor],
    grams: Mapping[str, Section] | None = None,
    examples: int | None = None,
) -> Message:
    """An honest reply with other updates, and perhaps other Grams and another claim."""
    kept = {n: part for n, part in honest.sections.items() if n.startswith("gram/")}
    told = {n: value for n, value in honest.scalars.items() if n.startswith("gram/")}
    count = int(honest.scalars["examples"]) if examples is None else examples
    return received.reply(updates, count, {**kept, **(grams or {})}, told)


def _all(received: Received) -> Sequence[tuple[str, Tensor]]:
    return list(received.trainable().items())


def _noise(received: Received) -> State:
    dice = torch.Generator().manual_seed(received.round)
    return {n: torch.empty(t.shape).normal_(generator=dice) for n, t in _all(received)}


DAMAGES: Mapping[str, tuple[Twist, Scheme]] = {
    "the opposite of what it trained, x 100": (flipped, FedAvg()),
    "a million everywhere": (huge, FedAvg()),
    "noise, claiming 2^63 - 1 examples": (claiming, FedAvg()),
    "the opposite, x 1000, and that claim": (within, FedAvg()),
    "noise, Grams x 1e6 (RegMean)": (exciting, FedAvg(aggregation="regmean")),
}
"""What a hostile client does, and to which scheme."""


@dataclass(frozen=True)
class Broken:
    """What is left of the owner's model.

    Attributes:
        accuracy: On the test set, in percent.
        rejected: In how many rounds nothing was applied.
        ended: Why the run ended early; empty if it did not.
        cut: What the records say of the attacker.
    """

    accuracy: float
    rejected: int
    ended: str
    cut: Sequence[str]


def break_model(scene: Scene, damage: str, bounded: bool, rounds: int) -> Broken:
    """Let a hostile client do one of `DAMAGES`, in every round."""
    twist, scheme = DAMAGES[damage]
    try:
        result = run(scene.federation(scheme, bounded), {ATTACKER: Liar(twist)}, rounds)
    except FedveilError as error:
        return Broken(float("nan"), 0, str(error).splitlines()[0], [])
    return Broken(
        result.rounds[-1].measures["global"]["accuracy"],
        sum(bool(record.rejected) for record in result.rounds),
        "",
        [cut for record in result.rounds if (cut := cut_in(record))],
    )


def unharmed(scene: Scene, scheme: Scheme, rounds: int) -> float:
    """What the model reaches where nobody is hostile, in percent."""
    return run(scene.federation(scheme, True), {}, rounds).rounds[-1].measures["global"]["accuracy"]
