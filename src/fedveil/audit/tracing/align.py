"""Puts a file's units back in the run's order, if whoever made it has shuffled or removed some.

Neurons of a hidden layer can be put in any order, and withheld ones left out, without changing what
a network computes. Units are recognised by their released values, whoever was sent them: the order
found depends on nobody's mask, so that tests of masks stay valid.

Does NOT undo: scaling of units (twice the input weights, half the output weights), a rotated
residual stream, units that were merged or split. A file altered so is not traced.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedveil.audit.tracing.amounts import Reference
from fedveil.audit.tracing.masks import UnitMap
from fedveil.units import Slice

__all__ = ["align"]

_ALIKE = 0.5  # cosine from which a unit counts as recognised; unrelated ones are near 0
_FEATURES = 512  # values of a unit that are compared
_ROWS = 2048  # units that are compared at once


def align(
    leaked: Mapping[str, Tensor],
    reference: Reference,
    units: UnitMap,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """The file's tensors with units in the run's order.

    Args:
        leaked: By the run's names, as :func:`fedveil.audit.tracing.fit` gives them: with the run's
            shapes, or narrower on axes that are cut.
        reference: What was released.
        units: Of the run.
        shapes: Of the run's tensors.

    Returns:
        Float32 copies at the run's shapes; units that are not recognised are zero if units were
        moved or are missing, and stay where they are otherwise.
    """
    tensors = {name: tensor.float().nan_to_num(0.0, 0.0, 0.0) for name, tensor in leaked.items()}
    waiting = {number for cuts in units.cuts.values() for number, _ in cuts}
    while waiting:
        # A tensor that another group cuts too can be compared once that group is in order.
        ready = {number for number in waiting if _comparable(number, tensors, units, waiting)}
        for number in sorted(ready or waiting):
            names = _comparable(number, tensors, units, waiting - {number}) if ready else []
            _put_in_order(number, names, tensors, reference, units, shapes)
            waiting.discard(number)
    return tensors


def _comparable(
    number: int, tensors: Mapping[str, Tensor], units: UnitMap, waiting: set[int]
) -> list[str]:
    """Tensors that a group cuts and no other group that is not yet in order."""
    cut = {name: {n for n, _ in cuts} for name, cuts in units.cuts.items() if name in tensors}
    return [name for name, by in cut.items() if number in by and not (by - {number}) & waiting]


def _put_in_order(
    number: int,
    names: list[str],
    tensors: dict[str, Tensor],
    reference: Reference,
    units: UnitMap,
    shapes: Mapping[str, torch.Size],
) -> None:
    size = units.groups[number].size
    cuts = [part for name in tensors for n, part in units.cuts[name] if n == number]
    counts = {tensors[p.tensor].shape[p.axis] * size // shapes[p.tensor][p.axis] for p in cuts}
    count = min(counts, default=size)
    own, released = [], []
    for part in (part for part in cuts if part.tensor in names):
        target = reference.tensor(part.tensor)
        known = ~target.isnan()
        scale = float(target[known].square().mean().sqrt()) if known.any() else 0.0
        if scale > 0:
            own.append(_rows(tensors[part.tensor], part, size, count) / scale)
            released.append(_rows(target.nan_to_num(0.0), part, size, size) / scale)
    order = torch.full((size,), -1)
    if own:
        order = _match(torch.cat(own, 1), torch.cat(released, 1))
    if count == size and (not own or _in_place(own, released) or not (order >= 0).any()):
        return
    # A tensor with two slices of this group (a fused layer) is moved once, with both.
    for name in dict.fromkeys(part.tensor for part in cuts):
        parts = [part for part in cuts if part.tensor == name]
        tensors[name] = _move(tensors[name], parts, order, size, count, shapes[name])


def _rows(tensor: Tensor, part: Slice, size: int, count: int) -> Tensor:
    """A slice as [units, values], with ``count`` of ``size`` units there."""
    start = part.offset * count // size
    rows = tensor.movedim(part.axis, 0)[start : start + count * part.width]
    return rows.reshape(count, -1)


def _in_place(own: list[Tensor], released: list[Tensor]) -> bool:
    """Whether units are where they were: those that are there at all resemble what was released."""
    one, other = torch.cat(own, 1), torch.cat(released, 1)
    there = (one.norm(dim=1) > 0) & (other.norm(dim=1) > 0)
    if not there.any():
        return True
    likeness = torch.nn.functional.cosine_similarity(one[there], other[there])
    return float(likeness.median()) >= _ALIKE


def _match(own: Tensor, released: Tensor) -> Tensor:
    """Per released unit the file's unit that is nearest both ways, or -1: int64 [units]."""
    if own.shape[1] > _FEATURES:
        chosen = torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(0))
        own, released = own[:, chosen[:_FEATURES]], released[:, chosen[:_FEATURES]]
    own = torch.nn.functional.normalize(own)
    released = torch.nn.functional.normalize(released)
    likeness, nearest = _nearest(released, own)
    _, back = _nearest(own, released)
    mutual = (back[nearest] == torch.arange(len(released))) & (likeness >= _ALIKE)
    return torch.where(mutual, nearest, -1)


def _nearest(these: Tensor, those: Tensor) -> tuple[Tensor, Tensor]:
    starts = range(0, len(these), _ROWS)
    found = [(these[start : start + _ROWS] @ those.T).max(1) for start in starts]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _move(
    tensor: Tensor, parts: list[Slice], order: Tensor, size: int, count: int, full: torch.Size
) -> Tensor:
    """The tensor with a group's units in a new order, as many as there should be."""
    axis = parts[0].axis
    shape = list(tensor.shape)
    shape[axis] = full[axis]
    moved = torch.zeros(shape)
    present = torch.nonzero(order >= 0).flatten()
    for part in parts:
        source = Slice(part.tensor, axis, part.width, part.offset * count // size)
        taken = tensor.index_select(axis, source.indices(order[present]))
        moved.index_copy_(axis, part.indices(present), taken)
    return moved
