"""Clients at work in this process, of whom some answer what they like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedveil import Federation, Result
from fedveil.engine.crew import Answer, Job
from fedveil.engine.in_process import InTurn, Workplace, work
from fedveil.errors import FedveilError
from fedveil.quantization import QuantizedTensor
from fedveil.wire import Dense, Message, Section

__all__ = ["MOST", "Attacker", "Hostile", "Received", "norm_of", "run", "updates_of"]

MOST = 2**63 - 1
"""The most examples that a message can claim."""

State = dict[str, Tensor]
Scalar = int | float | str


@dataclass(frozen=True)
class Received:
    """What an attacker has in a round: the message it was sent, and what it could do honestly.

    All tensors are at the shapes at which they were released.
    """

    message: Message
    train: Callable[[], Message]

    @property
    def round(self) -> int:
        """The number of the round, from 1."""
        return self.message.round

    def proxy(self) -> State:
        """The proxy, decoded, by tensor name."""
        return {
            name: part.dequantize() if isinstance(part, QuantizedTensor) else part.tensor
            for name, part in self.message.sections.items()
            if isinstance(part, QuantizedTensor | Dense)
        }

    def trainable(self) -> State:
        """Those tensors of it that an update may change."""
        return {name: tensor for name, tensor in self.proxy().items() if tensor.is_floating_point()}

    def exact(self) -> State:
        """Those tensors that were sent as they are, without codes."""
        return {n: p.tensor for n, p in self.message.sections.items() if isinstance(p, Dense)}

    def reply(
        self,
        updates: Mapping[str, Tensor],
        examples: int = 1,
        extra: Mapping[str, Section] | None = None,
        scalars: Mapping[str, Scalar] | None = None,
    ) -> Message:
        """A well-formed reply with these exact updates and this claim."""
        sections = {name: Dense(update.contiguous()) for name, update in updates.items()}
        told: dict[str, Scalar] = {
            "examples": examples,
            "steps": 1,
            "loss_first": 1.0,
            "loss_last": 1.0,
        }
        sent = self.message
        return Message(
            "update", sent.scheme, sent.round, sent.client, {**sections, **(extra or {})},
            {**told, **(scalars or {})},
        )  # fmt: skip

    def nothing(self, examples: int = 1) -> Message:
        """A reply that changes nothing."""
        return self.reply({n: torch.zeros_like(t) for n, t in self.trainable().items()}, examples)


class Attacker(Protocol):
    """A client that answers what it likes."""

    def answer(self, received: Received) -> Message:
        """The reply of one round."""


@dataclass
class Hostile(InTurn):
    """One client after the other; attackers, by name, answer in place of those they are.

    Attributes:
        attackers: Who they are. An attacker has what its client has: its data, and no more.
        before: Told of the round's number and each attacker's message before it answers: for a
            judge, who knows more than an attacker does.
    """

    attackers: Mapping[str, Attacker] = field(default_factory=dict)
    before: Callable[[str, Message], None] | None = None

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """See :class:`fedveil.engine.crew.Crew`."""
        for job in jobs:
            if job.client in self.attackers:
                yield self._attack(job)
            else:
                yield from super().answers([job])

    def _attack(self, job: Job) -> Answer:
        message = Message.from_bytes(bytearray(job.proxy))
        if self.before is not None:
            self.before(job.client, message)
        received = Received(message, lambda: self._honest(job))
        reply = self.attackers[job.client].answer(received)
        return Answer(job.client, reply.to_bytes())

    def _honest(self, job: Job) -> Message:
        answer = work(self.place, job, Message.to_bytes)
        if answer.reply is None:
            raise answer.failure or FedveilError("no reply")
        return Message.from_bytes(bytearray(answer.reply))


def run(
    federation: Federation,
    attackers: Mapping[str, Attacker],
    rounds: int,
    before: Callable[[str, Message], None] | None = None,
) -> Result:
    """Run a federation some of whose clients are hostile."""
    place: Workplace = federation.workplace()
    crew = Hostile(place, attackers=attackers, before=before)
    return federation.run(rounds, crew=crew)


def updates_of(reply: Message) -> State:
    """The updates in a reply, decoded, without what else is in it."""
    return {
        name: part.dequantize() if isinstance(part, QuantizedTensor) else part.tensor
        for name, part in reply.sections.items()
        if isinstance(part, QuantizedTensor | Dense) and not name.startswith("gram/")
    }


def norm_of(updates: Mapping[str, Tensor]) -> float:
    """The l2 norm of all updates together."""
    return math.sqrt(sum(float(one.double().square().sum()) for one in updates.values()))
