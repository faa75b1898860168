"""Tables and the picture, of finished runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recipes import COALITIONS, recipes_of

from fedveil.training.metrics import Metric, metric_named

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from results import Results, Values

__all__ = ["draw", "summary", "table"]

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
            "base": base, "kept": metric.share(final, base, far),
            "attacks": {
                size: _attacked(metric, [run["attacks"][str(size)] for run in runs], base, final)
                for size in COALITIONS if runs[0]["attacks"]
            },
        }  # fmt: skip
    return found


def _attacked(
    metric: Metric, attacks: Sequence[Values], base: float, final: float
) -> dict[str, Any]:
    reached, own = _mean(attacks, "A"), _mean(attacks, "O")
    return {
        "A": reached,
        "O": own,
        "leak": metric.share(reached, own, final),
        "gain": metric.share(reached, base, final),
        "own gain": metric.share(own, base, final),
        "range": [one["leak"] for one in attacks],
    }


def _mean(rows: Sequence[Values], key: str) -> float:
    return mean(row[key] for row in rows)


def table(results: Results, scene: str) -> str:
    """Markdown."""
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
            cells.append(f"{_percent(found['leak'])} ({_range(found['range'])})")
            cells.append(f"{_percent(found['gain'])} ({_percent(found['own gain'])})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        scene: found
        for scene in dict.fromkeys(name.partition(":")[0] for name in results.names())
        if (found := _points(summary(results, scene)))
    }
    if not scenes:
        return
    figure = Figure(figsize=(4.2 * len(scenes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (scene, points) in zip(figure.subplots(1, len(scenes), squeeze=False)[0],
                                     scenes.items(), strict=True):  # fmt: skip
        axes.axvspan(-1000, 100 * _LEAK[1], color="#009E73", alpha=0.08)
        axes.axhline(100 * _KEPT, color="#009E73", linewidth=1, linestyle=":")
        for recipe, (leak, kept) in points.items():
            ours = recipe == "public"
            axes.plot(
                leak,
                kept,
                "*" if ours else "o",
                markersize=15 if ours else 6,
                color="#0072B2" if ours else "#D55E00" if recipe == "paper" else "#6b6b6b",
            )
            axes.annotate(recipe, (leak, kept), (5, 5), textcoords="offset points", fontsize=8)
        axes.set_title(scene)
        axes.set_xlabel("leak to one client (%), less is better")
        low = min(0.0, *(leak for leak, _ in points.values()))
        axes.set_xlim(max(-60, low - 10), max(110, *(leak + 10 for leak, _ in points.values())))
        axes.set_ylim(0, max(120, *(kept + 10 for _, kept in points.values())))
    figure.axes[0].set_ylabel("of FedAvg's gain kept by the owner (%)")
    figure.savefig(path, dpi=110)


def _points(found: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Leak to one client and what is kept, in percent."""
    return {
        recipe: (100 * values["attacks"][1]["leak"], 100 * values["kept"])
        for recipe, values in found.items()
        if values["kept"] is not None
        and values["attacks"] and values["attacks"][1]["leak"] is not None
    }  # fmt: skip
