"""Whether a loss says that a model has broken down."""

from __future__ import annotations

import math

__all__ = ["loss_problem"]

EXPLODED = 10.0
"""A loss has exploded that is more than so many times what it was. What it was counts as a nat at
least: a good model may lose a little, and an untrained one of a thousand classes is at 7 nats."""


def loss_problem(loss: float, before: float | None) -> str | None:
    """What is wrong with a loss, in words; None if nothing is.

    Args:
        loss: After a round, in nats.
        before: Before it; None if it was not measured: then a loss has only to be finite.
    """
    if not math.isfinite(loss):
        return "a loss that is not finite"
    if before is not None and math.isfinite(before) and loss > EXPLODED * max(1.0, before):
        return f"a loss of {loss:.3g} nats, after {before:.3g}"
    return None
