"""The figures of one or several runs as one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedveil.errors import CheckpointError
from fedveil.files import write_whole
from fedveil.report.summary import metric_of_summary
from fedveil.report.words import human_bytes, human_percent, share
from fedveil.tasks.metrics import Metric

__all__ = ["plot"]

Figures = Mapping[str, Any]
Colour = tuple[float, float, float]

# Okabe and Ito's palette, told apart by nearly everybody; black and yellow left out.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"
_GREY = "#555555"
# What the owner keeps is drawn in full colour; what clients see, in tints of it.
_BARS = (("global", 1.0, ""), ("proxy_before", 0.25, ""), ("proxy_after", 0.55, "////"))
_BAR_NAMES = {
    "global": "global model",
    "proxy_before": "proxy as received",
    "proxy_after": "proxy after training",
}


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw what is reached per round, what is kept and what is shown, and bytes, into a PNG file.

    Args:
        summary: What ``summary.json`` holds.
        path: The file to write.

    Raises:
        CheckpointError: It cannot be written.
    """
    schemes: Mapping[str, Figures] = summary["schemes"]
    metric = metric_of_summary(summary)
    size = (10 + 1.4 * max(0, len(schemes) - 4), 6.2 + 0.34 * len(schemes))
    figure = Figure(figsize=size, dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine(
        ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.05)
    )
    rows = figure.add_gridspec(2, 2, height_ratios=(4.2, 0.9 + 0.55 * len(schemes)))
    _draw_rounds(figure.add_subplot(rows[0, 0]), schemes, metric)
    _draw_views(figure.add_subplot(rows[0, 1]), schemes, metric)
    _draw_bytes(figure.add_subplot(rows[1, :]), schemes, summary["fp32_bytes"])
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue(), CheckpointError)


def _draw_rounds(axes: Axes, schemes: Mapping[str, Figures], metric: Metric) -> None:
    _dress(axes, "Global model after each round", metric.axis)
    for number, (name, figures) in enumerate(schemes.items()):
        points = enumerate([figures.get("base"), *figures.get("rounds", [])])
        measured = [(x, y) for x, y in points if y is not None]
        axes.plot(
            [x for x, _ in measured],
            [y for _, y in measured],
            color=_colour(number),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.8,
            label=name,
        )
    for value in dict.fromkeys(f["own_data"] for f in schemes.values() if f.get("own_data")):
        axes.axhline(value, color=_GREY, linestyle="--", linewidth=1.3, label="own data alone")
    axes.set_xlabel("round (0: the base model)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Below: among lines that go everywhere there is no room.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=9)


def _draw_views(axes: Axes, schemes: Mapping[str, Figures], metric: Metric) -> None:
    _dress(axes, "What is kept, and what is shown", metric.axis)
    bars = [bar for bar in _BARS if any(f.get(bar[0]) is not None for f in schemes.values())]
    width = 0.81 / max(len(bars), 2)
    for group, figures in enumerate(schemes.values()):
        for place, (view, tint, hatch) in enumerate(bars):
            x = group + (place - (len(bars) - 1) / 2) * width
            look = _colour(group), tint, hatch
            _draw_bar(axes, x, figures.get(view), 0.9 * width, look, metric)
        if figures.get("own_data") is not None:
            axes.hlines(
                figures["own_data"], group - 0.46, group + 0.46, colors=_GREY, linestyles="--",
                linewidth=1.3, zorder=3,
            )  # fmt: skip
    crowded = sum(map(len, schemes)) > 40
    axes.set_xticks(range(len(schemes)), list(schemes))
    if crowded:
        axes.tick_params("x", rotation=20)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.set_xlim(-0.6, len(schemes) - 0.4)
    if metric.unit == "%":
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
    else:
        axes.margins(y=0.08)  # room for the numbers on top
    own_data = any(figures.get("own_data") is not None for figures in schemes.values())
    _legend_of_views(axes, bars, own_data=own_data, below=-0.24 if crowded else -0.09)


def _draw_bar(
    axes: Axes,
    x: float,
    value: float | None,
    width: float,
    look: tuple[Colour, float, str],
    metric: Metric,
) -> None:
    if value is None:
        return
    colour, tint, hatch = look
    axes.bar(
        x, value, width, color=_tint(colour, tint), hatch=hatch, edgecolor=colour, linewidth=1.0
    )
    # A white ground keeps the number readable where the line of own data passes.
    axes.annotate(
        metric.figure(value), (x, value), (0, 3), textcoords="offset points", ha="center",
        va="bottom", fontsize=7.5, zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def _legend_of_views(
    axes: Axes, bars: Sequence[tuple[str, float, str]], *, own_data: bool, below: float
) -> None:
    handles: list[Any] = [
        Patch(
            facecolor=_tint(to_rgb(_GREY), tint),
            edgecolor=_GREY,
            hatch=hatch,
            label=_BAR_NAMES[view],
        )
        for view, tint, hatch in bars
    ]
    if own_data:
        handles.append(Line2D([], [], color=_GREY, linestyle="--", label="own data alone"))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, below), ncols=2,
        frameon=False, fontsize=9,
    )  # fmt: skip


def _draw_bytes(axes: Axes, schemes: Mapping[str, Figures], fp32_bytes: int) -> None:
    _dress(axes, "Bytes per client and round", "")
    for row, figures in enumerate(schemes.values()):
        for offset, key, tint, word in (
            (-0.2, "bytes_down", 0.55, "down"),
            (0.2, "bytes_up", 0.25, "up"),
        ):
            percent = share(figures.get(key), fp32_bytes)
            if percent is None:
                continue
            colour = _colour(row)
            axes.barh(
                row + offset, percent, 0.34, color=_tint(colour, tint), edgecolor=colour,
                linewidth=1.0,
            )  # fmt: skip
            axes.annotate(
                f"{word}: {human_percent(percent, sign=True)}, {human_bytes(figures[key])}",
                (percent, row + offset), (4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
    axes.axvline(100, color=_GREY, linestyle=":", linewidth=1.5, zorder=0)
    axes.set_yticks(range(len(schemes)), list(schemes))
    axes.set_ylim(len(schemes) - 0.45, -0.55)
    axes.set_xlim(0, 1.25 * max(100.0, *_shares(schemes.values(), fp32_bytes)))
    axes.set_xlabel(f"% of the model in float32 ({human_bytes(fp32_bytes)})")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#E3E3E3", linewidth=0.8)


def _shares(schemes: Iterable[Figures], fp32_bytes: int) -> list[float]:
    shares = (share(f.get(k), fp32_bytes) for f in schemes for k in ("bytes_down", "bytes_up"))
    return [0.0, *(value for value in shares if value is not None)]


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(label)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color="#E3E3E3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> Colour:
    return to_rgb(_PALETTE[number % len(_PALETTE)])


def _tint(colour: Colour, strength: float) -> Colour:
    red, green, blue = (1 - strength * (1 - part) for part in colour)
    return red, green, blue
