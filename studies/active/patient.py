"""Reading other clients' images within the bounds, with patience.

A bound on the length of an update leaves open where it goes. The *patient* client spends all of its
own on one unit of the first layer, round after round, until nothing of the unit's weights is left;
then it does with this unit what `active.images` does with all of them. What the others teach such a
unit stands alone in it, and codes tell it as well as they tell a weight. Every other round the unit
looks along a new direction, with a threshold that about one of the others' images is beyond.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedveil import FedQSN
from fedveil.wire import Message
from studies.active.crew import Received, norm_of, run, updates_of
from studies.active.digits import CLAIM, NORM, cut_in
from studies.active.images import Recovered, layers_of, similarity
from studies.active.scenes import ATTACKER, Scene

__all__ = ["Patient", "read_patiently"]

Change = tuple[Tensor, float, Tensor]
"""By how much the unit's weights, its bias and what it adds to the answers are to change."""

ASLEEP = 60.0
"""So many times the scale of a trap below zero a unit does not fire at any image."""


@dataclass
class Patient:
    """One client of a network of two linear layers, who keeps within the bounds.

    Attributes:
        own: Its own images, [rows, pixels].
        others: How many images the others have, as it guesses.
        claim, norm: What it claims and sends; see `active.digits.Crown`.
        scale: The size of the trap's weights.
        voice: The size of what the trap adds to the answers.
    """

    own: Tensor
    others: int
    claim: int = CLAIM
    norm: float = NORM
    scale: float = 1e-6
    voice: float = 1e-9
    images: list[Tensor] = field(default_factory=list)
    """What it takes for images."""
    ready: int | None = None
    """The round in which the unit had become its own."""
    _play: Generator[Change, Received, None] | None = None
    _unit: int = 0
    _share: float = 0.5

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        if self._play is None:
            (weight, _), *_ = layers_of(received.trainable())
            self._unit = int(received.trainable()[weight].norm(dim=1).argmin())
            self._play = self._attack(received)
            change = next(self._play)
        else:
            change = self._play.send(received)
        honest = received.train()
        updates = {name: torch.zeros_like(tensor) for name, tensor in received.trainable().items()}
        (weight, bias), (last, _) = layers_of(updates)
        updates[weight][self._unit] = change[0] / self._share
        updates[bias][self._unit] = change[1] / self._share
        updates[last][:, self._unit] = change[2] / self._share
        most = self.norm * norm_of(updates_of(honest)) / max(norm_of(updates), 1e-30)
        shorter = {name: update * min(1.0, most) for name, update in updates.items()}
        return received.reply(shorter, self.claim * int(honest.scalars["examples"]))

    def _attack(self, received: Received) -> Generator[Change, Received, None]:
        """Each yield answers a round, and gets the next one's message."""
        asleep, row = -0.01, self._see(received)[0]
        while float(row.norm()) > 1e-3:
            row, bias, voice = self._see(received)
            received = yield -row, asleep - bias, -voice
        bias = self._see(received)[1]
        # A unit that never fires changes only as it is told: now it can be seen how far it follows.
        push = 0.004
        received = yield 0 * row, -push * self._share, 0 * voice
        self._share = min(max((bias - self._see(received)[1]) / push, 0.05), 1.0)
        row, bias, voice = self._see(received)
        while float(row.norm()) > 0.01 * self.scale or float(voice.norm()) > 0.01 * self.voice:
            received = yield -row, -self.scale * ASLEEP - bias, -voice
            row, bias, voice = self._see(received)
        self.ready = received.round
        signs = torch.arange(len(voice)) % 2 * 2.0 - 1.0
        while True:
            direction, threshold = self._look(received.round)
            trap = self.scale * direction
            row, bias, voice = self._see(received)
            received = yield trap - row, -self.scale * threshold - bias, self.voice * signs - voice
            bias = self._see(received)[1]
            received = yield -trap, -self.scale * ASLEEP - bias, 0 * voice
            self._keep(self._see(received)[0])

    def _see(self, received: Received) -> Change:
        state = received.trainable()
        (weight, bias), (last, _) = layers_of(state)
        unit = self._unit
        return state[weight][unit].clone(), float(state[bias][unit]), state[last][:, unit].clone()

    def _look(self, number: int) -> tuple[Tensor, float]:
        """A direction, and a threshold that about one of the others' images is beyond."""
        dice = torch.Generator().manual_seed(number)
        direction = torch.randint(0, 2, (self.own.shape[1],), generator=dice) * 2.0 - 1.0
        seen = self.own @ direction
        far = torch.special.ndtri(torch.tensor(1 - 1 / self.others))
        return direction, float(seen.mean() + far * seen.std())

    def _keep(self, row: Tensor) -> None:
        peak = row[row.abs().argmax()]
        if float(peak.abs()) > 1e-3 * self.scale:
            self.images.append((row / peak).clamp(0.0, 1.0))


def read_patiently(scene: Scene, rounds: int = 120, *, bounded: bool = True) -> Recovered:
    """Let the patient client attack `FedQSN()`, from within the default bounds."""
    others = torch.cat([rows for name, rows in scene.images.items() if name != ATTACKER])
    patient = Patient(scene.images[ATTACKER], len(others))
    result = run(scene.federation(FedQSN(), bounded), {ATTACKER: patient}, rounds)
    return Recovered(
        similarity(others, patient.images),
        rounds,
        result.rounds[-1].measures.get("global", {}).get("accuracy", float("nan")),
        (result.base or {}).get("accuracy", float("nan")),
        [cut for record in result.rounds if (cut := cut_in(record))],
        patient.ready,
    )
