"""How good a model is on data it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.modes import evaluation_mode
from fedveil.tasks.task import Dataset, Measure, Prepared, Task, device_of, to_device
from fedveil.training.modes import seeded

__all__ = ["evaluate"]

_SEED = 0


def evaluate(
    model: nn.Module, task: Task, data: Dataset | Prepared, *, batch_size: int = 64
) -> dict[str, float]:
    """Measure `model` on `data`, where the model is; it is left as it was.

    A model that draws random numbers draws the same in every evaluation; the caller's generators
    go on as if there had been none.

    Args:
        model: Any model the task can call. This function releases nothing, but what it returns
            is computed from the data: keep it to those who may know it.
        task: What the model is for.
        data: Rows, or `task.prepare(rows)` to encode them once for many evaluations.
        batch_size: Examples at a time; the result depends on it only through rounding.

    Returns:
        "accuracy" in percent and "loss", the mean in nats; of language models both per answer
        token, and "perplexity", e to the loss; of classifiers also "f1" in percent: of two classes
        that of the second (GLUE), of more their mean.

    Raises:
        DataError: The data cannot be used.
        ConfigurationError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigurationError(
            "batch_size is impossible", expected="at least 1", found=str(batch_size)
        )
    prepared, device = task.prepare(data), device_of(model)
    order = _by_length(prepared)
    measures: list[Measure] = []
    # A model may draw numbers at any time: it draws the same wherever it is measured.
    with seeded(_SEED, device), evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = task.collate(prepared.select(order[start : start + batch_size]))
            measures.append(task.measure(model, to_device(batch, device)))
    count = sum(measure.examples for measure in measures)
    classes = [measure.classes for measure in measures if measure.classes is not None]
    found = {
        "accuracy": 100 * sum(measure.correct for measure in measures) / count,
        "loss": sum(measure.loss for measure in measures) / count,
    }
    if classes:
        found["f1"] = _f1(torch.stack(classes).sum(dim=0))
    if getattr(task, "metric", "accuracy") == "loss":
        # Beyond e to the 700 there is no such number; a model that bad is no model.
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found


def _f1(classes: Tensor) -> float:
    """F1 in percent, from the sums of :class:`Measure`, int64 [3, C].

    Of two classes it is that of the second, as GLUE has it for MRPC and QQP; of more, the mean over
    those that occur.
    """
    right, found, labels = classes.double()
    occurring = found + labels > 0
    each = torch.where(occurring, 2 * right / (found + labels).clamp(min=1), 0.0)
    score = each[1] if len(each) == 2 else each[occurring].mean()
    return 100 * float(score)


def _by_length(prepared: Prepared) -> list[int]:
    # Texts of like length in one batch need the least padding.
    if prepared.lengths is None:
        return list(range(len(prepared)))
    return sorted(range(len(prepared)), key=prepared.lengths.__getitem__)
