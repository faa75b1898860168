"""Layers, clients and Grams that the tests of RegMean share, and a float64 oracle that is dense,
slow and written from the formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedveil import RegMean
from fedveil.aggregation import Average, RegMeanSums
from fedveil.aggregation.gram import Gram, Moments
from fedveil.aggregation.linear import LinearLayer
from fedveil.masking import Release
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup
from fedveil.wire import Message

CPU = torch.device("cpu")
EVERYTHING = Selection((), {}, {})

# A net of a convolution, a Linear and a Conv1D: the first two are cut along both axes.
SHAPES = {
    "conv": torch.Size([6, 3, 2, 1]),
    "linear": torch.Size([5, 6]),
    "bias": torch.Size([5]),
    "transposed": torch.Size([5, 4]),
}
LAYERS = {
    "conv": LinearLayer("conv", "", 0, kernel=2),
    "linear": LinearLayer("linear", "", 0),
    "transposed": LinearLayer("transposed", "", 1),
}
GROUPS = (
    UnitGroup("pixels", "channels", 3, (Slice("conv", 1),)),
    UnitGroup("channels", "channels", 6, (Slice("conv", 0), Slice("linear", 1))),
    UnitGroup(
        "neurons", "neurons", 5, tuple(Slice(n, 0) for n in ("linear", "bias", "transposed"))
    ),
    UnitGroup("classes", "columns", 4, (Slice("transposed", 1),)),
)
UNITS = st.fixed_dictionaries({g.name: st.sets(st.integers(0, g.size - 1)) for g in GROUPS})
WHOLE = {group.name: set(range(group.size)) for group in GROUPS}


@dataclass(frozen=True)
class Client:
    """One client's round: which units it held, and numbers drawn from its seed."""

    units: Mapping[str, set[int]]
    seed: int
    weight: int
    rows: int
    unchanged: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()

    @property
    def selection(self) -> Selection:
        released = {n: Release(torch.tensor(sorted(u)).long(), 1.0) for n, u in self.units.items()}
        return Selection(GROUPS, released, SHAPES)

    def update(self, name: str) -> Tensor:
        """The update at the full shape; only its released part is ever used."""
        return torch.randn(SHAPES[name], generator=self._dice(name, 0))

    def inputs(self, name: str) -> Tensor:
        """What a layer sees, [examples, inputs]."""
        width = LAYERS[name].matrix_shape(SHAPES[name])[1]
        return torch.randn(self.rows, width, generator=self._dice(name, 1)) + 0.5

    def _dice(self, name: str, kind: int) -> torch.Generator:
        return torch.Generator().manual_seed(4 * self.seed + 2 * len(name) + kind)


NAMES = st.frozensets(st.sampled_from(sorted(LAYERS)), max_size=1)


def clients_with(units: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(
        st.builds(
            Client,
            units,
            st.integers(0, 10**6),
            st.integers(1, 1000),
            st.integers(1, 12),
            NAMES,
            NAMES,
        ),
        min_size=1,
        max_size=5,
    )


OWN_MASKS = clients_with(UNITS)
FEW_MASKS = st.lists(UNITS, min_size=1, max_size=3).flatmap(
    lambda masks: clients_with(st.sampled_from(masks))
)
SERVER_MASK = UNITS.flatmap(lambda mask: clients_with(st.just(mask)))
SETTINGS = st.builds(
    RegMean,
    off_diagonal=st.floats(0, 1),
    ridge=st.floats(0.01, 10),
    size=st.sampled_from([1, 2, 3, 5, 100]),
    bits=st.none(),
)


def gram_of(rows: Tensor, settings: RegMean, released: Tensor | None = None) -> Gram:
    moments = Moments(rows.shape[1], settings.form, settings.size, CPU)
    moments.add(rows)
    return moments.gram(len(rows), released)


def sums_of(
    clients: list[Client], settings: RegMean, *, shared: bool, average: Average = "holders"
) -> RegMeanSums:
    """Streamed, as a server would."""
    sums = RegMeanSums(SHAPES, LAYERS, settings, average, shared)
    for client in clients:
        mine = client.selection
        updates = {n: mine.gather(n, client.update(n)) for n in SHAPES if n not in client.unchanged}
        grams = {
            name: gram_of(client.inputs(name), settings, layer.inputs(mine))
            for name, layer in LAYERS.items()
            if name not in client.silent
        }
        sums.add(updates, mine, float(client.weight), grams)
    return sums


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name == "transposed" else tensor.flatten(1)


def held_by(client: Client, name: str) -> tuple[Tensor, Tensor]:
    """Which outputs and which inputs of a layer a client held (bool vectors)."""
    outputs, inputs = {
        "conv": ("channels", "pixels"),
        "linear": ("neurons", "channels"),
        "transposed": ("classes", "neurons"),
    }[name]
    width = 2 if name == "conv" else 1
    size = {group.name: group.size for group in GROUPS}
    held = [
        torch.tensor([u in client.units[side] for u in range(size[side])])
        for side in (outputs, inputs)
    ]
    return held[0], held[1].repeat_interleave(width)


@dataclass
class Oracle:
    """One client's part of the equations of one layer, in float64 at full size."""

    outputs: Tensor
    inputs: Tensor
    gram: Tensor
    update: Tensor
    weight: float
    held: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.held = self.outputs[:, None] & self.inputs
        self.update = self.update.double() * self.held


def shaped(moment: Tensor, settings: RegMean, inputs: Tensor) -> Tensor:
    """A second moment as RegMean uses it: within blocks, off-diagonals reduced, with a ridge."""
    width = len(moment)
    count = -(-width // settings.size)
    block = torch.zeros(width, dtype=torch.int64)
    for number, (start, stop) in enumerate(
        pairwise(round(width * k / count) for k in range(count + 1))
    ):
        block[start:stop] = number
    moment = moment * (block[:, None] == block) * (inputs[:, None] & inputs)
    diagonal = moment.diagonal()
    ridge = settings.ridge * diagonal.sum() / max(1, int(inputs.sum()))
    reduced = settings.off_diagonal * moment + (1 - settings.off_diagonal) * torch.diag(diagonal)
    return reduced + torch.diag((ridge + 1e-10) * inputs)


def oracles(clients: list[Client], name: str, settings: RegMean) -> list[Oracle]:
    found = []
    for client in (client for client in clients if name not in client.unchanged):
        outputs, inputs = held_by(client, name)
        rows = client.inputs(name).double() * (0.0 if name in client.silent else 1.0)
        gram = shaped(rows.t() @ rows / len(rows), settings, inputs)
        update = as_matrix(name, client.update(name))
        found.append(Oracle(outputs, inputs, gram, update, float(client.weight)))
    return found


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return sum(tensors, torch.tensor(0))


def exact_step(members: list[Oracle]) -> Tensor:
    """Each output over exactly the clients that held it."""
    step = torch.zeros_like(members[0].update)
    for output in range(len(step)):
        holders = [m for m in members if m.outputs[output]]
        if holders:
            gram = _sum(m.weight * m.gram for m in holders)
            right = _sum(m.weight * m.gram @ m.update[output] for m in holders)
            step[output] = solve(gram, right)
    return step


def common_step(members: list[Oracle]) -> Tensor:
    """All clients in one system; what is missing of an element's equation is scaled up."""
    gram = _sum(m.weight * m.gram for m in members)
    right = _sum(m.weight * m.update @ m.gram for m in members)
    of_element = _sum(m.weight * m.held for m in members)
    of_input = _sum(m.weight * m.inputs for m in members)
    right = torch.where(of_element > 0, right * of_input / of_element, 0.0)
    step = torch.stack([solve(gram, row) for row in right])
    return torch.where(of_element > 0, step, 0.0)


def solve(gram: Tensor, right: Tensor) -> Tensor:
    seen = gram.diagonal() > 0
    solution = torch.zeros_like(right)
    if bool(seen.any()):
        solution[seen] = torch.linalg.solve(gram[seen][:, seen], right[seen])
    return solution


def message(observed, scheme: str = "fedavg") -> Message:
    """Observed statistics as a reply, through bytes."""
    reply = Message("update", scheme, 1, "a", observed.sections, observed.scalars)
    return Message.from_bytes(reply.to_bytes())
