"""What models are judged by: which way is better, in which unit, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from fedveil.errors import ConfigurationError
from fedveil.tasks.task import Task

__all__ = ["Metric", "metric_in", "metric_named", "metric_of"]

Measures = Mapping[str, float]
"""What :func:`~fedveil.training.evaluate` returns."""

_T = TypeVar("_T")

_ACCURACY, _LOSS = "accuracy", "loss"
_UNTOLD: Final = 1e6
"""Perplexities above this are all the same: those of a model that is none."""


@dataclass(frozen=True)
class Metric:
    """One measure of a model on the owner's test set.

    Attributes:
        name: Its key in what :func:`~fedveil.training.evaluate` returns, and what it is called.
        unit: Whole, as on an axis: "%"; "" if it has none.
        sign: The unit as it stands behind a number: " %"; "" if it has none.
        digits: Behind the point.
        lower_is_better: Whether less of it is better.
        some: Models that are less than this apart are equally good: of such a difference no share
            can be taken.
    """

    name: str
    unit: str = ""
    sign: str = ""
    digits: int = 3
    lower_is_better: bool = False
    some: float = 0.0

    def of(self, measures: Measures) -> float | None:
        """What a model reaches; None if that was not measured, or is no number."""
        value = measures.get(self.name)
        return value if value is not None and math.isfinite(value) else None

    def lead(self, value: float, other: float) -> float:
        """By how much the first is better than the second, in the metric's unit."""
        return other - value if self.lower_is_better else value - other

    def best(self, candidates: Iterable[_T], measures: Callable[[_T], Measures]) -> _T | None:
        """The candidate that reaches most, of several the first; None if none was measured."""
        reached = [
            (self.lead(value, 0.0), candidate)
            for candidate in candidates
            if (value := self.of(measures(candidate))) is not None
        ]
        return max(reached, key=lambda pair: pair[0], default=(0.0, None))[1]

    def share(self, reached: float, start: float, end: float) -> float | None:
        """How far on the way from ``start`` to ``end``: 0 at the start, 1 at the end.

        None if the end is no better than the start, or too little for the difference to mean
        anything.
        """
        way = self.lead(end, start)
        return self.lead(reached, start) / way if way > 0 and way >= self.some else None

    def figure(self, value: float) -> str:
        """Without its unit, as in a column that has it on top: "88.0", "2.310"."""
        return f"{value:.{self.digits}f}"

    def exact(self, value: float) -> str:
        """The same with one more digit, to tell two of them apart: "88.02"."""
        return f"{value:.{self.digits + 1}f}"

    def text(self, value: float) -> str:
        """With its unit: "88.0 %", "2.310 nats"."""
        return self.figure(value) + self.sign

    def words(self, measures: Measures, *, at_length: bool = False) -> str:
        """For a sentence: "88.0 %", "2.31 nats (perplexity 10)".

        Args:
            measures: What a model reaches.
            at_length: With the whole unit, where it is named first: "2.31 nats per token ...".
        """
        value = measures[self.name]
        if self.name != _LOSS:
            return self.text(value)
        unit = f" {self.unit}" if at_length else self.sign
        return f"{value:.2f}{unit} (perplexity {_perplexity(value)})"

    @property
    def short(self) -> str:
        """With its unit, where there is little room: "accuracy (%)"."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def axis(self) -> str:
        """What an axis of it says; in two lines if it is much."""
        text = f"{self.name} on the owner's test set"
        if self.lower_is_better:
            return f"{text}\n({self.unit}, lower is better)"
        return f"{text} ({self.unit})" if self.unit else text

    @property
    def caption(self) -> str:
        """What the caption of a table says of it: "accuracy in %"."""
        text = f"{self.name} in {self.unit}" if self.unit else self.name
        return f"{text}, lower is better" if self.lower_is_better else text


_POINT: Final = 1.0
"""Points of accuracy: some hundred documents tell no finer."""
_NATS: Final = 0.03
"""Nats per token, or 3 % of perplexity: as far apart as models are that differ in the seed of
their training alone. SmolLM2's were 0.026 apart on average on 48 headlines (381 tokens); the
standard error of the difference of two models on these is 0.01."""

_KNOWN: Final = {
    "accuracy": Metric("accuracy", "%", " %", 1, some=_POINT),
    "loss": Metric("loss", "nats per token", " nats", 3, lower_is_better=True, some=_NATS),
}


def metric_named(name: str) -> Metric:
    """The metric of this name; of one that nobody knows its name, and that more is better."""
    return _KNOWN.get(name) or Metric(name)


def metric_of(task: Task) -> Metric:
    """What models of a task are judged by: accuracy, unless it says otherwise.

    Raises:
        ConfigurationError: The task says something that models are not measured by.
    """
    name = getattr(task, "metric", _ACCURACY)
    if not isinstance(name, str) or name not in _KNOWN:
        raise ConfigurationError(
            "The task's metric is unknown",
            expected=" or ".join(map(repr, _KNOWN)),
            found=repr(name),
            where=type(task).__name__,
        )
    return _KNOWN[name]


def metric_in(*measured: Measures) -> Metric:
    """What the models are judged by of which these are the measures.

    Only language models have a perplexity; whatever else was measured is a classifier.
    """
    return _KNOWN[_LOSS if any("perplexity" in one for one in measured) else _ACCURACY]


def _perplexity(loss: float) -> str:
    """e to the loss, in as many digits as it is sure of."""
    if loss > math.log(_UNTOLD):
        return f"above {_UNTOLD:,.0f}"
    value = math.exp(loss)
    return f"{value:,.{0 if value >= 9.95 else 1}f}"
