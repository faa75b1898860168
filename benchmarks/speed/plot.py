"""How cost grows: per client with the number of clients, and with the size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from speed.rows import Row

__all__ = ["draw"]

# Okabe and Ito's colours, which colour-blind readers tell apart.
CLIENTS: Final = (
    ("clients/release", "release (draw, gather, write)", "#0072B2", "o"),
    ("clients/absorb", "absorb an 8-bit update", "#009E73", "s"),
    ("clients/begin_round", "quantize, shared by all clients", "#D55E00", "^"),
)
PARAMETERS: Final = (
    ("parameters/quantize", "quantize and pack", "#D55E00", "^"),
    ("parameters/add", "decode and add", "#009E73", "s"),
    ("parameters/dequantize", "decode", "#CC79A7", "D"),
    ("parameters/gather", "gather one client's units", "#0072B2", "o"),
)
FLOOR: Final = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def draw(rows: Sequence[Row], path: Path, caption: str) -> bool:
    """Write the figure; whether there was anything to draw."""
    if not any(row.name.startswith(("clients/", "parameters/")) for row in rows):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, label, colour, marker in CLIENTS:
        points = _points(rows, name, "clients", shared=name == "clients/begin_round")
        _line(left, points, label, color=colour, marker=marker)
    floors = _points(rows, "clients/release", "clients", floor=True)
    _line(left, floors, "floor: memcpy of one message", **FLOOR)
    left.set(xlabel="clients in the round", ylabel="server time per client, ms",
             title="Per client, by clients in a round")  # fmt: skip
    for name, label, colour, marker in PARAMETERS:
        points = _points(rows, name, "parameters")
        _line(right, points, label, color=colour, marker=marker)
    floors = _points(rows, "parameters/quantize", "parameters", floor=True)
    _line(right, floors, "floor: copy of the model in fp32", **FLOOR)
    right.set(xlabel="parameters", ylabel="time, ms", title="Whole model at 4 bits, by parameters")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_count))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    figure.supxlabel(caption, fontsize=7, color="0.4")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _count(value: float, _: object) -> str:
    """1, 10, 1000, 1 M, 1 B."""
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _points(
    rows: Sequence[Row], name: str, key: str, *, floor: bool = False, shared: bool = False
) -> list[tuple[int, float]]:
    """Milliseconds by an entry of the case; divided by it if the time is `shared`."""
    points = []
    for row in rows:
        seconds = row.floor_seconds if floor else row.seconds
        if row.name == name and seconds is not None:
            at = int(row.case[key])
            points.append((at, 1e3 * seconds / (at if shared else 1)))
    return sorted(points)


def _line(axes: Any, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
