"""What a client does in every scheme that sends a proxy and takes back an update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedveil.aggregation import Aggregation, Mean
from fedveil.errors import ProtocolError
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor
from fedveil.schemes.adapters import frozen_names
from fedveil.schemes.base import LocalRecord, LocalTrainer, Memory
from fedveil.selection import Selection
from fedveil.shrinking import shrunk
from fedveil.state import StateDict, read_state
from fedveil.ties import refuse_overlaps
from fedveil.units import UnitGroup
from fedveil.units.rows import rows_checked
from fedveil.updates import ErrorFeedback, UpdateCodec
from fedveil.wire import Dense, Message, Section, UnitIndex

__all__ = ["UNIT_PREFIX", "ProxyClient", "examples_of", "no_groups"]

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
        shrink: Train a network that is physically without the withheld units, where one can be made
            (:func:`~fedveil.shrinking.shrunk`), rather than with zeros in their place.
        error_feedback: Add what quantizing lost of earlier updates to the next one.
        tensors: What of an architecture travels; the rest is the client's, and stays as it is.
        keeps_backbone: Keep what is frozen of the first message, for those that leave it out.
        still: A pattern for the names of parameters that are not trained though they travel.

    Does NOT protect the client's data from the server: the update is exact, or quantized by
    ``codec``. Withheld units take no part in training: they are zero in the model after it, too.
    """

    scheme: str
    find_groups: Callable[[nn.Module], Sequence[UnitGroup]]
    codec: UpdateCodec
    aggregation: Aggregation = field(default_factory=Mean)
    shrink: bool = True
    error_feedback: bool = False
    tensors: Callable[[nn.Module], StateDict] = read_state
    still: str | None = None
    keeps_backbone: bool = False

    @property
    def remembers(self) -> bool:
        """See :class:`~fedveil.schemes.base.ClientSide`."""
        return self.error_feedback or self.keeps_backbone

    def load(self, message: Message, model: nn.Module, memory: Memory | None = None) -> None:
        """See :class:`~fedveil.schemes.base.ClientSide`."""
        proxy = self._read(self._completed(message, model, dict(memory or {})), model)
        proxy.decode(self.tensors(model), proxy.selection)

    def fit(
        self,
        message: Message,
        model: nn.Module,
        trainer: LocalTrainer,
        memory: Memory | None = None,
    ) -> Message:
        """See :class:`~fedveil.schemes.base.ClientSide`."""
        memory = {} if memory is None else memory
        message = self._completed(message, model, memory)
        proxy = self._read(message, model)
        record, updates = self._train(proxy, model, trainer)
        owing = {name: tensor for name, tensor in memory.items() if name != _BACKBONE}
        feedback = ErrorFeedback(self.codec, proxy.selection, proxy.shapes, owing)
        owed = feedback.outstanding() if self.error_feedback else []
        sections: dict[str, Section] = {}
        for name in [*updates, *(name for name in owed if name not in updates)]:
            axis = next(iter(proxy.selection.positions(name)), 0)
            update = updates.pop(name, None)
            if self.error_feedback:
                sections[name] = feedback.encode(name, update, axis)
            elif update is not None:
                sections[name] = self.codec.encode(update, axis)
        changed = sections.keys()
        observed = self.aggregation.observe(model, trainer.replay, changed, proxy.selection)
        scalars = {
            "examples": record.examples,
            "steps": record.steps,
            "loss_first": float(record.loss_first),
            "loss_last": float(record.loss_last),
        }
        feedback.commit()
        memory.update(owing)
        if self.keeps_backbone and _BACKBONE not in memory:
            memory[_BACKBONE] = _packed(message, frozen_names(model))
        return Message(
            "update",
            self.scheme,
            message.round,
            message.client,
            {**sections, **observed.sections},
            {**scalars, **observed.scalars},
        )

    def _completed(self, message: Message, model: nn.Module, memory: Memory) -> Message:
        """A message with the backbone that the client keeps, if it was left out.

        A whole message takes the place of what was kept.

        Raises:
            ProtocolError: It was left out, and none is kept, or one of other units.
        """
        frozen = frozen_names(model) if self.keeps_backbone else frozenset()
        if not frozen - message.sections.keys():
            memory.pop(_BACKBONE, None)
            return message
        if _BACKBONE not in memory:
            raise ProtocolError(
                "The message has no backbone, and none was kept",
                fix="A client that failed in a round is sent it again in the next.",
            )
        kept = Message.from_bytes(bytearray(memory[_BACKBONE].numpy().data))
        for name, section in kept.sections.items():
            if isinstance(section, UnitIndex) and not _same(section, message.sections.get(name)):
                raise ProtocolError("The backbone that was kept has other units", where=name)
        whole = {**kept.sections, **message.sections}
        return Message(message.kind, message.scheme, message.round, message.client, whole, {})

    def _train(
        self, proxy: _Proxy, model: nn.Module, trainer: LocalTrainer
    ) -> tuple[LocalRecord, dict[str, Tensor]]:
        """Train the proxy; what was done, and the updates at their released shapes."""
        with self._sized(proxy, model) as cut:
            own = self.tensors(model)
            proxy.decode(own, cut)
            # The model may be of lower precision than the message: it starts from what it holds.
            start = {name: _copy(name, tensor, cut) for name, tensor in own.items()}
            with (
                _withheld_units_still(model, cut),
                _others_still(model, own, self.still),
                rows_checked(model, proxy.cut_groups()),
            ):
                record = trainer(model)
            updates = {}
            for name, tensor in own.items():
                update = _difference(cut.gather(name, tensor), start.pop(name))
                if update is not None:
                    updates[name] = update
        return record, updates

    def _sized(self, proxy: _Proxy, model: nn.Module) -> AbstractContextManager[Selection]:
        """The model to train; the context is what is still cut in it."""
        if self.shrink:
            return shrunk(model, proxy.groups, proxy.released)
        return nullcontext(proxy.selection)

    def _read(self, message: Message, model: nn.Module) -> _Proxy:
        """Check a message against the model's architecture, and decode nothing yet."""
        if (message.kind, message.scheme) != ("proxy", self.scheme):
            raise ProtocolError(
                "A client was sent the wrong message",
                expected=f"a proxy of scheme {self.scheme!r}",
                found=f"{message.kind!r} of {message.scheme!r}",
            )
        own = self.tensors(model)
        groups = self._groups(message, model, own)
        released = {group.name: _read_release(message, group) for group in groups}
        shapes = {name: tensor.shape for name, tensor in own.items()}
        selection = Selection(groups, released, shapes)
        _check_names(message, own, groups)
        parts = {
            name: _read_part(name, message.sections[name], selection.shape(name, shape))
            for name, shape in shapes.items()
        }
        return _Proxy(groups, released, shapes, selection, parts)

    def _groups(self, message: Message, model: nn.Module, own: StateDict) -> Sequence[UnitGroup]:
        """The model's unit groups, less those that the server does not cut."""
        shapes = [(name, tensor.shape) for name, tensor in own.items()]
        if _APART.get(model) != shapes:
            refuse_overlaps(model)
            _APART[model] = shapes
        if not any(name.startswith(UNIT_PREFIX) for name in message.sections):
            return []  # nothing is withheld: the model need not have any
        known = _KNOWN.get(model)
        if known is None or known[0] is not self.find_groups or known[1] != shapes:
            known = _KNOWN[model] = self.find_groups, shapes, self._find_groups(model, own)
        return [group for group in known[2] if UNIT_PREFIX + group.name in message.sections]

    @torch.no_grad()
    def _find_groups(self, model: nn.Module, own: StateDict) -> Sequence[UnitGroup]:
        """All unit groups of an architecture.

        On the server an embedding with a copy elsewhere is not cut. Here values say nothing, and
        two wiped tensors would pass for copies: each is told apart by a number of its own.
        """
        for number, tensor in enumerate(own.values(), start=1):
            if tensor.is_floating_point():
                tensor.fill_(number)
        return self.find_groups(model)


_BACKBONE = "backbone"
"""Where a client's memory has what is sent once, as bytes; residuals have the names of tensors."""


def _packed(message: Message, frozen: Collection[str]) -> Tensor:
    """The frozen part of a message, as bytes of its own: uint8."""
    sections = {
        name: section
        for name, section in message.sections.items()
        if name in frozen or isinstance(section, UnitIndex)
    }
    part = Message("proxy", message.scheme, message.round, message.client, sections, {})
    return torch.frombuffer(bytearray(part.to_bytes()), dtype=torch.uint8)


def _same(one: UnitIndex, other: object) -> bool:
    return (
        isinstance(other, UnitIndex)
        and one.scale == other.scale
        and torch.equal(one.released, other.released)
    )


def examples_of(reply: Message) -> int:
    """How many examples a client says it trained on: its own claim.

    Raises:
        ProtocolError: It says none.
    """
    value = reply.scalars.get("examples")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProtocolError(
            "A reply does not say its examples",
            expected="a positive integer",
            found=repr(value)[:80],
        )
    return value


_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, object, Sequence[UnitGroup]]]
_KNOWN = WeakKeyDictionary()
"""The unit groups of a model, who found them, and its shapes then: clients get many proxies."""

_APART: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The shapes of models none of whose tensors is a view of another."""


@dataclass(frozen=True)
class _Proxy:
    """What a message released of a model: its cut, and the tensors as they travelled."""

    groups: Sequence[UnitGroup]
    released: Mapping[str, Release]
    shapes: Mapping[str, torch.Size]
    selection: Selection
    parts: Mapping[str, Dense | QuantizedTensor]

    def cut_groups(self) -> list[UnitGroup]:
        """The groups of which a unit is withheld."""
        return [g for g in self.groups if len(self.released[g.name].units) < g.size]

    @torch.no_grad()
    def decode(self, own: StateDict, cut: Selection) -> None:
        """Put the released parts into a model's tensors, of which so much is still cut."""
        for name, tensor in own.items():
            if cut.positions(name):
                tensor.zero_()
            section = self.parts[name]
            if isinstance(section, QuantizedTensor):
                if not self.selection.is_scaled(name) and _decode_into(section, tensor, cut, name):
                    continue
                part = section.dequantize()
            else:
                part = section.tensor
            cut.scatter(name, self.selection.scale(name, part).to(tensor.dtype), tensor)


def _decode_into(section: QuantizedTensor, tensor: Tensor, cut: Selection, name: str) -> bool:
    """Decode straight to where units belong; whether that is possible.

    Args:
        section: the released part.
        tensor: the whole, zero where it is cut.
        cut: what is cut of it.
        name: the tensor's.
    """
    cuts = cut.positions(name)
    if tensor.dtype != torch.float32 or cuts.keys() - {section.axis}:
        return False
    if cuts:
        section.add_to(tensor, cuts[section.axis])
    else:
        section.dequantize(tensor)
    return True


def _read_part(name: str, section: object, shape: torch.Size) -> Dense | QuantizedTensor:
    """The section of a tensor, which must have the given shape.

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
    return section


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
    if section.scale > torch.finfo(torch.float32).max:
        raise ProtocolError(
            "A unit group's factor does not fit into float32",
            found=f"{section.scale:g}",
            where=group.name,
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
    """The update of one tensor, in the memory of what was before; None if nothing changed."""
    if not after.is_floating_point() or torch.equal(after, before):
        return None
    wide = torch.float64 if after.dtype == torch.float64 else torch.float32
    if after.dtype == wide:
        return torch.sub(after, before, out=before)
    return after.to(wide) - before.to(wide)


def _copy(name: str, tensor: Tensor, cut: Selection) -> Tensor:
    """A copy of what is released of a tensor."""
    part = cut.gather(name, tensor)
    return part.clone() if part is tensor else part


@contextmanager
def _others_still(model: nn.Module, own: StateDict, still: str | None) -> Iterator[None]:
    """Let no parameter be trained but those that travel and no pattern holds still."""
    held = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (name not in own or (still is not None and fnmatchcase(name, still)))
    ]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def no_groups(model: nn.Module) -> tuple[UnitGroup, ...]:
    """The unit groups of a scheme that cuts none."""
    return ()


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient.device)


@contextmanager
def _withheld_units_still(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Zero the gradients of withheld elements, so that training cannot grow them anew."""
    handles = []
    for name, parameter in model.named_parameters():
        if selection.positions(name) and parameter.requires_grad:
            mask = selection.released(name, parameter.shape).to(parameter.dtype)
            handles.append(parameter.register_hook(partial(_masked, mask)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
