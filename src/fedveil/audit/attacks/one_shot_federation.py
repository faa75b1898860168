"""One-shot federation: the coalition runs a federation of its own, from what it has stolen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fedveil.aggregation import RegMean
from fedveil.audit.attacks.coalition import Coalition, Stolen
from fedveil.audit.attacks.registry import MODEL, register_attack
from fedveil.schemes import FedAvg
from fedveil.secret import Secret
from fedveil.state import load_state
from fedveil.tasks import Prepared, Task
from fedveil.training import Trainer, Training
from fedveil.training.trainer import LocalRun

__all__ = ["federate", "one_shot_federation"]

_CLIENT = "attacker-{}"


@register_attack(
    "one-shot federation",
    title="merged, after each attacker had trained alone",
    does="lets each attacker of a coalition fine-tune alone, and merges what they get by least "
    "squares: the owner's recipe, turned against it",
    source="Guha et al. 2019, arXiv 1902.11175; RegMean: Jin et al. 2023, arXiv 2212.09849",
    begins=MODEL,
    alone=True,
)
def one_shot_federation(coalition: Coalition) -> Iterator[Stolen]:
    """The model of :func:`federate`; nothing of a single client."""
    stage = coalition.stage
    if len(coalition.clients) > 1:
        yield Stolen(
            federate(
                stage.model, stage.task, {name: stage.data[name] for name in coalition.clients},
                stage.training, coalition.start,
                rounds=len({kept.round for kept in coalition.sent}), seed=stage.seed,
                tell=lambda text: coalition.tell(f"one-shot federation, {text}"),
            )
        )  # fmt: skip


def federate(
    model: nn.Module,
    task: Task,
    data: Mapping[str, Prepared],
    training: Training,
    start: Mapping[str, Tensor],
    *,
    rounds: int = 1,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Tensor]:
    """Each attacker trains alone, and what they get is merged by least squares (RegMean).

    That is the owner's own recipe turned against it. On skewed data it can do better than training
    on what all attackers have together, as nobody forgets what another one knows.

    Knows: the stolen model, the data of all attackers, and how clients train.

    Args:
        model: The architecture; its weights are overwritten.
        task: What it is for.
        data: What each attacker has, by name.
        training: How a client trains in a round of the federation.
        start: What they begin with.
        rounds: Each trains for as many rounds' work.
        seed: Decides the order of examples and dropout.
        tell: Hears of each attacker.
    """
    scheme = FedAvg(aggregation=RegMean())
    load_state(model, start)
    server = scheme.server(model, Secret.generate())  # releases everything: nothing is drawn
    server.begin_round(1)
    for number, (name, rows) in enumerate(sorted(data.items()), start=1):
        tell(f"{name} trains, {number} of {len(data)}")
        steps = rounds * training.total_steps(math.ceil(len(rows) / training.batch_size))
        longer = replace(training, steps=steps, epochs=None)
        client = _CLIENT.format(number)
        run = LocalRun(Trainer(task, rows, longer), seed + number)
        reply = scheme.client().fit(server.release(client), model, run)
        server.absorb(client, reply, float(len(rows)))
    server.end_round()
    return server.final()
