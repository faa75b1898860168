"""Utility against the number of releases, at equal work for every client.

    python -m studies.releases                  # seeds 0 1 2; about 15 minutes on two cores
    python -m studies.releases --seeds 0

On the demo's task all ten clients take part in every round, and 40 optimizer steps each are spread
over 1, 2 or 3 rounds. Finished runs are kept in runs/releases/results.jsonl and not repeated;
the picture is runs/releases/releases.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fedveil.demo import Scene, Setting, build_federation, fast_matmul, prepare
from fedveil.engine import Evaluation
from fedveil.schemes import FedAvg, FedQSN, Scheme
from studies.results import Results

SCHEMES: dict[str, Scheme] = {
    "FedAvg": FedAvg(),
    "FedQSN, RegMean": FedQSN(client_mask=0.0, aggregation="regmean", block=64, shrink=False),
}
RELEASES = (1, 2, 3)
VIEWS = ("global", "server_model", "proxy_before", "proxy_after")


def run(
    scheme: Scheme, releases: int, scene: Scene, setting: Setting, workers: int
) -> dict[str, Any]:
    """Accuracies in percent after the last round, with proxies as means over three clients."""
    at = setting.at_once()
    steps = round(setting.total_steps / releases)
    at = replace(at, rounds=releases, releases=releases, training=replace(at.training, steps=steps))
    evaluation = Evaluation(every=0, proxies=3, base=False)
    result = build_federation(scene, at, scheme, workers, evaluation=evaluation).run(releases)
    measures = result.rounds[-1].measures
    return {
        **{view: measures.get(view, {}).get("accuracy") for view in VIEWS},
        "down": 100 * releases * result.mean_bytes_down() / result.parameters_bytes,
        "up": 100 * releases * result.mean_bytes_up() / result.parameters_bytes,
    }


def show(results: Results) -> Table:
    """Means over seeds; bytes are those of one client in all rounds together."""
    table = Table("scheme", "releases", "seeds", *VIEWS, "range of global", "down %", "up %")
    for name in SCHEMES:
        for releases in RELEASES:
            rows = results.of(f"{name} x{releases}")
            if rows:
                finals = [row["global"] for row in rows]
                means = (mean(rows, key) for key in (*VIEWS, "down", "up"))
                cells = ["-" if value is None else f"{value:.1f}" for value in means]
                spread = f"{min(finals):.1f} to {max(finals):.1f}"
                table.add_row(name, str(releases), str(len(rows)), *cells[:4], spread, *cells[4:])
    return table


def mean(rows: list[Mapping[str, float | None]], key: str) -> float | None:
    """Mean over seeds of what was measured."""
    values = [value for row in rows if (value := row.get(key)) is not None]
    return statistics.mean(values) if values else None


def draw(results: Results, path: Path) -> None:
    """What the owner keeps, and the most that anyone was sent, against the number of releases."""
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, colour in zip(SCHEMES, ("#0072B2", "#CC79A7"), strict=True):
        points = [(r, results.of(f"{name} x{r}")) for r in RELEASES if results.of(f"{name} x{r}")]
        for key, style, word in (("global", "-o", "global model"), ("proxy_before", ":v", "sent")):
            means: list[Any] = [mean(rows, key) for _, rows in points]
            axes.plot(
                [releases for releases, _ in points], means,
                style, color=colour, label=f"{name}: {word}",
            )  # fmt: skip
    axes.set_xlabel("releases per client (rounds), at 40 local steps in all")
    axes.set_ylabel("accuracy (%), mean over seeds")
    axes.set_xticks(RELEASES)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Run what is missing, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/releases"))
    arguments = parser.parse_args()
    console, results = Console(), Results(arguments.out)
    for seed in arguments.seeds:
        setting, scene = replace(Setting(judging_documents=0), seed=seed), None
        for name, scheme in SCHEMES.items():
            for releases in RELEASES:
                key = f"{name} x{releases}"
                if not results.has(key, seed):
                    scene = scene or prepare(setting)
                    values = run(scheme, releases, scene, setting, arguments.workers)
                    results.add(key, seed, values)
                    console.print(f"seed {seed}, {key}: {values}", soft_wrap=True)
    console.print(show(results))
    draw(results, arguments.out / "releases.png")


if __name__ == "__main__":
    with fast_matmul():  # as the demo
        main()
