"""What chooses how much the owner's model is to learn: its loss on his own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedveil.engine.crew import threads
from fedveil.engine.rounds import MEASURING_THREADS
from fedveil.state import load_state
from fedveil.training import Prepared, Task, evaluate
from fedveil.training.modes import on_device

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """The loss of models on the owner's data."""

    make: Callable[[], nn.Module]
    task: Task
    rows: Prepared
    device: str | None

    def __call__(self, state: Mapping[str, Tensor]) -> float:
        """In nats; infinite for a model whose answers are none."""
        model = self.make()
        load_state(model, state)
        with threads(MEASURING_THREADS), on_device(model, self.device):
            loss = evaluate(model, self.task, self.rows)["loss"]
        return loss if math.isfinite(loss) else math.inf
