"""Whether what came of a round is a model at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedveil.engine.bounds import Claim, times_median
from fedveil.engine.records import RoundRecord
from fedveil.errors import TrainingError
from fedveil.schemes.health import loss_problem

__all__ = ["Verdict"]


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

    def check(
        self, tensors: Mapping[str, Tensor], measures: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Refuse a model of which nothing can come.

        Args:
            tensors: What was trained of the global model.
            measures: What it was measured at, if it was.

        Raises:
            TrainingError: A weight is not finite, or a loss is not, or has exploded.
        """
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise self._rejection("a weight that is not finite", name)
        loss = measures.get("global", {}).get("loss")
        if loss is not None and (problem := loss_problem(loss, self._before)) is not None:
            raise self._rejection(problem, "the global model on the owner's test set")

    def _rejection(self, found: str, where: str = "") -> TrainingError:
        times = times_median(self._claims)
        largest = max(times, key=times.__getitem__)
        return TrainingError(
            "What clients sent makes no model of the global model, so none of it was applied",
            found=found,
            where=where,
            fix=f"The largest update is {largest}'s, {times[largest]:.3g} times the round's "
            "median. Look at its data; tighter bounds leave less room.",
        )
