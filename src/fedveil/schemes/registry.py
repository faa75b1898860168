"""Schemes by name, for configuration files and messages."""

from __future__ import annotations

from typing import TypeVar

from fedveil.errors import ConfigurationError
from fedveil.schemes.base import Scheme

__all__ = ["register_scheme", "scheme_class", "scheme_names"]

_SCHEMES: dict[str, type[Scheme]] = {}
_S = TypeVar("_S", bound=type[Scheme])


def register_scheme(scheme: _S) -> _S:
    """Class decorator: make a scheme known under its ``name``."""
    _SCHEMES[scheme.name] = scheme
    return scheme


def scheme_names() -> tuple[str, ...]:
    """The names of all known schemes."""
    return tuple(sorted(_SCHEMES))


def scheme_class(name: str) -> type[Scheme]:
    """The scheme of that name.

    Raises:
        ConfigurationError: If there is none.
    """
    if name not in _SCHEMES:
        raise ConfigurationError(
            "The scheme is unknown", expected=" or ".join(scheme_names()), found=repr(name)
        )
    return _SCHEMES[name]
