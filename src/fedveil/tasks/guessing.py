"""What a model reaches that knows nothing: by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from fedveil.tasks.task import Prepared, Task

__all__ = ["no_better_than_chance"]


_ROUNDING = 1e-6
"""In percent: the same share is computed in two ways."""


def no_better_than_chance(
    measures: Mapping[str, float], task: Task, data: Prepared, model: nn.Module
) -> str | None:
    """In words, that a model is no better than guessing; None if it is, or nobody can tell.

    Guessing is to answer with the commonest class of the data, which is right at least as often as
    any other guess, or to take all tokens for equally likely.

    Args:
        measures: What it reaches.
        task: What it is for.
        data: What it was measured on.
        model: Of its architecture.
    """
    if getattr(task, "metric", "accuracy") == "loss":
        return _of_language(measures["loss"], model)
    commonest = getattr(task, "commonest", None)
    if commonest is None or "accuracy" not in measures:
        return None
    chance = 100 * commonest(data)
    if measures["accuracy"] > chance + _ROUNDING:
        return None
    return (
        f"The base is no better than chance: {measures['accuracy']:.1f} % where always the "
        f"commonest class is right in {chance:.1f} %. Unless its head is new: is the order of "
        "classes right?"
    )


def _of_language(loss: float, model: nn.Module) -> str | None:
    read = getattr(model, "get_input_embeddings", lambda: None)()
    tokens = getattr(read, "num_embeddings", 0)
    if tokens < 2 or loss < math.log(tokens):
        return None
    return (
        f"The base is no better than chance: {loss:.2f} nats per token where all tokens equally "
        f"likely make {math.log(tokens):.2f}. Unless its weights are random: is the tokenizer its "
        "own?"
    )
