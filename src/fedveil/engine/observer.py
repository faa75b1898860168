"""Who wants to know how a federation is getting on."""

from __future__ import annotations

from fedveil.run.records import RoundRecord

__all__ = ["Observer"]


class Observer:
    """Hears of every event; does nothing with it unless a subclass does."""

    def untried(self, reason: str) -> None:
        """No round could be tried in small before the first, for this reason."""

    def run_started(self, rounds: int, finished: int) -> None:
        """A run of ``rounds`` rounds begins; ``finished`` are done already (resumed)."""

    def base_doubted(self, reason: str) -> None:
        """What the base reaches says that something may be wrong with it, and what."""

    def round_started(self, number: int, clients: int) -> None:
        """Round ``number`` begins with this many clients."""

    def waiting(self, text: str) -> None:
        """Somebody is waited for; told at every look, also if nothing has changed."""

    def client_refused(self, number: int, client: str, reason: str) -> None:
        """A client was not sent a proxy: that would have shown it more than is allowed."""

    def client_finished(self, number: int, client: str, failure: str | None) -> None:
        """A client's reply was used, or was not because of ``failure``."""

    def client_bounded(self, number: int, client: str, cuts: str) -> None:
        """A client's reply counts for less than it asked for."""

    def client_unusual(self, number: int, client: str, why: str) -> None:
        """A client began or ended far from the others; its reply counts all the same."""

    def client_left_out(self, number: int, client: str, reason: str) -> None:
        """A round was closed without a client's reply, which would have ruined the model."""

    def round_rejected(self, number: int, reason: str) -> None:
        """What came of a round is no model: the global model stays as it was before."""

    def checkpoint_saved(self, number: int, nbytes: int, kept: int) -> None:
        """A round is on disk, in so many bytes; checkpoints of the last ``kept`` rounds stay."""

    def round_finished(self, record: RoundRecord) -> None:
        """A round is over and, if there is a run folder, on disk."""
