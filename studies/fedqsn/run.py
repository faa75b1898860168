"""What owners keep and attackers get, by recipe: the tables and the picture of README.md.

    python -m studies.fedqsn.run                      # everything, 3 seeds, two processes
    python -m studies.fedqsn.run --scenes digits --seeds 0 --only FedAvg public

Finished runs are in results.jsonl beside this file, and are not repeated. B is the owner's base, F
what FedAvg makes of it, G the recipe's global model, A the best attacker of the audit, O the best
that the same attacker reaches with none of the released bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedveil import Federation, Secret, Tuning
from fedveil.audit import Evidence, audit
from fedveil.engine import Evaluation
from fedveil.run import Audit
from fedveil.tasks.metrics import metric_named, metric_of
from fedveil.training import evaluate
from studies.fedqsn.pool import run_missing
from studies.fedqsn.recipes import COALITIONS, Recipe, recipes_of
from studies.fedqsn.retuning import best, on_the_way
from studies.fedqsn.scenes import SCENES, Scene
from studies.fedqsn.tables import draw, page, table
from studies.results import Results

SECRET = Secret(hashlib.sha256(b"fedveil publications").digest())


def run(scene: Scene, recipe: Recipe, seed: int, *, full: bool) -> dict[str, Any]:
    """One federation and its audit: what models reach, by name and coalition."""
    plan, started = scene.plan, time.perf_counter()
    if recipe.releases is not None:
        plan = plan.at_once(len(scene.clients), recipe.releases, recipe.work)
    training = replace(plan.training, own_classes=recipe.own_classes)
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(
            scene.base, scene.clients, task=scene.task, scheme=recipe.scheme, test=scene.test,
            public=scene.public if recipe.public else None,
            owner=scene.owner if recipe.public else None,
            tuning=Tuning(scene.tuned, scene.tuning) if recipe.tuned and recipe.public else None,
            training=training, clients_per_round=plan.clients_per_round, secret=SECRET,
            seed=seed, out=Path(folder), keep_messages="proxies",
            evaluation=Evaluation(every=0, base=False),
        )  # fmt: skip
        result = federation.run(plan.rounds)
        final = result.global_model
        if recipe.tuned and not recipe.public:
            final = best(scene, on_the_way(scene, final, seed))
        trained = time.perf_counter() - started
        base = evaluate(scene.base, scene.task, scene.test)
        found = None
        if recipe.attacked:
            stage = federation.stage(scene.public)
            found = audit(Evidence(folder), stage, full=full, coalitions=COALITIONS)
    metric = metric_of(scene.task).name
    return {
        "metric": metric,
        "B": base[metric],
        "G": evaluate(final, scene.task, scene.test)[metric],
        "made of": {
            name: result.rounds[-1].metrics[name]
            for name in ("own", "taught", "tuned") if name in result.rounds[-1].metrics
        },
        "attacks": {} if found is None else {
            str(size): attacked(found, size) for size in COALITIONS
        },
        "down": result.mean_bytes_down() * plan.rounds / result.parameters_bytes,
        "full": full,
        "seconds": [round(trained), round(time.perf_counter() - started - trained)],
    }  # fmt: skip


def attacked(found: Audit, size: int) -> dict[str, Any]:
    """The best of a coalition with all that it was sent, and with nothing of it."""
    metric = metric_named(found.metric)
    mine = [a for a in found.attacks if len(a.clients) == size]
    stolen = metric.best((a for a in mine if a.released), lambda one: one.measures)
    alone = metric.best((a for a in mine if not a.released), lambda one: one.measures)
    assert stolen is not None
    assert alone is not None
    kinds: dict[str, float] = {}
    for attack in mine:
        kind = ", ".join(filter(None, (attack.attack, attack.holes, attack.polish)))
        value = attack.measures[metric.name]
        if kind not in kinds or metric.lead(value, kinds[kind]) > 0:
            kinds[kind] = value
    return {
        "A": stolen.measures[metric.name],
        "O": alone.measures[metric.name],
        "kinds": kinds,
    }


@dataclass(frozen=True)
class Trial:
    """One recipe on one scene; see `pool.Job`."""

    scene: str
    seed: int
    recipe: str
    full: bool
    audited: bool = True

    @property
    def name(self) -> str:
        """See `pool.Job`."""
        return f"{self.scene}: {self.recipe}"

    def run(self, scene: Scene) -> dict[str, Any]:
        """See `pool.Job`."""
        recipe = recipes_of(self.scene)[self.recipe]
        recipe = replace(recipe, attacked=recipe.attacked and self.audited)
        return run(scene, recipe, self.seed, full=self.full)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of recipes; all by default")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--quick", action="store_true", help="no full audits, to find a way")
    parser.add_argument(
        "--no-audits",
        action="store_true",
        help="G alone; not beside runs that were audited (--out)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    results = Results(options.out)
    trials = [
        Trial(name, seed, recipe, settings.full and not options.quick, not options.no_audits)
        for seed in options.seeds
        for name in options.scenes
        for recipe, settings in recipes_of(name).items()
        if options.only is None or recipe in options.only
    ]
    run_missing(
        results, trials, processes=options.processes,
        told=lambda values: f"G {values['G']:.2f}, {sum(values['seconds'])} s",
    )  # fmt: skip
    for name in options.scenes:
        print(f"\n{name}\n\n{table(results, name)}")
    (options.out / "tables.md").write_text(page(results))
    draw(results, options.out / "frontier.png")


if __name__ == "__main__":
    main()
