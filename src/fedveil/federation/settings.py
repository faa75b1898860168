"""Checks of single settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fedveil.engine.bounds import Bounds
from fedveil.errors import ConfigurationError

__all__ = ["check_count", "check_declared", "check_keeping", "check_limit", "check_return"]


def check_count(name: str, value: int | None, most: int | None) -> None:
    """Whether a setting is None or an integer from 1 to ``most``."""
    if value is None:
        return
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not ok or (most is not None and value > most):
        limit = f" and at most {most}, the number of clients" if most is not None else ""
        raise ConfigurationError(
            f"The setting {name!r} is impossible",
            expected=f"an integer of at least 1{limit}",
            found=repr(value),
        )


def check_limit(limit: float | None) -> None:
    """Whether `exposure_limit` is None or a share."""
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 1:
        raise ConfigurationError(
            "The setting 'exposure_limit' is impossible",
            expected="a number above 0 and up to 1",
            found=repr(limit),
            fix="A limit of 0.6 shows no client more than 60 % of the model's parameters.",
        )


def check_declared(bounds: Bounds, clients: Collection[str]) -> Bounds:
    """The bounds, if the owner declares examples of clients that there are."""
    odd = sorted(set(bounds.examples or ()) - set(clients))
    if odd:
        raise ConfigurationError(
            "Examples are declared of a client that takes no part",
            expected=", ".join(sorted(clients)),
            found=repr(odd[0]),
            where="Bounds.examples",
        )
    return bounds


def check_return(from_round: int | None, rounds: int, *, resume: bool) -> None:
    """Whether a run can go back to a round."""
    check_count("from_round", from_round, None)
    if from_round is not None and not resume:
        raise ConfigurationError(
            "Only a run that is resumed can go back to a round",
            expected="resume=True with from_round=...",
            found="resume=False",
        )
    if from_round is not None and from_round >= rounds:
        raise ConfigurationError(
            "Nothing would be run",
            expected=f"from_round below {rounds}, the number of rounds",
            found=str(from_round),
        )


def check_keeping(keep_messages: object, out: Any) -> None:
    """Whether messages can be kept as is asked."""
    if keep_messages not in (True, False, "proxies"):
        raise ConfigurationError(
            "The setting 'keep_messages' is unknown",
            expected="true, false or 'proxies'",
            found=repr(keep_messages),
        )
    if keep_messages and out is None:
        raise ConfigurationError(
            "keep_messages needs a place to keep them", fix="Give the run a folder with out=..."
        )
