"""Distillation: a fresh model taught by the stolen one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.fine_tuning import FineTuned, fine_tune
from fedveil.audit.attacks.registry import MODEL, register_attack
from fedveil.errors import ConfigurationError
from fedveil.state import load_state
from fedveil.tasks import Prepared
from fedveil.tasks.task import Batch, Dataset, Measure, Task
from fedveil.training import Training

__all__ = ["distil", "distillation", "scores_of"]

_TEMPERATURE = 2.0

Scores = Callable[[nn.Module, Batch], Tensor]
"""Scores of a model on a batch that another model's can be compared with, [answers, C]."""


@runtime_checkable
class HasLogits(Task, Protocol):
    """A task whose models score classes."""

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores per class, shape [B, C]."""


@runtime_checkable
class HasAnswers(Task, Protocol):
    """A task whose models score the tokens of answers."""

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of all answer tokens of a batch, [tokens, V], and the tokens themselves."""


@register_attack(
    "distillation",
    title="distilled into a fresh model",
    does="trains a public model (an untrained one, if there is none) to answer as the stolen one "
    "does",
    source="Hinton et al. 2015, arXiv 1503.02531",
    begins=MODEL,
)
def distillation(coalition: Coalition) -> Iterator[Stolen]:
    """The student of :func:`distil`; nothing if models of the task cannot teach each other."""
    stage = coalition.stage
    if scores_of(stage.task) is None:
        return
    student = coalition.untrained() if stage.public is None else stage.public
    taught = distil(
        stage.model, stage.task, coalition.data, stage.training, coalition.start,
        stage.whole(student), rounds=coalition.rounds, seed=stage.seed,
        tell=lambda text: coalition.tell(f"distillation, {text}"),
    )  # fmt: skip
    yield Stolen(taught.state)


def scores_of(task: Task) -> Scores | None:
    """What one model can teach another by; None if the task has nothing like that."""
    if isinstance(task, HasLogits):
        return task.logits
    if isinstance(task, HasAnswers):
        return lambda model, batch: task.answers(model, batch)[0]
    return None


def distil(
    model: nn.Module,
    task: Task,
    data: Prepared,
    training: Training,
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    *,
    rounds: int = 6,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> FineTuned:
    """Train a student to answer as the stolen model does, on the attacker's own inputs.

    Labels are not needed. It carries over what a proxy knows and leaves its holes behind.
    Distillation with temperature 2 as in arXiv 1503.02531.

    Knows: the stolen model, a public one to begin with, the attacker's own data.

    Args:
        model: The architecture; its weights are overwritten.
        task: What it is for; scores of classes are compared, or of each token of an answer.
        data: The attacker's own.
        training: How the attacker trains.
        teacher: The stolen model.
        student: What the student begins as.
        rounds: As of :func:`fine_tune`.
        seed: As of :func:`fine_tune`.
        tell: Hears of each piece.

    Raises:
        ConfigurationError: The task has no scores that could be compared.
    """
    scores = scores_of(task)
    if scores is None:
        raise ConfigurationError(
            "Models of this task cannot teach each other",
            expected="a task with logits or answers",
            found=type(task).__name__,
        )
    wise = copy.deepcopy(model).eval().requires_grad_(False)
    load_state(wise, teacher)
    taught = _Taught(task, scores, wise)
    every = replace(training, own_classes=False)  # the teacher scores all classes
    return fine_tune(model, taught, data, every, student, rounds=rounds, seed=seed, tell=tell)


class _Taught:
    """The task, with another model's answers in the place of labels."""

    def __init__(self, task: Task, scores: Scores, teacher: nn.Module) -> None:
        self._task, self._scores, self._teacher = task, scores, teacher
        # Of how many answers a batch's loss is the mean; None where that is its examples.
        self.count = getattr(task, "count", None)

    @property
    def name(self) -> str:
        """See :class:`~fedveil.training.Task`."""
        return self._task.name

    def validate(self, data: Dataset) -> None:
        """See :class:`~fedveil.training.Task`."""
        self._task.validate(data)

    def prepare(self, data: Dataset | Prepared) -> Prepared:
        """See :class:`~fedveil.training.Task`."""
        return self._task.prepare(data)

    def collate(self, rows: Sequence[Any]) -> Batch:
        """See :class:`~fedveil.training.Task`."""
        return self._task.collate(rows)

    def measure(self, model: nn.Module, batch: Batch) -> Measure:
        """How well it answers as it should; the attacker stops by its own labels."""
        return self._task.measure(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean divergence from the teacher's answer, in nats, times the temperature squared."""
        with torch.no_grad():
            wanted = self._scores(self._teacher, batch).float() / _TEMPERATURE
        found = self._scores(model, batch).float() / _TEMPERATURE
        divergence = nn.functional.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
        )
        return divergence * _TEMPERATURE**2
