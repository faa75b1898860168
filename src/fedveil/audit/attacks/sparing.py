"""Sparing: healing that leaves alone what the model knows of other classes than the attacker's."""

from __future__ import annotations

from dataclasses import replace

from fedveil.tasks import Prepared, Task
from fedveil.tasks.task import Classification
from fedveil.training import Training

__all__ = ["lacks_classes", "sparing"]


def lacks_classes(task: Task, data: Prepared, test: Prepared) -> bool:
    """Whether there are classes in the test set that an attacker has no example of."""
    return isinstance(task, Classification) and not (
        set(task.classes_in(test)) <= set(task.classes_in(data))
    )


def sparing(training: Training) -> Training:
    """How to :func:`heal` with a softmax over the attacker's own classes alone.

    Who trains a stolen model on data of few classes teaches it that the others never occur, and
    loses what he stole. With the others left out of the softmax (FedRS, Li and Zhan 2021) their
    rows of the head stay as they were. Where clients train like that themselves, this is healing
    over all classes, so that both are tried. It is for classifications.

    Args:
        training: How clients train.
    """
    return replace(training, own_classes=not training.own_classes)
