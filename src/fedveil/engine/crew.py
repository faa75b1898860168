"""Those who do the clients' part of a round, wherever they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedveil.errors import FedveilError
from fedveil.secret import Secret
from fedveil.wire import Limits, Message

__all__ = ["Answer", "Crew", "Desk", "Job", "Measures", "order_of", "seed_of", "threads"]

Measures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One client's round: the bytes it was sent, the seed of its training, whether to measure the
    proxy ``"before"`` and ``"after"`` it, and how much its reply may be."""

    client: str
    proxy: bytearray | memoryview
    seed: int
    measure: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Answer:
    """What came back: the reply's bytes, or why there are none; ``before`` and ``after`` measure
    the proxy as received and as trained."""

    client: str
    reply: bytearray | memoryview | None
    failure: FedveilError | None = None
    before: Measures | None = None
    after: Measures | None = None
    seconds: float = 0.0


class Crew(Protocol):
    """Does jobs and hands back the answers in the order of the jobs."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """Do the jobs. A job is asked for only when someone is about to be free for it."""

    def present(self, wanted: int) -> Collection[str] | None:
        """Clients who can be sent something now; None if all can.

        Args:
            wanted: How many are needed; they are waited for as long as that makes sense.
        """

    @property
    def one_at_a_time(self) -> bool:
        """Whether it is done with a job's bytes before it asks for the next job."""


class Desk:
    """Memory for one message at a time: it is used again for the next one.

    Fresh memory costs as much as what is written to it: the system clears it page by page.
    """

    def __init__(self) -> None:
        self._memory = bytearray()

    def write(self, message: Message) -> memoryview:
        """The message's bytes, until the next message is written."""
        if len(self._memory) < message.nbytes:
            self._memory = bytearray(message.nbytes)
        return message.write_into(self._memory)


def seed_of(secret: Secret, seed: int, number: int, client: str) -> int:
    """The seed of one client's training in round ``number``, from 0 to 2^32 - 1.

    It is sent to the client: under a secret it tells nothing of other clients, other rounds, or
    whatever else a federation draws.
    """
    return int(secret.words(1, "client training", seed, number, client)[0] & 0xFFFFFFFF)


def order_of(secret: Secret, seed: int, number: int, clients: Iterable[str]) -> list[str]:
    """All clients in the order in which they are asked to take part in round ``number``."""
    names = sorted(clients)
    words = secret.words(len(names), "client sampling", seed, number).tolist()
    return [name for _, name in sorted(zip(words, names, strict=True))]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on ``count`` threads. Clients train on one each: the same sums in the same order,
    however many workers there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
