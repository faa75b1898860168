"""JSON with exactly one spelling, and a reader that refuses everything odd."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from fedveil.errors import WireError

__all__ = ["read_json", "write_json"]

_MAX_DEPTH: Final = 8
"""Nesting that the deepest header needs is 4; this bounds the parser's recursion."""

_STRING: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""One string, ended or not; possessive, so that no text makes the search slow."""

_NOT_BRACKET: Final = re.compile(r"[^\[\]{}]+")


def write_json(value: object) -> str:
    """The canonical spelling: sorted keys, no spaces, ASCII, floats as Python's `repr` has them.

    Raises:
        WireError: NaN or infinity, or text that is not valid Unicode.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except ValueError as error:
        raise WireError("a scalar cannot be written", found=f"{error}") from None


def read_json(text: str, where: str) -> Any:
    """Parse; no NaN, no key twice, no deep nesting.

    Raises:
        WireError: anything else than one JSON value of the kind described.
    """
    _check_depth(text, where)
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError("not valid JSON", found=f"{error}"[:200], where=where) from None


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for bracket in _NOT_BRACKET.sub("", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > _MAX_DEPTH:
            raise WireError("JSON is nested too deeply", expected=f"{_MAX_DEPTH}", where=where)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
