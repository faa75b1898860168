"""What is compared: schemes, and in how many releases they work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedveil.schemes import FedAvg, FedLPP, FedQSN, Scheme
from studies.fedqsn.tried import Deepening, Distorted, Held, Lagging, Ternary, WithOptimizer

__all__ = ["COALITIONS", "Recipe", "recipes_of"]

COALITIONS = (1, 3)
"""Clients who pool what they were sent, of ten."""


@dataclass(frozen=True)
class Recipe:
    """A scheme, and how often it releases.

    Attributes:
        scheme: What clients get.
        releases: Rounds in which all clients take part and do all their work; None for the scene's
            own plan of many rounds.
        public: Release the public model that the owner's was fine-tuned from, and nothing more.
        own_classes: Whether clients leave classes that they lack out of the softmax.
        tuned: Whether the owner repeats its tuning on what came of it.
        work: Steps of a client, next to those of the scene's own plan.
        full: Try every attack there is, and not only the quick set.
        attacked: Whether to attack it at all.
    """

    scheme: Scheme
    releases: int | None = None
    public: bool = False
    own_classes: bool = False
    tuned: bool = False
    work: float = 1.0
    full: bool = False
    attacked: bool = True


def once(server_mask: float, bits: int | None = 4, **changes: object) -> Recipe:
    """One release of the base, merged with RegMean."""
    return Recipe(FedQSN.once(server_mask=server_mask, bits=bits, **changes), 1)


_PUBLIC = Recipe(
    FedQSN.once(server_mask=0.0), 1, public=True, own_classes=True, tuned=True, full=True
)
_MAIN: Mapping[str, Recipe] = {
    # Clients hold the global model: there is nothing to attack.
    "FedAvg": Recipe(FedAvg(), attacked=False),
    "FedAvg, tuned again": Recipe(FedAvg(), tuned=True, attacked=False),
    "public": _PUBLIC,
    "paper": Recipe(FedQSN.paper(), full=True),
}
_BBC: Mapping[str, Recipe] = {**_MAIN, "once, 20 %": once(0.2)}
# A full audit of many rounds takes half an hour there.
_NEWSGROUPS: Mapping[str, Recipe] = {**_MAIN, "paper": Recipe(FedQSN.paper())}
_ADAPTERS: Mapping[str, Recipe] = {
    "FedAvg": Recipe(FedLPP(bits=None), attacked=False),
    # Who begins with what everybody has must learn once more what the base knows already.
    "public": Recipe(FedLPP(bits=None, aggregation="regmean"), 1, public=True, work=3.0),
}
_MANY = FedQSN(server_mask=0.2)
"""Several rounds of masked proxies, as whoever has nothing public would think of."""

_NOTHING_PUBLIC: Mapping[str, Recipe] = {
    **_BBC,
    # Of a random initialization, as nothing better is public.
    "public, 3 x the work": replace(_PUBLIC, work=3.0),
    "public, 3 releases": replace(_PUBLIC, releases=3, tuned=False, full=False),
    # How much is withheld, of what.
    "once, 0 %": once(0.0),
    "once, 40 %, server model": once(0.4, merge="server"),
    "once, 10 %": once(0.1),
    "once, 30 %, server model": once(0.3, merge="server"),
    "once, 50 %, server model": once(0.5, merge="server"),
    "once, 20 % of columns": once(0.2, units="columns"),
    "once, 20 %, and 30 % per group": once(0.2, client_mask=0.3),
    "once, 20 %, mean": once(0.2, aggregation="mean"),
    "once, 20 %, more of deep layers": Recipe(Deepening.once(server_mask=0.2), 1),
    # With how many bits.
    "once, 20 %, 8 bit": once(0.2, 8),
    "once, 20 %, 3 bit": once(0.2, 3),
    "once, 20 %, 2 bit": once(0.2, 2),
    "once, 1.58 bit": Recipe(Ternary(aggregation="regmean"), 1),
    # In how many releases, to whom.
    "20 %, 2 releases": Recipe(FedQSN.once(server_mask=0.2), 2),
    "20 %, 3 releases": Recipe(FedQSN.once(server_mask=0.2), 3),
    "5 rounds, 20 %, 30 % per group": Recipe(_MANY),
    "5 rounds, 20 %, 30 % sticky": Recipe(replace(_MANY, policy="sticky")),
    "5 rounds, 20 %, 30 % fresh": Recipe(replace(_MANY, policy="fresh")),
    "5 rounds, participants": Recipe(replace(_MANY, average="participants")),
    "5 rounds, server momentum": Recipe(WithOptimizer(server_mask=0.2, optimizer="momentum")),
    "5 rounds, server Adam": Recipe(WithOptimizer(server_mask=0.2, optimizer="adam")),
    # Something else than the model.
    "first layer held": Recipe(Held(layers=("0.*",))),
    "widest layer held": Recipe(Held(layers=("5.*",))),
    "last layer held": Recipe(Held(layers=("7.*",))),
    "noise of 0.5": Recipe(Distorted(noise=0.5)),
    "noise of 1": Recipe(Distorted(noise=1.0)),
    "noise of 1, once": Recipe(Distorted(noise=1.0, aggregation="regmean"), 1),
    "half of the gain": Recipe(Lagging(shown=0.5)),
    "none of the gain": Recipe(Lagging(shown=0.0)),
}


def recipes_of(scene: str) -> Mapping[str, Recipe]:
    """What is tried on a scene, by name."""
    return {
        "bbc": _BBC, "newsgroups": _NEWSGROUPS, "headlines": _ADAPTERS, "digits": _NOTHING_PUBLIC,
    }[scene]  # fmt: skip
