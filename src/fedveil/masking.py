"""Which units are withheld from whom: the server mask and the client masks (FedQSN, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.secret import Secret
from fedveil.units import UnitGroup

__all__ = ["Masking", "Masks", "Release"]

Policy = Literal["fresh", "sticky", "grouped"]
Draw = Literal["exact", "bernoulli"]
POLICIES = ("fresh", "sticky", "grouped")
DRAWS = ("exact", "bernoulli")


@dataclass(frozen=True)
class Masking:
    """How units are withheld.

    Attributes:
        server: Server mask rate p1: the share of units that no client ever gets.
        client: Client mask rate p2: the share of the remaining units withheld from one client.
        policy: ``"fresh"`` draws a new client mask in every round (the paper), ``"sticky"`` one per
            client for the whole federation, ``"grouped"`` one per group of clients, for the whole
            federation as well.
        groups: Number of groups under ``"grouped"``.
        draw: ``"exact"`` withholds ``round(rate * units)`` units of each group, ``"bernoulli"``
            each unit independently (the paper).
        unbiased: Scale released units by 1/(1 - p), so that the proxy equals the model in
            expectation (the paper). Their updates are divided by the same factor.

    What each does NOT protect: under ``fresh`` a client that keeps what it receives misses a unit
    after T rounds only with probability p2^T, so p2 gives no lasting secrecy; under ``sticky``
    colluding clients still unite their different proxies; under ``grouped`` only clients of
    different groups gain by colluding. Server-masked units stay hidden from any coalition, but if
    the owner started from a public model their initial values are public too.

    Raises:
        ConfigurationError: If a rate is outside [0, 1) or a word is not one of those above.
    """

    server: float = 0.1
    client: float = 0.3
    policy: Policy = "sticky"
    groups: int = 2
    draw: Draw = "exact"
    unbiased: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.server, "server mask rate (p1)")
        _check_rate(self.client, "client mask rate (p2)")
        _check_word(self.policy, POLICIES, "mask policy")
        _check_word(self.draw, DRAWS, "mask draw")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ConfigurationError(
                "The number of mask groups is impossible",
                expected="an integer of at least 1",
                found=repr(self.groups),
            )

    @property
    def is_shared(self) -> bool:
        """Whether clients share a few masks, rather than each having its own."""
        return self.policy == "grouped" or self.client == 0


@dataclass(frozen=True)
class Release:
    """The units of one unit group that one client gets: ``units`` int64 ``[released]``, ascending.

    ``scale`` is the unbiased factor 1/(1 - p), or 1.
    """

    units: Tensor
    scale: float


class Masks:
    """Draws the masks of one federation; the same configuration and secret give the same masks."""

    def __init__(self, groups: Sequence[UnitGroup], masking: Masking, secret: Secret) -> None:
        self.groups, self.masking = tuple(groups), masking
        self._secret = secret
        self._places: dict[str, int] = {}
        self._server = {group.name: self._draw_server(group) for group in self.groups}

    def server(self) -> Mapping[str, Tensor]:
        """Units outside the server mask, per group: int64 ``[kept]``, ascending."""
        return self._server

    def release(self, client: str, number: int) -> Mapping[str, Release]:
        """What one client gets in round ``number``: units outside both masks, per group."""
        return {group.name: self._release(group, client, number) for group in self.groups}

    def mask_of(self, client: str, number: int) -> tuple[str | int, ...]:
        """What a client's mask in round ``number`` is drawn for: the same for equal masks."""
        if self.masking.policy == "fresh":
            return ("client mask", client, number)
        if self.masking.policy == "sticky":
            return ("client mask", client)
        return ("group mask", self.group_of(client))

    def group_of(self, client: str) -> int:
        """The mask group (0-based) of a client under the ``grouped`` policy.

        Groups are kept equal in size by permuted blocks: each block of ``groups`` clients, in the
        order in which they were first seen, is spread over all groups by a keyed permutation.
        """
        place = self._places.setdefault(client, len(self._places))
        block, position = divmod(place, self.masking.groups)
        words = self._secret.words(self.masking.groups, "client groups", block)
        return int(np.argsort(words, kind="stable")[position])

    def clients(self) -> tuple[str, ...]:
        """Clients in the order in which they were first seen, which decides their groups."""
        return tuple(self._places)

    def enroll(self, clients: Sequence[str]) -> None:
        """Take over what :meth:`clients` returned, to go on with the same groups."""
        self._places = {client: place for place, client in enumerate(clients)}

    def _draw_server(self, group: UnitGroup) -> Tensor:
        words = self._secret.words(group.size, "server mask", group.name)
        return self._keep(torch.arange(group.size), words, self.masking.server)

    def _release(self, group: UnitGroup, client: str, number: int) -> Release:
        kept = self._server[group.name]
        # One word per unit of the whole group: a unit's fate under the client mask does not depend
        # on how the server mask numbers the rest.
        words = self._secret.words(group.size, *self.mask_of(client, number), group.name)
        units = self._keep(kept, words[kept.numpy()], self.masking.client)
        return Release(units, self._scale(group, units))

    def _keep(self, units: Tensor, words: np.ndarray, rate: float) -> Tensor:
        """The units that a mask of this rate leaves, decided by one random word per unit."""
        if self.masking.draw == "bernoulli":
            # rate < 1, so the threshold fits 64 bits; 53-bit precision is far below any rate's.
            return units[torch.from_numpy(words >= np.uint64(int(rate * 2.0**64)))]
        withheld = min(round(rate * len(units)), max(len(units) - 1, 0))
        chosen = np.argsort(words, kind="stable")[withheld:]
        return units[torch.from_numpy(np.sort(chosen))]

    def _scale(self, group: UnitGroup, units: Tensor) -> float:
        if not self.masking.unbiased or not len(units):
            return 1.0
        if self.masking.draw == "exact":
            return group.size / len(units)
        return 1.0 / ((1.0 - self.masking.server) * (1.0 - self.masking.client))


def _check_rate(rate: float, name: str) -> None:
    ok = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < 1
    if not ok:
        raise ConfigurationError(
            f"The {name} is impossible",
            expected="a number from 0 up to, but not including, 1",
            found=repr(rate),
            fix="A rate of 0.3 withholds 30 % of the units.",
        )


def _check_word(word: str, known: tuple[str, ...], name: str) -> None:
    if word not in known:
        raise ConfigurationError(
            f"The {name} is unknown", expected=" or ".join(known), found=repr(word)
        )
