"""A server on a whole model: what a round costs it, per round and per client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from fedveil.masking import Policy
from fedveil.quantization import QuantizedTensor
from fedveil.schemes import FedQSN
from fedveil.secret import Secret
from fedveil.state import read_state
from fedveil.wire import Dense, Message, Section
from speed import budgets
from speed.kernels import COPY, GPT2
from speed.plan import Plan, Tell
from speed.rows import Case, Row, measured
from speed.shapes import gpt2, random_like
from speed.timing import Pairs, alternate, clock

__all__ = ["SECRET", "Round", "copy_of", "copy_of_updates", "memcpy", "server_rows"]

SECRET: Final = Secret(bytes(range(32)))
MESSAGE: Final = "memcpy of the message's bytes"
UPDATE: Final = "preallocated fp32 copy of the update"
POLICIES: Final[dict[Policy, str]] = {
    "fresh": "a mask for each client",
    "grouped": "two masks for all",
}

Call = Callable[[], object]
Updates = Mapping[str, tuple[Tensor, int]]


def server_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Begin a round, release proxies, absorb updates; and what a client does but for training.

    Every release is to a new client. Under fresh masks drawing one counts.
    """
    tell("GPT-2 small and its server")
    model, case = gpt2(plan), {"model": GPT2}
    floor = copy_of(read_state(model))
    tell("begin a round")
    stage = Round(model, FedQSN())
    yield measured("server/begin_round", case, alternate(stage.begin, floor, plan.repeats(5)), COPY)
    for policy, masks in POLICIES.items():
        tell(f"release, {masks}")
        stage = Round(model, FedQSN(policy=policy))
        stage.begin()
        pairs, at = stage.time_release(plan.repeats(9)), {**case, "masks": masks}
        yield measured("server/release", at, pairs, MESSAGE, budget=budgets.PROXY)
    tell("a client loads its proxy")
    loads = alternate(stage.loading(model), floor, plan.repeats(5))
    yield measured("client/load", case, loads, COPY, budget=budgets.LOAD)
    for bits in (None, 8, 4):
        tell(f"updates at {bits or 32} bits")
        stage = Round(model, FedQSN(policy="fresh", update_bits=bits))
        stage.begin()
        coded: Case = {**case, "bits": bits or 32}
        yield measured("client/encode", coded, stage.time_encode(plan.repeats(5)), UPDATE)
        yield measured("server/absorb", coded, stage.time_absorb(plan.repeats(5)), UPDATE)


class Round:
    """A server in the middle of things, with clients who answer without training.

    Args:
        model: the owner's.
        scheme: a FedQSN that withholds the same number of units from every client.
    """

    def __init__(self, model: nn.Module, scheme: FedQSN) -> None:
        self._scheme, self._server = scheme, scheme.server(model, SECRET)
        self._number = self._clients = 0
        self._open = False

    def begin(self) -> None:
        """Quantize the model for a new round; one that is open ends."""
        self.end()
        self._number, self._open = self._number + 1, True
        self._server.begin_round(self._number)

    def end(self) -> None:
        """Apply what was absorbed, if a round is open."""
        if self._open:
            self._server.end_round()
        self._open = False

    def release(self) -> Message:
        """The proxy of a client that was never seen."""
        self._clients += 1
        return self._server.release(self._last)

    def receive(self, data: bytes | bytearray) -> None:
        """Read and absorb the answer of the client that was released to last."""
        self._server.absorb(self._last, Message.from_bytes(data), 1.0)

    def time_release(self, repeats: int) -> Pairs:
        """Draw a mask, gather and write the message into memory that is there."""
        data = self.release().to_bytes()
        buffer = bytearray(len(data))
        return alternate(lambda: self.release().write_into(buffer), memcpy(data), repeats)

    def time_encode(self, repeats: int) -> Pairs:
        """Encode an update and write its message into memory that is there."""
        updates = self.updates()
        buffer = bytearray(self.reply(self.encode(updates)).nbytes)

        def write() -> None:
            self.reply(self.encode(updates)).write_into(buffer)

        return alternate(write, copy_of_updates(updates), repeats)

    def time_absorb(self, repeats: int) -> Pairs:
        """Read an update's message and add it to the running sums.

        Each client's release comes before, untimed.
        """
        updates = self.updates()
        floor, sections, pairs = copy_of_updates(updates), self.encode(updates), Pairs()
        for number in range(repeats + 1):
            self.release()
            data = self.reply(sections).to_bytes()
            seconds = clock(partial(self.receive, data)), clock(floor)
            if number:  # the first makes the running sums
                pairs.operation.append(seconds[0])
                pairs.floor.append(seconds[1])
        return pairs

    def loading(self, architecture: nn.Module) -> Call:
        """What a client does with its proxy before it trains: read, check, decode in place."""
        data, client = self.release().to_bytes(), self._scheme.client()
        return lambda: client.load(Message.from_bytes(data), architecture)

    def updates(self) -> Updates:
        """A random update on the units of a proxy: per tensor, with the axis that counts units."""
        proxy = Message.from_bytes(self.release().to_bytes())
        found = {}
        for seed, (name, section) in enumerate(proxy.sections.items()):
            if isinstance(section, QuantizedTensor):
                found[name] = (random_like(section.shape, torch.float32, seed), section.axis)
            elif isinstance(section, Dense) and section.tensor.is_floating_point():
                found[name] = (random_like(tuple(section.tensor.shape), torch.float32, seed), 0)
        return found

    def encode(self, updates: Updates) -> dict[str, Section]:
        """The update as it travels. It fits any client, since all hold as many units."""
        encode = self._scheme.codec.encode
        return {name: encode(update, axis) for name, (update, axis) in updates.items()}

    def reply(self, sections: Mapping[str, Section]) -> Message:
        """What the client that was released to last answers."""
        scalars = {"examples": 1, "steps": 1, "loss_first": 1.0, "loss_last": 1.0}
        return Message("update", self._scheme.name, self._number, self._last, sections, scalars)

    @property
    def _last(self) -> str:
        # All names are of one length, so that all messages are.
        return f"client-{self._clients:08d}"


def copy_of(tensors: Mapping[str, Tensor]) -> Call:
    """The floor: a copy of all tensors into preallocated ones."""
    pairs = [(tensor, torch.zeros_like(tensor)) for tensor in tensors.values()]

    def floor() -> None:
        for source, target in pairs:
            target.copy_(source)

    return floor


def copy_of_updates(updates: Updates) -> Call:
    """The floor: a copy of an update into preallocated tensors."""
    return copy_of({name: update for name, (update, _) in updates.items()})


def memcpy(data: bytes | bytearray) -> Call:
    """The floor: a copy of these bytes into memory that is there."""
    source, target = memoryview(bytes(data)), memoryview(bytearray(len(data)))

    def floor() -> None:
        target[:] = source

    return floor
