"""Dropout rescaling: known units stand in for those that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.imputation import ZEROS, impute
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.pooling import pool
from fedveil.audit.attacks.registry import MESSAGES, register_attack
from fedveil.units import Slice, UnitGroup

__all__ = ["dropout_rescaling", "rescale"]


@register_attack(
    "dropout rescaling",
    title="pooling of all that was sent, scaled up for the units that are missing",
    does="leaves holes at zero, and multiplies what the next layer makes of a group of units by "
    "how many units there are, over how many are known",
    source="our name; dropout: Hinton et al. 2012, arXiv 1207.0580",
    begins=MESSAGES,
)
def dropout_rescaling(coalition: Coalition) -> Iterator[Stolen]:
    """The pooled model after :func:`rescale`, with zeros in its holes; nothing if it has none."""
    known = pool(coalition.evidence, coalition.sent)
    if rescale(known, coalition.evidence.manifest.groups):
        yield Stolen(impute(known, coalition.evidence.manifest), ZEROS, known)


def rescale(known: PartialModel, groups: Sequence[UnitGroup]) -> bool:
    """Scale up what layers read of units, where some of these are missing. In place.

    A layer sums over the units that it reads. With n units of which k are known, n / k times the
    sum of k is what the sum of all n would be, if the missing ones were like the others: the
    training of dropout reckons with the same (Hinton et al., arXiv 1207.0580).

    Knows: the messages, and which tensor reads which units, as anybody does who has the
    architecture. It is right on average only, costs nothing, and is of no use where the holes are
    filled with values.

    Args:
        known: What was collected; its values change.
        groups: The unit groups that masks cut.

    Returns:
        Whether a unit of some group is missing, so that anything was scaled.
    """
    changed = False
    for group in groups:
        for part in (part for part in group.slices if part.scaled):
            count = int(_known_units(known.known[part.tensor], part, group.size).sum())
            if 0 < count < group.size:
                _positions(known.values[part.tensor], part, group.size).mul_(group.size / count)
                changed = True
    return changed


def _positions(tensor: Tensor, part: Slice, size: int) -> Tensor:
    """A view of what all units of a group own of a tensor."""
    return tensor.narrow(part.axis, part.offset, size * part.width)


def _known_units(known: Tensor, part: Slice, size: int) -> Tensor:
    """Of which units anything is known: bool [units]."""
    return _positions(known, part, size).movedim(part.axis, 0).reshape(size, -1).any(1)
