"""Ratios that survive a busy machine: an operation and its floor are timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

__all__ = ["Pairs", "alternate", "clock"]


@dataclass
class Pairs:
    """Times of an operation and of its floor, in seconds; entries of one index were taken together.

    What slows the machine for longer than one pair slows both, so the ratio of a pair does not
    change; what slows it for less is an outlier, which the median leaves aside.
    """

    operation: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Operation over floor, pair by pair."""
        return [one / other for one, other in zip(self.operation, self.floor, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the ratios: half of all pairs lie between."""
        return spread(self.ratios)

    def __add__(self, other: Pairs) -> Pairs:
        """Both operations done one after the other, against both floors."""
        return Pairs(
            [sum(pair) for pair in zip(self.operation, other.operation, strict=True)],
            [sum(pair) for pair in zip(self.floor, other.floor, strict=True)],
        )


def alternate(
    operation: Callable[[], object],
    floor: Callable[[], object],
    repeats: int,
    *,
    warm: bool = True,
) -> Pairs:
    """Time both `repeats` times, in turn; which goes first changes from pair to pair.

    Args:
        operation: what is measured.
        floor: what no way of doing it can beat.
        repeats: pairs.
        warm: call both once before, untimed: code is compiled and memory paged in.
    """
    pairs = Pairs()
    if warm:
        operation(), floor()
    with _no_collection():
        for number in range(repeats):
            if number % 2:
                pairs.floor.append(clock(floor))
                pairs.operation.append(clock(operation))
            else:
                pairs.operation.append(clock(operation))
                pairs.floor.append(clock(floor))
    return pairs


def clock(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


@contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage collector takes half a second where many libraries are loaded: not meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
