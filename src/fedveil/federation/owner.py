"""What the owner does with its own rows: judges models by their loss, and tunes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedveil.engine.crew import threads
from fedveil.engine.rounds import MEASURING_THREADS
from fedveil.federation.clients import Rows
from fedveil.state import StateDict, load_state, read_state
from fedveil.tasks import Prepared, Task
from fedveil.training import Trainer, Training, evaluate
from fedveil.training.modes import on_device

__all__ = ["Judge", "Tuner", "Tuning"]


@dataclass(frozen=True)
class Tuning:
    """How the owner made its model of what that was fine-tuned from, to be repeated.

    Attributes:
        rows: What it was tuned on. They stay on the server.
        training: How.
    """

    rows: Rows
    training: Training


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


@dataclass(frozen=True)
class Tuner:
    """Tunes models as the owner's was."""

    make: Callable[[], nn.Module]
    trainer: Trainer
    seed: int

    def __call__(self, state: Mapping[str, Tensor]) -> StateDict:
        """Those of the given tensors, trained."""
        model = self.make()
        load_state(model, state)
        with threads(MEASURING_THREADS):
            self.trainer.train(model, seed=self.seed)
        tuned = read_state(model)
        return {name: tuned[name].detach() for name in state}
