"""A comparison of runs as a picture: what the owner gets against what attackers get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from fedveil.errors import AuditError, CheckpointError
from fedveil.report.compare import Compared, Comparison, Value, values_of
from fedveil.tasks.metrics import metric_named

__all__ = ["plot_frontier"]

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A05000", "#56B4E9", "#7B5FC0", "#808000")
_MARKERS = "osD^vPX*"
_GREY = "#6b6b6b"

# Where a label may stand, the best first: points to the right and up, and which end is there.
_PLACES: tuple[tuple[float, float, Literal["left", "right", "center"]], ...] = (
    (10, 0, "left"), (-10, 0, "right"), (8, 18, "left"), (-8, 18, "right"), (8, -18, "left"),
    (-8, -18, "right"), (0, 36, "center"), (0, -36, "center"), (8, 54, "left"), (-8, 54, "right"),
    (8, -54, "left"), (-8, -54, "right"), (8, 80, "left"), (-8, 80, "right"), (8, -80, "left"),
    (-8, -80, "right"),
)  # fmt: skip


@dataclass(frozen=True)
class _Recipe:
    """The runs of one label on the picture: what attackers get, and what the owner gets."""

    label: str
    colour: str
    marker: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @property
    def x(self) -> float:
        return sum(self.xs) / len(self.xs)

    @property
    def y(self) -> float:
        return sum(self.ys) / len(self.ys)


def plot_frontier(comparison: Comparison, path: Path) -> None:
    """Draw what attackers get (to the right) against what the owner gets (upwards).

    To the right is the strongest attacker's leak or, if that means nothing for one of the runs, the
    attacker's result. A recipe is a point at the mean of its seeds, with its range in both ways;
    runs that were not audited are named below, and not drawn.

    Args:
        comparison: What was compared.
        path: The file to write; its suffix says what kind: .png, .svg or .pdf.

    Raises:
        AuditError: No run was audited and measured.
        CheckpointError: The file cannot be written.
    """
    drawn = [r for r in comparison.runs if r.attack is not None and r.final is not None]
    if not drawn:
        raise AuditError(
            "There is nothing to draw: no run has both an audit and a measured global model",
            expected="at least 1 audited run with a test set",
            where=", ".join(str(run.folder) for run in comparison.runs)[:300],
            fix="Run: fedveil audit RUN, for each of them.",
        )
    figure = Figure(figsize=(7.2, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_leak = all(run.leak is not None for run in drawn)
    _dress(axes, comparison, drawn, by_leak=by_leak)
    recipes = _recipes(comparison, drawn, by_leak=by_leak)
    for recipe in recipes:
        _draw(axes, recipe)
    _write_labels(figure, axes, recipes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "The picture could not be written",
            expected="a file that may be written, .png, .svg or .pdf",
            found=str(error),
            where=str(path),
            fix="Name another file.",
        ) from error


def _recipes(comparison: Comparison, runs: Sequence[Compared], *, by_leak: bool) -> list[_Recipe]:
    recipes: list[_Recipe] = []
    for label in comparison.labels:
        if some := [run for run in runs if run.label == label]:
            number = len(recipes)
            recipes.append(_Recipe(
                label + (f" ({len(some)} seeds)" if len(some) > 1 else ""),
                _PALETTE[number % len(_PALETTE)],
                _MARKERS[number % len(_MARKERS)],
                tuple(values_of(some, _across(by_leak=by_leak))),
                tuple(values_of(some, lambda run: run.final)),
            ))  # fmt: skip
    return recipes


def _draw(axes: Axes, recipe: _Recipe) -> None:
    x, y, xs, ys, colour = recipe.x, recipe.y, recipe.xs, recipe.ys, recipe.colour
    if len(xs) > 1:
        axes.scatter(xs, ys, color=colour, marker=recipe.marker, s=22, alpha=0.35, linewidths=0)
        axes.errorbar(
            x, y, xerr=[[x - min(xs)], [max(xs) - x]], yerr=[[y - min(ys)], [max(ys) - y]],
            color=colour, linewidth=1.2, capsize=3, alpha=0.8,
        )  # fmt: skip
    axes.scatter([x], [y], color=colour, marker=recipe.marker, s=75, zorder=4)


def _write_labels(figure: Figure, axes: Axes, recipes: Sequence[_Recipe]) -> None:
    """Each beside its point, where it covers nothing; else as near as that."""
    figure.draw_without_rendering()  # so that data have places on the canvas
    taken = [box for recipe in recipes for box in _boxes(axes, recipe)]
    for recipe in recipes:
        tried: list[tuple[int, int, Annotation]] = []
        for sideways, up, side in _PLACES:
            text = axes.annotate(
                _wrapped(recipe.label), (recipe.x, recipe.y), (sideways, up),
                textcoords="offset points", ha=side, va="center", fontsize=9,
                parse_math=False,
                color=recipe.colour, fontweight="bold", zorder=5,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            tried.append((box.count_overlaps(taken) + (0 if inside else 100), len(tried), text))
            if tried[-1][0] == 0:
                break
        tried.sort(key=lambda one: one[:2])
        for _, _, text in tried[1:]:
            text.remove()
        taken.append(tried[0][2].get_window_extent())


def _boxes(axes: Axes, recipe: _Recipe) -> list[Bbox]:
    """What is drawn of a recipe, on the canvas."""
    spans = [
        ((min(recipe.xs), recipe.y), (max(recipe.xs), recipe.y)),
        ((recipe.x, min(recipe.ys)), (recipe.x, max(recipe.ys))),
        *((point, point) for point in zip(recipe.xs, recipe.ys, strict=True)),
    ]
    return [Bbox(axes.transData.transform(span)).padded(7) for span in spans]


def _dress(axes: Axes, comparison: Comparison, runs: Sequence[Compared], *, by_leak: bool) -> None:
    metric = metric_named(comparison.metric)
    axes.set_title("What the owner gets, and what attackers get", loc="left", fontweight="bold")
    axes.set_ylabel(f"global model: {metric.short}", parse_math=False)
    what = "leak (%)" if by_leak else metric.short
    named = [run.folder.name for run in comparison.runs if run not in runs]
    left_out = f"\nnot audited or not measured: {', '.join(named)[:90]}" if named else ""
    axes.set_xlabel(f"strongest attacker: {what}{left_out}", parse_math=False)
    axes.grid(visible=True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    xs, ys = values_of(runs, _across(by_leak=by_leak)), values_of(runs, lambda run: run.final)
    if by_leak:
        # From nothing to everything, whatever was measured: else small leaks would look large.
        axes.set_xlim(min([0.0, *xs]) - 5, max([100.0, *xs]) + 5)
        axes.axvline(100, color=_GREY, linestyle=":", linewidth=1.3)
        axes.annotate(
            "everything leaks →", (100, 0.985), (-4, 0), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="right", va="top", fontsize=8.5, color=_GREY,
            style="italic",
        )  # fmt: skip
    else:
        room = 0.15 * (max(xs) - min(xs)) or 1
        axes.set_xlim(min(xs) - room, max(xs) + room)
        _note(axes, 0.985, "attackers get more →", "right")
    # At least some percent of the whole, lest noise should look like a difference.
    room = max(0.3 * (max(ys) - min(ys)), 0.03 * max(map(abs, ys))) or 1
    axes.set_ylim(min(ys) - room, max(ys) + room)
    better = f"lower {metric.name} (upwards)" if metric.lower_is_better else "higher"
    _note(axes, 0.015, f"← attackers get less; {better} is better for the owner", "left")
    if metric.lower_is_better:
        axes.invert_yaxis()
        if not by_leak:
            axes.invert_xaxis()


def _note(axes: Axes, x: float, text: str, side: str) -> None:
    axes.text(
        x, 0.985, text, transform=axes.transAxes, ha=side, va="top", fontsize=8.5, color=_GREY,
        style="italic",
    )  # fmt: skip


def _across(*, by_leak: bool) -> Value:
    if by_leak:
        return lambda run: None if run.leak is None else 100 * run.leak
    return lambda run: run.attack


def _wrapped(text: str, width: int = 26) -> str:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
