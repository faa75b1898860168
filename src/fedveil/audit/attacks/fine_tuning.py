"""Fine-tuning: training a stolen model on, on the attacker's own data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.registry import MODEL, register_attack
from fedveil.state import load_state, read_state
from fedveil.tasks import Prepared, Task
from fedveil.training import Trainer, Training, evaluate

__all__ = ["FineTuned", "fine_tune", "fine_tuned", "fine_tuning"]

PIECES = 6
"""How often the attacker looks at its held-out part: after each sixth of what it trains at most."""
_HELD_OUT = 5
"""One in so many of the attacker's examples is held out to tell when to stop."""
_ENOUGH = 100
"""More held-out examples than this tell little more, and take time."""


@dataclass(frozen=True)
class FineTuned:
    """A model after the attacker has trained it.

    Attributes:
        state: The best of what it came by, by its held-out part.
        pieces: After how many pieces of training that was; 0 if training made it worse.
    """

    state: dict[str, Tensor]
    pieces: int


@register_attack(
    "fine-tuning",
    title="fine-tuned",
    does="trains the model on with the attackers' own data, and stops where the loss on a held-out "
    "fifth of them is least",
    source="of stolen parts: Zhang et al. 2024, arXiv 2310.07152",
    begins=MODEL,
    quick=True,
    alone=True,
)
def fine_tuning(coalition: Coalition) -> Iterator[Stolen]:
    """What :func:`fine_tune` makes of the start."""
    yield Stolen(fine_tuned(coalition).state)


def fine_tuned(coalition: Coalition) -> FineTuned:
    """The same for all attacks that need it: a start is fine-tuned once."""
    stage = coalition.stage
    return coalition.once(
        "fine-tuning",
        lambda: fine_tune(
            stage.model, stage.task, coalition.data, stage.training, coalition.start,
            rounds=coalition.rounds, seed=stage.seed,
            tell=lambda text: coalition.tell(f"fine-tuning, {text}"),
        ),
    )  # fmt: skip


def fine_tune(
    model: nn.Module,
    task: Task,
    data: Prepared,
    training: Training,
    start: Mapping[str, Tensor],
    *,
    rounds: int = 6,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> FineTuned:
    """Fine-tune with early stopping: stop where the loss on a held-out part is least.

    Knows: the stolen model (or, for the baseline, the public one), the attacker's own data, and how
    the clients of the federation train. It closes holes that matter for the task, and is what an
    attacker does anyway.

    Args:
        model: The architecture; its weights are overwritten.
        task: What it is for.
        data: The attacker's own.
        training: How the attacker trains in a round of the federation.
        start: What it begins with.
        rounds: It trains for as many of them at most.
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
    return FineTuned(best, best_at)


def _split(data: Prepared, seed: int) -> tuple[Prepared, Prepared]:
    """What is trained on, and what is held out; with a single example both are that one."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(order) // _HELD_OUT, _ENOUGH) or (1 if len(order) > 1 else 0)
    rest = order[count:]
    return data.part(rest), data.part(order[:count] or rest)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in read_state(model).items()}
