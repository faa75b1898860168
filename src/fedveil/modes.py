"""Training and evaluation mode for a while: each module has its own again after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode", "training_mode"]


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """All modules in training mode inside, each in its former mode after."""
    with _mode(model, training=True):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode inside, each in its former mode after."""
    with _mode(model, training=False):
        yield


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
