"""Averages and intersections: whether many coarse views of a weight make a fine one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedveil.audit.attacks.loot import Loot
from fedveil.audit.evidence import Evidence, Kept
from fedveil.run.shown import Proxy

__all__ = ["average", "intersect"]

_NARROWER = 0.9
"""An interval is taken for narrowed below this share of its width."""


def average(evidence: Evidence, proxies: Iterable[Kept]) -> Loot:
    """The mean of all values that were shown of a weight.

    Knows: the messages. It undoes rounding that is random or that depends on what else was
    released; against deterministic rounding along units it gains nothing, and loses what the model
    learned meanwhile.

    Args:
        evidence: The run.
        proxies: What the coalition was sent.
    """
    loot = Loot.empty(evidence.manifest)
    counts = {name: torch.zeros(value.shape) for name, value in loot.values.items()}
    for kept in proxies:
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value = loot.values[name]
            if value.is_floating_point():
                value += proxy.whole(name).nan_to_num_(0.0)
            else:  # of counters the newest
                proxy.selection.scatter(name, proxy.part(name), value)
            counts[name] += proxy.shows(name)
    for name, value in loot.values.items():
        loot.known[name] = counts[name] > 0
        if value.is_floating_point():
            value /= counts[name].clamp(min=1)
    return loot


def intersect(evidence: Evidence, proxies: Sequence[Kept]) -> Loot:
    """The middle of what all views of a weight leave possible, where that is less than one does.

    A quantized value says in which interval the weight was. Going back from the newest view,
    intervals are intersected for as long as something is left: then the weight has changed.

    Knows: the messages and the codebook. Against deterministic rounding of an unchanged weight all
    intervals are the same, and it gains nothing.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
    """
    loot = Loot.empty(evidence.manifest)
    bounds: dict[str, tuple[Tensor, Tensor]] = {}
    widths: dict[str, Tensor] = {}
    settled = {name: torch.zeros_like(known) for name, known in loot.known.items()}
    for kept in reversed(proxies):
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            value, seen = loot.values[name], proxy.shows(name)
            newest = seen & ~loot.known[name]
            value[newest] = proxy.whole(name)[newest].to(value.dtype)
            loot.known[name] |= seen
            interval = proxy.interval(name)
            if interval is not None:
                _narrow(bounds, settled[name], name, proxy, interval, seen)
                low, high = bounds[name]
                width = widths.setdefault(name, torch.zeros_like(low))
                width[newest] = (high - low)[newest]
    for name, (low, high) in bounds.items():
        narrowed = high - low < _NARROWER * widths[name]
        loot.values[name] = torch.where(narrowed, (low + high) / 2, loot.values[name])
    return loot


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
