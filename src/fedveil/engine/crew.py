"""Those who do the clients' part of a round, wherever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from fedveil.errors import FedveilError
from fedveil.wire import Message

__all__ = ["Answer", "Crew", "Desk", "Job", "Measures", "seed_of", "threads"]

Measures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One client's round: the bytes it was sent, the seed of its training, and whether to measure
    the proxy ``"before"`` and ``"after"`` it."""

    client: str
    proxy: bytearray | memoryview
    seed: int
    measure: tuple[str, ...] = ()


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


def seed_of(seed: int, number: int, client: str) -> int:
    """The seed of one client's training in round ``number`` of a federation with ``seed``."""
    text = f"{seed}/train/{number}/{client}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


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
