"""Tests a model file against the masks of a run, and takes suspects out of it one by one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.audit.evidence import Evidence
from fedveil.audit.tracing.align import align
from fedveil.audit.tracing.amounts import Leak, Reference
from fedveil.audit.tracing.chance import SURE, Chance
from fedveil.audit.tracing.leaked import fit
from fedveil.audit.tracing.masks import Bools, Candidate, Masks, UnitMap, check_traceable
from fedveil.errors import ConfigurationError

__all__ = ["Match", "Trace", "trace"]

LEAST_SHARE, LEAST_CONTRAST = 0.1, 0.8
"""Least figures of a suspect. The model learns from masked updates, so that masks leave faint marks
on what none of the suspects has published: a small p-value alone is no accusation."""

_SAME_FIT = 1.05  # rounds that fit a file so nearly as well as the best are not told apart
_FULL = 0.5  # share of withheld units in a file from which its holes look filled

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Match:
    """How well a file fits what some clients were sent.

    Attributes:
        clients: All who were sent this mask. More than one: nothing tells them apart.
        rounds: Of the releases; several if all of them are in the file or fit equally well. Where a
            round changed the model little, a file of several rounds may show some of them only.
        log10_p: Of the probability that the mask of somebody who had nothing to do with the file
            fits as well, for any client and round that was tried; at most 0, an upper bound. It is
            never below -77: whoever guesses the 256-bit secret knows all masks.
        contrast: The share in standard deviations of the units' amounts: how clearly released and
            withheld units differ.
        share: How much more of a released than of a withheld unit is in the file: 1 for a proxy as
            it was sent, 1/k for the average of k.
    """

    clients: tuple[str, ...]
    rounds: tuple[int, ...]
    log10_p: float
    share: float
    contrast: float


@dataclass(frozen=True)
class Trace:
    """What a file says about where it comes from.

    Attributes:
        suspects: Those whose masks it bears, surest first; empty if nobody is accused.
        scores: Every client and round that was tried, best first, before anything was explained.
        alpha: Chance at most taken of accusing anybody wrongly.
        sentence: The answer in words.
        granularity: Whom the masks of this run can tell apart at all, in words.
    """

    suspects: tuple[Match, ...]
    scores: tuple[Match, ...]
    alpha: float
    sentence: str
    granularity: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Found:
    """A candidate's figures: log10_p of one test, not bounded below."""

    candidate: Candidate
    log10_p: float
    share: float
    contrast: float
    misfit: float

    def is_sure(self, most: float) -> bool:
        """Whether it is surer than chance at most allows, and no faint mark of training."""
        is_clear = self.share >= LEAST_SHARE and self.contrast >= LEAST_CONTRAST
        return self.log10_p <= most and is_clear

    def and_still(self, other: _Found) -> _Found:
        """What is found now that some of the file is explained, as sure as it was before at most.

        Chance allows for an innocent client's mask to fit the file by itself. What is left of a
        file once a suspect is taken out of it may also fit a mask for reasons of training.
        """
        return replace(other, log10_p=max(self.log10_p, other.log10_p))


@torch.no_grad()
def trace(
    evidence: Evidence,
    leaked: Mapping[str, Tensor],
    *,
    base: Mapping[str, Tensor] | None = None,
    alpha: float = 0.001,
    rounds: Collection[int] | None = None,
    tell: Tell | None = None,
) -> Trace:
    """Find the clients whose proxies a model file comes from.

    In memory are the file's and the base's cut tensors in float32, the masks (one bit per unit,
    client and round), and the messages of a few clients of one round.

    Args:
        evidence: What clients were sent.
        leaked: The file's tensors, as :func:`fedveil.audit.tracing.read_model` gives them.
        base: The public base that holes may have been filled from. Without it a file whose holes
            were filled is not traced.
        alpha: Chance at most taken of accusing anybody wrongly, over all clients and rounds.
        rounds: Look at these rounds only; None looks at all.
        tell: Is told of progress.

    Does NOT protect against: whoever takes proxies apart unit by unit so that none of them shows
    (pools with very many others, rescales every unit, trains until the weights are others); whoever
    puts another client's proxy together from stolen messages. It names whose proxy it is, not who
    published it.

    Raises:
        AuditError: Nothing can be traced, since all clients were sent the same units; the file is
            of another architecture; a message is damaged.
        ConfigurationError: ``alpha`` is not between 0 and 1.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ConfigurationError(
            "The chance of a false accusation (alpha) is impossible",
            expected="a number between 0 and 1",
            found=repr(alpha),
        )
    return _Tracer(evidence, rounds, tell or (lambda _: None)).run(leaked, base, alpha)


class _Tracer:
    """The masks of a run, and the tests of a file against them."""

    def __init__(self, evidence: Evidence, rounds: Collection[int] | None, tell: Tell) -> None:
        self._evidence, self._tell = evidence, tell
        manifest = evidence.manifest
        self._units = UnitMap(manifest)
        self._shapes = {name: torch.Size(info.shape) for name, info in manifest.tensors.items()}
        self._masks = Masks(evidence, self._units, rounds, tell)
        check_traceable(self._masks, self._units, str(evidence.folder))
        self._candidates = self._masks.candidates()

    def run(
        self, leaked: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, alpha: float
    ) -> Trace:
        manifest = self._evidence.manifest
        tensors = fit(leaked, manifest, "The file", whole=False)
        public = None if base is None else fit(base, manifest, "The base")
        last = self._reference(self._masks.rounds[-1])
        leak = Leak(align(tensors, last, self._units, self._shapes), public, self._units)
        found, background = self._test(leak, [])
        tried = math.log10(len(found))
        most = math.log10(alpha) - tried
        order = sorted(found, key=lambda one: (one.log10_p, -one.share))
        scores = tuple(_match(one, tried) for one in order)
        suspects: list[Match] = []
        explained: list[Bools] = []
        while sure := [one for one in found if one.is_sure(most) and not _is_among(one, suspects)]:
            best = _choose(sure)
            share = self._explain(best, leak)
            explained.append(self._masks.unpack(best.candidate.mask))
            match = replace(_match(best, tried), rounds=_rounds_of(best, sure), share=share)
            suspects.append(match)
            self._tell(f"Found {_names(match.clients)}; looking for others.")
            again, _ = self._test(leak, explained)
            found = [one.and_still(other) for one, other in zip(found, again, strict=True)]
        filled = public is None and background >= _FULL
        sentence = _sentence(suspects, filled)
        granularity = _granularity(self._candidates)
        return Trace(tuple(suspects), scores, alpha, sentence, granularity)

    def _test(self, leak: Leak, explained: Sequence[Bools]) -> tuple[list[_Found], float]:
        """Every candidate's figures, and how much of withheld units is in the file at most."""
        universe = self._masks.universe
        strata = self._strata(explained)
        results, background = [], 1.0
        of_round: dict[int, list[Candidate]] = defaultdict(list)
        for candidate in self._candidates:
            of_round[candidate.round].append(candidate)
        for number, candidates in of_round.items():
            self._tell(f"Comparing the file with round {number}.")
            amounts = leak.amounts(self._reference(number))
            background = min(background, float(amounts.held[universe].min(initial=1.0)))
            masks = np.stack([self._masks.unpack(candidate.mask) for candidate in candidates])
            tests = Chance(amounts.held[universe], strata).test(masks[:, universe])
            results += [
                _Found(one, float(p), float(share), float(contrast), amounts.misfit(mask, share))
                for one, mask, share, contrast, p in zip(candidates, masks, *tests, strict=True)
            ]
        return results, background

    def _strata(self, explained: Sequence[Bools]) -> NDArray[np.int_]:
        """Which units are alike but for chance, int [units of the universe].

        Those of one group; and, once a mask is known to be in the file, either released or withheld
        by it: in a federation of few masks, what one withholds the others are sure to release.
        """
        keys = np.stack([self._units.strata, *explained])[:, self._masks.universe]
        found: NDArray[np.int_] = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        return found

    def _explain(self, found: _Found, leak: Leak) -> float:
        """Take out of the file what a proxy explains; the proxy's share in the file."""
        mask = self._masks.unpack(found.candidate.mask)
        reference, universe = self._reference(found.candidate.round), self._masks.universe
        # A unit is not whole in its own proxy where a tensor is cut along two axes.
        held = leak.proxy(mask, reference).amounts(reference).held[universe]
        whole, _, _ = Chance(held, self._strata([])).test(mask[None, universe])
        share = min(found.share / max(float(whole[0]), found.share), 1.0)
        leak.explain(mask, share, reference)
        return share

    def _reference(self, number: int) -> Reference:
        proxies = [self._evidence.open(kept) for kept in self._masks.cover(number)]
        return Reference(proxies, self._shapes)


def _choose(sure: Sequence[_Found]) -> _Found:
    """The surest; a lasting mask is as sure in all its rounds: then of those the one that fits."""
    surest = min(sure, key=lambda found: (found.log10_p, -found.share))
    same_mask = [found for found in sure if found.candidate.mask == surest.candidate.mask]
    return min(same_mask, key=lambda found: found.misfit)


def _rounds_of(best: _Found, sure: Sequence[_Found]) -> tuple[int, ...]:
    """All rounds of which the file shows what the same clients were sent."""
    rounds = set(best.candidate.rounds)
    for found in sure:
        if found.candidate.mask == best.candidate.mask:
            fits = found.misfit <= _SAME_FIT * best.misfit
        else:  # a union fits if any of its rounds does: only single releases tell more
            fits = len(found.candidate.rounds) == 1 and found.share >= best.share / 2
        if fits and found.candidate.clients == best.candidate.clients:
            rounds |= set(found.candidate.rounds)
    return tuple(sorted(rounds))


def _is_among(found: _Found, suspects: Sequence[Match]) -> bool:
    return any(set(found.candidate.clients) <= set(match.clients) for match in suspects)


def _match(found: _Found, tried: float) -> Match:
    """Figures to report, corrected for how much was tried."""
    log10_p = min(max(found.log10_p + tried, SURE), 0.0)
    candidate = found.candidate
    return Match(candidate.clients, candidate.rounds, log10_p, found.share, found.contrast)


def _sentence(suspects: Sequence[Match], filled: bool) -> str:
    if not suspects:
        text = "The file bears the mask of no client: nobody is accused."
        if filled:
            text += (
                " It holds all units: if holes were filled from a public model, give that as base."
            )
        return text
    told = [
        f"{_names(match.clients)} ({_rounds(match.rounds)}, chance at most "
        f"1 in 10^{math.floor(-match.log10_p)})"
        for match in suspects
    ]
    text = f"The file comes from what was sent to {'; and to '.join(told)}."
    if any(len(match.clients) > 1 for match in suspects):
        text += " Clients named together share one mask: which of them it was cannot be told."
    return text


def _granularity(candidates: Sequence[Candidate]) -> str:
    single = [candidate for candidate in candidates if len(candidate.rounds) == 1]
    told_apart = {candidate.clients for candidate in single}
    if any(len(clients) > 1 for clients in told_apart):
        return (
            f"Masks of this run tell {len(told_apart)} groups of clients apart, "
            "not the clients of a group."
        )
    changing = len({candidate.mask for candidate in single}) > len(told_apart)
    rounds = "and the rounds of each" if changing else "not the rounds of each"
    return f"Masks of this run tell its {len(told_apart)} clients apart, {rounds}."


def _names(clients: Sequence[str]) -> str:
    return clients[0] if len(clients) == 1 else f"one of {', '.join(clients)}"


def _rounds(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if len(rounds) > 2 and rounds[-1] - rounds[0] + 1 == len(rounds):
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"rounds {', '.join(map(str, rounds))}"
