"""Imputation: what stands where nothing was released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.run.manifest import Manifest

__all__ = ["PUBLIC_VALUES", "ZEROS", "impute"]

ZEROS: Final = "zeros"
PUBLIC_VALUES: Final = "public"


def impute(
    known: PartialModel, manifest: Manifest, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A whole model of a part: holes are filled.

    With a public model, as Zhang et al. (arXiv 2310.07152) fill what a trusted processor shields.
    If the owner began with it, what was withheld is nearly all in it: training changes little of a
    weight.

    Knows: besides the part, a model of the same architecture that anybody can get.

    Args:
        known: What was collected.
        manifest: Of the run.
        values: What stands in the holes, by tensor; zeros without it.

    Returns:
        A state dict in the dtypes of the owner's model, each tied tensor once.
    """
    state = {}
    for name, info in manifest.tensors.items():
        value = known.values[name]
        if values is not None:
            value = torch.where(known.known[name], value, values[name].to(value.dtype))
        state[name] = value.to(getattr(torch, info.dtype))
    return state
