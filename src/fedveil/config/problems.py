"""What is wrong with a configuration file, in words: all of it at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedveil.errors import ConfigurationError

__all__ = ["Problems"]

_LONGEST = 80
_TOML_WORDS = {
    "boolean": "true or false",
    "list": "an array",
    "number": "a number",
    "integer": "a whole number",
    "string": "text",
    "tuple": "an array",
}
_KIND = re.compile(r"(bool|int|float|str|none|list|tuple|dict|literal|constrained-\w+)(\[.*\])?")
"""How pydantic calls one kind of several that a value may be of; it stands after the key."""


class Problems:
    """Collects the problems of one file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._found: list[ConfigurationError] = []

    def add(self, problem: str, table: str, key: str = "", **parts: str) -> None:
        """Note a problem with a table or one of its keys."""
        where = f"{self._file}: [{table}] {key}".rstrip()
        self._found.append(ConfigurationError(problem, where=where, **parts))

    def add_unknown(self, what: str, table: str, key: str, known: Iterable[str]) -> None:
        """Note a name that nobody knows, with the nearest that is known."""
        known = list(known)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(sorted(known))}."
        where = f"{self._file}: [{table}]" if table else self._file
        self._found.append(ConfigurationError(f"Unknown {what} {key!r}", where=where, fix=fix))

    def add_all(self, table: str, error: ValidationError, known: Sequence[str]) -> None:
        """Note what pydantic found in one table."""
        for key, detail, expected in _by_key(error):
            if detail["type"] == "extra_forbidden":
                self.add_unknown("key", table, key, known)
            elif detail["type"] == "missing":
                self.add("A key is missing", table, key, expected="a value")
            else:
                self.add(
                    "The value cannot be used",
                    table,
                    key,
                    expected=expected,
                    found=_quote(detail["input"]),
                )

    def add_refused(self, table: str, error: ConfigurationError) -> None:
        """Note what a settings class has against its values."""
        self.add(error.problem, table, expected=error.expected, found=error.found, fix=error.fix)

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_any(self) -> None:
        """Raise one error for all problems, if there are any."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            lines = "\n".join(f"  - {_without_file(error, self._file)}" for error in self._found)
            raise ConfigurationError(
                f"{self._file} has {len(self._found)} problems:\n{lines}\nNothing was started"
            )


def _by_key(error: ValidationError) -> Iterator[tuple[str, ErrorDetails, str]]:
    """What is wrong with each key, and what was expected: of a choice of kinds all of them."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        parts = [str(part) for part in detail["loc"]]
        if len(parts) > 1 and _KIND.fullmatch(parts[-1]):
            del parts[-1]
        found.setdefault(".".join(parts), []).append(detail)
    for key, details in found.items():
        yield key, details[0], " or ".join(dict.fromkeys(map(_expected, details)))


def _expected(detail: ErrorDetails) -> str:
    words = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    words = words.replace("greater than or equal to", "at least")
    words = words.replace("less than or equal to", "at most")
    return _TOML_WORDS.get(words, words)


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _without_file(error: ConfigurationError, file: str) -> str:
    return str(error).replace(f"{file}: ", "", 1)
