"""What a scheme says of what it sends, so that an audit knows what to look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fedveil.errors import ConfigurationError
from fedveil.masking import Draw, Policy

__all__ = ["EXACT", "Bits", "Facts", "bits_of"]

Exact = Literal["exact"]
EXACT: Exact = "exact"

Bits = int | Exact
"""Bits of each number, or "exact": the values themselves, in whatever precision they have."""

_MOST_BITS = 64


@dataclass(frozen=True)
class Facts:
    """What a scheme states of its releases. None is not "none" but "the scheme does not say".

    An audit checks bytes against these statements. What is not stated cannot be checked, and is
    called "not applicable", never "sound". Who adds a scheme states what is true of every message,
    whatever the model; there is no harm in stating nothing.

    Does NOT protect: a statement changes no byte. It is what checks compare the bytes with.

    Attributes:
        server_mask: Share of the units of each group that no client ever gets; 0 for no such mask.
        client_mask: Share of the rest that is withheld from one client; 0 for no such mask.
        draw: Whether masks withhold an exact number of units, or each unit by a throw of its own.
        policy: When client masks are drawn; see :class:`~fedveil.masking.Masking`.
        bits: The most bits of a number in a released matrix, outside of adapters.
        adapter_bits: The same of the matrices of PEFT adapters.
        exact_below: Outside of adapters, matrices of fewer numbers than this travel exactly all the
            same, as vectors do.
        of_owner: Whether releases depend on the owner's model. A federation states it where it
            releases a public model in the owner's place; unless it is False, they do.

    Raises:
        ConfigurationError: A statement is impossible.
    """

    server_mask: float | None = None
    client_mask: float | None = None
    draw: Draw | None = None
    policy: Policy | None = None
    bits: Bits | None = None
    adapter_bits: Bits | None = None
    exact_below: int = 0
    of_owner: bool | None = None

    def __post_init__(self) -> None:
        for name in ("server_mask", "client_mask"):
            self._require(name, _is_rate(getattr(self, name)), "a share from 0 up to 1, without 1")
        for name in ("bits", "adapter_bits"):
            self._require(name, _is_bits(getattr(self, name)), f'1 to {_MOST_BITS}, or "{EXACT}"')
        for name, words in (("draw", get_args(Draw)), ("policy", get_args(Policy))):
            self._require(name, getattr(self, name) in (None, *words), " or ".join(words))
        whole = type(self.exact_below) is int and self.exact_below >= 0
        self._require("exact_below", whole, "a whole number")
        self._require("of_owner", self.of_owner in (None, True, False), "true or false")

    def to_json(self) -> dict[str, Any]:
        """What is stated, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """What :meth:`to_json` gave. Statements that this version does not know are left out.

        Raises:
            ConfigurationError: A statement is impossible.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigurationError(
                f"A scheme states what is impossible of {name!r}",
                expected=f"{expected}, or None if it does not say",
                found=repr(getattr(self, name)),
            )


def bits_of(setting: int | None) -> Bits:
    """What the setting of a scheme means that sends values exactly where it is None."""
    return EXACT if setting is None else setting


def _is_rate(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_bits(value: object) -> bool:
    return value in (None, EXACT) or (type(value) is int and 1 <= value <= _MOST_BITS)
