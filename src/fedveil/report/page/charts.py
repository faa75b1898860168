"""The pictures of a report, lines over rounds and over coalitions, in the units of the drawing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.ticker import MaxNLocator

from fedveil.report.curves import Line
from fedveil.report.words import human_bytes

__all__ = ["Chart", "chart"]

_LAST: Mapping[str, Callable[[float], str]] = {
    "bytes": human_bytes,
    "percent": "{:.1f} %".format,
    "nats": "{:.3f} nats".format,
    "": "{:.3g}".format,
}
"""How a legend writes values."""

Tick = tuple[float, str]
"""Where a line of the grid is, and what is written at its end."""


@dataclass(frozen=True)
class Box:
    """A drawing and, in it, what the axes enclose. A phone shows letters of 10 at full size."""

    left: float
    width: float = 331.2
    height: float = 230.4
    right: float = 328
    top: float = 3
    bottom: float = 196

    @property
    def middle(self) -> float:
        """Half-way between left and right."""
        return (self.left + self.right) / 2

    @property
    def centre(self) -> float:
        """Half-way between top and bottom."""
        return (self.top + self.bottom) / 2


@dataclass(frozen=True)
class DrawnLine:
    """A line where it is drawn.

    Attributes:
        name: In the legend.
        look: Which of the template's looks it has.
        points: From left to right.
        last: Its last value, as it is written.
        is_level: Whether its one value holds everywhere.
    """

    name: str
    look: str
    points: Sequence[tuple[float, float]]
    last: str
    is_level: bool

    @property
    def layer(self) -> int:
        """Those of a higher one are drawn over the others: attackers over models over levels."""
        return 0 if self.is_level else 2 if self.look.startswith("attack") else 1


@dataclass(frozen=True)
class Chart:
    """A picture, ready for its template.

    Attributes:
        name: One word, unlike those of the page's other pictures, for its ids.
        y: What runs upwards, with its unit, line by line.
        box: Its measures.
        x_ticks: Along the lower edge.
        y_ticks: Along the left edge.
        lines: What is drawn, in the order of the legend.
    """

    name: str
    y: Sequence[str]
    box: Box
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[DrawnLine]

    @property
    def has_attackers(self) -> bool:
        """Whether any line is of an attacker."""
        return any(line.look.startswith("attack") for line in self.lines)


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high`, which lie from `start` to `end` of the drawing."""

    low: float
    high: float
    ticks: Sequence[float]
    start: float = 0.0
    end: float = 0.0

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def chart(
    name: str, y: str, lines: Sequence[Line], form: str = "", *, from_zero: bool = False
) -> Chart | None:
    """A picture of lines; None if there are none.

    Args:
        name: One word, for its ids.
        y: What runs upwards, with its unit.
        lines: What to draw.
        form: How values are written: "percent", "nats", "bytes" or "" for a plain number.
        from_zero: Whether y begins at 0.
    """
    if not lines:
        return None
    labels = y.split("\n")
    across, upwards = _across(lines), _upwards(lines, from_zero=from_zero)
    written = _written(upwards.ticks, form)
    widest = max(map(len, written), default=0)
    box = Box(left=round(12 + 12 * len(labels) + 6.2 * widest, 1))
    across = replace(across, start=box.left, end=box.right)
    upwards = replace(upwards, start=box.bottom, end=box.top)
    return Chart(
        name,
        labels,
        box,
        [(across.place(value), f"{value:.0f}") for value in across.ticks],
        list(zip(map(upwards.place, upwards.ticks), written, strict=True)),
        list(_drawn(lines, across, upwards, form)),
    )


def _written(ticks: Sequence[float], form: str) -> list[str]:
    """What stands at ticks: all plain numbers with as many decimals as one of them needs."""
    if form == "bytes":
        return list(map(human_bytes, ticks))
    plain = [f"{value:g}" for value in ticks]
    if any("e" in text for text in plain):  # very small, or very large
        return plain
    decimals = max((len(text.partition(".")[2]) for text in plain), default=0)
    return [f"{value:.{decimals}f}" for value in ticks]


def _across(lines: Sequence[Line]) -> _Axis:
    places = sorted({x for line in lines if not line.is_level for x, _ in line.points})
    if len(places) <= 1:  # a single round or size: as wide as several, and its number once
        at = places[0] if places else 1
        return _Axis(at - 1, at + 1, [at])
    return _axis(*_with_margin(places[0], places[-1]), MaxNLocator(nbins=7, integer=True))


def _upwards(lines: Sequence[Line], *, from_zero: bool) -> _Axis:
    values = [y for line in lines for _, y in line.points]
    low, high = _with_margin(min(values), max(values))
    if from_zero:
        low, high = 0, 1.08 * max(*values, 0) or 1
    return _axis(low, high, MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10]))


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """A little more than what there is to see; not nothing where there is a single value."""
    most = max(abs(low), abs(high))
    if high - low <= 1e-12 * most:
        low, high = low - 0.05 * (most or 1), high + 0.05 * (most or 1)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _axis(low: float, high: float, locator: MaxNLocator) -> _Axis:
    ticks = map(float, locator.tick_values(low, high))
    return _Axis(low, high, [value for value in ticks if low <= value <= high])


def _drawn(lines: Sequence[Line], across: _Axis, upwards: _Axis, form: str) -> Iterator[DrawnLine]:
    numbers = itertools.count(1)
    for line in lines:
        look = f"attack-{next(numbers)}" if line.look == "attack" else line.look
        points = [(across.place(x), upwards.place(y)) for x, y in line.points]
        yield DrawnLine(line.name, look, points, _LAST[form](line.points[-1][1]), line.is_level)
