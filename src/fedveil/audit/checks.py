"""What should never be found in the bytes that were sent, and alarms if it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fedveil.audit.chance import chance_to_miss
from fedveil.audit.evidence import Evidence, Kept
from fedveil.audit.guessing import FEWEST, SEEDS, guess_masks, guessed_group, rates_to_try
from fedveil.quantization import QuantizedTensor
from fedveil.run.exposure import Exposure
from fedveil.run.findings import ALARM, NOT_APPLICABLE, SOUND, Checked, Outcome
from fedveil.run.head import NAME as LEDGER
from fedveil.run.manifest import TensorInfo
from fedveil.run.shown import OvershownError, Proxy
from fedveil.schemes import EXACT, Bits, Facts
from fedveil.schemes.adapters import is_adapter
from fedveil.units import UnitGroup
from fedveil.wire import Dense, Message

__all__ = ["check"]

Tell = Callable[[str], None]
Answer = tuple[Outcome, str]

_GUESSED = 2
"""Different masks that are guessed at."""

_DOUBT = 0.01
"""A check that misses more often than this what it looks for has seen too little."""


def check(evidence: Evidence, tell: Tell = lambda text: None) -> list[Checked]:
    """Look through everything that was sent for what a sound scheme never sends.

    Each check looks at the bytes alone, with what everybody knows: architecture, unit groups and
    what the scheme states of itself (:class:`~fedveil.schemes.Facts`). The federation secret is not
    needed. Where nothing was looked at, or what the scheme should be held to is not stated, the
    answer is "not applicable"; where a part was looked at, the answer says how much.

    Args:
        evidence: The run.
        tell: Hears of what is being done.

    What it does NOT show: that nothing else was sent. Only messages that the run kept are looked
    at, and only for these faults.
    """
    checked = []
    beyond = _not_kept(evidence)
    for name, look in _CHECKS.items():
        tell(f"check: {name}")
        outcome, found = look(evidence)
        if outcome == SOUND and beyond:
            found = f"{found} {beyond}"
        checked.append(Checked(name, outcome, found))
    return checked


def _withheld_units(evidence: Evidence) -> Answer:
    """A message has more in it than the units that it says it releases."""
    read, cut = 0, set[str]()
    for kept in evidence.proxies():
        message = kept.read()
        try:
            proxy = Proxy(message, evidence.manifest)
        except OvershownError as error:
            return (
                ALARM,
                f"{error.problem}: of {error.where}, {error.expected}; found {error.found}.",
            )
        for name in message.scalars:
            return ALARM, f"{_to(kept)} has a scalar, {name!r}."
        cut |= {g.name for g in proxy.groups if len(proxy.released[g.name].units) < g.size}
        read += 1
    if not cut:
        return NOT_APPLICABLE, f"None of {_messages(read)} withholds a unit."
    groups = len(evidence.manifest.groups)
    return SOUND, (
        f"Each of {_messages(read)} has the tensors of its released units, and nothing else; units "
        f"of {len(cut)} of {groups} unit groups are withheld."
    )


def _server_mask(evidence: Evidence) -> Answer:
    """More units were released in all than a server mask of the stated rate leaves."""
    facts = evidence.manifest.facts
    if facts.server_mask is None:
        return _unsaid("which share of the units a server mask withholds")
    if not facts.server_mask:
        return NOT_APPLICABLE, "The scheme has no server mask."
    shown = [_Shown.of(group, facts) for group in evidence.manifest.groups]
    opened = _Opened(evidence)
    for proxy in opened:
        for one in shown:
            one.see(proxy)
    for one in shown:
        if one.count > one.most:
            return ALARM, (
                f"Clients were sent {one.count} of the {one.group.size} units of {one.group.name} "
                f"in all, and a server mask of {facts.server_mask:.0%} leaves {one.left}: it was "
                "drawn anew, or not applied."
            )
    if not shown:
        return ALARM, "The scheme states a server mask, and the run has no unit that it could cut."
    if opened.all_failed:
        return _unopened()
    return _server_mask_unbroken(facts, shown, opened)


def _server_mask_unbroken(facts: Facts, shown: Sequence[_Shown], opened: _Opened) -> Answer:
    """No more was sent than a server mask leaves; but would anybody have seen it otherwise?"""
    if facts.draw is None or facts.client_mask is None:
        return _unsaid("at which rate, and how, it draws client masks: they may hide as many units")
    told = [one for one in shown if one.most < one.group.size and one.masks]
    missed = math.prod(one.chance_to_miss(facts.client_mask, facts.draw) for one in told)
    if missed > _DOUBT:
        return NOT_APPLICABLE, (
            "Too few units, or too few different masks, were sent to tell: client masks alone "
            f"would leave as many units unseen with a chance of {missed:.0%}."
        )
    return SOUND, (
        f"No more units were ever sent than a server mask of {facts.server_mask:.0%} leaves, of "
        f"{len(told)} of {len(shown)} unit groups{_too_small(len(shown) - len(told))}."
        f"{opened.note}"
    )


def _only_proxies(evidence: Evidence) -> Answer:
    """A message on the way down that is no proxy."""
    down = evidence.down()
    for kept in down:
        message = kept.read()
        if message.kind != "proxy":
            return ALARM, (
                f"{kept.client} was sent a message of kind {message.kind!r} in round {kept.round}, "
                f"with {_numbers(message):,} numbers: only proxies may go to clients."
            )
    found = f"All of {_messages(len(down))} to clients are proxies."
    if unread := evidence.unread:
        found += (
            f" {len(unread)} files among them are no messages by their names, and were not read: "
            f"{unread[0].name}{', ...' if len(unread) > 1 else ''}."
        )
    return SOUND, found


def _ledger(evidence: Evidence) -> Answer:
    """A client was sent what the exposure ledger does not list: more was shown than it says."""
    listed = _listed(evidence)
    if listed is None:
        return NOT_APPLICABLE, f"The run has no exposure ledger ({LEDGER})."
    for kept in evidence.proxies():
        if (kept.round, kept.client) not in listed:
            return ALARM, f"{_to(kept)} is not in the exposure ledger: more was shown than it says."
    return SOUND, f"All of {_messages(len(evidence.proxies()))} are in the exposure ledger."


def _few_bits(evidence: Evidence) -> Answer:
    """A matrix travels in more bits than the scheme states."""
    facts = evidence.manifest.facts
    limits = {name: _limit(facts, name, info) for name, info in evidence.manifest.tensors.items()}
    if set(limits.values()) <= {EXACT, None}:
        if facts.bits is None and facts.adapter_bits is None:
            return _unsaid("in how many bits it sends numbers")
        if None in limits.values():
            return _unsaid("in how many bits it sends all that it does not send exactly")
        return NOT_APPLICABLE, "The scheme sends values exactly, or nothing that is quantized."
    few = exact = 0
    for kept in evidence.proxies():
        for name, section in kept.read().sections.items():
            if name not in limits or not isinstance(section, QuantizedTensor | Dense):
                continue
            count, limit = _count(section), limits[name]
            if isinstance(limit, int) and count:
                if (bits := _sent_bits(section)) is None or bits > limit:
                    form = "in full precision" if bits is None else f"in {bits} bits"
                    return ALARM, f"{_to(kept)} has {name} {form}; the scheme says {limit} bits."
                few += count
            elif evidence.manifest.tensors[name].is_floating_point:
                exact += count
    if not few:
        return NOT_APPLICABLE, "No matrix was sent of which the scheme states few bits."
    found = f"{few:,} numbers of matrices were sent, none in more bits than the scheme states."
    if exact:
        found += (
            f" Of all numbers {exact / (few + exact):.1%} are others: of vectors, of small "
            "matrices, or of what the scheme sends exactly or does not speak of."
        )
    return SOUND, found


def _same_values(evidence: Evidence) -> Answer:
    """A unit decodes to other values for one client than for another in the same round."""
    opened, compared, rounds, shared = _Opened(evidence), 0, 0, 0
    for _, proxies in groupby(opened, key=lambda proxy: proxy.round):
        values = _Values(evidence)
        for proxy in proxies:
            if (name := values.differing(proxy)) is not None:
                return ALARM, _difference(evidence, proxy, name)
        compared += values.compared
        rounds += 1
        shared += values.compared > 0
    if opened.all_failed:
        return _unopened()
    if not compared:
        return NOT_APPLICABLE, "In no round were two clients sent a value of the same unit."
    others = "; in the others no two clients were sent the same unit" if shared < rounds else ""
    return SOUND, (
        "What two clients of a round were both sent has the same values, so that averaging over "
        f"clients gains nothing: {compared:,} values were compared, in {shared} of {rounds} rounds"
        f"{others}.{opened.note}"
    )


def _guessable_masks(evidence: Evidence) -> Answer:
    """Masks that a generator with a guessable seed draws as well."""
    facts = evidence.manifest.facts
    stated = {"server": facts.server_mask, "client": facts.client_mask}
    rates = [rate for rate in stated.values() if rate]
    unsaid = [name for name, rate in stated.items() if rate is None]
    if not rates and not unsaid:
        return NOT_APPLICABLE, "The scheme draws no masks."
    opened = _Opened(evidence)
    tried = list[tuple[str, set[float]]]()
    for proxy, group in _different_masks(opened, rates):
        if (found := guess_masks(proxy, rates)) is not None:
            return ALARM, f"The mask of {proxy.client} in round {proxy.round} is that of {found}."
        tried.append((group, set(rates_to_try(proxy, rates))))
    if unsaid:
        return _unsaid(f"at which rate it draws {' and '.join(unsaid)} masks")
    if opened.all_failed:
        return _unopened()
    if not tried:
        return NOT_APPLICABLE, (
            f"No mask withholds {FEWEST} units of a group: with fewer, a guess may be right by "
            "chance."
        )
    left_out = [f"{rate:.0%}" for rate in rates if not any(rate in one for _, one in tried)]
    too_few = f" At a rate of {' and '.join(left_out)} too few units are withheld to tell."
    return SOUND, (
        f"No usual generator draws, with a seed below {SEEDS:,}, what is withheld of {tried[0][0]}"
        f", in {len(tried)} different masks of that group{too_few if left_out else '.'}"
        + opened.note
    )


_CHECKS: dict[str, Callable[[Evidence], Answer]] = {
    "withheld units": _withheld_units,
    "server mask": _server_mask,
    "only proxies": _only_proxies,
    "exposure ledger": _ledger,
    "few bits": _few_bits,
    "same values for all": _same_values,
    "unguessable masks": _guessable_masks,
}


class _Opened:
    """All proxies that can be opened, and how many cannot: another check tells of those."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._opened = self._failed = 0

    def __iter__(self) -> Iterator[Proxy]:
        self._opened = self._failed = 0
        for kept in self._evidence.proxies():
            try:
                proxy = self._evidence.open(kept)
            except OvershownError:
                self._failed += 1
                continue
            self._opened += 1
            yield proxy

    @property
    def all_failed(self) -> bool:
        """Whether nothing could be looked at."""
        return self._failed > 0 and not self._opened

    @property
    def note(self) -> str:
        """How much was not looked at, for the end of a text."""
        if not self._failed:
            return ""
        return f" {_messages(self._failed)} with more than their units were left out."


@dataclass
class _Shown:
    """Which units of a group clients were ever sent, by how many different masks.

    Attributes:
        group: The group.
        left: Units that a server mask leaves.
        most: So many may be shown before there is an alarm: more than ``left`` of masks that throw
            for each unit, by six standard deviations of a binomial number.
        units: Which were shown: bool [units].
        masks: The different masks.
    """

    group: UnitGroup
    left: int
    most: int
    units: Tensor
    masks: set[bytes] = field(default_factory=set)

    @classmethod
    def of(cls, group: UnitGroup, facts: Facts) -> _Shown:
        """Nothing was shown yet."""
        rate = facts.server_mask or 0.0
        left = max(group.size - round(rate * group.size), 1)
        slack = 0 if facts.draw == "exact" else round(6 * (group.size * rate * (1 - rate)) ** 0.5)
        return cls(group, left, left + slack, torch.zeros(group.size, dtype=torch.bool))

    @property
    def count(self) -> int:
        """How many units were shown."""
        return int(self.units.sum())

    def see(self, proxy: Proxy) -> None:
        """Add what a proxy shows. Of a group that it does not cut it shows all, if anything."""
        shown = {*proxy.tensors}
        if not any(part.tensor in shown for part in self.group.slices):
            return
        mask = torch.ones(self.group.size, dtype=torch.bool)
        if (release := proxy.released.get(self.group.name)) is not None:
            mask = torch.zeros(self.group.size, dtype=torch.bool)
            mask[release.units] = True
        self.units |= mask
        self.masks.add(mask.numpy().tobytes())

    def chance_to_miss(self, client_mask: float, draw: str) -> float:
        """How likely no more would have been shown without a server mask."""
        return chance_to_miss(
            self.group.size, client_mask, len(self.masks), self.most, exact=draw == "exact"
        )


class _Values:
    """Which values clients were sent in one round."""

    def __init__(self, evidence: Evidence) -> None:
        self._tensors = evidence.manifest.tensors
        self._values: dict[str, Tensor] = {}
        self._known: dict[str, Tensor] = {}
        self.compared = 0

    def differing(self, proxy: Proxy) -> str | None:
        """The first tensor that was sent with other values before; None if there is none."""
        for name in proxy.tensors:
            values, shown = _whole(proxy, name), proxy.shows(name)
            if name not in self._values:
                self._values[name], self._known[name] = values, shown
                continue
            both = self._known[name] & shown
            if not bool(_alike(self._values[name], values)[both].all()):
                return name
            if self._tensors[name].is_floating_point:
                self.compared += int(both.sum())
            self._values[name] = torch.where(self._known[name], self._values[name], values)
            self._known[name] |= shown
        return None


def _difference(evidence: Evidence, proxy: Proxy, name: str) -> str:
    """Whose values of a tensor differ from a client's, in a sentence."""
    values, shown = _whole(proxy, name), proxy.shows(name)
    for other in _Opened(evidence):
        if other.round != proxy.round:
            continue
        both = other.shows(name) & shown
        a, b = _whole(other, name)[both], values[both]
        alike = _alike(a, b)
        if bool(alike.all()):
            continue
        finite = a.isfinite() & b.isfinite()
        size = float((a - b)[finite].norm() / a[finite].norm().clamp(min=1e-30))
        return (
            f"In round {proxy.round}, {other.client} and {proxy.client} were sent other values of "
            f"the same units of {name} ({1 - float(alike.float().mean()):.0%} of them, {size:.2%} "
            "apart): who unites or averages proxies comes closer to the model than any one of them."
        )
    raise AssertionError("no proxy differs")  # what was sent before is what these sent


def _whole(proxy: Proxy, name: str) -> Tensor:
    """A tensor at its whole shape, without loss."""
    part = proxy.part(name)
    exact = part.dtype in (torch.float64, torch.int64, torch.int32)
    return proxy.spread(name, part.double() if exact else part.float())


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors are the same, element by element: NaN is like NaN."""
    return (one == other) | (one.isnan() & other.isnan())


def _different_masks(opened: _Opened, rates: Sequence[float]) -> Iterator[tuple[Proxy, str]]:
    """The first proxies whose masks can be guessed at and differ, and whose group that is."""
    masks: set[bytes] = set()
    for proxy in opened:
        group = guessed_group(proxy)
        if group is None or not rates_to_try(proxy, rates):
            continue
        mask = proxy.released[group.name].units.numpy().tobytes()
        if mask in masks:
            continue
        masks.add(mask)
        yield proxy, group.name
        if len(masks) == _GUESSED:
            return


def _limit(facts: Facts, name: str, info: TensorInfo) -> Bits | None:
    """In how many bits a tensor may travel by what the scheme states; None if it does not say."""
    if not info.is_floating_point or len(info.shape) < 2:
        return EXACT
    if is_adapter(name):
        return facts.adapter_bits
    return EXACT if info.numel < facts.exact_below else facts.bits


def _sent_bits(section: QuantizedTensor | Dense) -> int | None:
    return section.bits if isinstance(section, QuantizedTensor) else None


def _count(section: QuantizedTensor | Dense) -> int:
    shape = section.shape if isinstance(section, QuantizedTensor) else section.tensor.shape
    return math.prod(shape)


def _listed(evidence: Evidence) -> set[tuple[int, str]] | None:
    """Rounds and clients of all releases in the exposure ledger; None if there is no ledger."""
    ledger = Exposure(evidence.manifest, evidence.folder)
    if not (evidence.folder / LEDGER).exists():
        return None
    return {(number, client) for number, client, _ in ledger.releases()}


def _not_kept(evidence: Evidence) -> str:
    """What was sent that nobody can look at, in a sentence; "" if there is nothing."""
    listed = _listed(evidence)
    if listed is None:
        return "Whether more was sent nothing says: the run has no exposure ledger."
    lost = listed - {(kept.round, kept.client) for kept in evidence.proxies()}
    if not lost:
        return ""
    return f"{len(lost)} of {_messages(len(listed))} that were sent were not kept, nor looked at."


def _unsaid(what: str) -> Answer:
    return NOT_APPLICABLE, f"The scheme does not say {what}."


def _unopened() -> Answer:
    return NOT_APPLICABLE, "No message could be opened: each has more in it than its units."


def _too_small(groups: int) -> str:
    return f"; the other {groups} are too small to tell, or were not sent" if groups else ""


def _to(kept: Kept) -> str:
    return f"The message to {kept.client} in round {kept.round}"


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count} messages"


def _numbers(message: Message) -> int:
    return sum(
        section.tensor.numel()
        for section in message.sections.values()
        if isinstance(section, Dense)
    )
