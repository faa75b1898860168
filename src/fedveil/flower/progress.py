"""What happens, in the log of the ServerApp."""

from __future__ import annotations

import logging

from fedveil.engine import Observer, RoundRecord

__all__ = ["LogProgress"]


class LogProgress(Observer):
    """One line for each event. A line is repeated only when it says something new."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._last = log, ""

    def waiting(self, text: str) -> None:
        """Who is waited for; told again when that changes."""
        what = text.rsplit(",", 1)[0]
        if what != self._last:
            self._last = what
            self._log.info(text)

    def run_started(self, rounds: int, finished: int) -> None:
        """See :class:`~fedveil.engine.Observer`."""
        done = f", {finished} of them finished before" if finished else ""
        self._log.info("%d rounds%s", rounds, done)

    def round_started(self, number: int, clients: int) -> None:
        """See :class:`~fedveil.engine.Observer`."""
        self._log.info("round %d: %d clients", number, clients)

    def client_refused(self, number: int, client: str, reason: str) -> None:
        """See :class:`~fedveil.engine.Observer`."""
        self._log.warning("round %d: %s is sent nothing: %s", number, client, reason)

    def client_finished(self, number: int, client: str, failure: str | None) -> None:
        """See :class:`~fedveil.engine.Observer`."""
        if failure is None:
            self._log.info("round %d: %s answered", number, client)
        else:
            self._log.warning("round %d: %s failed: %s", number, client, failure)

    def round_finished(self, record: RoundRecord) -> None:
        """See :class:`~fedveil.engine.Observer`."""
        down, up = sum(record.bytes_down.values()), sum(record.bytes_up.values())
        model = record.measures.get("global", {}).get("accuracy")
        measured = "" if model is None else f", global model {model:.1f} %"
        self._log.info(
            "round %d finished: %d of %d clients%s, %d bytes down, %d up, %.0f s",
            record.round, len(record.bytes_up), len(record.bytes_down), measured, down, up,
            record.seconds,
        )  # fmt: skip
