"""Accuracy of recipes on the demo's task, over seeds: what docs/measurements.md reports.

    python -m studies.recipes                         # all recipes, seeds 0 1 2; about an hour
    python -m studies.recipes --seeds 0 --only fedavg fedqsn

Finished runs are kept in runs/recipes/results.jsonl and not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from fedveil.demo import (
    Scene,
    Setting,
    build_federation,
    fast_matmul,
    own_data_alone,
    prepare,
)
from fedveil.schemes import FedAvg, FedQSN, Scheme
from studies.results import Results, Values

# What the default was chosen from, as it was then.
FORMER = FedQSN(block=64, shrink=False)

RECIPES: dict[str, Scheme] = {
    "fedavg": FedAvg(),
    "fedqsn-paper": FedQSN.paper(),
    "fedqsn": FedQSN(),
    "fedqsn-regmean": FedQSN(client_mask=0.0, aggregation="regmean"),
    "fedqsn, 8-bit updates": FedQSN(update_bits=8),
    "fedqsn, 8-bit updates, error feedback": FedQSN(update_bits=8, error_feedback=True),
    "fedqsn, 4-bit updates": FedQSN(update_bits=4),
    "fedqsn, 4-bit updates, error feedback": FedQSN(update_bits=4, error_feedback=True),
    "fedqsn, 2-bit updates": FedQSN(update_bits=2),
    "fedqsn, 2-bit updates, error feedback": FedQSN(update_bits=2, error_feedback=True),
    "block-64": FedQSN(block=64),
    "block-64-regmean": FedQSN(block=64, client_mask=0.0, aggregation="regmean"),
    "former": FORMER,
    "former, sticky masks": replace(FORMER, policy="sticky"),
    "former, fresh masks": replace(FORMER, policy="fresh"),
    "former, unbiased": replace(FORMER, unbiased=True),
    "former, mean over participants": replace(FORMER, average="participants"),
    "former, neurons and heads": replace(FORMER, units="neurons"),
    "former, columns": replace(FORMER, units="columns"),
    "former, 3 bit": replace(FORMER, bits=3),
    "former, 8-bit updates": replace(FORMER, update_bits=8),
    "former, 4-bit updates": replace(FORMER, update_bits=4),
}
ALONE = "own data alone"
RELEASED_ONCE = "regmean"
"""What the names of recipes end in that release one proxy per client."""
VIEWS = ("global", "server_model", "proxy_before", "proxy_after")


def run(name: str, scene: Scene, setting: Setting, workers: int) -> dict[str, float | None]:
    """One recipe with one seed: accuracies in percent, bytes as % of fp32."""
    at = setting.at_once() if name.endswith(RELEASED_ONCE) else setting
    result = build_federation(scene, at, RECIPES[name], workers).run(at.rounds)
    measures = result.rounds[-1].measures
    return {
        **{view: measures.get(view, {}).get("accuracy") for view in VIEWS},
        "down": 100 * result.mean_bytes_down() / result.parameters_bytes,
        "up": 100 * result.mean_bytes_up() / result.parameters_bytes,
    }


def show(results: Results) -> Table:
    """Mean over seeds, and the range of the global model."""
    table = Table("recipe", "seeds", *VIEWS, "range of global", "down %", "up %")
    for name in results.names():
        rows = results.of(name)
        means = [
            statistics.mean(v) if (v := [r[k] for r in rows if r.get(k) is not None]) else None
            for k in (*VIEWS, "down", "up")
        ]
        cells = ["-" if mean is None else f"{mean:.1f}" for mean in means]
        finals = [row["global"] for row in rows if row.get("global") is not None]
        spread = f"{min(finals):.1f} to {max(finals):.1f}" if finals else "-"
        table.add_row(name, str(len(rows)), *cells[:4], spread, *cells[4:])
    return table


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console, results = Console(width=140), Results(arguments.out)
    for seed in arguments.seeds:
        setting, scene = replace(Setting(judging_documents=0), seed=seed), None
        for name in [ALONE, *arguments.only]:
            if results.has(name, seed):
                continue
            scene = scene or prepare(setting)
            if name == ALONE:
                base, alone = own_data_alone(scene, setting, arguments.workers)
                values: Values = {"base": base, "proxy_after": alone}
            else:
                values = run(name, scene, setting, arguments.workers)
            results.add(name, seed, values)
            console.print(f"seed {seed}, {name}: {values}", soft_wrap=True)
    console.print(show(results))


if __name__ == "__main__":
    with fast_matmul():  # as the demo
        main()
