"""The contract of a scheme: one method's whole protocol, server side and client side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fedveil.aggregation import WHOLE, Aggregation, Influence, Mean, Scales
from fedveil.errors import ConfigurationError
from fedveil.schemes.facts import Facts
from fedveil.secret import Secret
from fedveil.state import StateDict, read_state
from fedveil.ties import refuse_overlaps
from fedveil.units import UnitGroup
from fedveil.units.trial import Run
from fedveil.unsupported import refuse_foreign_state
from fedveil.wire import Message

__all__ = [
    "ClientSide",
    "LocalTrainer",
    "Memory",
    "Metrics",
    "Scheme",
    "ServerSide",
    "ServerState",
    "with_aggregation",
]

Metrics = Mapping[str, float]

Memory = MutableMapping[str, Tensor]
"""What a client keeps for itself from one round to the next."""


class LocalRecord(Protocol):
    """What a client tells of its training."""

    @property
    def examples(self) -> int:
        """Distinct examples the client trained on: its weight in the mean."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""

    @property
    def loss_first(self) -> float:
        """Loss of the first batch, in nats."""

    @property
    def loss_last(self) -> float:
        """Loss of the last batch, in nats."""


class LocalTrainer(Protocol):
    """Trains a model in place on one client's data."""

    def __call__(self, model: nn.Module) -> LocalRecord:
        """Train ``model`` and say what was done."""

    def replay(self, model: nn.Module, examples: int) -> Iterator[Mapping[str, Tensor]]:
        """Run ``model`` on at most so many of the client's examples, without training it.

        Hands out each batch just before the model gets it. With an argument ``batch_size`` it can
        be asked for one example at a time, which some Grams need.
        """


@dataclass(frozen=True)
class ServerState:
    """Everything a server side needs to go on, except the secret.

    ``tensors`` hold the global model: whoever reads them owns it.
    """

    tensors: Mapping[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)


class ServerSide(Protocol):
    """The owner's half of a scheme. It holds the global model; ``release`` is the only door out.

    Per round: ``begin_round``, then ``release`` once per client, ``inspect`` for each reply, then
    ``absorb`` for those that are used, and ``end_round``.
    """

    def begin_round(self, number: int) -> None:
        """Prepare the releases of a round (numbered from 1)."""

    def release(self, client: str) -> Message:
        """The message for one client. The same client gets the same message all round long."""

    def inspect(self, client: str, reply: Message) -> Influence:
        """How much a reply would change; it is checked whole, and nothing of it is kept.

        Raises:
            ProtocolError: If the reply is not the one awaited.
        """

    def absorb(self, client: str, reply: Message, weight: float, scales: Scales = WHOLE) -> None:
        """Add one reply to the running sums.

        Args:
            client: Who was sent the release that it answers.
            reply: The client's message. Its tensors may be gone after this call.
            weight: What it counts for.
            scales: How much is left of what it would change, so that no client decides.

        Raises:
            ProtocolError: If the reply is not the one awaited; then nothing has changed.
        """

    def end_round(self) -> Metrics:
        """Apply the mean update to the global model and say what happened."""

    def final(self) -> StateDict:
        """The model to keep, after the merge, in the dtypes the owner brought."""

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The unit groups that masks cut; none if everything is released whole."""

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the models that the owner can measure: ``global``, perhaps ``server_model``."""

    def view(self, name: str) -> StateDict:
        """A copy of one of them, in the owner's dtypes; never to be serialized to a client."""

    def state(self) -> ServerState:
        """Everything needed to resume after the last finished round, secret excluded."""

    def restore(self, state: ServerState) -> None:
        """Go on from a state that :meth:`state` returned under the same configuration."""


class ClientSide(Protocol):
    """A partner's half of a scheme."""

    def load(self, message: Message, model: nn.Module, memory: Memory | None = None) -> None:
        """Put the proxy in ``message`` into ``model``, an architecture whose weights do not matter.

        ``memory`` is what the client kept, as in :meth:`fit`; it is not changed, and only a side
        that :attr:`remembers` is given one.

        Raises:
            ProtocolError: If the message does not fit the model.
        """

    def fit(
        self,
        message: Message,
        model: nn.Module,
        trainer: LocalTrainer,
        memory: Memory | None = None,
    ) -> Message:
        """Load the proxy, train it in place, and return the update.

        Args:
            message: What the server released.
            model: The architecture.
            trainer: Trains on the client's data.
            memory: What this client kept from its last round; changed in place once the update is
                made. Without one nothing is kept.

        Raises:
            ProtocolError: If the message does not fit the model.
        """

    @property
    def remembers(self) -> bool:
        """Whether :meth:`fit` wants a memory that lasts from round to round."""


def with_aggregation(scheme: Scheme, aggregation: Aggregation) -> Scheme:
    """A scheme whose updates something else combines.

    Raises:
        ConfigurationError: Its own way is not the mean, which needs nothing of clients but updates.
    """
    own = getattr(scheme, "aggregation", None)
    if not isinstance(own, Mean):
        raise ConfigurationError(
            "Updates would be combined in two ways",
            expected='a scheme with aggregation="mean"',
            found=repr(own or scheme),
        )
    changed: Scheme = replace(scheme, aggregation=aggregation)  # type: ignore[type-var]
    return changed


class Scheme(ABC):
    """One method. A subclass is a frozen dataclass: its fields are its configuration."""

    name: ClassVar[str]
    client_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that the client side depends on; clients need to know no others."""
    clients_hold_rest: ClassVar[bool] = False
    """Whether clients hold, exactly as the owner does, what is not among :meth:`tensors`."""

    def tensors(self, model: nn.Module) -> StateDict:
        """What is released and trained of a model: the model's own tensors, without a copy.

        Raises:
            ConfigurationError: There is nothing of the kind in it, two of its tensors share memory
                without being one, or its state holds what is neither parameter nor buffer.
        """
        refuse_foreign_state(model)
        refuse_overlaps(model)
        return read_state(model)

    def check(self, model: nn.Module, run: Run | None = None) -> None:  # noqa: B027  may stay so
        """Raise if the scheme cannot work with a model; by default it can with any.

        :meth:`server` finds out as well. Who has data says with ``run`` how the model is run on an
        example, for a scheme that has to see it at work.

        Raises:
            ConfigurationError: It cannot.
            UnknownArchitectureError: It would have to know the model's units.
        """

    def facts(self) -> Facts:
        """What is true of every release, for an audit to check; by default nothing is stated.

        A check that needs what is not stated answers "not applicable".
        """
        return Facts()

    def beside(self, model: nn.Module) -> Mapping[str, int]:
        """By section the most numbers in a reply beside an update of what the client was sent.

        Replies that are longer than both together are refused unread. By default it is what the
        scheme's ``aggregation`` asks for; a scheme whose clients send something else says so here.
        """
        aggregation = getattr(self, "aggregation", None)
        if not isinstance(aggregation, Aggregation):
            return {}
        shapes = {name: tensor.shape for name, tensor in self.tensors(model).items()}
        return aggregation.beside(model, shapes)

    @abstractmethod
    def server(self, model: nn.Module, secret: Secret) -> ServerSide:
        """The server side for a model, which is copied."""

    @abstractmethod
    def client(self) -> ClientSide:
        """The client side. It needs the architecture and the messages, nothing else."""
