"""Numbers for named classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedveil.data.library import library, quiet, require_column
from fedveil.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["encode_labels"]


def encode_labels(
    dataset: datasets.Dataset, column: str = "label", *, names: Sequence[str] | None = None
) -> tuple[datasets.Dataset, list[str]]:
    """Turn a column into class numbers, in the sorted order of its values.

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
    values = require_column(dataset, column)
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        if names is None or list(names) == feature.names:
            return dataset, list(feature.names)
        name_of = {value: feature.names[value] for value in values}
    else:
        _check_type(values, column)
        name_of = {value: str(value) for value in values}
    order = list(names) if names is not None else [name_of[value] for value in values]
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
        raise DataError(
            "labels are of a type that names no classes",
            expected="strings or whole numbers",
            found=f"{wrong!r} ({type(wrong).__name__})",
            where=f'column "{column}"',
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
