"""Reading released weights beyond the digits that were released.

A proxy tells a weight to b bits. Whoever can subtract from the global model what it was sent is
sent the rest next, again to b bits: the *amplifier* claims more examples than all others together,
which makes its update the step, and reads b more bits in every round. In the last round it puts the
model back.

The other two keep within bounds. The *crown* makes a weight the largest of its unit: a unit's scale
is its largest weight, in float32. The *dither* moves a few weights a little in every round, by
amounts of its own, and intersects the intervals that their codes leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedveil import Bounds, RoundRecord
from fedveil.quantization import QuantizedTensor
from fedveil.wire import Message
from studies.active.crew import MOST, Received, norm_of, run, updates_of
from studies.active.scenes import ATTACKER, Scene, Watched, cut_of, global_model

__all__ = [
    "Amplifier",
    "Crown",
    "Dither",
    "Reading",
    "Within",
    "read_digits",
    "read_within",
]

State = dict[str, Tensor]

CLAIM, NORM = int(Bounds().weight or 1), 0.8 * (Bounds().norm or 1.0)
"""How many times its own examples, and the length of an honest update, the default bounds leave a
client; of length a little less, as the median may be of shorter ones than its own."""


@dataclass
class Amplifier:
    """Subtracts what it was sent, and is sent what is left of it.

    Attributes:
        rounds: After so many it puts the model back.
        claim: The examples it claims.
    """

    rounds: int
    claim: int = MOST
    estimates: list[State] = field(default_factory=list)
    """After each round, what it takes the released weights of round 1 to be."""
    taken: State = field(default_factory=dict)

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        proxy = received.trainable()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in proxy.items()}
        before = self.taken or zeros
        self.taken = {name: before[name] + tensor for name, tensor in proxy.items()}
        self.estimates.append(self.taken)
        if received.round == self.rounds:
            return received.reply(before, self.claim)
        return received.reply({name: -tensor for name, tensor in proxy.items()}, self.claim)


@dataclass(frozen=True)
class Reading:
    """What somebody reads of the released, quantized weights, relative to their l2 norm.

    Attributes:
        honest: The error of a proxy as it was received.
        errors: The error of the attacker's estimate, after each round.
        accuracy: The owner's model at the end, in percent.
        cut: What the record of each round says of the attacker.
    """

    honest: float
    errors: Sequence[float]
    accuracy: float
    cut: Sequence[str]

    @property
    def best(self) -> float:
        """The least error of all rounds: the attacker may not know which it was."""
        return min(self.errors)


def read_digits(scene: Scene, bounded: bool, rounds: int = 6, **settings: Any) -> Reading:
    """Let the amplifier attack `FedQSN()`."""
    attacker, sent = Amplifier(rounds), []
    federation = scene.federation(Watched(**settings), bounded)
    result = run(federation, {ATTACKER: attacker}, rounds, lambda _, message: sent.append(message))
    truth = released(scene, sent[0], scene.model.state_dict())
    proxy = {name: part.dequantize() for name, part in packed(sent[0]).items()}
    return Reading(
        error(proxy, truth),
        [error(estimate, truth) for estimate in attacker.estimates],
        result.rounds[-1].measures.get("global", {}).get("accuracy", float("nan")),
        [cut for record in result.rounds if (cut := cut_in(record))],
    )


def cut_in(record: RoundRecord) -> str:
    """What the record of a round says that was cut of what the attacker sent."""
    return record.bounded.get(ATTACKER, "")


def packed(message: Message) -> dict[str, QuantizedTensor]:
    """The sections of a proxy that are quantized."""
    return {n: p for n, p in message.sections.items() if isinstance(p, QuantizedTensor)}


def released(scene: Scene, message: Message, state: Mapping[str, Tensor]) -> State:
    """Those elements of a whole model that a message released, of its quantized tensors."""
    cut = cut_of(message, scene.model, "mlp")
    return {name: cut.gather(name, state[name]) for name in packed(message)}


def error(estimate: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The relative l2 error over all tensors of the truth."""
    wrong = {name: estimate[name].double() - tensor.double() for name, tensor in truth.items()}
    return norm_of(wrong) / norm_of(truth)


@dataclass
class Crown:
    """Makes one weight the largest of its unit, in as many units as it may, and reads the scales.

    It trains honestly first, to know how long an update may be, and puts all of that into crowns.

    Attributes:
        claim: How many times its own examples it claims.
        norm: How many times the length of its honest update it sends.
        share: What of its update becomes the model's step.
    """

    claim: int
    norm: float
    share: float
    readings: list[tuple[int, str, int, int, float]] = field(default_factory=list)
    """Round, tensor, unit, place in the unit, and the weight as it is in that round."""
    _crowned: list[tuple[float, str, int, int]] = field(default_factory=list)
    tried: set[tuple[str, int, int]] = field(default_factory=set)

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        parts = packed(received.message)
        rows = {name: in_rows(part) for name, part in parts.items()}
        self._read(received.round, parts, rows)
        honest = received.train()
        left = (self.norm * norm_of(updates_of(honest))) ** 2
        updates = {name: torch.zeros_like(tensor) for name, tensor in received.trainable().items()}
        self._crowned = []
        for step, name, unit, place in sorted(
            self._steps(parts, rows), key=lambda one: abs(one[0])
        ):
            left -= (step / self.share) ** 2
            if left < 0:
                break
            row = torch.zeros(rows[name].shape[1])
            row[place] = step / self.share
            update = updates[name].movedim(parts[name].axis, 0)
            update[unit] = row.view_as(update[unit])
            self._crowned.append((step, name, unit, place))
            self.tried.add((name, unit, place))
        return received.reply(updates, self.claim * int(honest.scalars["examples"]))

    def _steps(
        self, parts: Mapping[str, QuantizedTensor], rows: Mapping[str, Tensor]
    ) -> list[tuple[float, str, int, int]]:
        """A step for each unit that crowns a weight, wherever in its code's interval that is."""
        steps = []
        for name, part in parts.items():
            assert part.unit_scales is not None
            sizes = rows[name].abs()
            sizes[sizes >= 0.999 * part.unit_scales[:, None]] = -1.0  # told already
            for tensor, unit, place in self.tried:
                if tensor == name:
                    sizes[unit, place] = -1.0
            for unit, place in enumerate(sizes.argmax(dim=1).tolist()):
                value, top = float(rows[name][unit, place]), float(part.unit_scales[unit])
                step = 1.15 * top - abs(value)
                steps.append((step if value >= 0 else -step, name, unit, place))
        return steps

    def _read(
        self, number: int, parts: Mapping[str, QuantizedTensor], rows: Mapping[str, Tensor]
    ) -> None:
        for step, name, unit, place in self._crowned:
            scales = parts[name].unit_scales
            assert scales is not None
            top, value = float(scales[unit]), float(rows[name][unit, place])
            if abs(value) > 0.99 * top and value * step > 0:
                self.readings.append((number, name, unit, place, value))


@dataclass
class Dither:
    """Moves some weights a little in every round, and intersects what their codes say of them.

    In the first round it moves their units' biases, which are sent exactly, to learn how far a unit
    follows it: that depends on who else holds it.

    Attributes:
        claim, norm: See `Crown`.
        focus: How many weights of the first layer it looks at.
    """

    claim: int
    norm: float
    focus: int = 8
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where its weights are in the released tensor, flat."""
    moved: Tensor = field(default_factory=lambda: torch.empty(0))
    """By how much it has moved them, as it reckons."""
    ends: tuple[Tensor, Tensor] | None = None
    """Between which values they were before it moved them."""
    estimate: Tensor = field(default_factory=lambda: torch.empty(0))
    """What they are in the round that it saw last."""
    _biases: Tensor | None = None
    _shares: Tensor | None = None

    def answer(self, received: Received) -> Message:
        """See `active.crew.Attacker`."""
        name, part = next(iter(packed(received.message).items()))
        bias = name.removesuffix("weight") + "bias"
        dice = torch.Generator().manual_seed(received.round)
        if not len(self.places):
            self.places = torch.randperm(part.shape[0] * part.shape[1], generator=dice)[
                : self.focus
            ]
            self.moved = torch.zeros(self.focus)
        units, proxy, honest = self.places // part.shape[1], received.proxy(), received.train()
        most = self.norm * norm_of(updates_of(honest)) / self.focus**0.5
        updates = {n: torch.zeros_like(t) for n, t in received.trainable().items()}
        if self._biases is None:
            self._biases = proxy[bias][units]
            updates[bias][units] = most
            self._pushed = most
        else:
            if self._shares is None:
                self._shares = (proxy[bias][units] - self._biases) / self._pushed
                self._shares.clamp_(0.01, 1.0)
            self._look(part)
            width = (part.interval()[1] - part.interval()[0]).flatten()[self.places]
            wanted = (torch.rand(self.focus, generator=dice) - 0.5) * width - self.moved
            push = (wanted / self._shares).clamp(-most, most)
            self.moved = self.moved + self._shares * push
            updates[name].view(-1)[self.places] = push
        return received.reply(updates, self.claim * int(honest.scalars["examples"]))

    def _look(self, part: QuantizedTensor) -> None:
        low, high = (end.flatten()[self.places] - self.moved for end in part.interval())
        before = self.ends or (low, high)
        both = torch.maximum(before[0], low), torch.minimum(before[1], high)
        # Where they have nothing in common others have moved the weight: it begins anew.
        agree = both[0] <= both[1]
        self.ends = torch.where(agree, both[0], low), torch.where(agree, both[1], high)
        self.estimate = (self.ends[0] + self.ends[1]) / 2 + self.moved


def in_rows(part: QuantizedTensor) -> Tensor:
    """A quantized tensor as the values of its units, [units, values]."""
    return part.dequantize().movedim(part.axis, 0).flatten(1)


@dataclass(frozen=True)
class Within:
    """What the crown and the dither read in some rounds, within the bounds.

    Attributes:
        released: Quantized weights that a proxy holds.
        told: Those that the units' scales of one proxy tell anyway.
        tried: Weights that were to be made the largest of their units.
        read: Those of them that were read to a relative error below 1e-6.
        dithered: Error of the dither, as a multiple of what one proxy leaves of the same weights.
        cut: In how many rounds something of what they sent was cut.
    """

    released: int
    told: int
    tried: int
    read: int
    dithered: float
    cut: int


class Judge:
    """Keeps what the weights that were released are in truth, round by round."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.parts: list[dict[str, QuantizedTensor]] = []
        self.truths: list[State] = []

    def __call__(self, client: str, message: Message) -> None:
        """Told of each message that the attacker gets, before it answers."""
        self.parts.append(packed(message))
        self.truths.append(released(self._scene, message, global_model()))

    def value(self, number: int, name: str, unit: int, place: int) -> float:
        """One weight, as it was when the message of a round was made."""
        rows = self.truths[number - 1][name].movedim(self.parts[number - 1][name].axis, 0)
        return float(rows[unit].flatten()[place])


def read_within(scene: Scene, bounded: bool, rounds: int = 10) -> Within:
    """Let the crown, and then the dither, attack `FedQSN()`; they know the default bounds."""
    share = CLAIM / (CLAIM + len(scene.clients) - 1)
    crown, judge = Crown(CLAIM, NORM, share), Judge(scene)
    result = run(scene.federation(Watched(), bounded), {ATTACKER: crown}, rounds, judge)
    read = 0
    for number, name, unit, place, value in crown.readings:
        true = judge.value(number, name, unit, place)
        read += abs(value - true) <= 1e-6 * abs(true)
    cut = sum(bool(cut_in(record)) for record in result.rounds)
    parts = judge.parts[0].values()
    dither, judge = Dither(CLAIM, NORM), Judge(scene)
    result = run(scene.federation(Watched(), bounded), {ATTACKER: dither}, rounds, judge)
    name, part = next(iter(judge.parts[-1].items()))
    now = judge.truths[-1][name].flatten()[dither.places]
    plain = part.dequantize().flatten()[dither.places]
    return Within(
        released=sum(part.units * part.fan_in for part in parts),
        told=sum(part.units for part in parts),
        tried=len(crown.tried),
        read=read,
        dithered=float((dither.estimate - now).norm() / (plain - now).norm()),
        cut=cut + sum(bool(cut_in(record)) for record in result.rounds),
    )
