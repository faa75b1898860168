"""Healing: training a stolen model on, on the attacker's own data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedveil.state import load_state, read_state
from fedveil.tasks import Prepared, Task
from fedveil.training import Trainer, Training, evaluate

__all__ = ["Healing", "heal"]

PIECES = 6
"""How often the attacker looks at his held-out part: after each sixth of what he trains at most."""
_HELD_OUT = 5
"""One in so many of the attacker's examples is held out to tell when to stop."""
_ENOUGH = 100
"""More held-out examples than this tell little more, and take time."""


@dataclass(frozen=True)
class Healing:
    """A model after the attacker has trained it.

    Attributes:
        state: The best of what he came by, by his held-out part.
        pieces: After how many pieces of training that was; 0 if training made it worse.
    """

    state: dict[str, Tensor]
    pieces: int


def heal(
    model: nn.Module,
    task: Task,
    data: Prepared,
    training: Training,
    start: Mapping[str, Tensor],
    *,
    rounds: int = 6,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Healing:
    """Fine-tune with early stopping: stop where the loss on a held-out part is least.

    Knows: the stolen model (or, for the baseline, the public one), his own data, and how the
    clients of the federation train. It closes holes that matter for his task, and is what an
    attacker does anyway.

    Args:
        model: The architecture; its weights are overwritten.
        task: What it is for.
        data: The attacker's own.
        training: How he trains in a round of the federation.
        start: What he begins with.
        rounds: He trains for as many of them at most.
        seed: Decides the held-out part, the order of examples and dropout.
        tell: Hears of each piece.
    """
    train, held_out = _split(data, seed)
    load_state(model, start)
    best, best_loss, best_at = _copy(model), evaluate(model, task, held_out)["loss"], 0
    batches = math.ceil(len(train) / training.batch_size)
    steps = math.ceil(rounds * training.total_steps(batches) / PIECES)
    steady = replace(training, schedule="constant", steps=steps, epochs=None)
    for piece in range(1, PIECES + 1):
        tell(f"training, {piece} of {PIECES}")
        Trainer(task, train, steady).train(model, seed=seed + piece)
        loss = evaluate(model, task, held_out)["loss"]
        if loss < best_loss:
            best, best_loss, best_at = _copy(model), loss, piece
    return Healing(best, best_at)


def _split(data: Prepared, seed: int) -> tuple[Prepared, Prepared]:
    """What is trained on, and what is held out; with a single example both are that one."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(order) // _HELD_OUT, _ENOUGH) or (1 if len(order) > 1 else 0)
    rest = order[count:]
    return data.part(rest), data.part(order[:count] or rest)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in read_state(model).items()}
