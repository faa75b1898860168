"""How much of the model each client had been shown after each round, as a table of colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fedveil.report.page.markup import Html, scrolling, tag
from fedveil.run import ClientExposure

__all__ = ["STEPS", "heat_map", "most_shown"]

STEPS = 10
"""Colours from nothing to the whole model; the style sheet has them as k0 to k10."""

_MOST_CLIENTS = 100
_MOST_COLUMNS = 100
_ROOMY = 16
"""Up to so many columns have room for a number in each cell."""


def heat_map(exposure: Mapping[str, ClientExposure], rounds: int) -> Html:
    """Clients from top to bottom, rounds from left to right, the cumulative share in each cell.

    Neighbours with the same share are one cell. Of very many clients those who were shown most are
    listed, and of very many rounds some: what was left out is said.

    Args:
        exposure: By client.
        rounds: How many rounds there were.
    """
    names = sorted(exposure)
    if len(names) > _MOST_CLIENTS:
        names = sorted(sorted(names, key=lambda n: -exposure[n].share)[:_MOST_CLIENTS])
    columns = _columns(max([rounds, *(r for one in exposure.values() for r in one.after)]))
    dense = len(columns) > _ROOMY
    classes = ["heat", *(["dense"] if dense else []), *(["many"] if len(names) > 25 else [])]
    when = "after each round" if columns else "by the end"
    caption = f"Share of the model that each client had been shown {when}, in percent"
    caption += _left_out(len(exposure) - len(names), dense=dense, thin=_is_thin(columns))
    head = tag(
        "tr",
        tag("th", "client", scope="col"),
        [_column_head(number, columns, dense=dense) for number in columns],
        tag("th", "at the end", scope="col", class_="number"),
    )
    body = tag("tbody", [_row(name, exposure[name], columns) for name in names])
    return Html(_scale() + scrolling(caption, tag("thead", head), body, class_=" ".join(classes)))


def most_shown(exposure: Mapping[str, ClientExposure]) -> str:
    """One sentence that names the client who was shown most, and since which round."""
    name = max(sorted(exposure), key=lambda name: exposure[name].share)
    after = exposure[name].after
    since = min(
        (r for r, share in after.items() if _percent(share) == _percent(max(after.values()))),
        default=None,
    )
    when = f", all of it by round {since}" if since is not None else ""
    return f"{name} was shown most: {100 * exposure[name].share:.1f} % of the model{when}."


def _columns(last: int) -> list[int]:
    if last == 0:  # the course is not known, only the end
        return []
    step = math.ceil(last / _MOST_COLUMNS)
    # The last round is always there, since it says what clients hold in the end.
    return sorted({*range(step, last + 1, step), last})


def _is_thin(columns: Sequence[int]) -> bool:
    return columns != list(range(1, len(columns) + 1))


def _left_out(clients: int, *, dense: bool, thin: bool) -> str:
    parts = [". Each small cell is a round"] if dense and not thin else []
    parts += [". Not every round is shown"] if thin else []
    parts += [f". {clients} clients who were shown less are left out"] if clients else []
    return "".join(parts)


def _column_head(number: int, columns: Sequence[int], *, dense: bool) -> Html:
    # Where columns are narrow, every tenth has its number written across its neighbours.
    labelled = not dense or number == columns[0] or columns.index(number) % 10 == 9
    text = str(number) if labelled else ""
    return tag("th", tag("span", text), scope="col", aria_label=f"round {number}")


def _row(name: str, one: ClientExposure, columns: Sequence[int]) -> Html:
    cells = [_cell(share, width) for share, width in _runs(one, columns)]
    end = tag("td", f"{100 * one.share:.1f} %", class_=f"number {_colour(one.share)}")
    return tag("tr", tag("th", tag("span", name, class_="name"), scope="row"), cells, end)


def _cell(share: int | None, width: int) -> Html:
    wide = width if width > 1 else None
    if share is None:
        return tag("td", "–", class_="kx", colspan=wide)
    return tag("td", str(share), class_=_colour(share / 100), colspan=wide)


def _runs(one: ClientExposure, columns: Sequence[int]) -> Iterator[tuple[int | None, int]]:
    """Percent (None: nothing sent yet) and over how many columns it stays."""
    rounds = sorted(one.after)
    reached, place = None, 0
    current, width = None, 0
    for number in columns:
        while place < len(rounds) and rounds[place] <= number:
            reached, place = _percent(one.after[rounds[place]]), place + 1
        if width and reached != current:
            yield current, width
            width = 0
        current, width = reached, width + 1
    if width:
        yield current, width


def _colour(share: float) -> str:
    return f"k{min(max(round(share * STEPS), 0), STEPS)}"


def _percent(share: float) -> int:
    return round(100 * share)


def _scale() -> Html:
    """Which colour is how much."""
    steps = [
        tag("span", f"{100 * step // STEPS}", class_=f"k{step}") for step in range(0, STEPS + 1)
    ]
    return tag(
        "p", "% shown: ", tag("span", "–", class_="kx"), steps, " (–: nothing was sent yet)",
        class_="scale",
    )  # fmt: skip
