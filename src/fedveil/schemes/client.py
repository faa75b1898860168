"""What a client does in every scheme that sends a proxy and takes back an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedveil.aggregation import Aggregation, Mean
from fedveil.errors import ProtocolError
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor
from fedveil.schemes.base import LocalTrainer
from fedveil.selection import Selection
from fedveil.state import read_state, wipe
from fedveil.units import UnitGroup
from fedveil.updates import UpdateCodec
from fedveil.wire import Dense, Message, Section, UnitIndex

__all__ = ["UNIT_PREFIX", "ProxyClient", "read_part"]

UNIT_PREFIX = "units/"
"""A unit index travels under this prefix and the name of its unit group."""


@dataclass(frozen=True)
class ProxyClient:
    """Trains a proxy and returns the update on released units.

    Attributes:
        scheme: Name of the scheme it speaks.
        find_groups: The unit groups of an architecture; the same function as on the server.
        codec: How updates are encoded.
        aggregation: What else the server needs to combine them.

    Does NOT protect the client's data from the server: the update is exact, or quantized by
    ``codec``. Withheld units take no part in training: they are zero, and stay so.
    """

    scheme: str
    find_groups: Callable[[nn.Module], Sequence[UnitGroup]]
    codec: UpdateCodec
    aggregation: Aggregation = field(default_factory=Mean)

    def load(self, message: Message, model: nn.Module) -> None:
        """See :class:`~fedveil.schemes.base.ClientSide`."""
        self._load(message, model)

    def fit(self, message: Message, model: nn.Module, trainer: LocalTrainer) -> Message:
        """See :class:`~fedveil.schemes.base.ClientSide`."""
        selection, parts = self._load(message, model)
        own = read_state(model)
        # The model may be of lower precision than the message: training starts from what it holds.
        start = {name: selection.gather(name, own[name]).clone() for name in parts}
        with _withheld_units_still(model, selection):
            record = trainer(model)
        sections: dict[str, Section] = {}
        for name, before in start.items():
            update = _difference(selection.gather(name, own[name]), before)
            if update is not None:
                axis = next(iter(selection.positions(name)), 0)
                sections[name] = self.codec.encode(update, axis)
        observed = self.aggregation.observe(model, trainer.replay, sections.keys(), selection)
        scalars = {
            "examples": record.examples,
            "steps": record.steps,
            "loss_first": float(record.loss_first),
            "loss_last": float(record.loss_last),
        }
        return Message(
            "update",
            self.scheme,
            message.round,
            message.client,
            {**sections, **observed.sections},
            {**scalars, **observed.scalars},
        )

    def _load(self, message: Message, model: nn.Module) -> tuple[Selection, Mapping[str, Tensor]]:
        if (message.kind, message.scheme) != ("proxy", self.scheme):
            raise ProtocolError(
                "A client was sent the wrong message",
                expected=f"a proxy of scheme {self.scheme!r}",
                found=f"{message.kind!r} of {message.scheme!r}",
            )
        own = read_state(model)
        groups = self._groups(message, model)
        released = {group.name: _read_release(message, group) for group in groups}
        selection = Selection(groups, released, {n: t.shape for n, t in own.items()})
        _check_names(message, own, groups)
        parts = {
            name: read_part(name, message.sections[name], selection.shape(name, tensor.shape))
            for name, tensor in own.items()
        }
        wipe(model)
        with torch.no_grad():
            for name, part in parts.items():
                selection.scatter(name, selection.scale(name, part).to(own[name].dtype), own[name])
        return selection, parts

    def _groups(self, message: Message, model: nn.Module) -> Sequence[UnitGroup]:
        """The model's unit groups, less those that the server does not cut.

        On the server an embedding with a copy elsewhere is not cut. Here values say nothing, and
        two wiped tensors would pass for copies: each is told apart by a number of its own.
        """
        with torch.no_grad():
            for number, tensor in enumerate(read_state(model).values(), start=1):
                if tensor.is_floating_point():
                    tensor.fill_(number)
        groups = self.find_groups(model)
        return [group for group in groups if UNIT_PREFIX + group.name in message.sections]


def read_part(name: str, section: object, shape: torch.Size) -> Tensor:
    """The tensor in a section, which must have the given shape.

    Raises:
        ProtocolError: If the section is no tensor, or of another shape.
    """
    if not isinstance(section, Dense | QuantizedTensor):
        raise ProtocolError("A section is no tensor", found=type(section).__name__, where=name)
    found = tuple(section.shape if isinstance(section, QuantizedTensor) else section.tensor.shape)
    if found != tuple(shape):
        raise ProtocolError(
            "A tensor has the wrong shape", expected=str(list(shape)), found=str(list(found)),
            where=name, fix="Server and client must hold the same architecture.",
        )  # fmt: skip
    return section.dequantize() if isinstance(section, QuantizedTensor) else section.tensor


def _read_release(message: Message, group: UnitGroup) -> Release:
    section = message.sections.get(UNIT_PREFIX + group.name)
    if not isinstance(section, UnitIndex) or section.size != group.size:
        raise ProtocolError(
            "A unit group's index is missing or of another size",
            expected=f"{group.size} units",
            found=str(section.size) if isinstance(section, UnitIndex) else "none",
            where=group.name,
            fix="Server and client must use the same choice of units.",
        )
    return Release(section.released, section.scale)


def _check_names(message: Message, own: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> None:
    expected = set(own) | {UNIT_PREFIX + group.name for group in groups}
    odd = sorted(set(message.sections) ^ expected)
    if odd:
        raise ProtocolError(
            "The proxy is of another architecture",
            found=("an unknown" if odd[0] in message.sections else "a missing") + " section",
            where=odd[0],
        )


def _difference(after: Tensor, before: Tensor) -> Tensor | None:
    """The update of one tensor, or None if it cannot or did not change."""
    if not after.is_floating_point() or torch.equal(after, before):
        return None
    wide = torch.float64 if after.dtype == torch.float64 else torch.float32
    return after.to(wide) - before.to(wide)


@contextmanager
def _withheld_units_still(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Zero the gradients of withheld elements, so that training cannot grow them anew."""
    handles = []
    for name, parameter in model.named_parameters():
        if selection.positions(name) and parameter.requires_grad:
            mask = selection.released(name, parameter.shape).to(parameter.dtype)
            handles.append(parameter.register_hook(mask.__mul__))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
