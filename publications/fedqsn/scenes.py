"""The tasks: an owner with a base, ten clients of skewed data, and what anybody can get."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedveil.data import mnist_5k, partition
from fedveil.demo import Setting
from fedveil.demo import prepare as prepare_bbc
from fedveil.engine.crew import threads
from fedveil.training import ImageClassification, Prepared, Task, Trainer, Training

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
        clients: Their rows.
        test: The owner's test set.
        plan: Of FedAvg and other schemes of many rounds.
    """

    base: nn.Module
    public: nn.Module | None
    task: Task
    clients: Mapping[str, Prepared]
    test: Prepared
    plan: Plan


def bbc(seed: int) -> Scene:
    """MiniLM (22.7 M parameters), tuned on 60 documents of BBC News in five classes."""
    setting = Setting(seed=seed)
    scene = prepare_bbc(setting)
    plan = Plan(setting.rounds, setting.clients_per_round, setting.training)
    return Scene(scene.base, scene.public, scene.task, scene.clients, scene.test, plan)


def digits(seed: int) -> Scene:
    """A small convolutional network, trained on 100 handwritten digits of MNIST; none is public."""
    rows = mnist_5k().shuffle(seed=seed)
    test, owner = rows.select(range(1000)), rows.select(range(1000, 1100))
    clients = partition(
        rows.select(range(1100, len(rows))), 10, how="dirichlet", alpha=0.3, min_size=20, seed=seed
    )
    task = ImageClassification(num_labels=10)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    tuning = Training(steps=60, batch_size=16, learning_rate=1e-3)
    with threads(1):
        Trainer(task, owner, tuning).train(model, seed=seed)
    training = Training(steps=20, batch_size=16, learning_rate=1e-3)
    prepared = {name: task.prepare(data) for name, data in clients.items()}
    return Scene(model, None, task, prepared, task.prepare(test), Plan(5, 8, training))


def headlines(seed: int) -> Scene:
    """SmolLM2 (135 M parameters) with a LoRA adapter that begins at zero, on headlines of BBC News.

    The owner's base is public; what is his is what the federation adds.
    """
    from fedveil.demo.generation import GenerationSetting
    from fedveil.demo.generation import prepare as prepare_headlines

    setting = GenerationSetting(seed=seed)
    model, task, clients, test, _ = prepare_headlines(setting)
    plan = Plan(setting.rounds, setting.clients, setting.training)
    return Scene(model, copy.deepcopy(model), task, clients, test, plan)


SCENES: Mapping[str, Callable[[int], Any]] = {"bbc": bbc, "digits": digits, "headlines": headlines}
