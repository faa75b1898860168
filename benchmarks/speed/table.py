"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from speed.budgets import HEADLINES, Headline
from speed.rows import FEDVEIL, Row

__all__ = ["Sheet", "markdown", "sheets", "show"]

COLUMN: Final = {
    "quantize": "bits",
    "dequantize": "bits",
    "clients": "clients",
    "parameters": "parameters",
    "bytes": "bits",
    "peers": "what",
}
"""Whose rows stand side by side, by what of their case."""

_UNITS: Final = {"x": " x", "%": " %", "bits": " bits", "parts": ""}

_UNNAMED: Final = ("model", "layers", "step")

TITLES: Final = {
    "quantize": "Quantize and pack every matrix",
    "dequantize": "Decode every matrix into a preallocated tensor, or add it to a running sum",
    "gather": "Gather 63 % of the packed units into memory that is there",
    "server": "A server, and its clients but for training",
    "client": "A client, but for training",
    "bytes": "Bytes",
    "memory": "Peak extra memory of the server",
    "peers": "Other libraries on the same matrices",
    "rounds": "A round in process beside a bare loop",
    "shrink": "A client that builds the smaller network",
    "clients": "Server, by clients in a round",
    "parameters": "Kernels at 4 bits, by parameters",
}


@dataclass(frozen=True)
class Sheet:
    """A table as plain text: what `show` prints and `markdown` writes."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)


def sheets(rows: Sequence[Row]) -> Iterator[Sheet]:
    """The summary, which holds every budget, and then everything by benchmark."""
    lines = [cells for line in HEADLINES if (cells := _headline(line, rows))]
    if lines:
        yield Sheet("Budgets", ["", "budget", "fedveil", "met", "others"], lines)
    for section in dict.fromkeys(_section(row) for row in rows):
        yield _sheet(section, [row for row in rows if _section(row) == section])


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print all tables."""
    for sheet in sheets(rows):
        table = Table(title=sheet.title, title_justify="left", title_style="bold", expand=False)
        for number, name in enumerate(sheet.columns):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for line in sheet.lines:
            table.add_row(*(_coloured(cell) for cell in line))
        console.print(table)
        for note in sheet.notes:
            console.print(f"  {escape(note)}")


def markdown(rows: Sequence[Row]) -> str:
    """All tables in Markdown."""
    return "\n".join(_markdown(sheet) for sheet in sheets(rows))


def _headline(line: Headline, rows: Sequence[Row]) -> list[str]:
    own = [row for row in line.own(rows) if row.budget is not None]
    if not own:
        return []
    measured = [row for row in own if row.value is not None]
    budgets = sorted({row.budget for row in own if row.budget is not None})
    others = "; ".join(f"{row.who} {_value(row)}" for row in line.others(rows))
    if not measured:
        return [line.title, _range(budgets), "skipped", "-", others]
    met = "yes" if all(row.met for row in measured) else "NO"
    values = [row.value for row in measured if row.value is not None]
    unit = _UNITS[measured[0].unit]
    return [line.title, _range(budgets) + unit, _range(values) + unit, met, others or "-"]


def _sheet(section: str, rows: Sequence[Row]) -> Sheet:
    key = COLUMN.get(section, "")
    columns = _in_order({row.case[key]: None for row in rows if key in row.case})
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.who, _case(row, key)), []).append(row)
    names = [_column(key, value) for value in columns]
    if not names:
        head = ["", "value", "quartiles", "time", "budget", "met", "note"]
        return Sheet(_title(section), head, [_line(row) for row in rows])
    lines = []
    for (_, _, case), members in groups.items():
        cells = [_of_value(members, key, value) for value in columns]
        limits = sorted({row.budget for row in members if row.budget is not None})
        label = [_what(members[0], case)]
        met = [row.met for row in members if row.met is not None]
        mark = ("yes" if all(met) else "NO") if met else ""
        lines.append([*label, *cells, _range(limits) if limits else "", mark])
    notes = {f"{_what(row, _case(row, ''))}: {row.reason}": None for row in rows if row.reason}
    return Sheet(_title(section), ["", *names, "budget", "met"], lines, list(notes))


def _line(row: Row) -> list[str]:
    time = "" if row.seconds is None else _seconds(row.seconds)
    spread = "" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"
    budget = "" if row.budget is None else f"{row.budget:.3g}"
    met = {True: "yes", False: "NO", None: ""}[row.met]
    return [_what(row, _case(row, "")), _value(row), spread, time, budget, met, row.reason]


def _of_value(members: Sequence[Row], key: str, value: str | int) -> str:
    return next((_value(row) for row in members if row.case.get(key) == value), "")


def _value(row: Row) -> str:
    if row.value is None:
        return "skipped"
    if row.unit == "s":
        return _seconds(row.value)
    digits = 0 if row.value >= 100 else 1 if row.value >= 20 else 2
    return f"{row.value:.{digits}f}{_UNITS[row.unit]}"


def _what(row: Row, case: str) -> str:
    """A line's first cell: who, if not fedveil; which operation; on what."""
    section, _, name = row.name.partition("/")
    if name in _UNNAMED or section == "rounds":
        name = ""
    who = "" if row.who == FEDVEIL and section not in ("peers", "rounds") else row.who
    return ": ".join(filter(None, (who, name.replace("_", " "), case)))


def _case(row: Row, without: str) -> str:
    return ", ".join(
        f"{value} {key}" if isinstance(value, int) else str(value)
        for key, value in row.case.items()
        if key != without
    )


def _section(row: Row) -> str:
    return row.name.partition("/")[0]


def _title(section: str) -> str:
    return TITLES.get(section, section)


def _column(key: str, value: str | int) -> str:
    if key == "parameters":
        count = int(value)
        return f"{count / 1e9:.3g} B" if count >= 10**9 else f"{count / 1e6:.3g} M"
    if key == "clients":
        return f"{value} client" + ("s" if value != 1 else "")
    return f"{value} bit" if key == "bits" else str(value)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _in_order(values: Iterable[str | int]) -> list[str | int]:
    """Numbers ascending; words as they came."""
    return sorted(values, key=lambda value: value if isinstance(value, int) else 0)


def _coloured(cell: str) -> str:
    styles = {"yes": "[green]yes[/]", "NO": "[bold red]NO[/]"}
    return styles.get(cell, escape(cell))


def _markdown(sheet: Sheet) -> str:
    columns = [column.replace("|", "\\|") or " " for column in sheet.columns]
    lines = [f"**{sheet.title}**", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "|".join(["---"] * len(columns)) + "|")
    for line in sheet.lines:
        cells = [f"**{c}**" if c == "NO" else c.replace("|", "\\|") for c in line]
        lines.append(f"| {' | '.join(cells)} |")
    if sheet.notes:
        lines += ["", *(f"- {note}" for note in sheet.notes)]
    return "\n".join([*lines, ""])
