"""Numbers for named classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fedveil.errors import DataError
from fedveil.hub.library import library, quiet, require_column

if TYPE_CHECKING:
    import datasets

__all__ = ["encode_labels", "in_order", "is_whole_number"]

_WHOLE = re.compile(r"0|-?[1-9][0-9]*")


def is_whole_number(name: str) -> bool:
    """Whether this is a whole number as it is usually written: "1", not "01", "+1" or "1.0"."""
    return _WHOLE.fullmatch(name) is not None


def in_order(names: Collection[str]) -> list[str]:
    """Names of classes, sorted: as numbers if all of them are, else as texts."""
    numbers = all(map(is_whole_number, names))
    # By length first: of numbers with thousands of digits Python makes none.
    return sorted(names, key=_by_size) if numbers else sorted(names)


def _by_size(number: str) -> tuple[int, str]:
    if number.startswith("-"):
        return -len(number), "".join(chr(ord("9") - ord(digit)) for digit in number[1:])
    return len(number), number


def encode_labels(
    dataset: datasets.Dataset, column: str = "label", *, names: Sequence[str] | None = None
) -> tuple[datasets.Dataset, list[str]]:
    """Turn a column into class numbers, in the sorted order of its values.

    Classes are what stands in the column: "1" and "01" are two, "True" and "true" as well. Where
    all of them are whole numbers, 2 comes before 10.

    Clients that encode their own data must agree on `names`, or their class 0 will not be the
    same class: a client that has never seen a class would number the others differently.

    Args:
        dataset: Strings, whole numbers or ClassLabel in `column`; ClassLabel is left as it is
            unless `names` differ.
        column: The column to encode.
        names: All class names in order; None to take the values found.

    Returns:
        The data set with a ClassLabel column, and the class names.

    Raises:
        DataError: The column is missing, has gaps, is of another type, or has a value that is not
            among `names`.
    """
    datasets = library("datasets")
    feature = dataset.features.get(column)
    if feature is not None and not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise _no_classes(str(feature), column)
    values = require_column(dataset, column)
    if isinstance(feature, datasets.ClassLabel):
        if names is None or list(names) == feature.names:
            return dataset, list(feature.names)
        _check_numbered(values, column)
        name_of = {value: feature.names[value] for value in values}
    else:
        _check_type(values, column)
        name_of = {value: str(value) for value in values}
    order = list(names) if names is not None else in_order(name_of.values())
    _check_known(set(name_of.values()), order, column)
    index = {value: order.index(name) for value, name in name_of.items()}
    with quiet():
        encoded = dataset.map(
            lambda labels: {column: [index[label] for label in labels]},
            input_columns=[column],
            batched=True,
            features=datasets.Features(
                {**dataset.features, column: datasets.ClassLabel(names=order)}
            ),
            keep_in_memory=True,
            load_from_cache_file=False,
        )
    return encoded, order


def _check_type(values: Sequence[object], column: str) -> None:
    wrong = next((value for value in values if not isinstance(value, str | int)), None)
    if wrong is not None:
        raise _no_classes(f"{wrong!r} ({type(wrong).__name__})", column)


def _no_classes(found: str, column: str) -> DataError:
    return DataError(
        "labels are of a type that names no classes",
        expected="strings or whole numbers",
        found=found,
        where=f'column "{column}"',
        fix="Write them as texts: what 1.0, a date or a list is called would be a guess.",
    )


def _check_numbered(values: Sequence[int], column: str) -> None:
    """Of sets on the hub, rows without a label have the class -1."""
    if values and values[0] < 0:
        raise DataError(
            "rows lack a label",
            expected="a class in every row",
            found=f"class {values[0]}",
            where=f'column "{column}"',
            fix="Drop those rows first, or take a split that has labels.",
        )


def _check_known(found: set[str], names: list[str], column: str) -> None:
    unknown = sorted(found - set(names))
    if unknown:
        raise DataError(
            "a label is not among the class names",
            expected=", ".join(repr(name) for name in names),
            found=", ".join(repr(name) for name in unknown[:5]),
            where=f'column "{column}"',
        )
