"""Owners who fine-tuned a public model, and what judges them."""

import copy

import toys
from fedveil import FedAvg, FedQSN
from fedveil.schemes import Transfer
from fedveil.schemes.transfer import COEFFICIENTS
from fedveil.state import read_state

OWNER = {"owner": toys.rows(8, seed=70)}
TEXTS = {"owner": toys.texts(8, seed=70)}
ONCE = FedQSN.once(server_mask=0.0)
SCHEMES = [FedAvg(), FedQSN(), FedQSN.paper(), ONCE]


def tuned(public, seed, size=0.05):
    """What an owner has who fine-tuned a public model."""
    own = copy.deepcopy(public)
    toys.Nudge(seed, size)(own)
    for name, tensor in read_state(own).items():
        if name.endswith("running_var"):
            tensor.abs_()
    return own


def judge(state):
    """Any number that depends on all of a model."""
    return float(sum(t.double().abs().sum() for t in state.values() if t.is_floating_point()))


def first(*pair):
    """A judge who prefers one pair of coefficients."""
    losses = iter([float(one != pair) for one in COEFFICIENTS])
    return lambda state: next(losses)


def transfer(scheme, public, own, **more):
    return Transfer(scheme, public, own, toys.SECRET, more.pop("judge", judge), **more)


def sent(server, model, scheme, rounds=2):
    """All bytes that clients receive of a server side, who answer them."""
    received = []
    for number in range(1, rounds + 1):
        server.begin_round(number)
        for client in ("a", "b"):
            message = server.release(client)
            received.append(bytes(message.to_bytes()))
            reply = toys.reply_of(scheme, message, toys.bare(model), toys.Nudge(number, 0.01))
            server.absorb(client, reply, 1.0)
        server.end_round()
    return received
