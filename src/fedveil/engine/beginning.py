"""Every client begins with the same model, whoever trained in it before.

Clients of one process train in one model, and a client's own program in the same one round after
round. A message brings what travels; all else is put back here: buffers that are not sent, frozen
weights, modes, and what modules keep for themselves.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Beginning"]

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""What torch itself keeps in a module: parameters, buffers, modules, hooks."""

_CONTAINERS = (
    list, dict, set, bytearray, deque, OrderedDict, defaultdict, Counter, Random,
    np.random.Generator, np.random.RandomState,
)  # fmt: skip
"""What can be changed in place, and is small: it is copied."""


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer in its place.

    Attributes:
        table: A module's own table of parameters, or of buffers.
        name: In it.
        tensor: The object that stands there.
        value: What it holds; None if that comes with every message.
        trained: Whether it requires gradients.
    """

    table: dict[str, Any]
    name: str
    tensor: Tensor
    value: Tensor | None
    trained: bool


class Beginning:
    """What a model is now, but for what comes with every message; and the way back to it.

    Does NOT cover: what code keeps elsewhere than in its modules' attributes (in globals, in
    classes, in objects of its own, in a task or a data set), and modules that it exchanges.

    Args:
        model: Nobody has trained in it yet.
        sent: Names of the tensors that every message brings, as
            :func:`~fedveil.state.read_state` has them. Their values are not kept.
        origin: Where the same values are and stay, by name, so that they need no copy.
    """

    def __init__(
        self,
        model: nn.Module,
        sent: Collection[str],
        origin: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._modules = model, list(model.modules())
        self._slots = list(self._find_slots(sent, origin or {}))
        own = [_own(module) for module in self._modules]
        self._values = [_held(values) for values in own]
        self._tensors = [
            (value, value.detach().clone())
            for values in own
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        containers = {
            (number, name): value
            for number, values in enumerate(own)
            for name, value in values.items()
            if type(value) in _CONTAINERS
        }
        self._containers = self._copied(containers)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was."""
        for slot in self._slots:
            slot.table[slot.name] = slot.tensor
            slot.tensor.requires_grad_(slot.trained)
            if slot.value is not None:
                slot.tensor.data.copy_(slot.value)
        for tensor, value in self._tensors:
            tensor.data.copy_(value)
        for module, values in zip(self._modules, self._values, strict=True):
            own = vars(module)
            for name in own.keys() - values.keys() - _OF_TORCH:
                del own[name]
            own.update(values)
        for (number, name), value in self._copied(self._containers).items():
            vars(self._modules[number])[name] = value

    def _find_slots(self, sent: Collection[str], origin: Mapping[str, Tensor]) -> Iterator[_Slot]:
        seen: set[int] = set()
        known = {id(tensor) for name, tensor in self._named() if name in sent}
        for name, tensor in self._named():
            path, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(path)
            table = module._parameters if leaf in module._parameters else module._buffers
            value = None
            if id(tensor) not in known and id(tensor) not in seen:
                value = origin[name] if name in origin else tensor.detach().clone()
            seen.add(id(tensor))
            yield _Slot(table, leaf, tensor, value, tensor.requires_grad)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters(remove_duplicate=False)
        yield from self._model.named_buffers(remove_duplicate=False)

    def _copied(self, containers: dict[tuple[int, str], Any]) -> dict[tuple[int, str], Any]:
        """Copies that hold the same modules and tensors, and share what they shared."""
        if not containers:
            return {}
        kept = [*self._modules, *(slot.tensor for slot in self._slots)]
        return copy.deepcopy(containers, {id(one): one for one in kept})


def _own(module: nn.Module) -> dict[str, Any]:
    """What a module has beside what torch keeps in it."""
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


def _held(values: Mapping[str, Any]) -> dict[str, Any]:
    """What its attributes refer to, but for containers, which are given anew."""
    return {name: value for name, value in values.items() if type(value) not in _CONTAINERS}
