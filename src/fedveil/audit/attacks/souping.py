"""Souping: a point between two models, of which one was trained from the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["SHARES", "between"]

SHARES = (0.25, 0.5, 0.75)
"""How much of what training changed is kept, where it is tried."""


def between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """``start + share * (end - start)``: of the stolen model before and after it was trained on.

    Training on an attacker's skewed data forgets what the stolen model knows of all else; on the
    way back much of both is kept (WiSE-FT, Wortsman et al., 2109.01903). Beyond 1 it goes on.

    Knows: both models.

    Args:
        start: A model.
        end: What became of it, with the same tensors.
        share: 0 is the start, 1 the end.

    Returns:
        The tensors of ``end``, in its dtypes; what is no weight is the end's.
    """
    state = {}
    for name, value in end.items():
        if value.is_floating_point():
            begun = start[name].float()
            value = (begun + share * (value.float() - begun)).to(value.dtype)
        state[name] = value
    return state
