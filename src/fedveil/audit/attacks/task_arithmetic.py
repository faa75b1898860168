"""Task arithmetic: what a release differs in from the public model, made larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.registry import MODEL, register_attack
from fedveil.audit.attacks.weight_interpolation import interpolate

__all__ = ["FACTORS", "scale_task_vector", "task_arithmetic"]

FACTORS = (2.0, 4.0, 10.0)
"""What is tried: a release that went a tenth of the way to the owner's model is undone by 10."""


@register_attack(
    "task arithmetic",
    title="further on from the public model",
    does="goes on from the public model in the direction of the stolen one, 2, 4 and 10 times as "
    "far: the owner's model, if a part of the way to it was released",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    begins=MODEL,
)
def task_arithmetic(coalition: Coalition) -> Iterator[Stolen]:
    """The stolen model's task vector, scaled by `FACTORS`; nothing without a public model."""
    if (public := coalition.stage.public) is None:
        return
    for factor in FACTORS:
        yield Stolen(scale_task_vector(public, coalition.start, factor))


def scale_task_vector(
    public: Mapping[str, Tensor], stolen: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """``public + factor * (stolen - public)``: the owner's model, if part of the way was released.

    Whoever releases a model between the public one and its own has released its own: the direction
    is all there is to know, and a few factors are soon tried. What quantizing did grows as well.

    Knows: the stolen model, and what anybody can get.

    Args:
        public: What the owner began with.
        stolen: What was made of released bytes, whole.
        factor: 1 is the stolen model, 0 the public one.

    Returns:
        The tensors of ``stolen``, in its dtypes.
    """
    return interpolate(public, stolen, factor)
