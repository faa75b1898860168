"""Which Flower node is which client."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.app import Message, MessageType
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedveil.errors import ConfigurationError, ProtocolError, WireError
from fedveil.flower.payload import pack, unpack

__all__ = ["ByAnswer", "ByKey", "ByNode", "Directory", "read_key"]


class Directory(Protocol):
    """Finds clients among the nodes that are connected."""

    def find(self, grid: Grid) -> Mapping[str, int]:
        """Node ids by client name, of those clients who can be reached now."""


class ByKey:
    """Clients by the public keys of their SuperNodes, which the SuperLink has checked.

    A node gets a new id whenever it is started anew; its key stays. A node whose key belongs to no
    client is sent nothing.

    Args:
        keys: Public keys by client name, as in ``clinic-1.pub`` (ecdsa-sha2-nistp384).

    Does NOT protect against the operator of the SuperLink, who decides which key is which node's.

    Raises:
        ConfigurationError: A key is none, or two clients have the same one.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._clients: dict[bytes, str] = {}
        for client, text in keys.items():
            key = read_key(text, client)
            if key in self._clients:
                raise ConfigurationError(
                    "Two clients have the same key",
                    expected="a key of its own for each client",
                    found=f"{self._clients[key]} and {client}",
                )
            self._clients[key] = client

    def find(self, grid: Grid) -> Mapping[str, int]:
        """See :class:`Directory`."""
        nodes: dict[str, int] = {}
        for node in grid.get_nodes():
            client = self._clients.get(bytes(node.public_key).strip())
            if client is not None:
                nodes[client] = node.node_id
        return nodes


class ByNode:
    """Every node is a client of its own, named by its key; or by its number, if it has no key.

    With a key, which a SuperLink checks that was started with ``--enable-supernode-auth``, a client
    stays the same when its node comes back. Without, it is a new one each time: it gets new masks,
    and sees more of the model.
    """

    def find(self, grid: Grid) -> Mapping[str, int]:
        """See :class:`Directory`."""
        return {_fingerprint(node): node.node_id for node in grid.get_nodes()}


@dataclass
class ByAnswer:
    """Clients by what their nodes answer when they are asked: only where nobody could lie.

    Made for simulations, whose nodes have no keys.

    Attributes:
        timeout: Seconds to wait for answers.
        strict: Whether a node that cannot say its name is an error, rather than nobody.
    """

    timeout: float = 600.0
    strict: bool = False
    _known: dict[int, str] = field(default_factory=dict)

    def find(self, grid: Grid) -> Mapping[str, int]:
        """See :class:`Directory`.

        Raises:
            ProtocolError: A node cannot say its name, and ``strict`` is set.
        """
        nodes = list(grid.get_node_ids())
        unknown = [node for node in nodes if node not in self._known]
        questions = [
            Message(content=pack(None), dst_node_id=node, message_type=MessageType.QUERY)
            for node in unknown
        ]
        if questions:
            for answer in grid.send_and_receive(questions, timeout=self.timeout):
                if (name := _name(answer)) is not None:
                    self._known[answer.metadata.src_node_id] = name
                elif self.strict:
                    raise ProtocolError(
                        "A node does not know which client it is",
                        fix="Its own log says why.",
                    )
        return {self._known[node]: node for node in nodes if node in self._known}


def read_key(text: str, whose: str) -> bytes:
    """A public key in OpenSSH's form, as Flower keeps it: PEM, without a line break at the end.

    Raises:
        ConfigurationError: It is no elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey):
        raise ConfigurationError(
            "A client's key cannot be read",
            expected='"ecdsa-sha2-nistp384 AAAA..."',
            found=repr(text[:40]),
            where=whose,
            fix="It is what ssh-keygen -t ecdsa -b 384 writes to the .pub file.",
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).strip()


def _fingerprint(node: NodeInfo) -> str:
    key = bytes(node.public_key).strip()
    return f"key-{hashlib.sha256(key).hexdigest()[:16]}" if key else f"node-{node.node_id}"


def _name(answer: Message) -> str | None:
    if answer.has_error():
        return None
    try:
        _, facts = unpack(answer.content)
    except WireError:
        return None
    name = facts.get("client")
    return name if isinstance(name, str) else None
