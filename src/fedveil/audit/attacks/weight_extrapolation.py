"""Weight extrapolation: the next model, guessed from the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.registry import MESSAGES, register_attack
from fedveil.audit.evidence import Evidence, Kept

__all__ = ["extrapolate", "weight_extrapolation"]


@register_attack(
    "weight extrapolation",
    title="next model, guessed from the last two",
    does="guesses the next model from what each weight last changed by",
    source="Kamarthi and Pittner 1999, doi 10.1016/S0893-6080(99)00072-6",
    begins=MESSAGES,
)
def weight_extrapolation(coalition: Coalition) -> Iterator[Stolen]:
    """The model of :func:`extrapolate`, with its holes filled."""
    yield from coalition.completed(extrapolate(coalition.evidence, coalition.sent))


def extrapolate(evidence: Evidence, proxies: Sequence[Kept], step: float = 1.0) -> PartialModel:
    """Each weight, moved on by what it last changed.

    Clients are shown the model as it was before the last round; who can guess the last step has
    what the owner keeps. Where a weight was shown only once, that is what is taken.

    Knows: the messages.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
        step: How much of the last change to add.
    """
    guess = PartialModel.empty(evidence.manifest)
    before: dict[str, Tensor] = {name: value.clone() for name, value in guess.values.items()}
    rounds = {name: torch.zeros(known.shape, dtype=torch.int32) for name, known in
              guess.known.items()}  # fmt: skip
    spans = {name: torch.zeros_like(number) for name, number in rounds.items()}
    for kept in proxies:
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value, seen = guess.values[name], proxy.shows(name)
            newer = seen & (rounds[name] < proxy.round)
            moved = newer & guess.known[name]
            before[name] = torch.where(moved, value, before[name])
            spans[name] = torch.where(moved, proxy.round - rounds[name], spans[name])
            shown = proxy.whole(name).to(value.dtype)
            guess.values[name] = torch.where(newer, shown, value)
            rounds[name][newer] = proxy.round
            guess.known[name] |= seen
    for name, value in guess.values.items():
        if value.is_floating_point():
            twice = spans[name] > 0
            change = (value - before[name]) / spans[name].clamp(min=1)
            guess.values[name] = torch.where(twice, value + step * change, value)
    return guess
