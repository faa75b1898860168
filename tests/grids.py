"""Flower without processes: a grid whose nodes are functions, and what may go wrong with them."""

import copy
from dataclasses import dataclass, field
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity


def bytes_of(message):
    """What a message takes on the wire: every object in it, as Flower writes it."""
    return b"".join(part.deflate() for part in get_all_nested_objects(message).values())


@dataclass
class Node:
    """A connected node: its key, its program, its --node-config, and how it misbehaves.

    ``behaviour`` is a function of the reply that returns what arrives: a message, several, an
    Error, or None for nothing at all.
    """

    app: object
    key: bytes = b""
    config: dict = field(default_factory=dict)
    behaviour: object = field(default=lambda reply: reply)


class LocalGrid(Grid):
    """Delivers messages to `nodes`, by node id, one by one, and keeps all that was sent."""

    def __init__(self, nodes):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.nodes, self.sent, self._replies, self._numbers = nodes, [], {}, count(1)

    def set_run(self, run):
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **words):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def get_nodes(self):
        return [NodeInfo(node_id=n, public_key=node.key) for n, node in self.nodes.items()]

    def push_messages(self, messages):
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids):
        return [reply for number in message_ids for reply in self._replies.pop(number, [])]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message):
        number = f"message-{next(self._numbers)}"
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = number
        self.sent.append(copy.deepcopy(message))
        context = Context(1, node, self.nodes[node].config, RecordDict(), {})
        TaskIdentity.node_id = node
        reply = self.nodes[node].app(copy.deepcopy(message), context)
        TaskIdentity.node_id = 1
        arrived = self.nodes[node].behaviour(reply)
        if isinstance(arrived, Error):
            arrived = Message(arrived, reply_to=message)
        if arrived is not None:
            self._replies[number] = arrived if isinstance(arrived, list) else [arrived]
        return number
