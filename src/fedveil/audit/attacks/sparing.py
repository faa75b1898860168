"""Sparing: healing that leaves alone what the model knows of other classes than the attacker's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fedveil.audit.attacks.healing import Healing, heal
from fedveil.training import Prepared, Task, Training
from fedveil.training.tasks import Classification

__all__ = ["lacks_classes", "spare"]


def lacks_classes(task: Task, data: Prepared, test: Prepared) -> bool:
    """Whether there are classes in the test set that an attacker has no example of."""
    return isinstance(task, Classification) and not (
        set(task.classes_in(test)) <= set(task.classes_in(data))
    )


def spare(
    model: nn.Module,
    task: Task,
    data: Prepared,
    training: Training,
    start: Mapping[str, Tensor],
    *,
    rounds: int = 1,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Healing:
    """Heal the stolen model with a softmax over the attacker's own classes alone.

    Who trains a stolen model on data of few classes teaches it that the others never occur, and
    loses what he stole. With the others left out of the softmax (FedRS, Li and Zhan 2021) their
    rows of the head stay as they were. Where clients train like that themselves, this is healing
    over all classes, so that both are tried.

    Knows: the stolen model, his own data.

    Args:
        model: The architecture; its weights are overwritten.
        task: A classification.
        data: The attacker's own.
        training: How clients train.
        start: The stolen model.
        rounds: As of :func:`heal`.
        seed: As of :func:`heal`.
        tell: Hears of each piece.
    """
    other = replace(training, own_classes=not training.own_classes)
    return heal(model, task, data, other, start, rounds=rounds, seed=seed, tell=tell)
