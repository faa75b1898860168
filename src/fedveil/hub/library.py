"""The Hugging Face and Flower data libraries: found late, and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedveil.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["library", "quiet", "quiet_transformers", "require_column"]

# Read by the libraries as they are imported. A user who wants the reports can ask for them.
_NO_REPORTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
}


def library(name: str) -> Any:
    """Import a module of the `hf` extra, its usage reports off unless the environment says so.

    A library that the program imported earlier has settled that by itself already.

    Raises:
        ConfigurationError: It is not installed.
    """
    for variable, value in _NO_REPORTS.items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the package {(error.name or name).partition('.')[0]!r} is not installed",
            where="fedveil.hub",
            fix='Run: pip install "fedveil[hf]"',
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars inside; the caller's choice of them is back after."""
    datasets = library("datasets")
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The transformers library; inside, it and the hub's library show no reports and no bars."""
    transformers = library("transformers")
    own, hub = transformers.utils.logging, library("huggingface_hub").logging
    before = own.get_verbosity(), hub.get_verbosity()
    bars = own.is_progress_bar_enabled()
    own.set_verbosity_error()
    hub.set_verbosity_error()
    own.disable_progress_bar()
    try:
        yield transformers
    finally:
        own.set_verbosity(before[0])
        hub.set_verbosity(before[1])
        if bars:
            own.enable_progress_bar()


def require_column(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The distinct values of a column, sorted.

    Raises:
        DataError: There is no such column, it has gaps, or its values cannot be sorted.
    """
    if column not in dataset.column_names:
        raise DataError(
            f"the data set has no column {column!r}",
            expected=repr(column),
            found=", ".join(repr(name) for name in dataset.column_names),
            fix="Rename the column, or name another one.",
        )
    values = dataset.unique(column)
    if None in values:
        raise DataError(
            "rows lack a value",
            expected="a value in every row",
            found=f"an empty one, first in row {list(dataset[column]).index(None)}",
            where=f'column "{column}"',
            fix="Drop those rows first.",
        )
    try:
        return sorted(values)
    except TypeError as error:
        raise DataError(
            "values cannot be told apart in order",
            expected="strings or numbers",
            found=type(values[0]).__name__,
            where=f'column "{column}"',
        ) from error
