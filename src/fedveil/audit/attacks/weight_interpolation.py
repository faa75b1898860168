"""Weight interpolation: a point between two models, of which one was trained from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.fine_tuning import fine_tuned
from fedveil.audit.attacks.registry import MODEL, register_attack

__all__ = ["SHARES", "interpolate", "weight_interpolation"]

SHARES = (0.25, 0.5, 0.75)
"""How much of what training changed is kept, where it is tried."""


@register_attack(
    "weight interpolation",
    title="part of the way to the fine-tuned model",
    does="goes a quarter, half and three quarters of the way from the stolen to the fine-tuned "
    "model, which keeps what fine-tuning on skewed data forgets",
    source="WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903",
    begins=MODEL,
    alone=True,
)
def weight_interpolation(coalition: Coalition) -> Iterator[Stolen]:
    """The points of `SHARES` between the start and what fine-tuning makes of it."""
    end = fine_tuned(coalition).state
    for share in SHARES:
        yield Stolen(interpolate(coalition.start, end, share))


def interpolate(
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
