"""What should never be found in the bytes that were sent, and alarms if it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, islice

import torch
from torch import Tensor

from fedveil.audit.evidence import Evidence, Kept, OvershownError, Proxy
from fedveil.audit.findings import Alarm
from fedveil.audit.guessing import guess_masks
from fedveil.quantization import QuantizedTensor
from fedveil.wire import Dense, Message

__all__ = ["check"]

Tell = Callable[[str], None]

_COMPARED = 3
"""Clients of each round whose values are compared with those of the first."""


def check(evidence: Evidence, tell: Tell = lambda text: None) -> list[Alarm]:
    """Look through everything that was sent for what a sound scheme never sends.

    Each check looks at the bytes alone, with what everybody knows: architecture, unit groups and
    mask rates. The federation secret is not needed.

    Args:
        evidence: The run.
        tell: Hears of what is being done.
    """
    alarms = []
    for name, look in _CHECKS.items():
        tell(f"check: {name}")
        found = next(look(evidence), None)
        alarms.append(Alarm(name, found is not None, found or _SOUND[name]))
    return alarms


def _withheld_units(evidence: Evidence) -> Iterator[str]:
    """A message has more in it than the units that it says it releases."""
    for kept in evidence.proxies():
        message = kept.read()
        try:
            Proxy(message, evidence.manifest)
        except OvershownError as error:
            yield f"{error.problem}: of {error.where}, {error.expected}; found {error.found}."
            return
        for name in message.scalars:
            yield f"The message to {kept.client} in round {kept.round} has a scalar, {name!r}."


def _server_mask(evidence: Evidence) -> Iterator[str]:
    """More units were released in all than a server mask of the configured rate leaves."""
    scheme = evidence.manifest.configuration.get("scheme", {})
    rate = scheme.get("server_mask", 0.0)
    if not rate:
        return
    ever: dict[str, Tensor] = {}
    for proxy in _proxies(evidence):
        for group in proxy.groups:
            mask = ever.setdefault(group.name, torch.zeros(group.size, dtype=torch.bool))
            mask[proxy.released[group.name].units] = True
    exact = scheme.get("draw", "exact") == "exact"
    for name, mask in ever.items():
        size, most = len(mask), len(mask) - round(rate * len(mask))
        if not exact:
            # Six standard deviations of a binomial number.
            most += round(6 * (size * rate * (1 - rate)) ** 0.5)
        if int(mask.sum()) > max(most, 1):
            yield (
                f"Clients were sent {int(mask.sum())} of the {size} units of {name} in all, and a "
                f"server mask of {rate:.0%} leaves {most}: it was drawn anew, or not applied."
            )


def _whole_model(evidence: Evidence) -> Iterator[str]:
    """A message on the way down that is no proxy, or that is of full precision."""
    scheme = evidence.manifest.configuration.get("scheme", {})
    packed = _packed(evidence) if scheme.get("bits") else set()
    for kept in evidence.down():
        message = kept.read()
        if message.kind != "proxy":
            yield (
                f"{kept.client} was sent a message of kind {message.kind!r} in round {kept.round}, "
                f"with {_numbers(message):,} numbers: only proxies may go to clients."
            )
            return
        if name := _exact_weight(packed, message):
            yield (
                f"The message to {kept.client} in round {kept.round} has {name} in full precision, "
                f"where others have it in {scheme['bits']} bits."
            )
            return


def _same_bits(evidence: Evidence) -> Iterator[str]:
    """A unit decodes to other values for one client than for another in the same round."""
    for _, sent in groupby(evidence.proxies(), key=lambda kept: kept.round):
        first, *others = sent
        for other in others[:_COMPARED]:
            found = _difference(evidence, first, other)
            if found is not None:
                yield found
                return


def _guessable_masks(evidence: Evidence) -> Iterator[str]:
    """Masks that a generator with a guessable seed draws as well."""
    scheme = evidence.manifest.configuration.get("scheme", {})
    rates = [rate for rate in (scheme.get("server_mask"), scheme.get("client_mask")) if rate]
    if not rates:
        return
    for proxy in islice(_proxies(evidence), 2):
        found = guess_masks(proxy, rates) if proxy.groups else None
        if found is not None:
            yield f"The mask of {proxy.client} in round {proxy.round} is that of {found}."
            return


_CHECKS: dict[str, Callable[[Evidence], Iterator[str]]] = {
    "withheld units": _withheld_units,
    "server mask": _server_mask,
    "only proxies": _whole_model,
    "same values for all": _same_bits,
    "unguessable masks": _guessable_masks,
}
_SOUND = {
    "withheld units": "Every message has the tensors of its released units, and nothing else.",
    "server mask": "No more units were ever sent than the server mask leaves.",
    "only proxies": "Nothing but proxies went to clients, in as many bits as configured.",
    "same values for all": "A unit has the same values for all clients of a round: averaging "
    "over clients gains nothing.",
    "unguessable masks": "No usual generator with a small seed draws these masks.",
}


def _proxies(evidence: Evidence) -> Iterator[Proxy]:
    """All proxies that can be opened; another check tells of the others."""
    for kept in evidence.proxies():
        try:
            yield evidence.open(kept)
        except OvershownError:
            continue


def _numbers(message: Message) -> int:
    return sum(
        section.tensor.numel()
        for section in message.sections.values()
        if isinstance(section, Dense)
    )


def _exact_weight(packed: set[str], message: Message) -> str | None:
    """A tensor that is sent in full precision here, and in few bits in another message."""
    for name, section in message.sections.items():
        if isinstance(section, Dense) and name in packed:
            return name
    return None


def _packed(evidence: Evidence) -> set[str]:
    """Tensors that some message has in few bits."""
    names: set[str] = set()
    for kept in evidence.proxies():
        sections = kept.read().sections.items()
        names |= {name for name, section in sections if isinstance(section, QuantizedTensor)}
    return names


def _difference(evidence: Evidence, one: Kept, other: Kept) -> str | None:
    try:
        first, second = evidence.open(one), evidence.open(other)
    except OvershownError:
        return None
    for name in first.tensors:
        a, b = first.whole(name), second.whole(name)
        both = a.isfinite() & b.isfinite()
        a, b = a[both], b[both]
        if not torch.equal(a, b):
            share = float((a != b).float().mean())
            size = float((a - b).norm() / a.norm().clamp(min=1e-30))
            return (
                f"In round {one.round}, {one.client} and {other.client} were sent other values of "
                f"the same units of {name} ({share:.0%} of them, {size:.2%} apart): who unites or "
                "averages proxies comes closer to the model than any one of them."
            )
    return None
