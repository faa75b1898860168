"""Restricted softmax: fine-tuning that leaves alone what a model knows of others' classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.fine_tuning import fine_tune
from fedveil.audit.attacks.registry import MODEL, register_attack
from fedveil.audit.attacks.weight_interpolation import SHARES, interpolate
from fedveil.tasks import Prepared, Task
from fedveil.tasks.task import Classification
from fedveil.training import Training

__all__ = ["lacks_classes", "restricted", "restricted_softmax"]


@register_attack(
    "restricted softmax",
    title="fine-tuned with a softmax over own classes",
    does="fine-tunes with a softmax over the attackers' own classes alone, as what the stolen "
    "model knows of others is lost otherwise; weights are interpolated as well",
    source="FedRS: Li and Zhan 2021, doi 10.1145/3447548.3467254",
    begins=MODEL,
    alone=True,
)
def restricted_softmax(coalition: Coalition) -> Iterator[Stolen]:
    """Points on the way to what :func:`restricted` training makes of the start, and its end."""
    stage, data = coalition.stage, coalition.data
    if not lacks_classes(stage.task, data, stage.test):
        return
    tuned = fine_tune(
        stage.model, stage.task, data, restricted(stage.training), coalition.start,
        rounds=coalition.rounds, seed=stage.seed,
        tell=lambda text: coalition.tell(f"restricted softmax, {text}"),
    )  # fmt: skip
    for share in (*SHARES, 1.0):
        yield Stolen(interpolate(coalition.start, tuned.state, share))


def lacks_classes(task: Task, data: Prepared, test: Prepared) -> bool:
    """Whether there are classes in the test set that an attacker has no example of."""
    return isinstance(task, Classification) and not (
        set(task.classes_in(test)) <= set(task.classes_in(data))
    )


def restricted(training: Training) -> Training:
    """How to :func:`fine_tune` with a softmax over the attacker's own classes alone.

    An attacker that trains a stolen model on data of few classes teaches it that the others never
    occur, and loses what it stole. With the others left out of the softmax (FedRS, Li and Zhan
    2021) their rows of the head stay as they were. Where clients train like that themselves, this
    is fine-tuning over all classes, so that both are tried. It is for classifications.

    Args:
        training: How clients train.
    """
    return replace(training, own_classes=not training.own_classes)
