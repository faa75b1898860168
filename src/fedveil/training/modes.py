"""Borrowing a model or a random generator, and giving it back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedveil.errors import ConfigurationError

__all__ = [
    "check_device",
    "checkpointing",
    "make_dense",
    "on_device",
    "only_trainable",
    "seeded",
]


@contextmanager
def only_trainable(model: nn.Module, names: set[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters called `names`; no other gets a gradient inside, and none keeps one after."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = [parameter for name, parameter in model.named_parameters() if name in names]
    try:
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        yield chosen
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def make_dense(parameters: list[nn.Parameter]) -> None:
    """Write out sparse gradients (``nn.Embedding(sparse=True)``), as norms and most optimizers take
    dense ones only: the embedding trains as one that is not sparse."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def check_device(name: str) -> torch.device:
    """The device of a name, if this machine has it.

    Raises:
        ConfigurationError: It has not, or there is no such thing.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigurationError(
            "There is no such device on this machine",
            expected=" or ".join(there),
            found=repr(name),
            where="Training.device",
        ) from error
    return device


@contextmanager
def on_device(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model's tensors are on a device inside; after, where they were, with their new values.

    Whoever holds the model's tensors from before finds the new values in them. None leaves the
    model where it is.

    Raises:
        ConfigurationError: There is no such device.
    """
    if name is None:
        yield
        return
    device = check_device(name)
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, buffer_name, buffer)
        for module in model.modules()
        for buffer_name, buffer in module.named_buffers(recurse=False)
    ]
    for parameter, home in parameters:
        parameter.data = home.to(device)
    for module, buffer_name, home in buffers:
        setattr(module, buffer_name, home.to(device))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, home in parameters:
                parameter.data = home.copy_(parameter.data)
            for module, buffer_name, home in buffers:
                setattr(module, buffer_name, home.copy_(getattr(module, buffer_name)))


_CHECKPOINTING = ("activation", "gradient")


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activations are computed anew for the backward pass inside, if that is wanted.

    Raises:
        ConfigurationError: The model cannot do it.
    """
    if not wanted:
        yield
        return
    # Transformers is renaming it.
    kinds = [kind for kind in _CHECKPOINTING if hasattr(model, f"{kind}_checkpointing_enable")]
    if not kinds or not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigurationError(
            "The model cannot compute activations twice",
            expected="a model of transformers that can",
            found=type(model).__name__,
            where="Training.gradient_checkpointing",
        )
    # Not the reentrant way, which needs inputs that require gradients: those of a frozen backbone
    # do not.
    words = {f"{kinds[0]}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{kinds[0]}_checkpointing_enable")(**words)
    try:
        yield
    finally:
        getattr(model, f"{kinds[0]}_checkpointing_disable")()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Generators start at `seed` inside; the caller's go on after.

    Those are torch's of the CPU and of `device`, and the global ones of Python and NumPy, which
    transforms of images like to use.
    """
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _others_seeded(seed):
        # torch.manual_seed would also seed devices that fork_rng does not give back.
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
