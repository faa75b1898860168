"""The weighted mean of updates, streamed: one running sum per tensor, whatever the clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fedveil.aggregation.base import WHOLE, Average, Observed, Replay, Scales
from fedveil.quantization import add_part
from fedveil.selection import Selection
from fedveil.updates import Updates
from fedveil.wire import Message, Section

__all__ = ["Mean", "StreamingMean"]

_ONE = torch.ones(1)


@dataclass(frozen=True)
class Mean:
    """The mean of updates, weighted by examples (FedAvg, 1602.05629)."""

    name: str = field(default="mean", init=False)

    def observe(
        self, model: nn.Module, replay: Replay, changed: Collection[str], selection: Selection
    ) -> Observed:
        """Nothing: a mean needs updates only."""
        return Observed()

    def sums(
        self,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        average: Average,
        shared_masks: bool,
    ) -> Callable[[], StreamingMean]:
        """See :class:`~fedveil.aggregation.base.Aggregation`."""
        return partial(StreamingMean, shapes, average)

    def beside(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        """Nothing."""
        return {}


class StreamingMean:
    """Mean update of a round, each element over the clients that held it.

    For element e of a tensor, with weights w_k (examples) and updates d_k of the clients k:

    - ``"holders"``: sum over k holding e of w_k d_k[e] / sum over k holding e of w_k;
    - ``"participants"``: the same sum divided by the weights of all clients of the round, whether
      they held e or not (the mean of FedQSN's released code).

    An element that no client held has mean update exactly zero. Sums are float32 (float64 for
    float64 models) and depend, in the last bits, on the order of :meth:`add`: engines add in the
    order in which clients were sampled.

    Does NOT protect: the server sees every update; nothing is noised here, and clipped only by the
    scales that are given.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], average: Average = "holders") -> None:
        self._shapes, self._average = dict(shapes), average
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self.total_weight = 0.0
        self.clients = 0

    def read(self, reply: Message, selection: Selection) -> tuple[dict[str, Section], None]:
        """All sections are updates."""
        return dict(reply.sections), None

    def sizes(self, statistics: None) -> dict[str, float]:
        """There are no statistics."""
        return {}

    def add(
        self,
        updates: Mapping[str, Tensor],
        selection: Selection,
        weight: float,
        statistics: None = None,
        scales: Scales = WHOLE,
    ) -> None:
        """Add one client's updates, given on released elements only, at their released shapes.

        A tensor that is missing did not change: its update is zero and its weight counts.
        """
        for name, shape in self._shapes.items():
            if name in updates:
                self._add(name, updates, selection, weight * scales.update)
            if name not in self._weights:
                self._weights[name] = torch.zeros(_weight_shape(selection, name, shape))
            one = _ONE if shape else _ONE[0]  # a single number has no axis
            add_part(one, selection.positions(name), self._weights[name], weight)
        self.total_weight += weight
        self.clients += 1

    def _add(
        self, name: str, updates: Mapping[str, Tensor], selection: Selection, weight: float
    ) -> None:
        if name not in self._sums:
            dtype = updates.dtype(name) if isinstance(updates, Updates) else updates[name].dtype
            self._sums[name] = torch.zeros(self._shapes[name], dtype=dtype)
        if isinstance(updates, Updates):
            updates.add_to(name, self._sums[name], weight)
        else:
            add_part(updates[name], selection.positions(name), self._sums[name], weight)

    def mean(self, name: str) -> Tensor | None:
        """The mean update of one tensor at its full shape, or None if none changed it."""
        if name not in self._sums:
            return None
        if self._average == "participants":
            return self._sums[name] / self.total_weight
        weights = self._weights[name]
        # Where nobody held an element its sum is zero as well: 0 / 1 keeps it exactly zero.
        return self._sums[name] / torch.where(weights > 0, weights, torch.ones_like(weights))


def _weight_shape(selection: Selection, name: str, full: torch.Size) -> torch.Size:
    """Weights vary only along cut axes; along the others one number serves all elements."""
    cut = selection.positions(name)
    return torch.Size(size if axis in cut else 1 for axis, size in enumerate(full))
