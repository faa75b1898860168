"""Dividing one data set among simulated clients, with the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedveil.errors import ConfigurationError, DataError
from fedveil.hub.library import library, quiet, require_column

if TYPE_CHECKING:
    import datasets

__all__ = ["partition"]

How = Literal["iid", "dirichlet", "column"]


def partition(
    dataset: datasets.Dataset,
    clients: int | None = None,
    *,
    how: How = "iid",
    alpha: float = 0.5,
    column: str = "label",
    min_size: int = 2,
    seed: int = 0,
) -> dict[str, datasets.Dataset]:
    """Divide `dataset` among clients: every row goes to exactly one.

    It is for simulations: whoever calls it holds everybody's data. Rows that repeat, or that belong
    to one person, may end up with several clients; divide by a column to keep them together.

    Args:
        dataset: The rows of all clients.
        clients: How many clients. With "column" it follows from the data; if given it must agree.
        how: "iid": shuffled and cut into equal shares. "dirichlet": each class is divided in
            proportions drawn from a Dirichlet distribution. "column": one client per value of
            `column`, such as a hospital's or a writer's name.
        alpha: For "dirichlet": small (0.1) gives each client few classes, large (100) nearly all
            the same mixture.
        column: For "dirichlet" the column of classes, for "column" the one that names clients.
        min_size: Fewest rows a client may have.
        seed: Decides who gets which row; the same seed, the same shares.

    Returns:
        Shares by client name: "client-00", "client-01", ..., or for "column" the column's values
        (characters other than letters, digits, ".", "_" and "-" become "-").

    Raises:
        DataError: A client would have fewer than `min_size` rows, or the column does not serve.
        ConfigurationError: A setting is impossible, or the `hf` extra is missing.
    """
    _check_settings(clients, how, alpha, min_size)
    partitioners = library("flwr_datasets.partitioner")
    with quiet():
        if how == "column":
            shares = _by_column(dataset, partitioners, clients, column)
        else:
            assert clients is not None
            if len(dataset) < clients * min_size:
                raise _too_small(f"{len(dataset)} rows for {clients} clients", min_size)
            if how == "iid":
                # The partitioner cuts rows in the order they have.
                dataset = dataset.shuffle(seed=seed, keep_in_memory=True)
                partitioner = partitioners.IidPartitioner(clients)
            else:
                require_column(dataset, column)
                partitioner = partitioners.DirichletPartitioner(
                    clients, column, float(alpha), min_size, self_balancing=False, seed=seed
                )
            shares = _numbered(_load(partitioner, dataset, alpha, min_size))
    for name, share in shares.items():
        if len(share) < min_size:
            raise _too_small(f"{len(share)} for {name!r}", min_size)
    return shares


def _load(
    partitioner: Any, dataset: datasets.Dataset, alpha: float, min_size: int
) -> list[datasets.Dataset]:
    partitioner.dataset = dataset
    try:
        with warnings.catch_warnings():
            # It warns at each attempt to reach min_size; if all fail it raises, and so do we.
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            return [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    except ValueError as error:
        raise DataError(
            "no division gives every client enough rows",
            expected=f"at least {min_size} rows each",
            found=f"fewer in all draws with alpha={alpha:g}",
            fix="Raise alpha, lower min_size or the number of clients, or try another seed.",
        ) from error


def _numbered(shares: list[datasets.Dataset]) -> dict[str, datasets.Dataset]:
    # Two digits at least, more when needed, so that names sort as numbers do.
    width = max(2, len(str(len(shares) - 1)))
    return {f"client-{number:0{width}d}": share for number, share in enumerate(shares)}


def _by_column(
    dataset: datasets.Dataset, partitioners: Any, clients: int | None, column: str
) -> dict[str, datasets.Dataset]:
    values = require_column(dataset, column)
    if clients is not None and clients != len(values):
        raise ConfigurationError(
            "the number of clients contradicts the column that names them",
            expected=f"{len(values)}, or None",
            found=str(clients),
            where=f'column "{column}"',
        )
    feature = dataset.features[column]
    to_text = feature.int2str if hasattr(feature, "int2str") else str
    names = [_client_name(to_text(value)) for value in values]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            "two values give the same client name",
            found=", ".join(repr(v) for v, n in zip(values, names, strict=True) if n == twice),
            where=f'column "{column}"',
            fix="Rename one of them.",
        )
    partitioner = partitioners.NaturalIdPartitioner(column)
    partitioner.dataset = dataset
    # Its progress bar has no switch. Partition numbers follow the sorted values.
    with contextlib.redirect_stderr(io.StringIO()):
        return {name: partitioner.load_partition(number) for number, name in enumerate(names)}


def _client_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.") or "client"


def _check_settings(clients: int | None, how: str, alpha: float, min_size: int) -> None:
    wrong: tuple[str, str, object] | None = None
    if how not in get_args(How):
        wrong = ("how", " or ".join(f'"{way}"' for way in get_args(How)), how)
    elif clients is None and how != "column":
        wrong = ("clients", f'a number, as how="{how}" does not tell it', clients)
    elif clients is not None and clients < 1:
        wrong = ("clients", "at least 1", clients)
    elif how == "dirichlet" and not 0 < alpha < float("inf"):
        wrong = ("alpha", "a number above 0", alpha)
    elif min_size < 1:
        wrong = ("min_size", "at least 1", min_size)
    if wrong is not None:
        name, expected, found = wrong
        raise ConfigurationError(
            f"{name} is impossible", expected=expected, found=repr(found), where="partition"
        )


def _too_small(found: str, min_size: int) -> DataError:
    return DataError(
        "a client would have too few rows",
        expected=f"at least {min_size} each",
        found=found,
        fix="Use fewer clients or a smaller min_size, or bring more data.",
    )
