"""What an owner has to audit a run with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedveil.schemes import Scheme
from fedveil.state import load_state
from fedveil.tasks import Prepared, Task
from fedveil.training import Training, evaluate

__all__ = ["Stage", "State"]

State = Mapping[str, Tensor]

_WORST = 700.0
"""In nats: what a model is said to lose whose answers are no numbers."""


@dataclass(frozen=True)
class Stage:
    """What the owner has: attacks are made with what attackers have, and measured with this.

    Attributes:
        model: The architecture; its weights are overwritten.
        task: What it is for.
        test: The owner's test set.
        training: How clients train; attackers do as well.
        data: What each client has: an attacker has its own.
        models: ``global`` (the final one), ``base`` and perhaps ``server_model``. Where the base
            has more in it than the global model, as the backbone under an adapter, that is what
            everybody holds.
        public: A model that anybody can get, of the same architecture; None if there is none.
        seed: Decides what attackers leave to chance.
        scheme: With its settings: attackers have the source. None if they are to do without.
    """

    model: nn.Module
    task: Task
    test: Prepared
    training: Training
    data: Mapping[str, Prepared]
    models: Mapping[str, State]
    public: State | None = None
    seed: int = 0
    scheme: Scheme | None = None

    def whole(self, state: State) -> State:
        """A model with what everybody holds wherever it says nothing of it."""
        base, kept = self.models["base"], self.models["global"]
        return {name: base[name] for name in base if name not in kept} | dict(state)

    def measure(self, state: State) -> dict[str, float]:
        """What a model reaches on the owner's test set."""
        load_state(self.model, self.whole(state))
        return _finite(evaluate(self.model, self.task, self.test))

    def pooled(self, clients: Sequence[str]) -> Prepared:
        """What a coalition has."""
        sets = [self.data[client] for client in clients]
        rows = [row for data in sets for row in data.select(range(len(data)))]
        lengths = [n for client in clients for n in self.data[client].lengths or ()]
        return Prepared(rows, lengths if len(lengths) == len(rows) else None)


def _finite(measures: dict[str, float]) -> dict[str, float]:
    """Measures that can be compared and written down, even of a model whose answers are none."""
    if math.isfinite(measures["loss"]):
        return measures
    worst = {"loss": _WORST, "perplexity": math.exp(_WORST)}
    return {name: worst.get(name, value) for name, value in measures.items()}
