"""The full-precision model on the server, as every scheme that trains all of it holds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from fedveil.errors import CheckpointError, ConfigurationError, ProtocolError
from fedveil.selection import Selection
from fedveil.state import StateDict, check_trainable, working_copy
from fedveil.wire.container import DTYPES

__all__ = ["GlobalModel", "sent"]

_WIDER = {
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
"""Integers that have no name on the wire travel as wider ones; a client's model has their type."""


class GlobalModel:
    """Full-precision weights, changed only by adding mean updates.

    Tied tensors are held once. Integer tensors (counters) are released but never updated. What is
    frozen, as the backbone of an adapter, is the owner's own: no copy, and in no checkpoint.

    Args:
        state: The owner's tensors.
        frozen: Names of those that nobody trains.

    Raises:
        ConfigurationError: If the model holds NaN or infinite weights, or what cannot be sent.
    """

    def __init__(self, state: StateDict, frozen: Collection[str] = ()) -> None:
        check_trainable(state)
        _check_sendable({n: t for n, t in state.items() if n not in frozen})
        trained = working_copy({n: t for n, t in state.items() if n not in frozen})
        self.tensors: StateDict = {n: trained.get(n, t.detach()) for n, t in state.items()}
        self._frozen = frozenset(frozen) & state.keys()
        self.dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self.shapes = {name: tensor.shape for name, tensor in state.items()}

    def floating(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are trained."""
        return ((name, t) for name, t in self.changing().items() if t.is_floating_point())

    def changing(self) -> StateDict:
        """All tensors but those that are frozen: what a checkpoint has to hold."""
        return {name: t for name, t in self.tensors.items() if name not in self._frozen}

    def apply(self, step_of: Callable[[str], Tensor | None]) -> float:
        """Add the step of each tensor, None for none; returns the l2 norm of what was added."""
        squared = 0.0
        for name, tensor in self.floating():
            step = step_of(name)
            if step is not None:
                tensor += step
                squared += float(step.square().sum(dtype=torch.float64))
        return float(squared**0.5)

    def check_statistics(self, updates: Mapping[str, Tensor], selection: Selection) -> None:
        """Refuse an update after which a running variance would be below zero.

        No data have such a variance, and a batch norm makes of it what is not finite: a single
        number within every bound on the update's length would end the run.

        Raises:
            ProtocolError: It is one.
        """
        for name in (name for name in updates if name.endswith("running_var")):
            before = selection.gather(name, self.tensors[name])
            after = before + updates[name]
            # A client of lower precision begins with a rounded variance.
            if bool((after < -0.01 * before.abs() - 1e-6).any()):
                raise ProtocolError(
                    "An update makes a variance negative",
                    expected="a variance of some data",
                    found=f"{float(after.min()):.3g}",
                    where=name,
                    fix="Nothing of this reply was used.",
                )

    def export(self, tensors: Mapping[str, Tensor] | None = None) -> StateDict:
        """A copy in the owner's dtypes."""
        tensors = self.tensors if tensors is None else tensors
        return {name: t.to(self.dtypes[name], copy=True) for name, t in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint, one at a time: they may be read as they are used.

        Raises:
            CheckpointError: If they are not those of this model; then nothing has changed.
        """
        found = {name: _kind(tensor) for name, tensor in tensors.items()}
        wanted = {name: _kind(tensor) for name, tensor in self.changing().items()}
        if found != wanted:
            odd = sorted(dict(set(found.items()) ^ set(wanted.items())))[0]
            raise CheckpointError(
                "The checkpoint is of another model",
                expected=wanted.get(odd, "no such tensor"),
                found=found.get(odd, "no such tensor"),
                where=odd,
                fix="Resume with the same model.",
            )
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


def sent(tensor: Tensor) -> Tensor:
    """A tensor of a type that the wire knows, of the same numbers."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _check_sendable(state: StateDict) -> None:
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values() and tensor.dtype not in _WIDER:
            raise ConfigurationError(
                "A tensor has a dtype that is not sent",
                expected=", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values()),
                found=str(tensor.dtype).removeprefix("torch."),
                where=name,
                fix="Convert it, to int32 or float32 for instance, or keep it out of the model's "
                "state: register_buffer(..., persistent=False).",
            )
