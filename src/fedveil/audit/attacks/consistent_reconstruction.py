"""Consistent reconstruction: a value that agrees with all views of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.registry import MESSAGES, register_attack
from fedveil.audit.evidence import Evidence, Kept
from fedveil.run.shown import Proxy

__all__ = ["consistent_reconstruction", "reconstruct"]

_NARROWER = 0.9
"""An interval is taken for narrowed below this share of its width."""


@register_attack(
    "consistent reconstruction",
    title="values that agree with all codes that were sent",
    does="finds where the intervals of all codes of a weight overlap, and takes the middle of that",
    source="Goyal, Vetterli and Thao 1998, doi 10.1109/18.650985",
    begins=MESSAGES,
)
def consistent_reconstruction(coalition: Coalition) -> Iterator[Stolen]:
    """The model of :func:`reconstruct`, with its holes filled."""
    yield from coalition.completed(reconstruct(coalition.evidence, coalition.sent))


def reconstruct(evidence: Evidence, proxies: Sequence[Kept]) -> PartialModel:
    """The middle of what all views of a weight leave possible, where that is less than one does.

    A quantized value says in which interval the weight was. Going back from the newest view,
    intervals are intersected for as long as something is left: then the weight has changed.

    Knows: the messages and the codebook. Against deterministic rounding of an unchanged weight all
    intervals are the same, and it gains nothing.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
    """
    found = PartialModel.empty(evidence.manifest)
    bounds: dict[str, tuple[Tensor, Tensor]] = {}
    widths: dict[str, Tensor] = {}
    settled = {name: torch.zeros_like(known) for name, known in found.known.items()}
    for kept in reversed(proxies):
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value, seen = found.values[name], proxy.shows(name)
            newest = seen & ~found.known[name]
            value[newest] = proxy.whole(name)[newest].to(value.dtype)
            found.known[name] |= seen
            interval = proxy.interval(name)
            if interval is not None:
                _narrow(bounds, settled[name], name, proxy, interval, seen)
                low, high = bounds[name]
                width = widths.setdefault(name, torch.zeros_like(low))
                width[newest] = (high - low)[newest]
    for name, (low, high) in bounds.items():
        narrowed = high - low < _NARROWER * widths[name]
        found.values[name] = torch.where(narrowed, (low + high) / 2, found.values[name])
    return found


def _narrow(
    bounds: dict[str, tuple[Tensor, Tensor]],
    settled: Tensor,
    name: str,
    proxy: Proxy,
    interval: tuple[Tensor, Tensor],
    seen: Tensor,
) -> None:
    """Intersect what is known of a tensor with one more view, where they still agree."""
    if name not in bounds:
        bounds[name] = torch.full(seen.shape, -torch.inf), torch.full(seen.shape, torch.inf)
    low, high = bounds[name]
    lowest, highest = (proxy.spread(name, side) for side in interval)
    # Where nothing was seen both are NaN, and agree with nothing.
    both = torch.maximum(low, lowest), torch.minimum(high, highest)
    agree = seen & ~settled & (both[0] <= both[1])
    settled |= seen & ~agree  # it was another value then: what is older says nothing
    low[agree], high[agree] = both[0][agree], both[1][agree]
