"""The owner tunes a model as its own was tuned, and takes what is best on the way."""

from __future__ import annotations

import copy

from torch import nn

from fedveil.schemes import transfer
from fedveil.state import load_state, read_state
from fedveil.training import Trainer, evaluate
from studies.fedqsn.scenes import Scene

__all__ = ["best", "on_the_way"]


def on_the_way(scene: Scene, model: nn.Module, seed: int) -> list[nn.Module]:
    """The model, points on the way to what the owner's tuning makes of it, and that."""
    end = copy.deepcopy(model)
    Trainer(scene.task, scene.tuned, scene.tuning).train(end, seed=seed)
    way = [model]
    for stretch in transfer.STRETCHES:
        between = copy.deepcopy(end)
        load_state(between, transfer.on_the_way(read_state(model), read_state(end), stretch))
        way.append(between)
    return way


def best(scene: Scene, models: list[nn.Module]) -> nn.Module:
    """The model with the least loss on rows that the owner's model was not tuned on."""
    return min(models, key=lambda model: evaluate(model, scene.task, scene.owner)["loss"])
