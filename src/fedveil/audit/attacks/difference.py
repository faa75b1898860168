"""Amplification: what a release differs in from the public model, made larger."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedveil.audit.attacks.souping import between

__all__ = ["FACTORS", "amplify"]

FACTORS = (2.0, 4.0, 10.0)
"""What is tried: a release that went a tenth of the way to the owner's model is undone by 10."""


def amplify(
    public: Mapping[str, Tensor], stolen: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """``public + factor * (stolen - public)``: the owner's model, if part of the way was released.

    Whoever releases a model between the public one and his own has released his own: the direction
    is all there is to know, and a few factors are soon tried. What quantizing did grows as well.

    Knows: the stolen model, and what anybody can get.

    Args:
        public: What the owner began with.
        stolen: What was made of released bytes, whole.
        factor: 1 is the stolen model, 0 the public one.

    Returns:
        The tensors of ``stolen``, in its dtypes.
    """
    return between(public, stolen, factor)
