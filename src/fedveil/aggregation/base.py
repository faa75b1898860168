"""What schemes ask of an aggregation: something to measure on clients, and running sums."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedveil.selection import Selection
from fedveil.wire import Message, Section

__all__ = [
    "AVERAGES",
    "WHOLE",
    "Aggregation",
    "Average",
    "Influence",
    "Observed",
    "Replay",
    "Scales",
    "Sums",
    "one_by_one",
]

Average = Literal["holders", "participants"]
AVERAGES = ("holders", "participants")

Replay = Callable[[nn.Module, int], Iterator[Mapping[str, Tensor]]]
"""Runs a model, without training it, on at most so many of a client's own examples: it hands out
each batch just before the model gets it.

One that also takes ``batch_size=1`` can be asked for one example at a time."""


def one_by_one(replay: Replay) -> Replay | None:
    """A replay that hands out one example at a time; None if it cannot be asked for that."""
    try:
        parameters = inspect.signature(replay).parameters
    except (TypeError, ValueError):
        return None
    asked: Callable[..., Iterator[Mapping[str, Tensor]]] = replay
    return partial(asked, batch_size=1) if "batch_size" in parameters else None


@dataclass(frozen=True)
class Observed:
    """What a client adds to its reply beside its update."""

    sections: Mapping[str, Section] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Influence:
    """How much one reply would change if it were used as it is.

    Attributes:
        update: Euclidean norm of the whole update, of all tensors together.
        statistics: Size of each statistic beside it, by name: of a Gram its trace.
    """

    update: float
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scales:
    """By how much a reply is scaled down before it is added, from 0 to 1.

    Attributes:
        update: The whole update.
        statistics: Statistics by name, as in :class:`Influence`; whoever is missing stays whole.
    """

    update: float = 1.0
    statistics: Mapping[str, float] = field(default_factory=dict)


WHOLE = Scales()
"""Nothing is scaled down. Sums are then, to the last bit, those without scales."""


class Sums(Protocol):
    """A round's replies as running sums: no single client's is kept."""

    @property
    def clients(self) -> int:
        """How many clients' updates are in the sums."""

    def read(self, reply: Message, selection: Selection) -> tuple[dict[str, Section], Any]:
        """The sections of a reply that are updates, and the statistics beside them, checked.

        Raises:
            ProtocolError: If the statistics are not those awaited.
        """

    def sizes(self, statistics: Any) -> Mapping[str, float]:
        """How large each of one client's statistics is, as :meth:`read` returned them."""

    def add(
        self,
        updates: Mapping[str, Tensor],
        selection: Selection,
        weight: float,
        statistics: Any,
        scales: Scales = WHOLE,
    ) -> None:
        """Add one client's updates, on released elements, and its statistics.

        The client counts with its whole weight, however little is left of what it sent.
        """

    def mean(self, name: str) -> Tensor | None:
        """The step of one tensor at its full shape, or None if no client changed it."""


@runtime_checkable
class Aggregation(Protocol):
    """How the updates of a round become one step. A frozen dataclass: its fields configure it."""

    def observe(
        self, model: nn.Module, replay: Replay, changed: Collection[str], selection: Selection
    ) -> Observed:
        """On a client, after training: what to send beside the updates of ``changed`` tensors."""

    def sums(
        self,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        average: Average,
        shared_masks: bool,
    ) -> Callable[[], Sums]:
        """On the server: makes empty sums for a round, over tensors of these shapes."""

    def beside(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> Mapping[str, int]:
        """By section the most numbers that a client sends in it beside its update.

        What is longer than that and the update together is not read at all. Who combines others'
        ways has what they have, and its own.
        """
