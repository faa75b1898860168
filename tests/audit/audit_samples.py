"""Small runs to be attacked, and servers with a planted weakness."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import toys
from fedveil.audit import Evidence
from fedveil.audit.attacks import attacks
from fedveil.audit.attacks.registry import Beginning
from fedveil.quantization import quantize
from fedveil.run import Manifest
from fedveil.state import read_state
from fedveil.wire import Dense, Message, UnitIndex

WIDTH = 256
CLIENTS = ("a", "b", "c")


def net(seed: int = 0) -> Any:
    """One hidden layer of 256 neurons; no tensor is cut along two axes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))


def names(begins: Beginning) -> set[str]:
    """Names of all attacks that begin with something."""
    return {attack.name for attack in attacks(begins)}


class Recorded:
    """A server whose messages are kept as a run keeps them, without clients.

    Args:
        folder: The run folder.
        scheme: What is run.
        spoil: Changes a message before it is sent.
        move: Changes the global model between rounds; gets the round's number and the tensors.
        facts: What run.json states; by default what the scheme does.
    """

    def __init__(self, folder, scheme, *, spoil=None, move=None, model=None, facts=None):
        self.folder, self.scheme = Path(folder), scheme
        self.model = model or net()
        self.server = scheme.server(self.model, toys.SECRET)
        self.spoil = spoil or (lambda message: message)
        self.move = move or (lambda number, tensors: None)
        self.truth = {}
        configuration = {"scheme": {"name": scheme.name, **vars(scheme)}}
        configuration["scheme"].pop("aggregation", None)
        facts = scheme.facts() if facts is None else facts
        tensors, groups = read_state(self.model), self.server.groups
        Manifest.of(tensors, groups, configuration, facts=facts).write(self.folder)

    def play(self, rounds=3, clients=CLIENTS):
        for number in range(1, rounds + 1):
            tensors = self.server._global.tensors
            self.move(number, tensors)
            self.truth[number] = {name: tensor.clone() for name, tensor in tensors.items()}
            self.server.begin_round(number)
            folder = self.folder / "messages" / f"round-{number:06d}"
            folder.mkdir(parents=True)
            for client in clients:
                message = self.spoil(Message.from_bytes(self.server.release(client).to_bytes()))
                path = folder / f"{client}.{message.kind}.safetensors"
                path.write_bytes(message.to_bytes())
            self.server.end_round()
        return Evidence(self.folder)


def changed(message, sections=None, *, kind=None, scalars=None):
    """A copy of a message with some sections replaced or added."""
    return Message(
        kind or message.kind, message.scheme, message.round, message.client,
        {**message.sections, **(sections or {})}, {**message.scalars, **(scalars or {})},
    )  # fmt: skip


def stochastic(message):
    """Round exact weights at random, so that the mean over many messages is the weight."""
    seed = hashlib.sha256(f"{message.round}/{message.client}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:4], "little"))
    exact = message.sections["1.weight"].tensor
    low, high = quantize(exact, block=16).interval()
    noise = torch.rand(low.shape, generator=generator) - 0.5
    return changed(message, {"1.weight": quantize(exact + noise * (high - low), block=16)})


def across_units(message):
    """Quantize exact weights along the other axis: blocks run across units."""
    exact = message.sections["1.weight"].tensor
    return changed(message, {"1.weight": quantize(exact, axis=1, block=64)})


def leaks_a_bias(model):
    """Send the whole bias of a layer of which neurons are withheld."""

    def spoil(message):
        return changed(message, {"1.bias": Dense(model[1].bias.detach().clone())})

    return spoil


def guessable(scheme, model):
    """Draw masks anew from the round and the client's place, as one would who forgot the secret."""

    def spoil(message):
        seed = 100 * message.round + CLIENTS.index(message.client)
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))
        units = order[round(scheme.client_mask * WIDTH) :].sort().values
        weight, bias = model[1].weight.detach()[units], model[1].bias.detach()[units]
        return Message(
            "proxy", message.scheme, message.round, message.client,
            {
                "units/1": UnitIndex(WIDTH, units),
                "1.weight": quantize(weight), "1.bias": Dense(bias),
                "3.weight": Dense(model[3].weight.detach()[:, units].contiguous()),
                "3.bias": message.sections["3.bias"],
            },
            {},
        )  # fmt: skip

    return spoil
