"""The union of proxies: of one client over the rounds, or of a coalition."""

from __future__ import annotations

from collections.abc import Iterable

from fedveil.audit.attacks.loot import Loot
from fedveil.audit.evidence import Evidence, Kept

__all__ = ["union"]


def union(evidence: Evidence, proxies: Iterable[Kept]) -> Loot:
    """Keep the newest value that was ever shown of every weight.

    Knows: the messages, nothing else. Against masks that are drawn anew in each round a client
    misses a unit after T rounds with probability p2^T only; against masks that stay it gains
    nothing over rounds, and a coalition gains what its masks differ in.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
    """
    loot = Loot.empty(evidence.manifest)
    for kept in proxies:
        loot.take(evidence.open(kept))
    return loot
