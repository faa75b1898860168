"""How the owner's model should learn what clients teach the public one: what was tried.

    python -m studies.fedqsn.leads                     # three scenes, 3 seeds
    python -m studies.fedqsn.leads --scenes bbc --seeds 0

All clients train the public model once, in full precision, and their models are merged; P is the
public model, B the owner's, X what clients teach P. Finished runs are in leads/results.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.merging import MergeStatistics, merge, statistics_of
from fedveil.schemes.transfer import COEFFICIENTS
from fedveil.state import load_state, read_state
from fedveil.training import Trainer, evaluate
from studies.fedqsn.pool import run_missing
from studies.fedqsn.retuning import best, on_the_way
from studies.fedqsn.scenes import Scene
from studies.results import Results

PLAIN, OWN_CLASSES = "as ever", "own classes"
TRAININGS = (PLAIN, OWN_CLASSES)
"""Whether clients leave classes that they lack out of the softmax."""
HEAD = "classifier."
ANOTHER_HEAD = "another head"
"""The public model's head is not that which the owner's began with; clients train as ever."""
WAYS = {
    "bbc": (*TRAININGS, ANOTHER_HEAD), "newsgroups": TRAININGS, "digits": TRAININGS,
}  # fmt: skip
JUDGES = ("that B was not tuned on", "that it was tuned on")
PROJECTIONS = (1.25, 1.5)
"""How far beyond what clients taught the trajectory is drawn on, in private."""
CALIBRATION = (4, 16)
"""Steps in which the owner trains what came of it on its own rows."""
WEIGHTS = (1.0, 4.0, 16.0)
"""The owner's model as one more to be merged counts for so many times the owner's rows."""


def tried(scene: Scene, seed: int, begun: str) -> dict[str, Any]:
    """The accuracy of each way, in percent."""
    public = with_head(scene.public, begun, seed)
    models, statistics = taught(scene, public, seed, own_classes=begun == OWN_CLASSES)
    weights = [float(len(rows)) for rows in scene.clients.values()]
    (merged,) = merge(models, statistics=statistics, weights=weights)
    (averaged,) = merge(models, method="mean", weights=weights)
    found: dict[str, Any] = {"B": measure(scene, scene.base)}
    for name, model in (("P + X", merged), ("P + X, mean", averaged)):
        found[name] = measure(scene, model)
    losses: dict[str, dict[str, float]] = {judges: {} for judges in JUDGES}
    for further in PROJECTIONS:
        model = combined(public, public, merged, 0.0, further)
        found[f"P + {further:g} X"] = measure(scene, model)
    for own, learned in COEFFICIENTS:
        model = combined(public, scene.base, merged, own, learned)
        name = f"P + {own:g} (B - P) + {learned:g} X"
        found[name] = measure(scene, model)
        for judges, rows in zip(JUDGES, (scene.owner, scene.tuned), strict=True):
            losses[judges][name] = evaluate(model, scene.task, rows)["loss"]
    for judges, by_name in losses.items():
        found[f"the one of these with the least loss on rows {judges}"] = found[
            min(by_name, key=by_name.__getitem__)
        ]
    if any(name.startswith(HEAD) for name in read_state(public)):
        both = combined(public, scene.base, merged, 1.0, 1.0, fresh=HEAD)
        found["B + X, head taken whole"] = measure(scene, both)
    for steps in CALIBRATION:
        model = combined(public, scene.base, merged, 1.0, 1.0)
        tuning = replace(scene.plan.training, steps=steps)
        Trainer(scene.task, scene.owner, tuning).train(model, seed=seed)
        found[f"B + X, then {steps} steps on the owner's rows"] = measure(scene, model)
    for name, start in (("B", scene.base), ("P + X", merged)):
        way = on_the_way(scene, start, seed + 1)
        found[f"{name}, then tuned as B was"] = measure(scene, way[-1])
        found[f"{name}, then tuned so, or the one on the way with the least loss"] = measure(
            scene, best(scene, way)
        )
    mine = statistics_of(scene.base, scene.owner, task=scene.task)
    for weight in WEIGHTS:
        (joined,) = merge(
            [*models, scene.base], statistics=[*statistics, mine],
            weights=[*weights, weight * len(scene.owner)],
        )  # fmt: skip
        found[f"B merged as one more, {weight:g} times its rows"] = measure(scene, joined)
    return found


def with_head(public: nn.Module, begun: str, seed: int) -> nn.Module:
    """A copy of the public model, with another head if that is told."""
    model: Any = copy.deepcopy(public)
    if begun == ANOTHER_HEAD:
        torch.manual_seed(seed + 1000)
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
    copied: nn.Module = model
    return copied


def taught(
    scene: Scene, public: nn.Module, seed: int, *, own_classes: bool
) -> tuple[list[nn.Module], list[MergeStatistics]]:
    """What each client makes of the public model with all the work of the federation."""
    training = replace(scene.plan.at_once(len(scene.clients)).training, own_classes=own_classes)
    models, statistics = [], []
    for number, rows in enumerate(scene.clients.values()):
        model = copy.deepcopy(public)
        Trainer(scene.task, rows, training).train(model, seed=100 * seed + number)
        models.append(model)
        statistics.append(statistics_of(model, rows, task=scene.task))
    return models, statistics


def combined(
    public: nn.Module, base: nn.Module, merged: nn.Module, own: float, learned: float,
    fresh: str | None = None,
) -> nn.Module:  # fmt: skip
    """``P + own (B - P) + learned X``; what is fresh begins at zero."""
    model, begun = copy.deepcopy(base), read_state(public)
    mine, theirs = read_state(base), read_state(merged)
    state: dict[str, Tensor] = {}
    for name, start in begun.items():
        if start.is_floating_point():
            at = torch.zeros_like(start) if fresh and name.startswith(fresh) else start
            state[name] = at + own * (mine[name] - at) + learned * (theirs[name] - at)
    load_state(model, state)
    return model


def measure(scene: Scene, model: nn.Module) -> float:
    """Accuracy on the owner's test set, in percent."""
    return evaluate(model, scene.task, scene.test)["accuracy"]


@dataclass(frozen=True)
class Lead:
    """All ways to learn from one training of the clients; see `pool.Job`."""

    scene: str
    seed: int
    way: str

    @property
    def name(self) -> str:
        """See `pool.Job`."""
        return f"{self.scene}, {self.way}"

    def run(self, scene: Scene) -> dict[str, Any]:
        """See `pool.Job`."""
        return tried(scene, self.seed, self.way)


def table(results: Results, scene: str) -> str:
    """Means over seeds, and each seed; a column for each way that clients train."""
    found = {way: results.by_seed(f"{scene}, {way}") for way in WAYS[scene]}
    columns = {way: [rows[seed] for seed in sorted(rows)] for way, rows in found.items() if rows}
    lines = [f"| {' | '.join(['', *columns])} |", f"|{'---|' * (1 + len(columns))}"]
    for name in next(iter(columns.values()))[0]:
        cells = [_cell([row[name] for row in rows]) for rows in columns.values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f} ({each})"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scenes", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "leads")
    options = parser.parse_args()
    results = Results(options.out)
    leads = [
        Lead(name, seed, way)
        for way in (*TRAININGS, ANOTHER_HEAD)
        for seed in options.seeds
        for name in options.scenes
        if way in WAYS[name]
    ]
    run_missing(results, leads, processes=options.processes, told=str)
    begun = [scene for scene in WAYS if any(results.of(f"{scene}, {way}") for way in WAYS[scene])]
    found = "\n\n".join(f"## {scene}\n\n{table(results, scene)}" for scene in begun)
    print(found)
    head = "# How the owner's model should learn\n\nAccuracy in percent. Written by `leads.py`."
    (options.out / "tables.md").write_text(f"{head}\n\n{found}\n")


if __name__ == "__main__":
    main()
