"""Reading other clients' images from how the model changed between two proxies.

The *imprinter* decides the model by its claim. It takes the owner's weights away, puts a trap in
their place ("Robbing the Fed", Fowl et al., 2110.13057), stands back for a round in which the
others train the trap, takes the trap away, and is sent what is left, digit by digit: the mean of
the others' updates. In the trap all units of the first layer look along one direction and differ in
their thresholds, and all count the same for the answer: the difference of two neighbours' updates
is what the images between their thresholds did, and if there is one such image, it is that image.

AdamW hides a gradient's size in its first step, unless the gradient is small beside its epsilon:
the answers of the trap are so small that it is. In the last round the owner's model is put back.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedveil import FedQSN
from fedveil.schemes import Scheme
from fedveil.wire import Message
from studies.active.crew import MOST, Received, run
from studies.active.digits import cut_in
from studies.active.scenes import ATTACKER, Scene

__all__ = ["FOUND", "Imprinter", "Recovered", "layers_of", "read_images", "similarity"]

State = dict[str, Tensor]
Play = Generator[tuple[State, int], Received, None]

FOUND = 30.0
"""An image counts as read from so many dB on (PSNR, of pixels from 0 to 1)."""

READINGS = 9, 3
"""Rounds in which the owner's model is read, and what the others did to a trap: b bits in each."""


class Imprinter:
    """One hostile client of a plain network of linear layers; see the module.

    Args:
        own: Its own images, [rows, pixels]: they say where to put thresholds.
        passes: Traps that it sets, each with a direction of its own.
        claim: The examples it claims when it decides the model.
        scale: The size of the trap's first layer.
        answer: The size of its last.
    """

    def __init__(
        self,
        own: Tensor,
        passes: int = 3,
        claim: int = MOST,
        scale: float = 1e-5,
        answer: float = 1e-10,
    ) -> None:
        self._own, self._passes, self._claim = own, passes, claim
        self._scale, self._answer = scale, answer
        self._play: Play | None = None
        self.images: list[Tensor] = []
        """What it takes for images, [pixels] each; most are mixtures."""

    @property
    def rounds(self) -> int:
        """How many rounds it needs, the last of which puts the model back."""
        begin, each = READINGS
        return begin + 2 + self._passes * (2 + each)

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        if self._play is None:
            self._play = self._attack(received)
            updates, claim = next(self._play)
        else:
            updates, claim = self._play.send(received)
        return received.reply(updates, claim)

    def _attack(self, received: Received) -> Play:
        """Each yield answers a round, with updates and a claim, and gets the next one's message."""
        own, there, received = yield from self._take_away(received, READINGS[0])
        # A trap without thresholds: units that the same clients hold change alike.
        trap = self._trap(received, 0, [])
        received = yield _plus(trap, there, -1.0), self._claim
        received = yield _nothing(received), 1
        clusters = self._clusters(_plus(received.trainable(), trap, -1.0))
        # What was sent exactly is known; the rest is what it was, but for less than its codes tell.
        there = {**trap, **received.exact()}
        for number in range(1, self._passes + 1):
            trap = self._trap(received, number, clusters)
            received = yield _plus(trap, there, -1.0), self._claim
            received = yield _nothing(received), 1
            received = yield _plus(_nothing(received), trap, -1.0), self._claim
            change, there, received = yield from self._take_away(received, READINGS[1])
            self.images += _between_thresholds(change, clusters)
        received = yield _plus(own, there, -1.0), self._claim
        while True:
            received = yield _nothing(received), 1

    def _take_away(
        self, received: Received, readings: int
    ) -> Generator[tuple[State, int], Received, tuple[State, State, Received]]:
        """Read all there is: what that was, and what is left, in a message yet to be answered."""
        left = received.trainable()
        total = left
        for _ in range(readings - 1):
            received = yield _plus(_nothing(received), left, -1.0), self._claim
            left = received.trainable()
            total = _plus(total, left, 1.0)
        return total, left, received

    def _trap(self, received: Received, number: int, clusters: Sequence[Tensor]) -> State:
        """All units look along one direction; those of a cluster share out the thresholds."""
        trap = _nothing(received)
        (weight, bias), *middle, (last, _) = layers_of(trap)
        dice = torch.Generator().manual_seed(number)
        direction = torch.randint(0, 2, (trap[weight].shape[1],), generator=dice) * 2.0 - 1.0
        seen = self._own @ direction
        spread = seen.std(correction=0).clamp_min(1e-3)
        trap[weight] += self._scale * direction
        thresholds = torch.full_like(trap[bias], float(seen.mean() - 10 * spread))
        for units in clusters:
            shares = (torch.arange(len(units)) + 0.5) / len(units)
            thresholds[units] = seen.mean() + spread * torch.special.ndtri(shares)
        trap[bias] -= self._scale * thresholds
        paths = 1
        for name, _ in middle:
            trap[name] += 1.0
            paths *= len(trap[name])
        signs = torch.arange(len(trap[last])) % 2 * 2.0 - 1.0
        trap[last] += (self._answer / paths * signs)[:, None]
        return trap

    def _clusters(self, change: State) -> list[Tensor]:
        """Units whose biases changed alike, the members of each in order."""
        found = change[layers_of(change)[0][1]]
        values, order = found.sort()
        jumps = values.diff() > 0.05 * (values[-1] - values[0])
        if float(values[-1] - values[0]) < 0.01 * float(found.abs().max()):
            jumps = torch.zeros_like(jumps)
        ends = [0, *(torch.nonzero(jumps).flatten() + 1).tolist(), len(values)]
        return [order[begin:end].sort().values for begin, end in pairwise(ends)]


def _between_thresholds(change: State, clusters: Sequence[Tensor]) -> list[Tensor]:
    """What the images between two neighbours' thresholds did, as if it were one image."""
    weight, bias = layers_of(change)[0]
    found = []
    for units in clusters:
        rows = torch.cat([change[weight][units], torch.zeros(1, change[weight].shape[1])])
        steps = torch.cat([change[bias][units], torch.zeros(1)])
        least = 1e-3 * float(steps.diff().abs().max())
        for row, step in zip(-rows.diff(dim=0), -steps.diff(), strict=True):
            if abs(float(step)) > least:
                found.append((row / step).clamp(0.0, 1.0))
    return found


def layers_of(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The weights of a plain network, each with its bias."""
    names = [name for name in state if name.endswith(".weight")]
    return [(name, name.removesuffix("weight") + "bias") for name in names]


def _nothing(received: Received) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in received.trainable().items()}


def _plus(one: State, other: State, factor: float) -> State:
    return {name: tensor + factor * other[name] for name, tensor in one.items()}


@dataclass(frozen=True)
class Recovered:
    """What the imprinter read.

    Attributes:
        similarities: Of each of the others' images, how near the nearest guess is, in dB.
        rounds: How many rounds it took.
        accuracy: The owner's model at the end, in percent; and what it was.
        cut: What the records of rounds say of the attacker.
    """

    similarities: Sequence[float]
    rounds: int
    accuracy: float
    base: float
    cut: Sequence[str]
    ready: int | None = None
    """The round in which all was prepared, where that is told."""

    @property
    def found(self) -> int:
        """How many images were read."""
        return sum(one >= FOUND for one in self.similarities)


def read_images(
    scene: Scene, bounded: bool, passes: int = 3, scheme: Scheme | None = None
) -> Recovered:
    """Let the imprinter attack, `FedQSN()` unless told otherwise."""
    attacker = Imprinter(scene.images[ATTACKER], passes)
    federation = scene.federation(scheme or FedQSN(), bounded)
    result = run(federation, {ATTACKER: attacker}, attacker.rounds)
    others = torch.cat([rows for name, rows in scene.images.items() if name != ATTACKER])
    measured = result.rounds[-1].measures.get("global", {})
    return Recovered(
        similarity(others, attacker.images),
        attacker.rounds,
        measured.get("accuracy", float("nan")),
        (result.base or {}).get("accuracy", float("nan")),
        [cut for record in result.rounds if (cut := cut_in(record))],
    )


def similarity(images: Tensor, guesses: Sequence[Tensor]) -> list[float]:
    """PSNR in dB between each image [pixels] and the nearest of the guesses; 0 of none."""
    if not guesses:
        return [0.0] * len(images)
    wrong = torch.cdist(images.double(), torch.stack([*guesses]).double()).square()
    nearest = wrong.min(dim=1).values / images.shape[1]
    return [float(-10 * one.clamp_min(1e-12).log10()) for one in nearest]
