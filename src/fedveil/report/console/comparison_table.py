"""A comparison of runs as a table for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fedveil.report.compare import Compared, Comparison, Value, mean_of, values_of
from fedveil.report.words import DASH, human_bytes, human_measure, human_percent
from fedveil.tasks.metrics import metric_named

__all__ = ["comparison_table"]

_COLUMNS = ("Seed", "Base", "Own", "Global", "Attack", "Leak", "Shown", "Down")

_CAPTION = (
    ("Global", "the owner's model at the end; means of several seeds are followed by the range."),
    ("Own", "what an attacker reaches without a released byte."),
    ("Attack", "what the strongest attacker reaches with what clients were sent."),
    ("Leak", "in %: 0 is no better than own, 100 is as good as the global model."),
    ("Shown", "largest share of the model that one client was sent, in %."),
)


def comparison_table(comparison: Comparison) -> Table:
    """One row per run and, for several seeds of one recipe, one with their means and ranges.

    Args:
        comparison: What was compared.
    """
    result = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        caption=_caption(comparison), caption_justify="left", caption_style="",
    )  # fmt: skip
    result.add_column("Scheme", overflow="fold", min_width=14)
    for header in _COLUMNS:
        wide = header in {"Global", "Attack"}  # ranges stand there
        result.add_column(
            header, justify="right", no_wrap=header != "Attack", min_width=9 if wide else None
        )
    for label in comparison.labels:
        runs = comparison.of(label)
        for number, run in enumerate(runs):
            result.add_row(Text("" if number else label), *_cells(run, comparison.metric))
        # The mean of what is known of some and of what is known of others would mix them up.
        known = [run for run in runs if run.audited] or list(runs)
        if len(known) > 1:
            name = Text(f"mean of {len(known)}")
            result.add_row(name, *_means(known, comparison.metric), style="bold")
    return result


def _cells(run: Compared, metric: str) -> list[Text]:
    return [
        Text(cell)
        for cell in (
            DASH if run.seed is None else str(run.seed),
            _bare(run.base, metric),
            _bare(run.own, metric),
            _bare(run.final, metric),
            _bare(run.attack, metric) if run.audited else "not audited",
            _percent(run.leak),
            _percent(run.shown),
            human_bytes(run.bytes_down),
        )
    ]


def _means(runs: Sequence[Compared], metric: str) -> list[str]:
    def spread(value: Value) -> str:
        mean, values = mean_of(runs, value), values_of(runs, value)
        if mean is None:
            return DASH
        low, high = (_bare(end, metric) for end in (min(values), max(values)))
        return f"{_bare(mean, metric)}\n{low}–{high}"

    return [
        "",
        _bare(mean_of(runs, lambda run: run.base), metric),
        _bare(mean_of(runs, lambda run: run.own), metric),
        spread(lambda run: run.final),
        spread(lambda run: run.attack),
        _percent(mean_of(runs, lambda run: run.leak)),
        _percent(mean_of(runs, lambda run: run.shown)),
        human_bytes(mean_of(runs, lambda run: run.bytes_down)),
    ]


def _caption(comparison: Comparison) -> Text:
    first = f"Base, own, global and attack: {metric_named(comparison.metric).caption}."
    lines = [Text(), Text(first)]
    lines += [Text.assemble((term, "bold"), ": ", meaning) for term, meaning in _CAPTION]
    lines += [Text(note, style="yellow") for note in comparison.notes]
    return Text("\n").join(lines)


def _bare(value: float | None, metric: str) -> str:
    return human_measure(value, metric_named(metric), sign=False)


def _percent(value: float | None) -> str:
    return human_percent(None if value is None else 100 * value)
