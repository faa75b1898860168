"""Federations of three clients, and the nodes that they are on a grid."""

import toys
from fedveil import FedQSN
from fedveil.flower import Partner, client_app
from grids import LocalGrid, Node


def federation(**changes):
    return toys.federation(toys.mlp(), scheme=FedQSN(units="neurons"), **changes)


def app_of(run, name):
    """The ClientApp of one client of a federation."""
    return client_app(lambda context: Partner(name, run.workplace()))


def grid_of(run, **behaviours):
    """A node for each client of a federation; behaviours by client name, with _ for -."""
    nodes = {}
    for number, name in enumerate(sorted(run.workplace().trainers), start=10):
        node = Node(app_of(run, name), key=name.encode())
        if name.replace("-", "_") in behaviours:
            node.behaviour = behaviours[name.replace("-", "_")]
        nodes[number] = node
    return LocalGrid(nodes)
