"""The end of a round: replies are added up, and the model learns, without a client if need be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedveil.engine.bounds import Bounded
from fedveil.engine.crew import Measures, threads
from fedveil.engine.spool import Spool
from fedveil.engine.verdict import Verdict
from fedveil.errors import TrainingError
from fedveil.schemes import ServerSide, ServerState
from fedveil.schemes.base import Metrics
from fedveil.state import StateDict
from fedveil.wire import Limits, Message

__all__ = ["Closing", "Outcome"]

_TRIES = 32
"""So many clients are left out, one after the other, of a round of which no model comes: those with
the largest updates."""


@dataclass(frozen=True)
class Outcome:
    """What came of a round.

    Attributes:
        metrics: What the scheme reports of it.
        seen: What the global model was looked at for; None if that was not done, or it stayed.
        left_out: Who was left out, as the model is best without its reply; None if nobody was.
        problem: Why somebody was, or why nothing was applied; empty if all is well.
    """

    metrics: Metrics
    seen: Measures | None = None
    left_out: str | None = None
    problem: str = ""

    @property
    def rejected(self) -> bool:
        """Whether nothing was applied, as leaving out a single client does not help."""
        return bool(self.problem) and self.left_out is None


@dataclass
class Closing:
    """Closes one round, of which all replies have come.

    Attributes:
        server: Whose round is open; everybody has been sent its proxy.
        number: Of the round.
        begun: The server's state before the round; its tensors need not be those of then.
        released: Who was sent a proxy, in that order: it decides who shares a mask.
        bounded: What each reply is given. That stays as it is when a client is left out, so that
            whoever stays gains nothing by it.
        limits: How much each reply may be.
        spool: The replies.
        verdict: What makes a model.
        look: Measures the global model; None if there is nothing to measure it on.
    """

    server: ServerSide
    number: int
    begun: ServerState
    released: Sequence[str]
    bounded: Mapping[str, Bounded]
    limits: Mapping[str, Limits]
    spool: Spool
    verdict: Verdict
    look: Callable[[], Measures | None]
    _before: StateDict = field(default_factory=dict, init=False)

    def run(self) -> Outcome:
        """Let the model learn what the clients taught."""
        self._add(self.bounded)
        added = self.server.state()
        self._before = {name: tensor.clone() for name, tensor in added.tensors.items()}
        try:
            return self._learn()
        except TrainingError as error:
            problem = str(error)
        culprit = self._find_culprit()
        if culprit is None:
            self.server.restore(replace(added, tensors=self._before))
            return Outcome({"clients": len(self.bounded)}, problem=problem)
        return replace(self._learn_without(culprit), left_out=culprit, problem=problem)

    def _find_culprit(self) -> str | None:
        """The client without whose reply the round gives the best model; None if none helps."""
        reached: dict[str, float] = {}
        for suspect in self.verdict.suspects[:_TRIES] if len(self.bounded) > 1 else ():
            try:
                seen = self._learn_without(suspect).seen
            except TrainingError:
                continue
            reached[suspect] = 0.0 if seen is None else seen["loss"]
        return min(reached, key=reached.__getitem__, default=None)

    def _learn_without(self, client: str) -> Outcome:
        """Begin the round anew, and close it without a client's reply.

        Raises:
            TrainingError: No model comes of that either.
        """
        self.server.restore(replace(self.begun, tensors=self._before))
        self.server.begin_round(self.number)
        for other in self.released:
            self.server.release(other)
        self._add(self.bounded.keys() - {client})
        return self._learn()

    def _add(self, clients: Collection[str]) -> None:
        with threads(1):
            for client, data in self.spool.replies():
                if client in clients:
                    mine = self.bounded[client]
                    reply = Message.from_bytes(data, limits=self.limits[client])
                    self.server.absorb(client, reply, mine.weight, mine.scales)

    def _learn(self) -> Outcome:
        """Apply what was added.

        Raises:
            TrainingError: No model comes of it.
        """
        metrics = dict(self.server.end_round())
        seen = self.look()
        loss = None if seen is None else seen["loss"]
        self.verdict.check(self.server.state().tensors, self._before, loss)
        return Outcome(metrics, seen)
