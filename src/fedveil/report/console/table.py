"""The figures of one or several runs as a table for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fedveil.report.summary import metric_of_summary
from fedveil.report.words import (
    human_bytes,
    human_measure,
    human_percent,
    human_seconds,
    share,
)
from fedveil.tasks.metrics import Metric

__all__ = ["table"]

_REACHED = {
    "base": "Base\nmodel",
    "global": "Global\nmodel",
    "server_model": "Server\nmodel",
    "proxy_before": "Proxy\nreceived",
    "proxy_after": "Proxy\ntrained",
    "own_data": "Own\ndata",
}

_CAPTION = (
    ("Base, global model", "the owner's model before and after the run."),
    ("Server model", "the global model without the units that are withheld from everybody."),
    ("Proxy", "what a client is sent, and what it holds after training that (means)."),
    ("Own data", "what a client reaches by tuning the base on its own data alone."),
    ("Down, up", "bytes per client and round, and their share of the model in float32."),
)

_ROOMY = 96
"""Columns of a console from which on the table may breathe."""


class _SummaryTable(Table):
    """A table whose columns stand further apart where there is room."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.padding = (0, 2, 0, 0) if options.max_width >= _ROOMY else (0, 0, 0, 0)
        yield from super().__rich_console__(console, options)


def table(summary: Mapping[str, Any]) -> Table:
    """One row per scheme; what was not measured is a dash.

    Args:
        summary: What ``summary.json`` holds.
    """
    metric = metric_of_summary(summary)
    result = _SummaryTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        caption=_caption(metric),
        caption_justify="left",
        caption_style="",
    )
    result.add_column("Scheme\n", style="bold", overflow="fold", min_width=6)
    for header in _REACHED.values():
        result.add_column(header, justify="right", no_wrap=True)
    for header in ("Down\n", "Up\n", "Time\n"):
        result.add_column(header, justify="right", no_wrap=True)
    for name, figures in summary["schemes"].items():
        result.add_row(name, *_cells(figures, summary["fp32_bytes"], metric))
    return result


def _cells(figures: Mapping[str, Any], fp32_bytes: int, metric: Metric) -> list[Text]:
    cells = [human_measure(figures.get(key), metric, sign=False) for key in _REACHED]
    for key in ("bytes_down", "bytes_up"):
        count = figures.get(key)
        cells.append(f"{human_bytes(count)}\n{human_percent(share(count, fp32_bytes), sign=True)}")
    cells.append(human_seconds(figures.get("seconds")))
    return [Text(cell) for cell in cells]


def _caption(metric: Metric) -> Text:
    what = f"{metric.name} in {metric.unit} on the owner's test set, after the last round"
    what += "; lower is better." if metric.lower_is_better else "."
    terms = (("Base to own data", what), *_CAPTION)
    lines = [Text.assemble((term, "bold"), ": ", meaning) for term, meaning in terms]
    return Text("\n").join([Text(), *lines])
