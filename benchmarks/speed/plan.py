"""How much is measured: everything, or a little of everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Plan", "Tell"]

Tell = Callable[[str], None]
"""Shows what is being done."""


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of a run.

    Attributes:
        quick: Small models, few repeats: whether everything works, not how fast.
    """

    quick: bool = False

    def repeats(self, full: int) -> int:
        """How many pairs are timed where a full run times `full`."""
        return 2 if self.quick else full

    @property
    def clients(self) -> tuple[int, ...]:
        """Clients per round, in the benchmark over them."""
        return (1, 4, 16) if self.quick else (1, 10, 100, 1000)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Parameters of the model, in the benchmark over them."""
        return (10**5, 10**6) if self.quick else (10**6, 10**7, 10**8, 10**9)

    @property
    def cohort(self) -> int:
        """Clients in each round of the benchmark of rounds."""
        return 5 if self.quick else 50
