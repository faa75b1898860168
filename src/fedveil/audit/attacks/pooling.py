"""Pooling: what one client was sent over the rounds, or a coalition, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.registry import MESSAGES, register_attack
from fedveil.audit.evidence import Evidence, Kept

__all__ = ["pool", "pooling"]


@register_attack(
    "pooling",
    title="pooling of all that was sent, newest first",
    does="takes the newest value of every unit that was ever sent",
    source="our name; collusion: Boneh and Shaw 1998, doi 10.1109/18.705568",
    begins=MESSAGES,
    quick=True,
)
def pooling(coalition: Coalition) -> Iterator[Stolen]:
    """The model of :func:`pool`, with its holes filled."""
    yield from coalition.completed(pool(coalition.evidence, coalition.sent))


def pool(evidence: Evidence, proxies: Iterable[Kept]) -> PartialModel:
    """Keep the newest value that was ever shown of every weight.

    Knows: the messages, nothing else. Against masks that are drawn anew in each round a client
    misses a unit after T rounds with probability p2^T only; against masks that stay it gains
    nothing over rounds, and a coalition gains what its masks differ in.

    Args:
        evidence: The run.
        proxies: What the coalition was sent, oldest first.
    """
    pooled = PartialModel.empty(evidence.manifest)
    for kept in proxies:
        pooled.take(evidence.open(kept))
    return pooled
