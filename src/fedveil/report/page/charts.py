"""The pictures of a report: lines over rounds and over coalitions, as SVG with legends in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedveil.report.curves import Line
from fedveil.report.page.markup import Html, tag
from fedveil.report.page.svg import GRID, INK, PAPER, inline_svg
from fedveil.report.words import human_bytes

__all__ = ["Chart", "draw"]

# Inches. A phone shows it at three quarters of this: letters of 10 points stay readable.
_SIZE = (4.6, 3.2)


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str = ""
    dashes: str = "-"
    width: float = 1.8
    level: str = "--"


# Okabe and Ito's palette. Blue is what the owner keeps, orange what clients hold, grey what
# anybody has without them; attackers have their own colours, and always a hollow marker.
_LOOKS: Mapping[str, _Look] = {
    "global": _Look("#0072B2", "o", width=2.6, level="-"),
    "server_model": _Look("#56B4E9", "s"),
    "proxy_before": _Look("#E69F00", "^", level=":"),
    "proxy_after": _Look("#D55E00", "v", level="-."),
    "base": _Look("#808080", level="--"),
    "public": _Look("#808080", level=":"),
    "own_data": _Look("#808080", level="-."),
    "own": _Look("#CC79A7", level="--"),
    "loss_first": _Look("#E69F00", "^"),
    "loss_last": _Look("#D55E00", "v"),
    "bytes_down": _Look("#D55E00", "v"),
    "bytes_up": _Look("#0072B2", "^"),
    "coalition": _Look("#D55E00", "o"),
}
_ATTACKERS = ("#CC79A7", "#009E73", "#A05000", "#7B5FC0", "#808000", "#C03030")
_ATTACK_MARKERS = "DPX*hd"


@dataclass(frozen=True)
class Chart:
    """What a picture is of.

    Attributes:
        name: One word, for its ids.
        title: What it shows.
        x: What runs from left to right.
        y: What runs upwards, with its unit.
        form: How values are written: "percent", "nats", "bytes" or "" for a plain number.
        from_zero: Whether y begins at 0.
    """

    name: str
    title: str
    x: str
    y: str
    form: str = ""
    from_zero: bool = False


def draw(chart: Chart, lines: Sequence[Line], reading: str) -> Html:
    """A picture with its title, its legend, and how to read it.

    Args:
        chart: What it is of.
        lines: What to draw; at least one.
        reading: One sentence.
    """
    looks = _looks(lines)
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    _dress(axes, chart, lines)
    for line, look in zip(lines, looks, strict=True):
        _draw_line(axes, line, look)
    ends = [f"{line.name}: {_value(line.points[-1][1], chart)}" for line in lines]
    described = f"{' '.join(chart.y.split())} against {chart.x}. Last values: {'; '.join(ends)}."
    return tag(
        "figure",
        tag("h3", chart.title),
        inline_svg(figure, chart.name, chart.title, described),
        _legend(chart, lines, looks),
        tag("figcaption", reading),
    )


def _looks(lines: Sequence[Line]) -> list[_Look]:
    """One look per line: of its kind or, for attackers, the next that is free."""
    attackers = [line for line in lines if line.look == "attack"]
    looks = []
    for line in lines:
        if line.look != "attack":
            looks.append(_LOOKS[line.look])
            continue
        number = attackers.index(line)
        turn = number // len(_ATTACKERS)
        looks.append(_Look(
            _ATTACKERS[number % len(_ATTACKERS)],
            _ATTACK_MARKERS[(number + turn) % len(_ATTACK_MARKERS)],
            ("-", "--", "-.")[turn % 3],
            1.4,
        ))  # fmt: skip
    return looks


def _draw_line(axes: Axes, line: Line, look: _Look) -> None:
    if line.is_level:
        level = line.points[0][1]
        axes.axhline(level, color=look.colour, linestyle=look.level, linewidth=1.8, zorder=1)
        return
    hollow = line.look == "attack"
    axes.plot(
        [x for x, _ in line.points],
        [y for _, y in line.points],
        color=look.colour,
        linestyle=look.dashes,
        linewidth=look.width,
        # Many rounds would be one thick row of markers.
        marker=look.marker if len(line.points) <= 25 else "",
        markersize=6,
        markerfacecolor=PAPER if hollow else look.colour,
        markeredgewidth=1.4,
        zorder=3 if hollow else 2,
    )


def _dress(axes: Axes, chart: Chart, lines: Sequence[Line]) -> None:
    axes.patch.set_alpha(0)
    axes.set_xlabel(chart.x, color=INK, fontsize=10)
    axes.set_ylabel(chart.y, color=INK, fontsize=10, parse_math=False)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    places = sorted({x for line in lines if not line.is_level for x, _ in line.points})
    if len(places) <= 1:  # a single round or size: as wide as several, and its number once
        at = places[0] if places else 1
        axes.set_xlim(at - 1, at + 1)
        axes.set_xticks([at])
    if chart.form:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _value(y, chart, tick=True)))
    if chart.from_zero:
        axes.set_ylim(0, 1.08 * max((y for line in lines for _, y in line.points), default=1) or 1)


def _value(value: float, chart: Chart, *, tick: bool = False) -> str:
    if chart.form == "bytes":
        return human_bytes(value)
    if chart.form == "percent":
        return f"{value:g}" if tick else f"{value:.1f} %"
    if chart.form == "nats":
        return f"{value:g}" if tick else f"{value:.3f} nats"
    return f"{value:.3g}"


def _legend(chart: Chart, lines: Sequence[Line], looks: Sequence[_Look]) -> Html:
    """In HTML, where it wraps, can be searched and is read out; with the last values."""
    return tag(
        "ul",
        [
            tag(
                "li",
                _swatch(line, look),
                line.name,
                " ",
                tag("b", _value(line.points[-1][1], chart)),
            )
            for line, look in zip(lines, looks, strict=True)
        ],
        class_="legend",
    )


_SHAPES = {
    "o": "M9 6a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M9.5 1.5h9v9h-9z",
    "^": "M14 1l5 10h-10z",
    "v": "M14 11l5-10h-10z",
    "D": "M14 1l5 5l-5 5l-5-5z",
    "d": "M14 0l3.5 6l-3.5 6l-3.5-6z",
    "P": "M12 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M10 0l4 4l4-4l2 2l-4 4l4 4l-2 2l-4-4l-4 4l-2-2l4-4l-4-4z",
    "*": "M14 0l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8-2.6l-3.8 2.6l1.3-4.3l-3.5-2.7h4.4z",
    "h": "M14 0.5l5 2.8v5.5l-5 2.8l-5-2.8v-5.5z",
}
_DASHES = {"-": None, "--": "6 3", ":": "2 2", "-.": "7 2 2 2"}


def _swatch(line: Line, look: _Look) -> Html:
    """The piece of a legend that looks like the line."""
    dashes = _DASHES[look.level if line.is_level else look.dashes]
    stroke = tag(
        "path", d="M0 6H28", stroke=look.colour, stroke_width="2.2", stroke_dasharray=dashes
    )
    shape = None
    if look.marker and not line.is_level:
        hollow = line.look == "attack"
        shape = tag(
            "path", d=_SHAPES[look.marker], fill="var(--paper)" if hollow else look.colour,
            stroke=look.colour, stroke_width="1.6",
        )  # fmt: skip
    return tag("svg", stroke, shape, viewBox="0 0 28 12", class_="swatch", aria_hidden="true")
