"""How the owner's model should learn what clients teach the public one: what was tried.

    python publications/fedqsn/leads.py                     # bbc and rotten, 3 seeds
    python publications/fedqsn/leads.py --scenes bbc --seeds 0

All clients train the public model once, in full precision, and their models are merged; P is the
public model, B the owner's, X what clients teach P. Finished runs are in leads/results.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scenes import SCENES, Scene
from torch import Tensor, nn

from fedveil.config.models import quiet_transformers
from fedveil.demo import fast_matmul
from fedveil.demo.setting import offline
from fedveil.merging import MergeStatistics, merge, statistics_of
from fedveil.schemes.transfer import COEFFICIENTS
from fedveil.state import load_state, read_state
from fedveil.training import Trainer, evaluate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from results import Results

HEADS = ("the owner's beginning", "another", "zero")
"""What the public model's head is: that which the owner's began with, or a new one."""
CALIBRATION = (4, 16)
"""Steps in which the owner trains what came of it on his own rows."""
WEIGHTS = (1.0, 4.0, 16.0)
"""The owner's model as one more to be merged counts for so many times his rows."""


def tried(scene: Scene, seed: int, head: str) -> dict[str, Any]:
    """The accuracy of each way, in percent; and the loss on the owner's rows of some."""
    assert scene.public is not None
    public = with_head(scene.public, head, seed)
    models, statistics = taught(scene, public, seed)
    weights = [float(len(rows)) for rows in scene.clients.values()]
    (merged,) = merge(models, statistics=statistics, weights=weights)
    (averaged,) = merge(models, method="mean", weights=weights)
    found: dict[str, Any] = {"B": measure(scene, scene.base)}
    for name, model in (("P + X", merged), ("P + X, mean", averaged)):
        found[name] = measure(scene, model)
    for own, learned in COEFFICIENTS:
        model = combined(public, scene.base, merged, own, learned)
        name = f"P + {own:g} (B - P) + {learned:g} X"
        found[name] = measure(scene, model)
        found[f"loss of {name}"] = evaluate(model, scene.task, scene.owner)["loss"]
    both = combined(public, scene.base, merged, 1.0, 1.0, fresh="classifier.")
    found["B + X, head taken whole"] = measure(scene, both)
    for steps in CALIBRATION:
        model = combined(public, scene.base, merged, 1.0, 1.0)
        tuning = replace(scene.plan.training, steps=steps)
        Trainer(scene.task, scene.owner, tuning).train(model, seed=seed)
        found[f"B + X, then {steps} steps on the owner's rows"] = measure(scene, model)
    mine = statistics_of(scene.base, scene.owner, task=scene.task)
    for weight in WEIGHTS:
        (joined,) = merge(
            [*models, scene.base], statistics=[*statistics, mine],
            weights=[*weights, weight * len(scene.owner)],
        )  # fmt: skip
        found[f"B merged as one more, {weight:g} times its rows"] = measure(scene, joined)
    return found


def with_head(public: nn.Module, head: str, seed: int) -> nn.Module:
    """A copy of the public model with one of `HEADS`."""
    model: Any = copy.deepcopy(public)
    if head != HEADS[0]:
        torch.manual_seed(seed + 1000)
        nn.init.normal_(model.classifier.weight, std=0.02 if head == HEADS[1] else 0.0)
        nn.init.zeros_(model.classifier.bias)
    return model


def taught(
    scene: Scene, public: nn.Module, seed: int
) -> tuple[list[nn.Module], list[MergeStatistics]]:
    """What each client makes of the public model with all the work of the federation."""
    training = scene.plan.at_once(len(scene.clients)).training
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


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """Means over seeds, and each seed."""
    lines = ["| | mean | each seed |", "|---|---|---|"]
    for name in (name for name in rows[0] if not name.startswith("loss of")):
        values = [row[name] for row in rows]
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {mean(values):.1f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["bbc", "rotten"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "leads")
    options = parser.parse_args()
    results = Results(options.out)
    torch.set_num_threads(1)
    with offline(), fast_matmul(), quiet_transformers():
        for name in options.scenes:
            for seed in options.seeds:
                heads = HEADS if name == "bbc" else HEADS[:1]
                missing = [h for h in heads if not results.has(f"{name}, head: {h}", seed)]
                scene = SCENES[name](seed) if missing else None
                for head in missing:
                    values = tried(scene, seed, head)
                    results.add(f"{name}, head: {head}", seed, values)
                    print(name, seed, head, values, file=sys.stderr, flush=True)
    for name in results.names():
        print(f"\n{name}\n\n{table(results.of(name))}")


if __name__ == "__main__":
    main()
