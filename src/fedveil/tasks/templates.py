"""Columns of a data set, and templates over them, such as "Summarize: {dialogue}"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Formatter
from typing import Any

from fedveil.errors import ConfigurationError, DataError
from fedveil.tasks.task import Dataset, column

__all__ = ["cells", "columns_of"]


def columns_of(name: str) -> tuple[str, ...]:
    """The columns that a template names; of a column its own name.

    Raises:
        ConfigurationError: It has braces, and is no template.
    """
    if "{" not in name:
        return (name,)
    try:
        pieces = list(Formatter().parse(name))
    except ValueError as error:
        raise _bad_template(name, str(error)) from error
    fields = [field for _, field, form, how in pieces if field is not None and not (form or how)]
    if not fields or len(fields) < sum(piece[1] is not None for piece in pieces) or "" in fields:
        raise _bad_template(name, "no column in braces")
    return tuple(dict.fromkeys(fields))


def _bad_template(name: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        "a template cannot be read",
        expected='columns in braces, such as "Summarize: {dialogue}"; other braces doubled',
        found=f"{found} in {name!r}",
    )


def cells(data: Dataset, name: str) -> Iterator[Any]:
    """A column, or a template filled in for each row.

    Raises:
        DataError: A column is missing, or a value in a template.
    """
    if "{" not in name:
        yield from column(data, name)
        return
    fields = columns_of(name)
    columns = [column(data, field) for field in fields]
    for row, values in enumerate(zip(*columns, strict=True)):
        for field, value in zip(fields, values, strict=True):
            if value is None:
                raise DataError(
                    f"row {row} lacks a value",
                    expected="text",
                    found="an empty one",
                    where=f'column "{field}"',
                )
        texts = {field: _written(value) for field, value in zip(fields, values, strict=True)}
        # What stands in braces is a name, whatever it looks like.
        yield "".join(
            literal + ("" if field is None else texts[field])
            for literal, field, _, _ in Formatter().parse(name)
        )


def _written(value: Any, between: str = " | ") -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return between.join(_written(item, " : ") for item in value)
    return str(value)
