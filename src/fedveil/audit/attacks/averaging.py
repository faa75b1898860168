"""Averaging: whether many coarse views of a weight make a fine one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.registry import MESSAGES, register_attack
from fedveil.audit.evidence import Evidence, Kept

__all__ = ["average", "averaging"]


@register_attack(
    "averaging",
    title="mean of all that was sent",
    does="takes the mean of all values of a weight, which undoes rounding that is random",
    source="averaging collusion: Cox et al. 1997, doi 10.1109/83.650120",
    begins=MESSAGES,
)
def averaging(coalition: Coalition) -> Iterator[Stolen]:
    """The model of :func:`average`, with its holes filled."""
    yield from coalition.completed(average(coalition.evidence, coalition.sent))


def average(evidence: Evidence, proxies: Iterable[Kept]) -> PartialModel:
    """The mean of all values that were shown of a weight.

    Knows: the messages. It undoes rounding that is random or that depends on what else was
    released; against deterministic rounding along units it gains nothing, and loses what the model
    learned meanwhile.

    Args:
        evidence: The run.
        proxies: What the coalition was sent.
    """
    found = PartialModel.empty(evidence.manifest)
    counts = {name: torch.zeros(value.shape) for name, value in found.values.items()}
    for kept in proxies:
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value = found.values[name]
            if value.is_floating_point():
                value += proxy.whole(name).nan_to_num_(0.0)
            else:  # of counters the newest
                proxy.selection.scatter(name, proxy.part(name), value)
            counts[name] += proxy.shows(name)
    for name, value in found.values.items():
        found.known[name] = counts[name] > 0
        if value.is_floating_point():
            value /= counts[name].clamp(min=1)
    return found
