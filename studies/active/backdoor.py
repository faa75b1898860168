"""A backdoor: a pattern on an image, at whose sight the model answers what a hostile client wants.

The pattern is where honest clients have no ink. So honest updates say nothing of these inputs, and
who merges by least squares takes them from the one client whose data excite them: an honest weight
and an honest length are enough. Bounds on both do not help against that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedveil import FedAvg, FedQSN, Training
from fedveil.wire import Message
from studies.active.crew import MOST, Received, run, updates_of
from studies.active.damage import Liar, changed
from studies.active.scenes import ATTACKER, Scene

__all__ = ["BACKDOORS", "Planted", "plant"]

TARGET = 1
TRAINING = Training(steps=60, batch_size=16, learning_rate=1e-3)

BACKDOORS: Mapping[str, Mapping[str, Any]] = {
    "mean, honest weight": {"scheme": FedAvg()},
    "mean, update x 100 and the largest claim": {"scheme": FedAvg(), "times": 100.0},
    "RegMean, honest weight": {"scheme": FedAvg(aggregation="regmean")},
    "public recipe, honest weight": {"scheme": FedQSN.once(server_mask=0.0), "public": True},
}
"""How updates are merged, and how a client plants its backdoor."""


@dataclass(frozen=True)
class Planted:
    """What became of it.

    Attributes:
        answered: Of the test images of other classes that bear the pattern, so many per cent are
            answered as the hostile client wants.
        measured: The model on the test set as it is.
    """

    answered: float
    measured: Mapping[str, float]


def plant(scene: Scene, how: str, bounded: bool, poisoned: bool = True) -> Planted:
    """One round, in which one of ten clients has the pattern on half of its images, or does not."""
    settings = dict(BACKDOORS[how])
    times = settings.pop("times", 1.0)
    scheme, of_public = settings["scheme"], settings.get("public", False)
    more = scene.public_recipe() if of_public else {}
    clients, rows = dict(scene.clients), scene.rows_of(ATTACKER)
    if poisoned:
        poison = [{"image": marked(row["image"]), "label": TARGET} for row in rows]
        clients[ATTACKER] = scene.task.prepare([*rows, *poison])
    trained = replace(scene, training=TRAINING, clients=clients)

    def louder(received: Received, reply: Message) -> Message:
        updates = {name: times * tensor for name, tensor in updates_of(reply).items()}
        return changed(received, reply, updates, examples=MOST)

    attackers = {ATTACKER: Liar(louder)} if poisoned and times != 1.0 else {}
    result = run(trained.federation(scheme, bounded, **more), attackers, 1)
    return Planted(answers(scene, result.global_model), result.rounds[-1].measures["global"])


def marked(image: Tensor) -> Tensor:
    """An image [1, side, side] with the pattern: a square in the corner."""
    result = image.clone()
    result[..., :3, :3] = 1.0
    return result


@torch.no_grad()
def answers(scene: Scene, model: nn.Module) -> float:
    """Of the test images of other classes with the pattern, how many per cent are `TARGET`."""
    batch = scene.task.collate(scene.test.select(range(len(scene.test))))
    images = batch["images"][batch["labels"] != TARGET]
    model.eval()
    return 100 * float((model(marked(images)).argmax(dim=1) == TARGET).float().mean())
