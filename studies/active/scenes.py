"""Federations to be attacked: an owner's network for handwritten digits, and ten clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedveil import (
    Bounds,
    Evaluation,
    Federation,
    FedQSN,
    ImageClassification,
    Secret,
    Training,
    Tuning,
)
from fedveil.hub import mnist_5k, partition
from fedveil.masking import Release
from fedveil.schemes import Scheme, ServerSide
from fedveil.schemes.client import UNIT_PREFIX
from fedveil.schemes.fedqsn import FedQSNServer
from fedveil.selection import Selection
from fedveil.state import read_state
from fedveil.tasks import Prepared
from fedveil.training import Trainer
from fedveil.units import find_units
from fedveil.wire import Message, UnitIndex

__all__ = [
    "ATTACKER",
    "Scene",
    "Watched",
    "bounds",
    "cut_of",
    "digits",
    "few_images",
    "global_model",
    "pixels",
    "toy",
    "young",
]

ATTACKER = "client-00"
CLIENTS = 10
TEST, JUDGING = 1000, 100


@dataclass(frozen=True)
class Scene:
    """An owner, ten clients, and how they train."""

    model: nn.Module
    task: ImageClassification
    clients: Mapping[str, Prepared]
    test: Prepared
    training: Training
    seed: int
    images: Mapping[str, Tensor]
    """The clients' rows as pixels from 0 to 1, [rows, pixels]: for the judge."""
    widths: tuple[int, ...] = ()
    tuning: Tuning | None = None
    """How the owner made its model."""
    judging: Prepared | None = None
    """Rows of the owner's that it did not tune its model on."""

    def rows_of(self, client: str) -> list[dict[str, Any]]:
        """A client's rows, with images as the model gets them."""
        data = self.clients[client]
        return [
            {"image": self.task.read(row), "label": row["label"]}
            for row in data.select(range(len(data)))
        ]

    def public_recipe(self) -> dict[str, Any]:
        """Settings of a federation in which a random initialization goes out."""
        assert self.tuning is not None
        return {
            "public": network(self.seed + 1000, self.widths), "owner": self.judging,
            "tuning": self.tuning,
        }  # fmt: skip

    def federation(self, scheme: Scheme, bounded: bool, **changes: Any) -> Federation:
        """With the default bounds, or with none."""
        settings = {
            "task": self.task, "training": self.training, "test": self.test, "seed": self.seed,
            "secret": Secret(self.seed.to_bytes(32, "big")), "scheme": scheme, **bounds(bounded),
            "evaluation": Evaluation(every=0, proxies=0), **changes,
        }  # fmt: skip
        return Federation(self.model, self.clients, **settings)


def bounds(bounded: bool) -> dict[str, Any]:
    """The setting of a federation that has the default bounds, or none."""
    return {} if bounded else {"bounds": Bounds.none()}


def digits(seed: int, training: Training | None = None) -> Scene:
    """A network of two hidden layers; every client has 100 images."""
    return _scene(seed, (784, 128, 64, 10), 100, training or Training(), tuned=500)


def few_images(seed: int) -> Scene:
    """A network of one hidden layer; every client has eight images, which are one batch."""
    return _scene(seed, (784, 128, 10), 8, Training(), tuned=500)


def young(seed: int) -> Scene:
    """As `digits`, of an owner with 100 images: clients have much to teach it."""
    return _scene(seed, (784, 128, 64, 10), 100, Training(steps=20, learning_rate=1e-3), tuned=100)


def toy(seed: int) -> Scene:
    """Of no size: eight by eight pixels of noise, three classes, two images a client."""
    dice = torch.Generator().manual_seed(seed)
    task = ImageClassification(num_labels=3)

    def rows(count: int) -> Prepared:
        images = torch.rand(count, 1, 8, 8, generator=dice)
        return task.prepare([{"image": x, "label": n % 3} for n, x in enumerate(images)])

    clients = {f"client-{number:02d}": rows(2) for number in range(CLIENTS)}
    images = {name: pixels(task, share) for name, share in clients.items()}
    return Scene(
        network(seed, (64, 96, 3)), task, clients, rows(30), Training(), seed, images, (64, 96, 3),
        Tuning(rows(6), Training(steps=2)), rows(6),
    )  # fmt: skip


def _scene(
    seed: int, widths: tuple[int, ...], rows: int, training: Training, *, tuned: int
) -> Scene:
    data = mnist_5k().shuffle(seed=seed)
    task = ImageClassification(num_labels=10)
    model, first = network(seed, widths), TEST + tuned + JUDGING
    own = task.prepare(data.select(range(TEST, TEST + tuned)))
    tuning = Tuning(own, Training(steps=300, batch_size=16, learning_rate=1e-3))
    Trainer(task, own, tuning.training).train(model, seed=seed)
    shares = partition(
        data.select(range(first, first + CLIENTS * rows)), CLIENTS, how="iid", seed=seed
    )
    clients = {name: task.prepare(share) for name, share in shares.items()}
    images = {name: pixels(task, share) for name, share in clients.items()}
    test, judging = data.select(range(TEST)), data.select(range(first - JUDGING, first))
    return Scene(
        model, task, clients, task.prepare(test), training, seed, images, widths, tuning,
        task.prepare(judging),
    )  # fmt: skip


def network(seed: int, widths: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between them, from pixels to classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def pixels(task: ImageClassification, rows: Prepared) -> Tensor:
    """The images of some rows as the model gets them, [rows, pixels]."""
    batch = task.collate(rows.select(range(len(rows))))
    return next(t for name, t in batch.items() if name != "labels").flatten(1)


@dataclass(frozen=True)
class Watched(FedQSN):
    """FedQSN, whose server a judge may look at: what an attacker made is held against it."""

    servers: ClassVar[list[ServerSide]] = []

    def server(self, model: nn.Module, secret: Secret) -> FedQSNServer:
        """As ever; the newest is remembered."""
        made = super().server(model, secret)
        self.servers[:] = [made]
        return made


def global_model() -> dict[str, Tensor]:
    """The global model of the newest `Watched` federation, as it is now."""
    return Watched.servers[0].view("global")


def cut_of(message: Message, model: nn.Module, choice: str) -> Selection:
    """Which elements of a model a proxy released."""
    groups = find_units(model, choice)
    released = {}
    for group in groups:
        index = message.sections[UNIT_PREFIX + group.name]
        assert isinstance(index, UnitIndex)
        released[group.name] = Release(index.released, index.scale)
    return Selection(groups, released, {n: t.shape for n, t in read_state(model).items()})
