"""What a round costs beyond training.

A convolutional net of 1.63 million parameters and images of CIFAR's shape: the setting in which
pfl-research compares simulators. Many clients take one step on one example, so little training that
the rest shows; some clients train for an epoch of fifty examples, the least that anyone would do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

import fedveil
from fedveil.run import RoundRecord
from fedveil.schemes import FedAvg, FedQSN, Scheme
from speed import budgets
from speed.children import ChildError, require, rows_of_child
from speed.plan import Plan, Tell
from speed.rows import Row, measured, skipped
from speed.server import SECRET
from speed.timing import Pairs, clock

__all__ = [
    "BARE",
    "BareLoop",
    "Local",
    "case_of",
    "examples",
    "net",
    "round_rows",
    "rows_of_simulator",
]

BARE: Final = "bare loop: load_state_dict, step, accumulate"
RATE: Final = 0.1
SCHEMES: Final[dict[str, Scheme]] = {
    "FedAvg": FedAvg(),
    "FedQSN, 4 bit, (.1, .3)": FedQSN(server_mask=0.1, client_mask=0.3, bits=4),
}
TINY, EPOCH = "one step on one example", "five steps on ten examples"
SIMULATORS: Final = {
    "pfl-research": ("pfl", "pfl"),
    "Flower, one worker": ("flower", "flwr", "ray"),
}
"""By title: what `speed.simulators` calls it, and the packages that it needs."""


def round_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Rounds through `fedveil.Federation`, each beside a round of a bare loop; then simulators."""
    for title, scheme in SCHEMES.items():
        tell(f"rounds of {title}")
        case, limit = {**case_of(plan), "scheme": title}, budgets.ROUND[title.partition(",")[0]]
        pairs = _rounds(scheme, Local(plan.cohort), plan)
        yield measured("rounds/fedveil", case, pairs, BARE, budget=limit)
        epoch = Local(max(1, plan.cohort // 10), steps=5, batch=10)
        case = {**case, "training": EPOCH, "clients": epoch.clients}
        yield measured("rounds/epoch", case, _rounds(scheme, epoch, plan), BARE)
    for who in SIMULATORS:
        tell(f"rounds of {who}")
        yield from rows_of_simulator(who, plan)


def rows_of_simulator(who: str, plan: Plan) -> list[Row]:
    """A simulator's row; if it is not installed or fails, one that says so."""
    argument, *packages = SIMULATORS[who]
    try:
        require(*packages)
        return rows_of_child("speed.simulators", [argument, who], plan)
    except ChildError as error:
        case = {**case_of(plan), "scheme": "FedAvg"}
        return [skipped("rounds/simulator", case, str(error), who=who, floor=BARE)]


def case_of(plan: Plan) -> dict[str, str | int]:
    """What every row of rounds is about."""
    return {"model": "CNN, 1.63 M", "training": TINY, "clients": plan.cohort}


def net() -> nn.Sequential:
    """The net: 1,626,442 parameters, images [3, 32, 32], ten classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Local:
    """How many clients there are, and what each does in a round."""

    clients: int
    steps: int = 1
    batch: int = 1

    @property
    def examples(self) -> int:
        """Of each client: an epoch of them."""
        return self.steps * self.batch


def examples(count: int) -> list[tuple[Tensor, int]]:
    """So many images, and the class of each."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 32, 32, generator=generator), n % 10) for n in range(count)]


class BareLoop:
    """The floor: what has to be done, and nothing else."""

    def __init__(self, local: Local) -> None:
        self._model = net().train()
        self._state = copy.deepcopy(self._model.state_dict())
        images, labels = zip(*examples(local.clients * local.examples), strict=True)
        self._batches = list(
            zip(
                torch.stack(images).split(local.batch),  # type: ignore[no-untyped-call]
                torch.tensor(labels).split(local.batch),  # type: ignore[no-untyped-call]
                strict=True,
            )
        )
        self._local = local

    def __call__(self) -> None:
        """One round of federated averaging."""
        sums = {name: torch.zeros_like(tensor) for name, tensor in self._state.items()}
        for first in range(0, len(self._batches), self._local.steps):
            self._model.load_state_dict(self._state)
            optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE)
            for images, labels in self._batches[first : first + self._local.steps]:
                loss = nn.functional.cross_entropy(self._model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                for name, tensor in self._model.state_dict().items():
                    sums[name] += tensor - self._state[name]
        for name, tensor in self._state.items():
            tensor += sums[name] / self._local.clients


class _Beside(fedveil.Observer):
    """After every round of a federation, one of the bare loop; the first round warms up."""

    def __init__(self, bare: BareLoop) -> None:
        self._bare, self.pairs = bare, Pairs()

    def round_finished(self, record: RoundRecord) -> None:
        """See `fedveil.Observer`."""
        seconds = clock(self._bare)
        if record.round > 1:
            self.pairs.operation.append(record.seconds)
            self.pairs.floor.append(seconds)


def _rounds(scheme: Scheme, local: Local, plan: Plan) -> Pairs:
    rows = [{"image": i, "label": c} for i, c in examples(local.clients * local.examples)]
    starts = range(0, len(rows), local.examples)
    beside = _Beside(BareLoop(local))
    federation = fedveil.Federation(
        net(),
        {f"client-{first}": rows[first : first + local.examples] for first in starts},
        task=fedveil.ImageClassification(num_labels=10),
        scheme=scheme,
        training=fedveil.Training(
            steps=local.steps, batch_size=local.batch, learning_rate=RATE, optimizer="sgd",
            weight_decay=0.0, schedule="constant", max_grad_norm=None,
        ),
        secret=SECRET,
        observer=beside,
    )  # fmt: skip
    federation.run(plan.repeats(7) + 1)
    return beside.pairs
