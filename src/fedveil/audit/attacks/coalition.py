"""What an attack is given, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

from torch import Tensor

from fedveil.audit.attacks.imputation import PUBLIC_VALUES, ZEROS, impute
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.evidence import Evidence, Kept
from fedveil.federation.stage import Stage, State
from fedveil.tasks import Prepared

__all__ = ["Coalition", "Simulated", "Stolen"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stolen:
    """A model that an attack has made, to be measured on the owner's test set.

    Attributes:
        state: Its tensors. What everybody holds anyway, as the backbone under an adapter, may be
            left out.
        holes: What stands where nothing was released: "zeros" or "public". "" of an attack on a
            model: what stands in the model that it began with.
        known: What was released; None of an attack on a model: what was released of that.
    """

    state: Mapping[str, Tensor]
    holes: str = ""
    known: PartialModel | None = None


@dataclass(frozen=True)
class Simulated:
    """Attackers can make by themselves all that they were sent: nothing of it is the owner's."""


@dataclass
class Coalition:
    """Clients that attack together (or one alone), and everything that they may use.

    Attributes:
        clients: Their names, sorted.
        sent: The messages that they were sent, oldest first. Of what `evidence` holds attacks use
            these alone, and the manifest; the rest is there to measure with.
        evidence: The run.
        stage: The architecture, the task, how clients train, what they have, the scheme, and what
            is public. An attacker has neither ``stage.models`` (but what everybody holds of the
            base: see :meth:`~fedveil.federation.stage.Stage.whole`) nor ``stage.test`` (but which
            classes there are).
        rounds: For how many rounds' work attackers train at most, who train as clients do.
        start: What an attack on a model begins with, whole; empty for the others.
        ways: How attackers fill holes: "zeros", "public".
        untrained: Makes a model in which nothing is left of the owner's.
        tell: Hears of what is being done.
    """

    clients: tuple[str, ...]
    sent: Sequence[Kept]
    evidence: Evidence
    stage: Stage
    rounds: int = 6
    start: State = field(default_factory=dict)
    ways: tuple[str, ...] = (ZEROS,)
    untrained: Callable[[], State] = dict
    tell: Callable[[str], None] = lambda text: None
    _made: dict[str, object] = field(init=False, repr=False, default_factory=dict)

    @cached_property
    def data(self) -> Prepared:
        """What all attackers have together."""
        return self.stage.pooled(self.clients)

    def completed(self, known: PartialModel) -> Iterator[Stolen]:
        """Whole models of what is known, with holes filled in every way that there is."""
        ways = self.ways[:1] if known.share() == 1 else self.ways
        for holes in ways:
            values = self.stage.public if holes == PUBLIC_VALUES else None
            yield Stolen(impute(known, self.evidence.manifest, values), holes, known)

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """What several attacks need of one start, made when the first of them asks for it.

        Args:
            name: Of what is made; whoever gives the same name gets the same thing.
            make: Makes it.
        """
        if name not in self._made:
            self._made[name] = make()
        return cast(_T, self._made[name])
