"""How surely a mask fits a file better than chance: a bound that holds for any number of units.

A client mask is a simple random sample of a group's units, drawn by a keyed stream that whoever
made the file did not know. If the file does not come from this mask's proxy, then which of the
units are in the mask has nothing to do with how much of each is in the file: the sum of these
amounts over the mask is that of a sample drawn without replacement. Its tail is bounded with
Chernoff's inequality, where the moment generating function is that of a sample drawn WITH
replacement, which is never smaller (Hoeffding 1963, theorem 4). Nothing is approximate: ties,
groups of few units and unequal groups cost power, not validity. Masks drawn with
``draw="bernoulli"`` are such samples too, given how many units each holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SURE", "Chance"]

Floats = NDArray[np.float64]

SURE = -77.0
"""Least log10 of a p-value: whoever guesses the 256-bit secret knows all masks."""

_TILTS = np.geomspace(0.02, 200.0, 80)  # of the bound, in standard deviations


class Chance:
    """Tests masks against the amounts of units that a file holds.

    Args:
        amounts: Per unit, float [units].
        strata: Which units may be exchanged for each other under chance, int [units], 0 or more:
            those of one unit group, as its masks draw from them.
    """

    def __init__(self, amounts: Floats, strata: NDArray[np.int_]) -> None:
        self._order = np.argsort(strata, kind="stable")
        ordered = strata[self._order]
        self._starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        self._size = np.diff(self._starts, append=len(ordered))
        values = amounts[self._order]
        self._centred = values - np.repeat(self._sum(values) / self._size, self._size)
        spread = float(np.sqrt(np.mean(self._centred**2))) if len(values) else 0.0
        # Below this, differences are rounding.
        self._flat = not spread > 1e-6
        self._tilts = _TILTS / (1.0 if self._flat else spread)
        self._up = self._cumulants(self._tilts)
        self._down = self._cumulants(-self._tilts)

    def test(self, masks: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
        """Compare what masks release with what they withhold.

        Args:
            masks: bool [masks, units].

        Returns:
            shares: Mean amount of released minus that of withheld units, over all strata.
            contrasts: The same in standard deviations within both.
            log10_p: Upper bound of the probability that a random mask fits as well, at most 0; it
                may go below `SURE`, which is for whoever reports it to mind.
        """
        held = masks[:, self._order].astype(float)
        released = self._sum(held)
        withheld = self._size - released
        pairs = (released * withheld / self._size).sum(1)
        excess = held @ self._centred
        shares = np.divide(excess, pairs, out=np.zeros_like(excess), where=pairs > 0)
        if self._flat:
            return shares, np.zeros_like(shares), np.zeros_like(shares)
        variance = (np.sum(self._centred**2) - shares * excess) / len(self._centred)
        # Where both are all alike, what is left is rounding.
        contrasts = shares / np.sqrt(np.maximum(variance, 1e-12))
        # Either the released or the withheld units are the sample: the smaller one binds better.
        few = released <= withheld
        log_mgf = np.where(few, released, 0) @ self._up + np.where(few, 0, withheld) @ self._down
        bounds = log_mgf - excess[:, None] * self._tilts
        return shares, contrasts, np.minimum(bounds.min(1) / np.log(10), 0.0)

    def _cumulants(self, tilts: Floats) -> Floats:
        """Log of the mean of exp(tilt * amount) within each stratum: [strata, tilts]."""
        exponents = np.outer(tilts, self._centred)
        top = np.maximum.reduceat(exponents, self._starts, axis=1)
        powers = np.exp(exponents - np.repeat(top, self._size, axis=1))
        means: Floats = top + np.log(self._sum(powers) / self._size)
        return means.T

    def _sum(self, values: Floats) -> Floats:
        """Sums over the units of each stratum: [..., units] to [..., strata]."""
        sums: Floats = np.add.reduceat(values, self._starts, axis=-1)
        return sums
