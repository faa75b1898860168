"""Clients on other machines, reached through Flower."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedveil.engine.crew import Answer, Job
from fedveil.engine.patience import Patience
from fedveil.errors import CheckpointError, FedveilError, ProtocolError, TrainingError, WireError
from fedveil.files import write_whole
from fedveil.flower.agreement import DisagreementError, packed
from fedveil.flower.directory import Directory
from fedveil.flower.payload import pack, unpack
from fedveil.wire import Limits

__all__ = ["FlowerCrew"]

Tell = Callable[[str], None]

_NAMED = 8
"""So many clients are told of by name, and more only by number."""

_WHY: Mapping[int, str] = {
    ErrorCode.NODE_UNAVAILABLE: "its node did not stay connected",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its program raised an error",
    ErrorCode.CLIENT_APP_CRASHED: "its program died",
    ErrorCode.INVALID_FAB: "it takes part in no app but fedveil's own",
}
"""Reasons in our own words: those of Flower may quote what a client's error said of its data."""


class FlowerCrew:
    """Sends each client its own message, and hands back answers in the order of the jobs.

    A round ends when all have answered, or at the deadline if enough have: who has not answered by
    then has failed. Answers wait on disk for those before them, so that one is in memory at a time.

    Args:
        grid: Flower's connection to the nodes.
        directory: Which node is which client.
        patience: How long to wait.
        tell: Hears what is waited for.
        settings: What clients must have in common with the owner, as
            :func:`~fedveil.flower.agreement.settings_of` finds it: a client that has something else
            does not train. None compares nothing.
    """

    one_at_a_time = True

    def __init__(
        self,
        grid: Grid,
        directory: Directory,
        patience: Patience | None = None,
        tell: Tell = lambda text: None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._grid, self._directory, self._tell = grid, directory, tell
        self._facts = {} if settings is None else {"settings": packed(settings)}
        self._patience = patience or Patience()
        self._nodes: Mapping[str, int] = {}

    def present(self, wanted: int) -> Collection[str]:
        """See :class:`~fedveil.engine.crew.Crew`.

        Raises:
            ProtocolError: Too few clients came.
        """
        started, patience = time.monotonic(), self._patience
        while True:
            self._nodes = self._find()
            waited, there = time.monotonic() - started, len(self._nodes)
            if there >= wanted or (
                waited >= patience.deadline and there >= patience.enough(wanted)
            ):
                return self._nodes.keys()
            if waited >= patience.give_up:
                raise ProtocolError(
                    "Too few clients are connected",
                    expected=f"at least {patience.enough(wanted)}",
                    found=", ".join(sorted(self._nodes)) or "none",
                    fix="Start their SuperNodes, then run again: finished rounds are kept.",
                )
            names = f": {', '.join(sorted(self._nodes))}" if 0 < there <= _NAMED else ""
            self._tell(f"waiting for clients: {there} of {wanted} are connected{names}")
            time.sleep(patience.poll)

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """See :class:`~fedveil.engine.crew.Crew`."""
        asked, limits = list[tuple[str, str | None]](), dict[str, Limits]()
        for job in jobs:
            number = self._ask(job)
            asked.append((job.client, number))
            if number is not None:
                limits[number] = job.limits
        with TemporaryDirectory(prefix="fedveil-") as folder:
            inbox = _Inbox(self._grid, limits, Path(folder))
            started = time.monotonic()
            for client, number in asked:
                if number is None:
                    yield Answer(client, None, _unreachable(client))
                else:
                    self._wait(inbox, client, number, started)
                    yield inbox.take(client, number)

    def _ask(self, job: Job) -> str | None:
        """Send a job; the number under which its answer is found, or None if it was not sent."""
        content = pack(job.proxy, {"seed": job.seed, **self._facts})
        message = Message(
            content=content, dst_node_id=self._nodes[job.client], message_type=MessageType.TRAIN,
            ttl=self._patience.give_up,
        )  # fmt: skip
        # A list: Flower goes through it twice.
        numbers = list(self._grid.push_messages([message]))
        return numbers[0] if numbers else None

    def _wait(self, inbox: _Inbox, client: str, number: str, started: float) -> None:
        """Wait until an answer is there, or it is too late for it.

        Raises:
            ProtocolError: Too few clients have answered when there is no more time.
        """
        while True:
            inbox.look()
            waited, enough = time.monotonic() - started, self._patience.enough(inbox.asked)
            late = waited >= self._patience.deadline and inbox.answered >= enough
            if number in inbox or late:
                return
            if waited >= self._patience.give_up:
                raise ProtocolError(
                    "Too few clients have answered",
                    expected=f"at least {enough} answers in {self._patience.give_up:.0f} s",
                    found=str(inbox.answered),
                    fix="Run again when they are there: finished rounds are kept.",
                )
            self._tell(f"waiting for {client}: {inbox.answered} of {inbox.asked} have answered")
            time.sleep(self._patience.poll)

    def _find(self) -> Mapping[str, int]:
        try:
            return self._directory.find(self._grid)
        except httpx.HTTPError:
            return {}  # the SuperLink does not answer just now


class _Inbox:
    """Answers that have come, as files until they are taken."""

    def __init__(self, grid: Grid, limits: Mapping[str, Limits], folder: Path) -> None:
        self._grid, self._folder, self._limits = grid, folder, limits
        self._missing = set(limits)
        self._failures: dict[str, Callable[[str], FedveilError]] = {}
        self.asked, self.answered = len(limits), 0

    def __contains__(self, number: str) -> bool:
        return number not in self._missing

    def look(self) -> None:
        """Fetch what has come since, one answer at a time."""
        for number in sorted(self._missing):
            try:
                found = list(self._grid.pull_messages([number]))
            except httpx.HTTPError:
                return  # the SuperLink does not answer just now
            if found:
                self._keep(number, found[0])  # who answers twice has answered once

    def take(self, client: str, number: str) -> Answer:
        """A client's answer; that there is none, if there is none."""
        if number in self._missing:
            return Answer(client, None, _failed(client, "it did not answer in time"))
        if number in self._failures:
            return Answer(client, None, self._failures[number](client))
        path = self._folder / number
        reply = bytearray(path.read_bytes())
        path.unlink()
        return Answer(client, reply)

    def _keep(self, number: str, message: Message) -> None:
        self._missing.discard(number)
        if message.has_error():
            why = _WHY.get(message.error.code, "Flower could not deliver its answer")
            self._failures[number] = lambda client: _failed(client, why)
            return
        self.answered += 1
        try:
            reply, facts = unpack(message.content)
            if reply is not None:
                self._limits[number].check_length(len(reply))
        except WireError as error:
            rubbish = error
            self._failures[number] = lambda client: rubbish
            return
        if reply is None:
            self._failures[number] = lambda client: _said(client, facts)
        else:
            # It waits for others: nothing relies on its being on disk.
            write_whole(self._folder / number, reply, CheckpointError, synced=False)


def _said(client: str, facts: Mapping[str, int | str]) -> FedveilError:
    """What a client says of its failure: a kind, and nothing of what its error said."""
    kind = facts.get("failure")
    if kind == DisagreementError.__name__:
        return DisagreementError(
            "A client did not train, as its settings are not the owner's",
            where=client,
            fix="Its own log names those that differ.",
        )
    known = kind if kind in ("TrainingError", "DataError", "ProtocolError", "WireError") else ""
    return TrainingError(
        "A client could not train",
        found=known or "an unnamed failure",
        where=client,
        fix="Its own log says why.",
    )


def _failed(client: str, why: str) -> FedveilError:
    return TrainingError("A client gave no answer", found=why, where=client)


def _unreachable(client: str) -> FedveilError:
    return ProtocolError("A client could not be sent its proxy", where=client)
