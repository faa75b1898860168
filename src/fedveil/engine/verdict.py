"""Whether what came of a round is a model at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedveil.engine.bounds import Claim, times_median
from fedveil.errors import TrainingError
from fedveil.run.records import RoundRecord
from fedveil.schemes.health import loss_problem

__all__ = ["Verdict"]

EXPLODED = 1000.0
"""A weight has exploded that is so many times the largest before, which counts as 1 at least. A net
of such weights may have a loss like any other, all its units being dead."""


class Verdict:
    """Judges the global model after a round.

    Args:
        records: The rounds before.
        base: What the owner's model reached before round 1; None if it was not measured.
        claims: What the clients of the round asked for: the largest update is named.
    """

    def __init__(
        self,
        records: Sequence[RoundRecord],
        base: Mapping[str, float] | None,
        claims: Mapping[str, Claim],
    ) -> None:
        known = [base, *(record.measures.get("global") for record in records)]
        losses = [measures["loss"] for measures in known if measures and "loss" in measures]
        self._before = losses[-1] if losses else None
        self._claims = claims

    @property
    def suspects(self) -> list[str]:
        """The clients of the round, the one with the largest update first."""
        times = times_median(self._claims)
        return sorted(times, key=times.__getitem__, reverse=True)

    def check(
        self, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], loss: float | None
    ) -> None:
        """Refuse a model of which nothing can come.

        Args:
            tensors: What was trained of the global model.
            before: The same before the round.
            loss: Of the global model, in nats; None if there is nothing to measure it on.

        Raises:
            TrainingError: A weight is not finite, or has left the range of all weights there were;
                or a loss is not finite, or has exploded.
        """
        most = EXPLODED * max(1.0, *(_largest(tensor) for tensor in before.values()))
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise self._rejection("a weight that is not finite", name)
            if (largest := _largest(tensor)) > most:
                raise self._rejection(f"a weight of {largest:.3g}", name)
        if loss is not None and (problem := loss_problem(loss, self._before)) is not None:
            raise self._rejection(problem, "the global model on the owner's test set")

    def _rejection(self, found: str, where: str = "") -> TrainingError:
        largest, times = self.suspects[0], times_median(self._claims)
        return TrainingError(
            "No model comes of what clients sent",
            found=found,
            where=where,
            fix=f"The largest update is {largest}'s, {times[largest]:.3g} times the round's "
            "median, which need not be the one whose fault it is.",
        )


def _largest(tensor: Tensor) -> float:
    """The largest size of a weight; 0 of what holds none."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)  # one pass, no copy
    return max(-float(low), float(high))
