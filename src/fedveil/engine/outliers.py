"""Clients that begin or end far from the others: a sign of other data, or of other settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fedveil.engine.bounds import lower_median

__all__ = ["far_from_others"]

_FEWEST = 3
"""Of two nobody can say which is the odd one."""
_TIMES, _NATS = 3.0, 1.0
"""A loss is far from the others' median that is so many times it, and so many nats above it."""
_SHORT = 0.1
"""An update is far from the others that has less than this share of their median length. Those that
are long are bounded, and named for it."""


def far_from_others(
    first: Mapping[str, float], last: Mapping[str, float], lengths: Mapping[str, float]
) -> dict[str, str]:
    """Why clients of a round stand out, by name; it changes nothing of what they count for.

    Args:
        first: Each client's loss before any step, in nats, as it says.
        last: The same of its last batch.
        lengths: Each client's update, in medians of the round.
    """
    if len(lengths) < _FEWEST:
        return {}
    found = {
        client: "; ".join(_reasons(client, first, last, length))
        for client, length in lengths.items()
    }
    return {client: why for client, why in found.items() if why}


def _reasons(
    client: str, first: Mapping[str, float], last: Mapping[str, float], length: float
) -> Iterator[str]:
    for word, losses in (("begins", first), ("ends", last)):
        if client not in losses:
            continue
        others = [loss for name, loss in losses.items() if name != client and math.isfinite(loss)]
        median, own = lower_median(others), losses[client]
        if not math.isfinite(own) or (own > _TIMES * median and own > median + _NATS):
            yield f"it {word} at a loss of {own:.3g} nats, where others have {median:.3g}"
    if 0 < length < _SHORT:
        yield f"its update has {length:.2g} times the median length"
