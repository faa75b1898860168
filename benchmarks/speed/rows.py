"""`Row`: one figure, with all that is needed to judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from speed.timing import Pairs, spread

__all__ = ["FEDVEIL", "Row", "measured", "plain", "skipped"]

FEDVEIL = "fedveil"

Case = Mapping[str, str | int]


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        name: which benchmark and what of it, as "kernels/quantize".
        case: on what: model, bits, storage, ...
        who: "fedveil", or the competitor that was measured.
        unit: what `value` counts: "x" for a ratio to the floor, "%", "bits", "s", ...
        floor: what the ratio is to.
        value: the figure, a median if it was timed; None if there is none.
        low, high: quartiles of the timed samples.
        samples: how many there were.
        seconds: median time of the operation, where one was timed.
        floor_seconds: median time of the floor.
        budget: what `value` should not exceed, or None.
        reason: why there is no value, or what to know about it.
    """

    name: str
    case: dict[str, str | int] = field(default_factory=dict)
    who: str = FEDVEIL
    unit: str = "x"
    floor: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    seconds: float | None = None
    floor_seconds: float | None = None
    budget: float | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is within the budget; None if there is no value or no budget."""
        if self.value is None or self.budget is None:
            return None
        return self.value <= self.budget

    def matches(self, name: str, **case: str | int) -> bool:
        """Whether this is a row of that name whose case agrees."""
        return self.name == name and all(self.case.get(key) == v for key, v in case.items())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The row that `to_json` wrote."""
        return cls(**values)


def measured(name: str, case: Case, pairs: Pairs, floor: str, **more: Any) -> Row:
    """A row of timed pairs."""
    low, high = pairs.quartiles
    return Row(
        name,
        dict(case),
        floor=floor,
        value=pairs.ratio,
        low=low,
        high=high,
        samples=len(pairs.ratios),
        seconds=median(pairs.operation),
        floor_seconds=median(pairs.floor),
        **more,
    )


def plain(name: str, case: Case, value: float, unit: str, **more: Any) -> Row:
    """A row of something counted."""
    return Row(name, dict(case), value=value, unit=unit, **more)


def timed(name: str, case: Case, seconds: list[float], **more: Any) -> Row:
    """A row of times that have no floor."""
    low, high = spread(seconds)
    middle = median(seconds)
    return Row(
        name, dict(case), value=middle, low=low, high=high, unit="s", samples=len(seconds),
        seconds=middle, **more,
    )  # fmt: skip


def skipped(name: str, case: Case, reason: str, **more: Any) -> Row:
    """A row that could not be measured, and why."""
    return Row(name, dict(case), reason=reason, **more)
