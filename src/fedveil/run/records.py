"""What is written down of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["RoundRecord"]


@dataclass
class RoundRecord:
    """One round, as a line of ``metrics.jsonl``.

    Attributes:
        round: Its number, from 1.
        bytes_down: Bytes of the message that each client was sent.
        bytes_up: Bytes of each client's reply.
        failed: Clients whose reply was not used, with the reason.
        refused: Clients that were not sent a proxy, with the reason: it would have shown them more
            of the model than allowed.
        bounded: Clients whose reply counted for less than it asked for, with what was cut.
        rejected: Why nothing of the round was applied, and whose update was the largest; empty if
            it was.
        examples: Examples each client says it trained on.
        loss_first: Loss of each client's first batch, in nats.
        loss_last: Loss of each client's last batch, in nats.
        measures: On the owner's test set: ``global``, ``server_model``, ``proxy_before`` and
            ``proxy_after`` (the last two means over the measured clients), each with what
            :func:`~fedveil.training.evaluate` returns: ``accuracy`` in percent, ``loss`` in nats,
            and "f1" of classifiers or "perplexity" of language models.
        metrics: What the scheme reports of the round.
        exposed: Share of the model's parameters, from 0 to 1, that each client of the round was
            shown so far in all rounds together; see :class:`~fedveil.audit.Exposure`.
        exposed_together: The same of all clients of the run united; None if nothing is kept.
        ledger: How far the exposure ledger went by the end of the round, from which it is seen if
            some of it was lost; None if there is none on disk.
        unusual: Clients that began or ended far from the others, or changed next to nothing, with
            what is unusual: they may have other settings, or other data. It cuts nothing.
        seconds: Wall-clock time of the round, measuring included.
    """

    round: int
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bounded: dict[str, str] = field(default_factory=dict)
    rejected: str = ""
    examples: dict[str, int] = field(default_factory=dict)
    loss_first: dict[str, float] = field(default_factory=dict)
    loss_last: dict[str, float] = field(default_factory=dict)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    exposed: dict[str, float] = field(default_factory=dict)
    exposed_together: float | None = None
    ledger: str | None = None
    unusual: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundRecord:
        """The record that :meth:`to_json` wrote."""
        return cls(**values)
