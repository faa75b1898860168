"""Extrapolation: the next model, guessed from the last ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedveil.audit.attacks.loot import Loot
from fedveil.audit.evidence import Evidence, Kept

__all__ = ["extrapolate"]


def extrapolate(evidence: Evidence, proxies: Sequence[Kept], step: float = 1.0) -> Loot:
    """Each weight, moved on by what it last changed.

    Clients are shown the model as it was before the last round; who can guess the last step has
    what the owner keeps. Where a weight was shown only once, that is what is taken.

    Knows: the messages.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
        step: How much of the last change to add.
    """
    loot = Loot.empty(evidence.manifest)
    before: dict[str, Tensor] = {name: value.clone() for name, value in loot.values.items()}
    rounds = {name: torch.zeros(known.shape, dtype=torch.int32) for name, known in
              loot.known.items()}  # fmt: skip
    spans = {name: torch.zeros_like(number) for name, number in rounds.items()}
    for kept in proxies:
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value, seen = loot.values[name], proxy.shows(name)
            newer = seen & (rounds[name] < proxy.round)
            moved = newer & loot.known[name]
            before[name] = torch.where(moved, value, before[name])
            spans[name] = torch.where(moved, proxy.round - rounds[name], spans[name])
            shown = proxy.whole(name).to(value.dtype)
            loot.values[name] = torch.where(newer, shown, value)
            rounds[name][newer] = proxy.round
            loot.known[name] |= seen
    for name, value in loot.values.items():
        if value.is_floating_point():
            twice = spans[name] > 0
            change = (value - before[name]) / spans[name].clamp(min=1)
            loot.values[name] = torch.where(twice, value + step * change, value)
    return loot
