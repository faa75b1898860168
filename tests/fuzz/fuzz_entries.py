"""What is done with a stranger's bytes, and what must hold whatever they are.

`read_anything` and `receive_anything` are the two entries that fuzzing programs, the corpus and
properties share. They return a word for what happened and raise only if something is wrong: any
other exception than a FedveilError, a receiver that a refusal has changed, bytes that were written
to, or a message that says something else once it is written again.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from io import StringIO
from types import FunctionType, MethodType, ModuleType
from typing import Any
from unicodedata import category

import torch
from fuzz_forge import take_apart
from rich.console import Console
from torch import Tensor, nn

from fedveil import Bounds, FedAvg, FedQSN, FedveilError, RegMean, Secret, TrainingError
from fedveil.engine.bounds import Claim
from fedveil.merging import MergeStatistics
from fedveil.quantization import QuantizedTensor
from fedveil.report.console.describe import message_table
from fedveil.schemes import Scheme, ServerSide
from fedveil.state import read_state, wipe
from fedveil.training import TrainingRecord
from fedveil.wire import Message, UnitIndex

__all__ = ["PLACES", "net", "read_anything", "receive_anything"]

SECRET = Secret(bytes(range(32)))
LARGEST_DECODED = 2**22
"""Numbers. A message of a few bytes may describe a huge tensor of no units: a receiver compares the
shape with its own before it asks for values."""

LONGEST_ERROR = 6000
"""Characters; a whole number that JSON may hold has 4300 digits."""


# Reading -------------------------------------------------------------------------------------


def read_anything(data: bytes) -> str:
    """Read a message; if it is one, decode all of it and write it again."""
    received = bytearray(data)  # that can be written to, so that the message is a view of it
    message, said = _read(received)
    if message is not None or zlib.crc32(data) % 4 == 0:
        # Bytes, of which there is a copy, and numbers at odd addresses make no difference.
        _, elsewhere = _read(memoryview(b"x" + data)[1:])
        assert (elsewhere == "taken") == (said == "taken"), (said, elsewhere)
    if message is None:
        return said
    again = message.to_bytes()
    assert _content(bytes(again)) == _content(data)
    assert Message.from_bytes(again).to_bytes() == again
    if _as_written(data) == data:
        assert again == data
    for section in message.sections.values():
        if isinstance(section, UnitIndex):
            _use_index(section)
        elif isinstance(section, QuantizedTensor):
            _use_quantized(section)
        else:
            assert section.tensor.data_ptr() % section.tensor.itemsize == 0
    if zlib.crc32(data) % 8 == 0:  # slow
        Console(file=StringIO(), width=100).print(message_table(message, len(data)))
    assert received == data, "somebody wrote into what was received"
    return "taken"


def _read(data: bytes | bytearray | memoryview) -> tuple[Message | None, str]:
    try:
        return Message.from_bytes(data), "taken"
    except FedveilError as error:
        return None, _words(error)


def _words(error: FedveilError) -> str:
    """What an error says; a sender must not be able to flood a log or steer a terminal with it."""
    said = str(error)
    assert len(said) < LONGEST_ERROR, f"an error of {len(said)} characters"
    assert not any(category(letter)[0] == "C" for letter in said), f"unprintable: {said!r}"
    return said


def _content(data: bytes) -> tuple[Any, ...]:
    """A message without what the container leaves to its writer: order, spaces, spelling."""
    forged = take_apart(data)
    assert forged is not None
    # NaN and -0.0 are compared by their bytes; the header is text, and its floats are finite.
    return repr(sorted(forged.header.items())), sorted(
        (name, piece.dtype, piece.shape, piece.octets) for name, piece in forged.pieces.items()
    )


def _as_written(data: bytes) -> bytes:
    """The same message in the order and the spelling of a writer."""
    forged = take_apart(data)
    assert forged is not None
    return forged.sealed()


def _use_index(section: UnitIndex) -> None:
    back = UnitIndex.from_bitmap(section.size, section.bitmap(), section.scale)
    assert torch.equal(back.released, section.released)


def _use_quantized(section: QuantizedTensor) -> None:
    """Decode in every way there is: all ways must agree to the last bit."""
    if section.units * section.fan_in > LARGEST_DECODED or section.fan_in > LARGEST_DECODED:
        return
    plain = section.dequantize()
    assert torch.isfinite(plain).all()
    assert float(plain.abs().max()) <= section.largest if plain.numel() else True
    turned = torch.full(section.shape[::-1], torch.nan).permute(*range(plain.dim())[::-1])
    assert torch.equal(section.dequantize(out=turned), plain)
    wide = torch.full(section.shape, torch.nan, dtype=torch.float64)
    assert torch.equal(section.dequantize(out=wide), plain.double())
    every = torch.arange(section.units)
    total = torch.zeros(section.shape)
    section.add_to(total, every)
    assert torch.equal(total, plain)
    assert torch.equal(section.select(every.flip(0)).dequantize(), plain.flip(section.axis))


# Receiving -----------------------------------------------------------------------------------


def net() -> nn.Module:
    """Three linear layers with arithmetic weights; the middle one [64, 96] is cut on both axes."""
    torch.manual_seed(0)  # for the constructors, whose numbers are overwritten
    model = nn.Sequential(
        nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    for number, tensor in enumerate(read_state(model).values()):
        tensor.copy_(_ramp(tensor.shape, number))
    return model


def wiped(model: nn.Module) -> nn.Module:
    wipe(model)
    return model


def _ramp(shape: torch.Size, number: int) -> Tensor:
    """Numbers in [-0.5, 0.5) that are exact in float32, and the same on every machine."""
    steps = torch.arange(shape.numel(), dtype=torch.int64) * 37 + 11 * number
    return ((steps % 64 - 32).float() / 64).reshape(shape)


@dataclass(frozen=True)
class Steady:
    """Training that adds the same numbers on every machine, to tensors whose names it is given."""

    only: tuple[str, ...] = ()

    def __call__(self, model: nn.Module) -> TrainingRecord:
        for number, (name, tensor) in enumerate(read_state(model).items()):
            if not torch.isfinite(tensor).all():
                raise TrainingError("The loss is not finite")  # as in `fedveil.training`
            if not self.only or name in self.only:
                tensor += _ramp(tensor.shape, number + 5) / 8
        return TrainingRecord(5, 1, 1.0, 0.5)

    def replay(self, model: nn.Module, examples: int):
        rows = _ramp(torch.Size([16, 4]), 3)
        yield {"rows": rows}
        with torch.no_grad():
            model(rows)


@dataclass
class Place:
    """A server that awaits one reply, and a client that awaits one proxy, under one scheme."""

    name: str
    scheme: Scheme
    workplace: nn.Module = field(init=False)
    server: ServerSide = field(init=False)
    honest: Message = field(init=False)

    def __post_init__(self) -> None:
        self.workplace = wiped(net())
        self._as_awaiting = self._new_server()
        self.server = self._copy()
        self._print = fingerprint(self.server)
        self.honest = Message.from_bytes(bytes(self.proxy.to_bytes()))
        self.scheme.client().load(self.honest, self.workplace)
        self._proxy_print = fingerprint(read_state(self.workplace))

    @property
    def proxy(self) -> Message:
        """What the client is sent."""
        return self.server.release(self.name)

    def reply(self, trainer: Steady) -> Message:
        """What an honest client answers."""
        return self.scheme.client().fit(self.proxy, wiped(net()), trainer)

    def _new_server(self) -> ServerSide:
        """Round 1 is open, one client has answered, and another's answer is awaited."""
        server = self.scheme.server(net(), SECRET)
        server.begin_round(1)
        first = self.scheme.client().fit(server.release("first"), wiped(net()), Steady())
        server.release(self.name)
        reply = Message.from_bytes(first.to_bytes())
        self._first = Claim(3, server.inspect("first", reply))
        server.absorb("first", reply, 3.0)
        return server

    def _copy(self) -> ServerSide:
        # A secret refuses to be copied.
        return copy.deepcopy(self._as_awaiting, {id(SECRET): SECRET})

    def serve(self, reply: Message) -> str:
        """What an engine does with a reply: looking at it must leave the server as it was.

        What was looked at and not refused is used, whatever it was scaled down to.
        """
        examples = reply.scalars.get("examples")
        claimed = examples if type(examples) is int and examples > 0 else 5
        try:
            claim = Claim(claimed, self.server.inspect(self.name, reply))
        except FedveilError as error:
            said = _words(error)
            assert fingerprint(self.server) == self._print, f"changed by what it refused: {said}"
            return said
        assert fingerprint(self.server) == self._print, "changed by what it looked at"
        bounded = Bounds().apply({"first": self._first, self.name: claim})[self.name]
        self.server.absorb(self.name, reply, bounded.weight, bounded.scales)
        server, self.server = self.server, self._copy()
        server.end_round()
        for name, tensor in server.final().items():
            assert torch.isfinite(tensor).all(), name
        return "taken"

    def work(self, proxy: Message) -> str:
        """What a client does with a proxy; after any, an honest one must be as good as ever."""
        client = self.scheme.client()
        try:
            reply = client.fit(proxy, self.workplace, Steady())
            data = reply.to_bytes()
        except FedveilError as error:
            said = _words(error)
        else:
            assert Message.from_bytes(data).to_bytes() == data
            said = "taken"
        client.load(self.honest, self.workplace)
        assert fingerprint(read_state(self.workplace)) == self._proxy_print
        return said


SCHEMES: Mapping[str, Callable[[], Scheme]] = {
    "avg": FedAvg,
    "avg-4": lambda: FedAvg(update_bits=4),
    "avg-regmean": lambda: FedAvg(update_bits=8, aggregation="regmean"),
    "qsn": lambda: FedQSN(units="neurons"),
    "qsn-4": lambda: FedQSN.paper(
        units="neurons", server_mask=0.05, client_mask=0.1, update_bits=4
    ),
    "qsn-8": lambda: FedQSN(
        bits=8, units="neurons", server_mask=0.05, client_mask=0.05, update_bits=8,
        policy="sticky", aggregation=RegMean(size=24),
    ),
    "qsn-low-rank": lambda: FedQSN(
        units="mlp", bits=3, aggregation=RegMean(form="low-rank", size=8)
    ),
}  # fmt: skip
PLACES = tuple(SCHEMES)
"""A client of one of these names is served under the scheme of this name."""


@cache
def place(name: str) -> Place:
    """The server and the client that await messages of this client."""
    return Place(name, SCHEMES[name]())


def receive_anything(data: bytes) -> str:
    """Hand a message to those whom it says it is for."""
    received = bytearray(data)
    message, said = _read(received)
    if message is None:
        return said
    receiver = place(message.client if message.client in SCHEMES else PLACES[0])
    answers = []
    if message.kind != "proxy":
        answers.append(receiver.serve(message))
    if message.kind != "update":
        answers.append(receiver.work(message))
    if message.kind == "statistics":
        answers.append(_merge_by(message))
    assert received == data, "somebody wrote into what was received"
    return answers[-1]


def _merge_by(message: Message) -> str:
    model = net()
    try:
        statistics = MergeStatistics(message)
        grams = statistics.grams(model) if statistics.method == "regmean" else {}
        for gram in grams.values():
            gram.dense(0.9, 0.1)
        if statistics.method == "fisher":
            statistics.fisher(model)
    except FedveilError as error:
        return _words(error)
    return "taken"


# Whether anything has changed ----------------------------------------------------------------


def fingerprint(thing: object) -> int:
    """Of everything that an object holds, however deep: tensors by their bits."""
    return _walk(thing, 0, set())


def _walk(thing: object, so_far: int, above: set[int]) -> int:
    if isinstance(thing, Tensor):
        flat = thing.detach().contiguous().view(-1).view(torch.uint8) if thing.numel() else None
        header = f"{thing.dtype}{list(thing.shape)}".encode()
        return zlib.crc32(
            flat.numpy().data if flat is not None else b"", zlib.crc32(header, so_far)
        )
    if isinstance(thing, str | bytes | int | float | type(None)):
        return zlib.crc32(repr(thing).encode(), so_far)
    if isinstance(thing, FunctionType | MethodType | ModuleType | type) or id(thing) in above:
        return so_far
    above = {*above, id(thing)}
    if isinstance(thing, Mapping):
        children: Any = [child for pair in thing.items() for child in pair]
    elif isinstance(thing, set | frozenset):
        children = sorted(thing, key=repr)
    elif isinstance(thing, list | tuple):
        children = thing
    elif is_dataclass(thing):
        children = [getattr(thing, f.name) for f in fields(thing) if hasattr(thing, f.name)]
    else:
        children = [child for pair in sorted(vars(thing).items()) for child in pair] \
            if hasattr(thing, "__dict__") else []  # fmt: skip
    for child in children:
        so_far = _walk(child, so_far, above)
    return zlib.crc32(type(thing).__name__.encode(), so_far)
