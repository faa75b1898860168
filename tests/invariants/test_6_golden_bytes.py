"""Today's schemes give the bytes that they gave: whoever changes a digest has changed the wire.

All numbers are fractions of a power of two and all steps elementwise, so that every machine gives
the same bits: no generator of normal numbers, no matrix product. What is learned is no matter here.
"""

import hashlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fedveil import FedAvg, FedLPP, FedQSN
from fedveil.schemes.transfer import Transfer
from fedveil.state import read_state
from fedveil.training import TrainingRecord
from fedveil.wire import Message
from toys import SECRET, bare

ROUNDS, CLIENTS = 3, ("ward-1", "ward-2", "ward-3")


def fractions(shape, seed):
    """Numbers from -2 to 2 in steps of 2^-10."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2048, 2049, shape, generator=generator) / 1024


def net(seed=0):
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(),
                          nn.Linear(64, 3))  # fmt: skip
    for number, tensor in enumerate(read_state(model).values()):
        tensor.copy_(fractions(tensor.shape, 100 * seed + number))
    return model


def adapted():
    """A net of which the last layer is trained, as beside a backbone."""
    model = net()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


@dataclass(frozen=True)
class Exact:
    """Training and data as fractions: the same on every machine."""

    seed: int
    examples: int

    def __call__(self, model):
        for number, (name, tensor) in enumerate(read_state(model).items()):
            if dict(model.named_parameters())[name].requires_grad:
                tensor += fractions(tensor.shape, 1000 * self.seed + number) / 64
        return TrainingRecord(self.examples, 4, 1.5, 0.25)

    def replay(self, model, examples):
        """Rows of small whole numbers, of which every sum of products is exact."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(-3, 4, (8, 16), generator=generator).float()
        yield {"x": rows}
        model(rows)


def played(scheme, model, server=None):
    """All bytes of some rounds, both ways, and the server that they were of."""
    server, side = server or scheme.server(model, SECRET), scheme.client()
    place, memories = bare(model), {client: {} for client in CLIENTS}
    bytes_ = hashlib.sha256()
    for number in range(1, ROUNDS + 1):
        server.begin_round(number)
        for index, client in enumerate(CLIENTS):
            down = server.release(client).to_bytes()
            trainer = Exact(10 * number + index, 4 + 2 * index)
            if getattr(scheme, "clients_hold_rest", False):
                place.load_state_dict(model.state_dict())
            up = side.fit(Message.from_bytes(down), place, trainer, memories[client]).to_bytes()
            server.inspect(client, Message.from_bytes(up))
            server.absorb(client, Message.from_bytes(up), float(trainer.examples))
            bytes_.update(down)
            bytes_.update(up)
        server.end_round()
    return bytes_.hexdigest()[:16], server


def digest_of(state):
    whole = hashlib.sha256()
    for name, tensor in state.items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()[:16]


SCHEMES = {
    "fedavg": FedAvg(),
    "fedavg, 4 bits up, error feedback": FedAvg(update_bits=4, error_feedback=True),
    "fedqsn": FedQSN(units="neurons", aggregation="mean", server_mask=0.2, client_mask=0.3),
    "fedqsn, fresh, 4 bits up": FedQSN(
        units="neurons", aggregation="mean", policy="fresh", update_bits=4
    ),
    "fedqsn, columns, merged by the server": FedQSN(
        units="columns", aggregation="mean", merge="server"
    ),
    "fedqsn as published": FedQSN.paper(server_mask=0.1, client_mask=0.2),
    "fedlpp": FedLPP(),
}
GOLDEN = {
    "fedavg": ("4b451e3cbe6ececa", "2ebc084fb7efd2ff"),
    "fedavg, 4 bits up, error feedback": ("b1173c287dcbcc81", "d57a36f33dfb79a3"),
    "fedqsn": ("951dc3112f2ad49d", "8eb1a8278623af4e"),
    "fedqsn, fresh, 4 bits up": ("7cd8e4937d7bd4d2", "01410efd06804d08"),
    "fedqsn, columns, merged by the server": ("a1f71f8f2df21307", "7d9bae94baede829"),
    "fedqsn as published": ("0c1df10f58c5ccc7", "0cdd45625d9499af"),
    "fedlpp": ("73b78388ba7ac7d4", "ebe93c1950e5a83d"),
    "once": "2467ef74e0e42e96",
    "public": ("6a9907a6fefc97c6", "7537b2a0523e1774"),
}
"""Per scheme the digests of all messages, and of the model that comes of them."""


@pytest.mark.parametrize("name", SCHEMES)
def test_messages_and_the_model_that_comes_of_them_are_the_same(name):
    model = adapted() if name == "fedlpp" else net()
    messages, server = played(SCHEMES[name], model)
    assert (messages, digest_of(server.final())) == GOLDEN[name]


def test_grams_are_the_same():
    """What comes of them is solved by LAPACK, whose last bits differ between machines."""
    assert played(FedQSN.once(units="neurons"), net())[0] == GOLDEN["once"]


def test_a_public_model_is_released_as_if_it_were_the_owners():
    scheme, public, own = FedQSN(units="neurons", aggregation="mean"), net(7), net()

    def judge(state):
        return float(sum(tensor.double().abs().sum() for tensor in state.values()))

    server = Transfer(scheme, public, own, SECRET, judge)
    messages, server = played(scheme, public, server)
    assert messages == played(scheme, public)[0]
    assert (messages, digest_of(server.final())) == GOLDEN["public"]
