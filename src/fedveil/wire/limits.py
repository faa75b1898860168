"""How much a receiver is ready to accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from fedveil.errors import ConfigurationError, WireError

__all__ = ["Limits"]

_WORDS: Final = 64 * 2**10
"""Bytes of a header beside what it says of sections: the message's own words, and its scalars."""
_PER_SECTION: Final = 1200
_NAMES: Final = 9
"""A section's name stands up to nine times in a header: with each of its three parts, and, where a
quotation mark takes two bytes more, among the sections, and with a scalar that names it."""
_LARGEST_NUMBER: Final = 8
"""Bytes: float64. Codes with their scales never take more."""


@dataclass(frozen=True)
class Limits:
    """Caps that are checked before anything of a size named by the sender is allocated.

    Attributes:
        max_bytes: bytes of the whole message.
        max_header_bytes: bytes of the container's header, where all names and scalars are.
        max_sections: sections of one message.
        max_elements: numbers in all sections together, counted after decoding: a packed 2-bit
            weight grows 16-fold when it becomes float32.

    Raises:
        ConfigurationError: a limit is not a whole number from 1 up.
    """

    max_bytes: int = 16 * 2**30
    max_header_bytes: int = 4 * 2**20
    max_sections: int = 100_000
    max_elements: int = 2**34

    @classmethod
    def of_reply(cls, sections: Mapping[str, int]) -> Limits:
        """The most that any honest message with these sections takes, however it is encoded.

        Args:
            sections: By name the most numbers that one may hold; not all need to be there.
        """
        elements = max(1, sum(sections.values()))
        header = _WORDS + sum(_PER_SECTION + _NAMES * len(name) for name in sections)
        return cls(
            max_bytes=_LARGEST_NUMBER * elements + header,
            max_header_bytes=header,
            max_sections=max(1, len(sections)),
            max_elements=elements,
        )

    def check_length(self, length: int) -> None:
        """Refuse a message by its length alone, before it is copied, kept or read.

        Args:
            length: Bytes of the whole message.

        Raises:
            WireError: It is longer than ``max_bytes``.
        """
        if length > self.max_bytes:
            raise WireError(
                "message too large",
                expected=f"up to {self.max_bytes} bytes",
                found=f"{length} bytes",
                fix="Raise Limits.max_bytes if this is meant.",
            )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(
                    "impossible limit",
                    expected="a whole number from 1 up",
                    found=f"{value!r}",
                    where=field.name,
                )
