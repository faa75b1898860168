"""Cost against the number of clients, and against the size of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Final

import torch

from fedveil.quantization import quantize
from fedveil.schemes import FedQSN
from fedveil.state import read_state
from speed import budgets
from speed.kernels import COPY, copies, released_units
from speed.plan import Plan, Tell
from speed.rows import Row, measured, plain
from speed.server import MESSAGE, UPDATE, Round, copy_of, copy_of_updates, memcpy
from speed.shapes import Matrices, gpt2
from speed.timing import Pairs, alternate, clock

__all__ = ["client_rows", "parameter_rows"]

FLOORS: Final = {"begin_round": COPY, "release": MESSAGE, "absorb": UPDATE, "end_round": COPY}
"""What each step of a round is compared with."""


def client_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Server time per client in rounds of 1 to 1000 clients, each with a mask of its own.

    The model is small, so that a round of 1000 is a matter of seconds.
    """
    model = gpt2(plan, small=True)
    title = f"GPT-2 shape, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    stage, floor = Round(model, FedQSN(policy="fresh", update_bits=8)), copy_of(read_state(model))
    found: dict[str, dict[int, float]] = {"release": {}, "absorb": {}}
    for count in plan.clients:
        tell(f"a round of {count} clients")
        # A round of few is over before a clock can tell: take more of them.
        steps = _rounds(stage, floor, count, plan.repeats(3 + 30 // count))
        case: dict[str, str | int] = {"model": title, "clients": count}
        for step, pairs in steps.items():
            yield measured(f"clients/{step}", case, pairs, FLOORS[step])
        for step, seconds in found.items():
            seconds[count] = median(steps[step].operation)
    # With a single client its share of what is done once a round is the whole of it.
    few, most = plan.clients[1], plan.clients[-1]
    for step, seconds in found.items():
        case = {"model": title, "step": step, "compared": f"{most} with {few} clients"}
        yield plain("clients/flat", case, seconds[most] / seconds[few], "x", budget=budgets.FLAT)


def parameter_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Each operation on [4 h, h] matrices in 4 bits that make up a model of some size."""
    for parameters in plan.parameters:
        group = _model(parameters)
        case: dict[str, str | int] = {"parameters": group.values}
        for name, pairs in _operations(group, plan, tell):
            yield measured(f"parameters/{name}", case, pairs, COPY)


def _rounds(stage: Round, copy: Callable[[], object], count: int, rounds: int) -> dict[str, Pairs]:
    """Rounds with so many clients, step by step; release and absorb in seconds per client."""
    found = {step: Pairs() for step in FLOORS}

    def note(step: str, operation: float, floor: float) -> None:
        found[step].operation.append(operation)
        found[step].floor.append(floor)

    stage.begin()
    updates = stage.updates()
    sections, copy_update = stage.encode(updates), copy_of_updates(updates)
    data = stage.release().to_bytes()
    buffer, copy_message = bytearray(len(data)), memcpy(data)
    stage.end()
    for _ in range(rounds):
        note("begin_round", clock(stage.begin), clock(copy))
        gathers, reads = Pairs(), Pairs()
        for _ in range(count):
            gathers.operation.append(clock(lambda: stage.release().write_into(buffer)))
            gathers.floor.append(clock(copy_message))
            data = stage.reply(sections).to_bytes()
            reads.operation.append(clock(partial(stage.receive, data)))
            reads.floor.append(clock(copy_update))
        for step, each in (("release", gathers), ("absorb", reads)):
            note(step, sum(each.operation) / count, sum(each.floor) / count)
        note("end_round", clock(stage.end), clock(copy))
    return found


def _model(parameters: int) -> Matrices:
    """Matrices [4 h, h] of about so many numbers in all: wider models are deeper, too."""
    width = max(64, 64 * round(parameters ** (1 / 3) * 2 / 64))
    return Matrices((4 * width, width), 0, max(1, round(parameters / (4 * width * width))))


def _operations(group: Matrices, plan: Plan, tell: Tell) -> Iterator[tuple[str, Pairs]]:
    exact = group.tensors()
    targets = [torch.zeros_like(weight) for weight in exact]
    packed = [quantize(weight) for weight in exact]
    units, every = released_units(packed[0].units), torch.arange(packed[0].units)
    parts = [one.select(units) for one in packed]
    floor = copies(exact, targets, group)
    operations: dict[str, Callable[[int], object]] = {
        "quantize": lambda turn: quantize(exact[turn]),
        "gather": lambda turn: packed[turn].select(units, out=parts[turn]),
        "dequantize": lambda turn: packed[turn].dequantize(targets[turn]),
        "add": lambda turn: packed[turn].add_to(targets[turn], every, 0.5),
    }
    # Small models are over before a clock can tell: they are done several times at once.
    times = max(1, 10**7 // group.values)
    for name, operation in operations.items():
        tell(f"{name} {group.values / 1e6:.1f} million parameters")

        def work(operation: Callable[[int], object] = operation) -> None:
            for _ in range(times):
                for turn in group.turns():
                    operation(turn)

        def copy() -> None:
            for _ in range(times):
                floor()

        pairs = alternate(work, copy, plan.repeats(3))
        yield name, Pairs([s / times for s in pairs.operation], [s / times for s in pairs.floor])
