"""How much a receiver is ready to accept."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedveil.errors import ConfigurationError

__all__ = ["Limits"]


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
