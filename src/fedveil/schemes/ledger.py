"""Who was sent what in this round, and who has answered."""

from __future__ import annotations

from typing import Generic, TypeVar

from fedveil.errors import ProtocolError
from fedveil.wire import Message

__all__ = ["RoundLedger"]

Sent = TypeVar("Sent")

# Beyond these, a weight times an update leaves what float32 can hold.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e20


class RoundLedger(Generic[Sent]):
    """Pairs each reply with the release that it answers, once.

    ``Sent`` is what the server must remember of a release to decode its reply.
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.round = 0
        self._open = False
        self._sent: dict[str, Sent] = {}
        self._answered: set[str] = set()

    def begin(self, number: int) -> None:
        """Open round ``number``.

        Raises:
            ProtocolError: If another round is open, or the number is not the next one.
        """
        if self._open or number != self.round + 1:
            found = f"round {number}" + (f" while {self.round} is open" if self._open else "")
            raise ProtocolError(
                "Rounds follow one another", expected=f"round {self.round + 1}", found=found
            )
        self.round, self._open = number, True
        self._sent.clear()
        self._answered.clear()

    def end(self) -> None:
        """Close the open round."""
        self._require_open()
        self._open = False

    def get(self, client: str) -> Sent | None:
        """What this client was sent in the open round, or None if nothing yet."""
        self._require_open()
        return self._sent.get(client)

    def sent(self) -> set[str]:
        """Who was sent something in the open round."""
        self._require_open()
        return set(self._sent)

    def answered(self) -> set[str]:
        """Who has answered in the open round."""
        self._require_open()
        return set(self._answered)

    def record(self, client: str, sent: Sent) -> None:
        """Remember a release."""
        self._require_open()
        self._sent[client] = sent

    def expect(self, client: str, reply: Message, weight: float = 1.0) -> Sent:
        """Check that this reply is awaited, without recording it yet; see :meth:`accept`.

        Raises:
            ProtocolError: If it is from or for someone else, of another round, kind or scheme,
                a second answer, or has an impossible weight.
        """
        self._require_open()
        expected = ("update", self.scheme, self.round, client)
        found = (reply.kind, reply.scheme, reply.round, reply.client)
        if found != expected:
            raise ProtocolError(
                "A reply is not the one awaited",
                expected="kind {!r}, scheme {!r}, round {}, client {!r}".format(*expected),
                found="{!r}, {!r}, {}, {!r}".format(*found),
            )
        if client not in self._sent:
            raise ProtocolError(
                "A client answers that was sent nothing", where=f"round {self.round}", found=client
            )
        if client in self._answered:
            raise ProtocolError(
                "A client answers twice",
                where=f"round {self.round}",
                found=client,
                fix="The first answer counts.",
            )
        if not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:  # false for NaN too
            raise ProtocolError(
                "A reply has an impossible weight",
                expected=f"a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}",
                found=repr(weight),
                where=client,
            )
        return self._sent[client]

    def accept(self, client: str) -> None:
        """Record that this client has answered."""
        self._answered.add(client)

    def _require_open(self) -> None:
        if not self._open:
            raise ProtocolError("No round is open", fix="Call begin_round first.")
