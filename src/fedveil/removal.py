"""Whether a model without its withheld units computes what it does with zeros there: tried once.

Clients train the smaller model (:func:`fedveil.shrinking.shrunk`). If it computed something else
they would teach something else, and nobody would be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.masking import Release
from fedveil.shrinking import shrinkable, shrunk
from fedveil.units import UnitGroup
from fedveil.units.examples import Run, runs_of
from fedveil.units.probe import Probe
from fedveil.units.trial import withheld

__all__ = ["try_removal"]

_APART = 1e-3
"""By how much of their size answers may differ: smaller layers add up in another order."""

_TRIED: WeakKeyDictionary[nn.Module, object]
_TRIED = WeakKeyDictionary()


def try_removal(model: nn.Module, groups: Sequence[UnitGroup], run: Run | None = None) -> None:
    """Refuse units whose removal is not the same as zeros in their place.

    It takes two forward passes in float32. The model comes out as it was. What was tried of a model
    is not tried again.

    What it does NOT find: what differs only while the model trains (dropout draws other numbers at
    another width; that is no fault), and what the input does not reach.

    Args:
        model: On the CPU, with groups that :func:`fedveil.units.tried_units` has found.
        groups: Its groups; those that clients do not make smaller are left out.
        run: Runs a model on an example where the model itself does not say what it reads.

    Raises:
        ConfigurationError: It names the group.
    """
    released = {group.name: Release(withheld(group, others=True), 1.0) for group in groups}
    smaller = shrinkable(model, groups, released)
    shapes = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    if not smaller or _TRIED.get(model) == (smaller, shapes):
        return
    for _, attempt in runs_of(model, run):
        differs = _differs(model, smaller, released, attempt)
        if differs is None:
            continue
        if differs:
            alone = (g for g in smaller if _differs(model, (g,), released, attempt))
            raise _wrong(next(alone, smaller[0]))
        break
    _TRIED[model] = smaller, shapes


def _differs(
    model: nn.Module, groups: Sequence[UnitGroup], released: Mapping[str, Release], run: Run
) -> bool | None:
    """Whether a model without some units answers otherwise than with zeros; None if not at all."""
    with Probe(model, drawn=True) as probe:
        for group in groups:
            for cut in group.slices:
                probe.fill(cut, withheld(group), random=False)
        try:
            zeros = probe.outputs(run)
        except Exception:  # the model's own forward, on an example that may not be for it
            return None
        try:
            with shrunk(model, groups, released):
                removed = probe.outputs(run)
        except Exception:  # likewise: a size is written down in it, for instance
            return True
    return not all(map(_alike, zeros, removed))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_APART, atol=_APART * size, equal_nan=True)


def _wrong(group: UnitGroup) -> ConfigurationError:
    return ConfigurationError(
        "A model without its withheld units computes something else than with zeros there, so that "
        "clients would train another model than the owner's",
        expected="the same output",
        found=f"another one without units of group {group.name!r}",
        where=group.slices[0].tensor,
        fix="Train with zeros in their place, at more time and memory: FedQSN(shrink=False), or "
        "shrink = false in [scheme].",
    )
