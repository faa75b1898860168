"""How good a model is on data it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.training.modes import evaluation_mode
from fedveil.training.tasks import Dataset, Measure, Prepared, Task, device_of, to_device

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module, task: Task, data: Dataset | Prepared, *, batch_size: int = 64
) -> dict[str, float]:
    """Measure `model` on `data`, where the model is; it is left as it was.

    Args:
        model: Any model the task can call. This function releases nothing, but what it returns
            is computed from the data: keep it to those who may know it.
        task: What the model is for.
        data: Rows, or `task.prepare(rows)` to encode them once for many evaluations.
        batch_size: Examples at a time; the result depends on it only through rounding.

    Returns:
        "accuracy" in percent and "loss", the mean in nats; of language models both per answer
        token, and "perplexity", e to the loss.

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
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = task.collate(prepared.select(order[start : start + batch_size]))
            measures.append(task.measure(model, to_device(batch, device)))
    count = sum(measure.examples for measure in measures)
    found = {
        "accuracy": 100 * sum(measure.correct for measure in measures) / count,
        "loss": sum(measure.loss for measure in measures) / count,
    }
    if getattr(task, "metric", "accuracy") == "loss":
        # Beyond e to the 700 there is no such number; a model that bad is no model.
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found


def _by_length(prepared: Prepared) -> list[int]:
    # Texts of like length in one batch need the least padding.
    if prepared.lengths is None:
        return list(range(len(prepared)))
    return sorted(range(len(prepared)), key=prepared.lengths.__getitem__)
