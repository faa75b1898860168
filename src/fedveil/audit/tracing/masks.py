"""Who was sent which units when: the masks of a run, read back from its messages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.audit.evidence import Evidence, Kept
from fedveil.errors import AuditError
from fedveil.run.manifest import Manifest
from fedveil.run.shown import Proxy
from fedveil.units import Slice

__all__ = ["Bools", "Candidate", "Masks", "UnitMap", "check_traceable"]

Bools = NDArray[np.bool_]
Tell = Callable[[str], None]


class UnitMap:
    """Numbers the units of all groups from 0: one vector holds something of every unit.

    Args:
        manifest: Of the run.

    Attributes:
        total: How many units there are.
        strata: The group of each unit, int [total].
        cuts: Per tensor, the slices through it, each with the number of its group.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.groups = manifest.groups
        sizes = [group.size for group in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=int)])
        self.total = int(self.starts[-1])
        self.strata = np.repeat(np.arange(len(sizes)), sizes)
        self.cuts: dict[str, list[tuple[int, Slice]]] = {}
        for number, group in enumerate(self.groups):
            # A tied tensor is in the manifest under one of its names only.
            for part in (part for part in group.slices if part.tensor in manifest.tensors):
                if manifest.tensors[part.tensor].is_floating_point:
                    self.cuts.setdefault(part.tensor, []).append((number, part))

    def units(self, group: int) -> slice:
        """The places of a group's units in the vector."""
        return slice(int(self.starts[group]), int(self.starts[group + 1]))

    def add(self, values: Tensor, name: str, out: Tensor) -> None:
        """Sum a tensor of element-wise values over each unit, into ``out`` [total]."""
        for number, part in self.cuts[name]:
            others = [axis for axis in range(values.dim()) if axis != part.axis]
            along = values.sum(others) if others else values
            size = self.groups[number].size
            owned = along[part.offset : part.end(size)].view(size, part.width)
            out[self.units(number)] += owned.sum(1)

    def spread(self, per_unit: Tensor, name: str, shape: torch.Size) -> Tensor:
        """Per element of a tensor, the product over its units' values; 1 where none owns it."""
        whole = torch.ones([1] * len(shape))
        by_axis: dict[int, Tensor] = {}
        for number, part in self.cuts[name]:
            along = by_axis.setdefault(part.axis, torch.ones(shape[part.axis]))
            values = per_unit[self.units(number)].repeat_interleave(part.width)
            along[part.offset : part.end(self.groups[number].size)] = values
        for axis, along in by_axis.items():
            view = [1] * len(shape)
            view[axis] = -1
            whole = whole * along.view(view)
        return whole

    def mask(self, proxy: Proxy) -> Bools:
        """Which units a proxy shows: bool [total]."""
        # A group that a message does not name is cut for nobody in it.
        mask = np.ones(self.total, bool)
        for number, group in enumerate(self.groups):
            if group.name in proxy.released:
                shown = np.zeros(group.size, bool)
                shown[proxy.released[group.name].units.numpy()] = True
                mask[self.units(number)] = shown
        return mask


@dataclass(frozen=True)
class Candidate:
    """One hypothesis about a file: whose mask it bears.

    Attributes:
        clients: All who were ever sent this mask: nothing tells them apart.
        rounds: Whose releases it unites; one round, or a client's rounds up to the last of them.
        mask: Packed bits, one per unit.
    """

    clients: tuple[str, ...]
    rounds: tuple[int, ...]
    mask: bytes

    @property
    def round(self) -> int:
        """The round with whose values the file is compared."""
        return self.rounds[-1]


class Masks:
    """All masks of a run.

    Args:
        evidence: Of the run.
        units: Of the run.
        rounds: Read messages of these rounds only; None reads all.
        tell: Is told of each round that was read.

    Attributes:
        universe: Units that anybody was ever sent, bool [total]. The server mask withholds the rest
            from all alike, which tells no client from another.
    """

    def __init__(
        self, evidence: Evidence, units: UnitMap, rounds: Collection[int] | None, tell: Tell
    ) -> None:
        self._total = units.total
        self.universe = np.zeros(units.total, bool)
        self._sent: dict[int, dict[bytes, Kept]] = {}
        self._of_client: dict[str, dict[int, bytes]] = {}
        for kept in evidence.proxies():
            if rounds is not None and kept.round not in rounds:
                continue
            if kept.round not in self._sent:
                tell(f"Reading the masks of round {kept.round}.")
            mask = units.mask(evidence.open(kept))
            self.universe |= mask
            packed = np.packbits(mask).tobytes()
            # Clients with equal masks were sent equal values: one message stands for all.
            self._sent.setdefault(kept.round, {}).setdefault(packed, kept)
            self._of_client.setdefault(kept.client, {})[kept.round] = packed

    @property
    def rounds(self) -> list[int]:
        """Rounds that were read, ascending."""
        return sorted(self._sent)

    @property
    def clients(self) -> list[str]:
        """Clients who were sent something in them, sorted."""
        return sorted(self._of_client)

    def unpack(self, mask: bytes) -> Bools:
        """Bool [total]."""
        bits = np.frombuffer(mask, np.uint8)
        return np.unpackbits(bits, count=self._total).astype(bool)

    def candidates(self) -> list[Candidate]:
        """Every hypothesis worth testing: masks that withhold something of the universe."""
        whole = np.packbits(self.universe).tobytes()
        found = dict.fromkeys(
            Candidate(self._owners[mask], (number,), mask)
            for number, masks in sorted(self._sent.items())
            for mask in masks
        )
        found |= dict.fromkeys(self._unions())
        return [candidate for candidate in found if candidate.mask != whole]

    def cover(self, number: int) -> list[Kept]:
        """Messages that together show every unit of the universe, values of a round foremost.

        To be decoded in this order, the later over the earlier. What nobody was sent in the round
        nobody changed in it: the next round in which it is sent shows the value that it had.
        """
        chosen: list[Kept] = []
        missing = self.universe.copy()
        for near in sorted(self._sent, key=lambda other: (other < number, abs(other - number))):
            for mask, kept in self._sent[near].items():
                if (missing & (shown := self.unpack(mask))).any():
                    missing &= ~shown
                    chosen.append(kept)
            if not missing.any():
                break
        return chosen[::-1]

    @cached_property
    def _owners(self) -> dict[bytes, tuple[str, ...]]:
        owners: dict[bytes, set[str]] = {}
        for client, masks in self._of_client.items():
            for mask in masks.values():
                owners.setdefault(mask, set()).add(client)
        return {mask: tuple(sorted(clients)) for mask, clients in owners.items()}

    def _unions(self) -> Iterator[Candidate]:
        """A client that keeps the newest value of each unit bears the union of its masks."""
        for client, masks in sorted(self._of_client.items()):
            rounds = sorted(masks)
            union = np.zeros(self._total, bool)
            for place, number in enumerate(rounds):
                before = union.copy()
                union |= self.unpack(masks[number])
                packed = np.packbits(union).tobytes()
                if place and not np.array_equal(before, union) and packed != masks[number]:
                    yield Candidate((client,), tuple(rounds[: place + 1]), packed)


def check_traceable(masks: Masks, units: UnitMap, where: str) -> None:
    """Raises AuditError unless some client was denied what another was sent."""
    if not units.total:
        raise AuditError(
            "Nothing can be traced: every client was sent the whole model",
            expected="unit groups that client masks cut (scheme fedqsn, client_mask above 0)",
            found="no unit groups",
            where=where,
            fix="Set client_mask before the next release; what was sent bears no fingerprint.",
        )
    if not masks.rounds:
        raise AuditError(
            "No proxy was sent in the rounds that were asked for",
            expected="rounds of the run",
            found="no message",
            where=where,
        )
    if not masks.candidates():
        raise AuditError(
            "Nothing can be traced: all clients were sent the same units",
            expected="masks that differ (client_mask above 0, more than one client or group)",
            found=f"one mask for {len(masks.clients)} clients",
            where=where,
            fix="Masks with policy sticky tell every client apart, grouped every group.",
        )
