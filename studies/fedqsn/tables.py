"""Tables and the picture, of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from fedveil.tasks.metrics import Metric, metric_named
from studies.fedqsn.recipes import COALITIONS, recipes_of
from studies.results import Results, Values

__all__ = ["draw", "page", "summary", "table"]

_KEPT, _LEAK = 0.95, {1: 0.25, 3: 0.35}
"""What is aimed at: so much kept at least, and so much leaked at most, by attackers."""


def summary(results: Results, scene: str) -> dict[str, dict[str, Any]]:
    """Per recipe means over seeds; shares are of the means, as a single seed may lack one."""
    found = {}
    fedavg = results.by_seed(f"{scene}: FedAvg")
    for recipe in recipes_of(scene):
        rows = results.by_seed(f"{scene}: {recipe}")
        both = sorted(rows.keys() & fedavg.keys())
        if not both:
            continue
        runs = [rows[seed] for seed in both]
        metric = metric_named(runs[0]["metric"])
        base, final = _mean(runs, "B"), _mean(runs, "G")
        far = _mean([fedavg[seed] for seed in both], "G")
        found[recipe] = {
            "metric": metric, "seeds": both, "G": [run["G"] for run in runs], "final": final,
            "base": base, "far": far, "kept": metric.share(final, base, far),
            "attacks": {
                size: _attacked(metric, runs, size) for size in COALITIONS if runs[0]["attacks"]
            },
        }  # fmt: skip
    return found


def _attacked(metric: Metric, runs: Sequence[Values], size: int) -> dict[str, Any]:
    attacks = [run["attacks"][str(size)] for run in runs]
    reached, own = _mean(attacks, "A"), _mean(attacks, "O")
    base, final = _mean(runs, "B"), _mean(runs, "G")
    return {
        "A": reached,
        "O": own,
        "leak": metric.share(reached, own, final),
        "gain": metric.share(reached, base, final),
        "own gain": metric.share(own, base, final),
        "range": [
            metric.share(one["A"], one["O"], run["G"])
            for one, run in zip(attacks, runs, strict=True)
        ],
    }


def _mean(rows: Sequence[Values], key: str) -> float:
    return float(mean(row[key] for row in rows))


def page(results: Results) -> str:
    """All tables, in Markdown."""
    runs = [values for name in results.names() for values in results.of(name)]
    hours = sum(sum(values["seconds"]) for values in runs) / 3600
    parts = [
        "# Every recipe on every task\n\nWritten by `run.py`; README.md says what is what. All "
        f"runs together took {hours:.1f} hours of one core.",
        f"## In short\n\n{_short(results)}",
    ]
    for scene in _scenes(results):
        rows = results.by_seed(f"{scene}: FedAvg")
        if rows:
            metric = metric_named(next(iter(rows.values()))["metric"])
            each = ", ".join(metric.figure(row["B"]) for _, row in sorted(rows.items()))
            parts.append(f"## {scene}\n\nB by seed: {each} ({metric.name}).")
            parts.append(table(results, scene))
    return "\n\n".join(parts) + "\n"


def _scenes(results: Results) -> list[str]:
    return [*dict.fromkeys(name.partition(":")[0] for name in results.names())]


def _short(results: Results) -> str:
    """What matters most of each scene: means over seeds."""
    lines = [
        "| task | recipe | B | F | G | kept | leak to one client | to three | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scene in _scenes(results):
        for recipe, values in summary(results, scene).items():
            if recipe == "FedAvg" or recipe not in _LOOKS:
                continue
            metric, attacks = values["metric"], values["attacks"]
            figures = [metric.figure(values[key]) for key in ("base", "far", "final")]
            leaks = [_leak(attacks[size]) if attacks else "–" for size in COALITIONS]
            cells = [scene, recipe, *figures, _percent(values["kept"]), *leaks]
            lines.append(f"| {' | '.join(cells)} | {len(values['seeds'])} |")
    return "\n".join(lines)


def table(results: Results, scene: str) -> str:
    """Markdown, a line per recipe."""
    lines = [
        "| recipe | G (each seed) | kept | one client: A, O | leak | gain shown (by O) "
        "| three: A, O | leak | gain shown (by O) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, values in summary(results, scene).items():
        metric = values["metric"]
        each = ", ".join(metric.figure(one) for one in values["G"])
        cells = [recipe, f"{metric.figure(values['final'])} ({each})", _percent(values["kept"])]
        for size in COALITIONS:
            found = values["attacks"].get(size)
            if found is None:
                cells += ["–"] * 3
                continue
            cells.append(f"{metric.figure(found['A'])}, {metric.figure(found['O'])}")
            cells.append(f"{_leak(found)} ({_range(found['range'])})")
            cells.append(f"{_percent(found['gain'])} ({_percent(found['own gain'])})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _leak(found: Mapping[str, Any]) -> str:
    return "G behind O" if found["leak"] is None else _percent(found["leak"])


def _range(shares: Sequence[float | None]) -> str:
    """Of single seeds."""
    known = [share for share in shares if share is not None]
    if not known:
        return "–"
    if max(known) <= 0:
        return "each none"
    return f"{_percent(min(known))} to {_percent(max(known))}"


def _percent(share: float | None) -> str:
    """Of a share; beyond an end it is only noise, or how small the way is."""
    if share is None:
        return "–"
    if share <= 0:
        return "none"
    return f"{100 * share:.0f} %" if share < 2 else "> 200 %"


def draw(results: Results, path: Path) -> None:
    """The plane of what is kept and what leaks to one client, a panel per scene."""
    scenes = {
        scene: found for scene in _scenes(results) if (found := _points(summary(results, scene)))
    }
    if not scenes:
        return
    figure = Figure(figsize=(3.6 * len(scenes), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (scene, points) in zip(figure.subplots(1, len(scenes), squeeze=False)[0],
                                     scenes.items(), strict=True):  # fmt: skip
        axes.add_patch(
            Rectangle((_LEFT, 100 * _KEPT), 100 * _LEAK[1] - _LEFT, 999, color="#009E73", alpha=0.1)
        )
        for recipe, (leak, kept) in points.items():
            look = _LOOKS.get(recipe, _OTHER)
            axes.plot(leak, max(kept, 0.0), look.marker, markersize=look.size, color=look.color)
        axes.set_title(scene)
        axes.set_xlabel("leak to one client (%)")
        axes.set_xlim(_LEFT, _RIGHT + 10)
        axes.set_xticks([0, 25, 50, 75, 100], ["none", "25", "50", "75", "all"])
        axes.set_ylim(-5, max(125, *(kept + 10 for _, kept in points.values())))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("kept of what FedAvg gains (%)")
    known = {recipe for points in scenes.values() for recipe in points}
    handles: list[Line2D | Patch] = [
        Line2D([], [], marker=look.marker, markersize=look.size, color=look.color, linestyle="",
               label=name)
        for name, look in {**_LOOKS, "other recipes": _OTHER}.items()
        if name in known or look is _OTHER
    ]  # fmt: skip
    handles.append(Patch(color="#009E73", alpha=0.1, label="aimed at"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class _Look:
    color: str
    marker: str = "o"
    size: int = 8


_LOOKS = {
    "FedAvg": _Look("#222222", "s", 7),
    "paper": _Look("#D55E00", "X", 10),
    "once, 20 %": _Look("#CC79A7", "D", 7),
    "public": _Look("#0072B2", "*", 15),
    "public, 3 x the work": _Look("#56B4E9", "*", 15),
    "FedAvg, tuned again": _Look("#7a7a7a", "s", 7),
}
_OTHER = _Look("#b0b0b0", "o", 5)
_LEFT, _RIGHT = -12.0, 110.0
"""Of the axis of leaks, in percent: what is less than none or more than all is at its ends."""


def _points(found: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Leak to one client and what is kept, in percent. FedAvg hands out all there is."""
    return {
        recipe: (_place(values), 100 * values["kept"])
        for recipe, values in found.items()
        if values["kept"] is not None
    }


def _place(values: Mapping[str, Any]) -> float:
    if not values["attacks"]:
        return 100.0
    leak = values["attacks"][1]["leak"]
    if leak is None:  # the attacker's own data are worth more than the owner's model
        ahead = values["metric"].lead(values["attacks"][1]["A"], values["attacks"][1]["O"]) > 0
        return _RIGHT if ahead else 0.0
    return float(min(max(100 * leak, 0.0), _RIGHT))
