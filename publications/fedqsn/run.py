"""What owners keep and attackers get, by recipe: the table and the picture of README.md.

    python publications/fedqsn/run.py                      # everything, 3 seeds
    python publications/fedqsn/run.py --scenes digits --seeds 0 --only FedAvg "once, 4 bit, 10 %"

Finished runs are in results.jsonl beside this file, and are not repeated. B is the owner's base, F
what FedAvg makes of it, G the recipe's global model, A the best attacker of the audit, O the best
that the same attacker reaches with none of the released bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from recipes import RECIPES, Recipe
from scenes import SCENES, Scene

from fedveil import Federation, Secret
from fedveil.audit import Audit, Evidence, audit
from fedveil.config.models import quiet_transformers
from fedveil.demo import fast_matmul
from fedveil.demo.setting import offline
from fedveil.engine import Evaluation
from fedveil.engine.crew import threads
from fedveil.training import evaluate
from fedveil.training.metrics import metric_named

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from results import Results

COALITIONS = (1, 3)
SECRET = Secret(hashlib.sha256(b"fedveil publications").digest())


def run(scene: Scene, recipe: Recipe, seed: int, workers: int, *, full: bool) -> dict[str, Any]:
    """One federation and its audit: what models reach, by name and coalition."""
    plan = scene.plan
    if recipe.releases is not None:
        plan = plan.at_once(len(scene.clients), recipe.releases)
    start, started = scene.public if recipe.ancestor else scene.base, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(
            start, scene.clients, task=scene.task, scheme=recipe.scheme, test=scene.test,
            training=plan.training, clients_per_round=plan.clients_per_round, secret=SECRET,
            seed=seed, workers=workers, out=Path(folder), keep_messages="proxies",
            evaluation=Evaluation(every=0, base=False),
        )  # fmt: skip
        result = federation.run(plan.rounds)
        with threads(2):
            found = audit(
                Evidence(folder), federation.stage(scene.public), full=full, coalitions=COALITIONS
            )
            base = evaluate(scene.base, scene.task, scene.test)[found.metric]
    return {
        "metric": found.metric,
        "B": base,
        "G": found.models["global"][found.metric],
        "server": found.models.get("server_model", {}).get(found.metric),
        "attacks": {str(size): attacked(found, size, base) for size in COALITIONS},
        "down": result.mean_bytes_down() * plan.rounds / result.parameters_bytes,
        "full": full,
        "seconds": time.perf_counter() - started,
    }


def attacked(found: Audit, size: int, base: float) -> dict[str, Any]:
    """The best of a coalition with all that it was sent, and with nothing of it."""
    metric = metric_named(found.metric)
    mine = [a for a in found.attacks if len(a.clients) == size]
    best = metric.best((a for a in mine if a.released), lambda one: one.measures)
    alone = metric.best((a for a in mine if not a.released), lambda one: one.measures)
    assert best is not None
    assert alone is not None
    reached, own = best.measures[metric.name], alone.measures[metric.name]
    end = found.models["global"][metric.name]
    return {
        "A": reached,
        "O": own,
        "how": ", ".join(filter(None, (best.attack, best.holes, best.polish))),
        "leak": metric.share(reached, own, end),
        "gain": metric.share(reached, base, end),
    }


def table(results: Results, scene: str) -> str:
    """Means over seeds in Markdown; shares are of the means, as a single seed may lack one."""
    lines = [
        "| recipe | seeds | G | kept | one client: A, O, leak | gain shown | three: A, O, leak |",
        "|---|---|---|---|---|---|---|",
    ]
    fedavg = results.by_seed(f"{scene}: FedAvg")
    for recipe in RECIPES:
        rows = results.by_seed(f"{scene}: {recipe}")
        if not rows:
            continue
        metric = metric_named(next(iter(rows.values()))["metric"])
        base, final = (mean(row[key] for row in rows.values()) for key in ("B", "G"))
        both = rows.keys() & fedavg.keys()
        kept = None
        if both:
            kept = metric.share(
                mean(rows[seed]["G"] for seed in both),
                mean(rows[seed]["B"] for seed in both),
                mean(fedavg[seed]["G"] for seed in both),
            )
        cells = [recipe, str(len(rows)), metric.figure(final), percent(kept)]
        for size in COALITIONS:
            reached, own = (
                mean(row["attacks"][str(size)][key] for row in rows.values()) for key in "AO"
            )
            leak = percent(metric.share(reached, own, final))
            cells.append(f"{metric.figure(reached)}, {metric.figure(own)}, {leak}")
            if size == 1:
                cells.append(percent(metric.share(reached, base, final)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="an audit of a minute, to find a way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    results = Results(options.out)
    with offline(), fast_matmul(), quiet_transformers():
        for name in options.scenes:
            for seed in options.seeds:
                missing = [r for r in options.only if not results.has(f"{name}: {r}", seed)]
                scene = SCENES[name](seed) if missing else None
                for recipe in missing:
                    if RECIPES[recipe].ancestor and scene.public is None:
                        continue
                    values = run(
                        scene, RECIPES[recipe], seed, options.workers, full=not options.quick
                    )
                    results.add(f"{name}: {recipe}", seed, values)
                    print(name, seed, recipe, values, file=sys.stderr, flush=True)
    for name in options.scenes:
        print(f"\n{name}\n\n{table(results, name)}")


if __name__ == "__main__":
    main()
