"""How much of the model each client had been shown after each round, as cells of a table."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedveil.run import ClientExposure

__all__ = ["HeatMap", "MostShown", "heat_map", "most_shown", "shade"]

_MOST_CLIENTS = 100
_MOST_COLUMNS = 100
_ROOMY = 16
"""Up to so many columns have room for a number in each cell."""


@dataclass(frozen=True)
class Row:
    """One client: its cells, each with a percentage (None: nothing sent yet) and a width."""

    client: str
    cells: Sequence[tuple[int | None, int]]
    share: float


@dataclass(frozen=True)
class HeatMap:
    """Clients from top to bottom, rounds from left to right, the cumulative share in each cell.

    Attributes:
        rows: Neighbours with the same share are one cell.
        columns: Rounds. Of very many some are shown; none if only the end is known.
        left_out: How many clients are not shown: of very many those who were shown least.
    """

    rows: Sequence[Row]
    columns: Sequence[int]
    left_out: int

    @property
    def is_dense(self) -> bool:
        """Whether cells are too narrow for numbers."""
        return len(self.columns) > _ROOMY

    @property
    def is_thinned(self) -> bool:
        """Whether rounds are missing."""
        return self.columns != list(range(1, len(self.columns) + 1))


@dataclass(frozen=True)
class MostShown:
    """The client who was shown most, and since which round; None if that is not known."""

    client: str
    share: float
    since: int | None


def heat_map(exposure: Mapping[str, ClientExposure], rounds: int) -> HeatMap:
    """What was shown over rounds.

    Args:
        exposure: By client.
        rounds: How many rounds there were.
    """
    most = sorted(sorted(exposure), key=lambda name: -exposure[name].share)[:_MOST_CLIENTS]
    columns = _columns(max([rounds, *(r for one in exposure.values() for r in one.after)]))
    rows = [
        Row(name, list(_cells(exposure[name], columns)), exposure[name].share)
        for name in sorted(most)
    ]
    return HeatMap(rows, columns, len(exposure) - len(rows))


def most_shown(exposure: Mapping[str, ClientExposure]) -> MostShown:
    """Who was shown most, of several the first."""
    name = max(sorted(exposure), key=lambda name: exposure[name].share)
    after = exposure[name].after
    all_of_it = _percent(max(after.values(), default=0))
    since = min((r for r, share in after.items() if _percent(share) == all_of_it), default=None)
    return MostShown(name, exposure[name].share, since)


def shade(share: float) -> str:
    """The style sheet's class for a share: "k0" for nothing, "k10" for the whole model."""
    return f"k{min(max(round(10 * share), 0), 10)}"


def _columns(last: int) -> list[int]:
    if last == 0:  # the course is not known, only the end
        return []
    step = math.ceil(last / _MOST_COLUMNS)
    # The last round is always there, since it says what clients hold in the end.
    return sorted({*range(step, last + 1, step), last})


def _cells(one: ClientExposure, columns: Sequence[int]) -> Iterator[tuple[int | None, int]]:
    for percent, same in itertools.groupby(_course(one, columns)):
        yield percent, len(list(same))


def _course(one: ClientExposure, columns: Sequence[int]) -> Iterator[int | None]:
    """What had been shown by each column."""
    rounds, reached = deque(sorted(one.after)), None
    for number in columns:
        while rounds and rounds[0] <= number:
            reached = _percent(one.after[rounds.popleft()])
        yield reached


def _percent(share: float) -> int:
    return round(100 * share)
