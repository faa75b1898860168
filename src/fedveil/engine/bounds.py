"""How much one client may weigh and change in a round: no client decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedveil.aggregation import WHOLE, Influence, Scales
from fedveil.errors import ConfigurationError

__all__ = ["Bounded", "Bounds", "Claim", "lower_median", "times_median"]

_SMALLEST = 1e-30


@dataclass(frozen=True)
class Claim:
    """What a reply asks for: the examples that its client says it has, and what it would change."""

    examples: int
    influence: Influence


@dataclass(frozen=True)
class Bounded:
    """What a reply is given of it.

    Attributes:
        weight: What it counts for in the mean, in examples.
        scales: By how much what it changes is scaled down.
        cuts: What was cut, in words; empty if nothing was.
    """

    weight: float
    scales: Scales = WHOLE
    cuts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """How much one client may weigh and change, whatever it claims.

    Claims and updates are held against the median of the round: half of the clients would have to
    lie to move it far. Of an even number it is the lower one of the two in the middle, so that of
    two clients the larger is held against the smaller. Clients whose update is zero do not count
    for the median of norms. Bounding the norm of updates is after Sun et al. ("Can You Really
    Backdoor Federated Learning?", 1911.07963); that it is relative to the median of the round, and
    the factors, are ours.

    Attributes:
        examples: How many examples clients have, by name, where the owner knows better than to ask
            them: what they claim is then not looked at.
        max_examples: No claim counts for more than so many; None for any number.
        weight: No client counts for more than so many times the median claim; None for any.
        norm: No update has more than so many times the median norm of the round's updates, and no
            Gram more than so many times the median trace of its layer's; what has more is scaled
            down to it. None for any.
        pull: No client's weight times the norm of its update is more than so many times the median
            of the round's; who has more weighs less. None for any. Its update stays as long as it
            is: one that is shortened would hold the model back where it was, which costs an honest
            client with much data more than a vote. What one client alone holds is bounded by
            ``norm``.

    Does NOT protect: against what a client does within the bounds. An update of usual size that
    plants a backdoor is used like any other, every round anew; half of the clients or more can move
    the median; of two clients, the smaller one holds back the larger one. Least squares (RegMean)
    take the step of a direction that only one client's data excite from that client alone.

    Raises:
        ConfigurationError: A bound is impossible.
    """

    examples: Mapping[str, int] | None = None
    max_examples: int | None = None
    weight: float | None = 5.0
    norm: float | None = 3.0
    pull: float | None = 3.0

    def __post_init__(self) -> None:
        for name, value in (("max_examples", self.max_examples), *self._declared()):
            if value is not None and (type(value) is not int or value < 1):
                raise _impossible(name, "a whole number of at least 1", value)
        factors = {"weight": self.weight, "norm": self.norm, "pull": self.pull}
        for name, factor in factors.items():
            if factor is not None and not _is_factor(factor):
                raise _impossible(name, "a number of at least 1", factor)

    @classmethod
    def none(cls) -> Bounds:
        """Nothing is bounded: what clients claim is believed, and what they send is used whole."""
        return cls(weight=None, norm=None, pull=None)

    def _declared(self) -> Iterator[tuple[str, int]]:
        for client, count in (self.examples or {}).items():
            yield f"examples.{client}", count

    def apply(self, claims: Mapping[str, Claim]) -> dict[str, Bounded]:
        """What each reply of a round is given; in the order of the claims."""
        norms = {client: claim.influence.update for client, claim in claims.items()}
        longest = _most(self.norm, norms.values())
        updates = {client: _scale(norm, longest) for client, norm in norms.items()}
        weights = self._weights(claims)
        pulls = {client: weights[client] * updates[client] * norms[client] for client in claims}
        strongest = _most(self.pull, pulls.values())
        most, times, bounded = self._most_statistics(claims), times_median(claims), {}
        for client, claim in claims.items():
            statistics = {
                name: scale
                for name, size in claim.influence.statistics.items()
                if (scale := _scale(size, most[name])) < 1
            }
            update = updates[client]
            scales = Scales(update, statistics) if update < 1 or statistics else WHOLE
            weight = weights[client] * _scale(pulls[client], strongest)
            cuts = (
                *self._cuts_of_claim(client, claim, weights[client], weight),
                *self._cuts_of_update(scales, times[client]),
            )
            bounded[client] = Bounded(weight, scales, cuts)
        return bounded

    def _weights(self, claims: Mapping[str, Claim]) -> dict[str, float]:
        counted = {client: self._counted(client, claim) for client, claim in claims.items()}
        most = _most(self.weight, counted.values())
        return {client: min(weight, most) for client, weight in counted.items()}

    def _counted(self, client: str, claim: Claim) -> float:
        """The examples that a client is taken to have, before it is compared with others."""
        told = (self.examples or {}).get(client, claim.examples)
        return float(told if self.max_examples is None else min(told, self.max_examples))

    def _most_statistics(self, claims: Mapping[str, Claim]) -> dict[str, float]:
        sizes: dict[str, list[float]] = {}
        for claim in claims.values():
            for name, size in claim.influence.statistics.items():
                sizes.setdefault(name, []).append(size)
        return {name: _most(self.norm, found) for name, found in sizes.items()}

    def _cuts_of_claim(
        self, client: str, claim: Claim, allowed: float, weight: float
    ) -> Iterator[str]:
        """What a claim counts as, and why.

        Args:
            client: Whose it is.
            claim: What it asks for.
            allowed: What it counts as before its pull is looked at.
            weight: What it counts as.
        """
        counted = self._counted(client, claim)
        told = (self.examples or {}).get(client, claim.examples)
        reasons = []
        if told != claim.examples:
            reasons.append(f"the owner declares {told}")
        if counted < told:
            reasons.append(f"max_examples is {self.max_examples}")
        if allowed < counted:
            reasons.append(f"weight allows {self.weight:g} times the median, {allowed:.6g}")
        if weight < allowed:
            reasons.append(f"pull allows examples times length {self.pull:g} times the median's")
        if reasons:
            why = "; ".join(reasons)
            yield f"its claim of {claim.examples} examples counts as {weight:.6g} ({why})"

    def _cuts_of_update(self, scales: Scales, times: float) -> Iterator[str]:
        if scales.update < 1:
            yield (
                f"its update is scaled from {times:.3g} to {times * scales.update:.3g} times the "
                "median length (norm)"
            )
        if scales.statistics and self.norm is not None:
            worst = self.norm / min(scales.statistics.values())
            yield (
                f"{len(scales.statistics)} of its Grams are scaled from up to {worst:.3g} to "
                f"{self.norm:g} times the median (norm)"
            )


def times_median(claims: Mapping[str, Claim]) -> dict[str, float]:
    """How many times the round's median each client's update is."""
    median = lower_median([claim.influence.update for claim in claims.values()])
    return {
        client: claim.influence.update / median if median else 0.0
        for client, claim in claims.items()
    }


def _most(factor: float | None, sizes: Iterable[float]) -> float:
    return math.inf if factor is None else factor * lower_median(sizes)


def lower_median(sizes: Iterable[float]) -> float:
    """The median of those above zero, of an even number the lower; infinite of none."""
    some = sorted(size for size in sizes if size > 0)
    return some[(len(some) - 1) // 2] if some else math.inf


def _scale(size: float, most: float) -> float:
    # Of a median next to nothing it would be zero, and nothing could be said of how much was cut.
    return 1.0 if size <= most else max(most / size, _SMALLEST)


def _is_factor(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 1 <= value < math.inf  # type: ignore[operator]


def _impossible(name: str, expected: str, found: object) -> ConfigurationError:
    return ConfigurationError(
        f"The setting {name!r} is impossible", expected=expected, found=repr(found), where="Bounds"
    )
