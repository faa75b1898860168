"""FedAvg (McMahan et al., 1602.05629): the reference that protects no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fedveil.aggregation import WHOLE, Aggregation, Influence, Scales, aggregation_of
from fedveil.schemes.adapters import frozen_names
from fedveil.schemes.base import Metrics, Scheme, ServerState
from fedveil.schemes.client import ProxyClient, no_groups
from fedveil.schemes.facts import EXACT, Facts
from fedveil.schemes.global_model import GlobalModel, sent
from fedveil.schemes.ledger import RoundLedger
from fedveil.schemes.registry import register_scheme
from fedveil.secret import Secret
from fedveil.selection import Selection
from fedveil.state import StateDict
from fedveil.units import UnitGroup
from fedveil.updates import UpdateCodec, Updates, check_error_feedback
from fedveil.wire import Dense, Message, Sections

__all__ = ["FedAvg"]


@register_scheme
@dataclass(frozen=True)
class FedAvg(Scheme):
    """Every client gets the whole global model in full precision and returns its update.

    In the equal form with updates: ``W += sum_k n_k (W_k - W) / sum_k n_k``, n_k examples.

    Attributes:
        update_bits: Quantize updates on the way up (2, 3, 4 or 8 bits); None sends float32.
        error_feedback: Clients keep what that loses and add it to their next update.
        aggregation: How updates become one: "mean", "regmean", or a
            :class:`~fedveil.aggregation.RegMean` with its settings.

    Does NOT protect: anything of the model. It is here to be compared with.
    """

    name: ClassVar[str] = "fedavg"
    client_fields: ClassVar[frozenset[str]] = frozenset(
        {"aggregation", "update_bits", "error_feedback"}
    )
    update_bits: int | None = None
    error_feedback: bool = False
    aggregation: Aggregation | str = "mean"

    @property
    def codec(self) -> UpdateCodec:
        """How updates travel."""
        return UpdateCodec(self.update_bits)

    def __post_init__(self) -> None:
        _ = self.codec  # checks update_bits
        check_error_feedback(self.error_feedback, self.update_bits)
        object.__setattr__(self, "aggregation", aggregation_of(self.aggregation))

    def facts(self) -> Facts:
        """See :meth:`Scheme.facts`: no masks, and nothing is quantized."""
        return Facts(server_mask=0.0, client_mask=0.0, bits=EXACT, adapter_bits=EXACT)

    def server(self, model: nn.Module, secret: Secret) -> FedAvgServer:
        """See :meth:`Scheme.server`; the secret is not used."""
        return FedAvgServer(self, model)

    def client(self) -> ProxyClient:
        """See :meth:`Scheme.client`."""
        return ProxyClient(
            self.name,
            no_groups,
            self.codec,
            aggregation_of(self.aggregation),
            error_feedback=self.error_feedback,
        )


class Averaging(Protocol):
    """A scheme that sends all clients the same and averages what comes back."""

    name: ClassVar[str]

    @property
    def aggregation(self) -> Aggregation | str: ...
    @property
    def codec(self) -> UpdateCodec: ...
    def tensors(self, model: nn.Module) -> StateDict: ...


class FedAvgServer:
    """The server side; see :class:`~fedveil.schemes.base.ServerSide`."""

    def __init__(self, scheme: Averaging, model: nn.Module) -> None:
        self._scheme, self._global = scheme, GlobalModel(scheme.tensors(model), frozen_names(model))
        self._ledger = RoundLedger[bool](scheme.name)
        self._everything = Selection((), {}, {})
        self._sections = Sections({})
        shapes = {name: tensor.shape for name, tensor in self._global.floating()}
        aggregation = aggregation_of(scheme.aggregation)
        self._new_sums = aggregation.sums(model, shapes, "holders", shared_masks=True)
        self._sums = self._new_sums()

    def begin_round(self, number: int) -> None:
        """Open a round."""
        self._ledger.begin(number)
        self._sums = self._new_sums()
        # A copy, once per round: a message that someone keeps must not change with the model.
        self._sections = Sections({n: Dense(sent(t)) for n, t in self._global.export().items()})

    def release(self, client: str) -> Message:
        """The whole model."""
        self._ledger.record(client, True)
        return Message("proxy", self._scheme.name, self._ledger.round, client, self._sections, {})

    def inspect(self, client: str, reply: Message) -> Influence:
        """Check one reply, and say how much it would change."""
        self._ledger.expect(client, reply)
        updates, statistics = self._read(reply)
        return Influence(updates.norm(), self._sums.sizes(statistics))

    def absorb(self, client: str, reply: Message, weight: float, scales: Scales = WHOLE) -> None:
        """Add one update to the sum."""
        self._ledger.expect(client, reply, weight)
        updates, statistics = self._read(reply)
        self._ledger.accept(client)
        self._sums.add(updates, self._everything, weight, statistics, scales)

    def _read(self, reply: Message) -> tuple[Updates, Any]:
        shapes = {name: tensor.shape for name, tensor in self._global.floating()}
        sections, statistics = self._sums.read(reply, self._everything)
        updates = self._scheme.codec.read(sections, shapes, self._everything)
        self._global.check_statistics(updates, self._everything)
        return updates, statistics

    def end_round(self) -> Metrics:
        """Add the mean update to the model."""
        self._ledger.end()
        norm = self._global.apply(self.step) if self._sums.clients else 0.0
        self._sections = Sections({})
        return {"clients": self._sums.clients, "update_norm": norm}

    def step(self, name: str) -> Tensor | None:
        """What is added to one tensor: the mean update, or None if no client changed it."""
        return self._sums.mean(name)

    def final(self) -> StateDict:
        """The global model."""
        return self._global.export()

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """None: everything is released whole."""
        return ()

    @property
    def views(self) -> tuple[str, ...]:
        """Global model only: clients hold the same."""
        return ("global",)

    def view(self, name: str) -> StateDict:
        """The global model."""
        return self._global.export()

    def state(self) -> ServerState:
        """Global model and round."""
        return ServerState(self._global.changing(), {"round": self._ledger.round})

    def restore(self, state: ServerState) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._global.restore(state.tensors)
        self._ledger.round = int(state.values["round"])
