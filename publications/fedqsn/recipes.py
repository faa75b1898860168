"""What is compared: schemes, and in how many releases they work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedveil.schemes import FedAvg, FedQSN, Scheme

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A scheme, and how often it releases.

    Attributes:
        scheme: What clients get.
        releases: Rounds in which all clients take part and do all their work; None for the scene's
            own plan of many rounds.
        ancestor: Release the public model that the owner's was made from, and nothing of his own.
    """

    scheme: Scheme
    releases: int | None = None
    ancestor: bool = False


def once(server_mask: float, bits: int | None = 4, **changes: object) -> Recipe:
    """One release, merged with RegMean."""
    scheme = FedQSN(
        server_mask=server_mask, client_mask=0.0, bits=bits, aggregation="regmean", **changes
    )
    return Recipe(scheme, 1)


RECIPES: Mapping[str, Recipe] = {
    "FedAvg": Recipe(FedAvg()),
    "FedAvg, once": Recipe(FedAvg(), 1),
    "FedQSN, paper": Recipe(FedQSN.paper()),
    "FedQSN, masks and mean": Recipe(FedQSN()),
    "once, 4 bit, 0 %": once(0.0),
    "once, 4 bit, 10 %": once(0.1),
    "once, 4 bit, 20 %": once(0.2),
    "once, 4 bit, 30 %": once(0.3),
    "once, 4 bit, 40 %": once(0.4),
    "once, 3 bit, 10 %": once(0.1, 3),
    "once, 3 bit, 20 %": once(0.2, 3),
    "once, 3 bit, 30 %": once(0.3, 3),
    "once, 4 bit, 20 %, server": once(0.2, merge="server"),
    "once, 4 bit, 30 %, server": once(0.3, merge="server"),
    "once, 4 bit, 40 %, server": once(0.4, merge="server"),
    "once, 4 bit, 10 %, heads": once(0.1, units="neurons"),
    "once, 4 bit, 20 %, heads": once(0.2, units="neurons"),
    "twice, 4 bit, 10 %": Recipe(once(0.1).scheme, 2),
    "ancestor once, 4 bit": Recipe(once(0.0).scheme, 1, ancestor=True),
    "ancestor once, 8 bit": Recipe(once(0.0, 8).scheme, 1, ancestor=True),
}
