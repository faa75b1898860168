"""How likely it is that masks hide a fault: then a check that finds nothing says nothing."""

from __future__ import annotations

from statistics import NormalDist

__all__ = ["chance_to_miss"]


def chance_to_miss(size: int, rate: float, masks: int, most: int, *, exact: bool) -> float:
    """How likely client masks alone, drawn from all units, show no more than so many of them.

    That is how likely nobody sees that there is no server mask. The number of units that all masks
    withhold is taken to be normal, with its own mean and variance; of a single exact mask it is
    certain.

    Args:
        size: Units of the group.
        rate: Share that each client mask withholds.
        masks: Different client masks that were seen.
        most: Units that may be shown with the server mask.
        exact: Whether each mask withholds ``round(rate * size)`` units, or each unit by a throw.
    """
    mean, variance = _withheld_by_all(size, rate, masks, exact)
    hidden = size - most
    if variance <= 0:
        return float(mean >= hidden)
    return 1 - NormalDist(mean, variance**0.5).cdf(hidden - 0.5)


def _withheld_by_all(size: int, rate: float, masks: int, exact: bool) -> tuple[float, float]:
    """Mean and variance of the number of units that every one of the masks withholds."""
    if not exact:
        share = rate**masks
        return size * share, size * share * (1 - share)
    count = min(round(rate * size), size - 1)
    mean = size * (count / size) ** masks
    # Of pairs: both are withheld by one mask with count / size * (count - 1) / (size - 1).
    pair = count / size * (count - 1) / (size - 1) if size > 1 else 0.0
    pairs = size * (size - 1) * max(pair, 0.0) ** masks
    return mean, max(pairs + mean - mean**2, 0.0) if masks > 1 else 0.0
