"""Templates of HTML in which no value can become markup, nor steer what it stands in."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedveil.printable import printable
from fedveil.report.page.heatmap import shade
from fedveil.report.words import human_bytes, human_measure, human_percent, human_seconds
from fedveil.tasks.metrics import Measures, Metric

__all__ = ["ENVIRONMENT"]


def _shown(value: object) -> str:
    """A value as a page shows it; what it escapes afterwards is whatever is not markup already."""
    if isinstance(value, Markup):
        return Markup(printable(value))  # noqa: S704  # a template's own output, made plain again
    # A percent sign belongs to its number: no line ends between them.
    return printable(str(value)).replace(" %", "\u00a0%")


def _percent(share: float | None) -> str:
    return human_percent(None if share is None else 100 * share, sign=True)


def _measure(measures: Measures, metric: Metric) -> str:
    return human_measure(metric.of(measures), metric)


ENVIRONMENT = Environment(
    loader=PackageLoader("fedveil.report.page"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
"""Every value goes through :func:`_shown`; a name that a template does not know is an error."""

ENVIRONMENT.filters |= {
    "bytes": human_bytes,
    "measure": _measure,
    "percent": _percent,
    "seconds": human_seconds,
    "shade": shade,
}
