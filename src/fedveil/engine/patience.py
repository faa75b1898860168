"""How long clients on other machines are waited for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedveil.errors import ConfigurationError

__all__ = ["Patience"]


@dataclass(frozen=True)
class Patience:
    """How long the owner waits for clients.

    Attributes:
        deadline: Seconds that a round takes at most if enough have answered by then.
        quorum: How many answers are enough; None for more than half of those who were asked.
        give_up: Seconds after which a round without enough answers, or a federation without enough
            clients, stops with an error: it can be resumed later.
        poll: Seconds between looks.

    Raises:
        ConfigurationError: A number is impossible.
    """

    deadline: float = 3600.0
    quorum: int | None = None
    give_up: float = 86400.0
    poll: float = 1.0

    def __post_init__(self) -> None:
        for name in ("deadline", "give_up", "poll"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                raise ConfigurationError(
                    f"The setting {name!r} is impossible",
                    expected="a number of seconds above 0",
                    found=repr(value),
                )
        if self.quorum is not None and (type(self.quorum) is not int or self.quorum < 1):
            raise ConfigurationError(
                "The setting 'quorum' is impossible",
                expected="at least 1 answer",
                found=repr(self.quorum),
            )

    def enough(self, asked: int) -> int:
        """How many answers of so many are enough."""
        return min(asked, self.quorum or asked // 2 + 1)
