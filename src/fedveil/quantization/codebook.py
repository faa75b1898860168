"""The NormalFloat levels: 2^bits numbers in [-1, 1], dense where normally distributed weights are.

Source: QLoRA (Dettmers et al., arXiv 2305.14314), whose NF4 is `NormalFloat(4)` to the last bit;
FedLPP (arXiv 2406.10976) uses the same rule at 2, 3 and 4 bits. FedQSN's released code has
2^bits + 1 symmetric levels instead, which do not fit into `bits` bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fedveil.errors import ConfigurationError

__all__ = ["BITS", "NormalFloat"]

BITS: Final = (2, 3, 4, 8)
"""The code widths there are, in bits."""

_OUTERMOST_QUANTILE: Final = 0.9677083
"""Probability whose normal quantile becomes the level 1: QLoRA's choice, used for all widths."""


@dataclass(frozen=True)
class NormalFloat:
    """The code book of `bits`-bit NormalFloat.

    Example:
        >>> [round(level, 4) for level in NormalFloat(3).levels.tolist()]
        [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0]

    Raises:
        ConfigurationError: `bits` is not one of 2, 3, 4, 8.
    """

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigurationError(
                "there is no such code width",
                expected="2, 3, 4 or 8 bits",
                found=f"{self.bits!r}",
                where="bits",
            )

    @property
    def levels(self) -> Tensor:
        """Float32 [2^bits], ascending, with -1, 0 and 1 among them; a level's place is its code."""
        return _levels(self.bits).clone()

    @property
    def thresholds(self) -> Tensor:
        """Float32 [2^bits - 1]: midpoints of neighbours; a value on one takes the lower level."""
        levels = _levels(self.bits)
        return (levels[:-1] + levels[1:]) / 2

    @property
    def half_gap(self) -> float:
        """Largest error of a value in [-1, 1]: half the widest gap between neighbouring levels."""
        return float(_levels(self.bits).diff().max()) / 2


@cache
def _levels(bits: int) -> Tensor:
    positive = 2 ** (bits - 1)
    quantiles = torch.cat(
        [
            -_normal_quantiles(positive - 1),
            torch.zeros(1),
            _normal_quantiles(positive),
        ]
    )
    levels = quantiles.sort().values
    return levels / levels.max()


def _normal_quantiles(count: int) -> Tensor:
    """Float32 [count]: normal quantiles of evenly spaced probabilities, the outermost one first."""
    probabilities = _evenly_spaced(_OUTERMOST_QUANTILE, 0.5, count + 1)[:-1]
    quantiles: Tensor = torch.special.ndtri(torch.from_numpy(probabilities).double())
    return quantiles.float()


def _evenly_spaced(start: float, end: float, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 [count] from `start` to `end`, every step rounded to float32.

    QLoRA's constants carry exactly this rounding. It is written out, because library versions fuse
    the multiplication and the addition on some processors: the levels must be the same bits
    everywhere, or a server and a client would disagree about the proxy.
    """
    first, last = np.float32(start), np.float32(end)
    index = np.arange(count, dtype=np.float32)
    step = (last - first) / np.float32(count - 1)
    from_start = first + step * index
    from_end = last - step * (np.float32(count - 1) - index)
    return np.where(index < count // 2, from_start, from_end)
