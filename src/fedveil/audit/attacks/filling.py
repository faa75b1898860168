"""Filling holes: what stands where nothing was released."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedveil.audit.attacks.loot import Loot
from fedveil.run.manifest import Manifest

__all__ = ["fill"]


def fill(
    loot: Loot, manifest: Manifest, holes: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A whole model of what is known.

    Knows: besides the loot, a model of the same architecture that anybody can get. If the owner
    began with it, what was withheld is nearly all in it: training changes little of a weight.

    Args:
        loot: What was collected.
        manifest: Of the run.
        holes: What stands in the holes, by tensor; zeros without it.

    Returns:
        A state dict in the dtypes of the owner's model, each tied tensor once.
    """
    state = {}
    for name, info in manifest.tensors.items():
        value = loot.values[name]
        if holes is not None:
            value = torch.where(loot.known[name], value, holes[name].to(value.dtype))
        state[name] = value.to(getattr(torch, info.dtype))
    return state
