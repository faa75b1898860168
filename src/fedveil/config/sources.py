"""The rows of a configured federation: loaded, labelled alike, divided among clients."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedveil.config.classes import settled_classes
from fedveil.config.file import Config
from fedveil.errors import ConfigurationError, DataError, FedveilWarning
from fedveil.hub import encode_labels, in_order, is_whole_number, load_data, partition

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "class_names", "is_file", "load_rows", "load_source", "load_test"]

_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_TRAIN, _TEST, _OWNER = "the training set", "the test set", "the owner's data"
_TUNED = "the rows of the owner's tuning"
_UNKNOWN = "a label is not among"


@dataclass(frozen=True)
class Rows:
    """What clients train on, what the owner tests on, and the class names of both.

    Attributes:
        clients: Rows by client; none of clients on other machines.
        test: The owner's test set, or None.
        owner: The owner's own rows, or None.
        tuned: The rows that the owner's model was tuned on, or None.
        names: Class names in order; none for language models.
    """

    clients: Mapping[str, datasets.Dataset]
    test: datasets.Dataset | None
    owner: datasets.Dataset | None
    tuned: datasets.Dataset | None
    names: list[str]


def load_rows(config: Config) -> Rows:
    """Load all rows that a configuration names.

    Raises:
        FedveilError: Some cannot be found or used; the error says whose they are.
    """
    if config.partner is not None:
        return _rows_of_partner(config)
    data, seed = config.data, config.federation.seed
    parts: dict[str, datasets.Dataset]
    files = dict(config.clients)
    if config.partners is not None:
        parts = {}
    elif config.partition is not None:
        assert data.train is not None
        whole = load_source(config, data.train, data.train_split)
        parts = {_TRAIN: _draw(whole, data.train_limit, seed)}
    else:
        parts = {
            f"client {name}": _draw(
                load_source(config, file, data.train_split), data.train_limit, seed
            )
            for name, file in files.items()
        }
    lent = {
        _TEST: load_test(config),
        _OWNER: _load_own(config, data.owner, data.owner_split, data.owner_limit),
        _TUNED: _load_own(config, data.tuned, data.tuned_split, data.tuned_limit),
    }
    names, encoded = [], parts
    if data.has_classes:
        places = _places(config, parts)
        known = data.labels or class_names(parts, data.label, config.model.num_labels, places)
        names = settled_classes(config, known)
        given = partial(_given, config, parts, places)

        def encode(who: str, rows: datasets.Dataset) -> datasets.Dataset:
            return _encode(rows, who, data.label, names, given, places[who])

        encoded = {who: encode(who, rows) for who, rows in parts.items()}
        lent = {who: None if rows is None else encode(who, rows) for who, rows in lent.items()}
    if config.partition is None:
        clients: Mapping[str, datasets.Dataset] = dict(zip(files, encoded.values(), strict=True))
    else:
        clients = _divide(config, encoded[_TRAIN])
    return Rows(clients, lent[_TEST], lent[_OWNER], lent[_TUNED], names)


def _rows_of_partner(config: Config) -> Rows:
    """A client's own rows, of one file on its machine: whoever wrote the rest of the file for it
    has nothing else loaded there.

    Raises:
        FedveilError: It names no such file, or other sources.
    """
    data, name = config.data, config.whose().name
    others = ("test", "owner", "tuned", "train_split", "variant", "revision")
    if odd := [key for key in others if getattr(data, key) is not None]:
        raise ConfigurationError(
            "A client loads its own rows, and nothing else",
            expected="`train` alone",
            found=", ".join(odd),
            where=f"{config.path.name}: [data]",
            fix="Take them out: they are the owner's.",
        )
    path = config.resolve(data.train or "")
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(
            "A client's rows are in a file on its machine",
            expected=f"a file that ends in {', '.join(_SUFFIXES)}",
            found=repr(data.train),
            where=f"{config.path.name}: [data] train",
        )
    rows = _draw(load_data(path, numbers=False), data.train_limit, config.federation.seed)
    names = data.labels or []
    if data.has_classes:
        names = settled_classes(config, names)
        who = f"client {name}"
        given = partial(_given, config, {}, {})
        rows = _encode(rows, who, data.label, names, given, f"{who} ({data.train})")
    return Rows({name: rows}, None, None, None, names)


def load_test(config: Config) -> datasets.Dataset | None:
    """The owner's test set as it is, or None.

    Raises:
        FedveilError: It cannot be found.
    """
    data = config.data
    return _load_own(config, data.test, data.test_split, data.test_limit)


def _load_own(
    config: Config, source: str | None, split: str | None, limit: int | None
) -> datasets.Dataset | None:
    if source is None:
        return None
    return _draw(load_source(config, source, split), limit, config.federation.seed)


def is_file(config: Config, source: str) -> bool:
    """Whether a name in the configuration is that of a file, and not of a hub data set."""
    path = config.resolve(source)
    looks_so = path.suffix.lower() in _SUFFIXES or source.startswith((".", "/", "~"))
    return looks_so or path.exists()


def load_source(config: Config, source: str, split: str | None) -> datasets.Dataset:
    """The rows that a name in the configuration stands for.

    Raises:
        FedveilError: There are none.
    """
    where: str | Path = config.resolve(source) if is_file(config, source) else source
    words: dict[str, Any] = {"split": split} if split is not None else {}
    # One file's classes may look like numbers where another's do not.
    words["numbers"] = False
    if where is source:
        words.update(config=config.data.variant, revision=config.data.revision)
    return load_data(where, **words)


def _draw(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    # Files are often sorted by class, so the first rows would not do.
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(limit), keep_in_memory=True)


class _Given(NamedTuple):
    """Where the classes of a federation come from, and some of them as they stand there."""

    place: str
    names: Sequence[str]
    listed: bool


def _places(config: Config, parts: Collection[str]) -> dict[str, str]:
    """Whose rows are where, for people: all that :func:`load_rows` loads."""
    data = config.data
    sources: dict[str, str | None] = {_TEST: data.test, _OWNER: data.owner, _TUNED: data.tuned}
    sources |= dict(zip(parts, config.clients.values() or [data.train], strict=False))
    if config.is_rehearsal:  # whose files are copies
        return {who: who for who in sources}
    return {who: f"{who} ({source})" for who, source in sources.items()}


def _given(
    config: Config, parts: Mapping[str, datasets.Dataset], places: Mapping[str, str]
) -> _Given | None:
    """Where classes come from: the file's list, else whoever's rows are first; None if no one's."""
    data = config.data
    if data.labels is not None:
        return _Given("`labels` in [data]", data.labels, listed=True)
    for who, rows in parts.items():
        return _Given(places[who], _names(rows, who, data.label), listed=False)
    return None


def class_names(
    parts: Mapping[str, datasets.Dataset],
    label: str,
    num_labels: int | None,
    places: Mapping[str, str] | None = None,
) -> list[str]:
    """The classes of all clients together, numbers in the order of numbers.

    Args:
        parts: Rows, by whose they are.
        label: The column of classes.
        num_labels: How many classes the model has, if the file says.
        places: What errors call those whose rows they are, if it is something else.

    Raises:
        DataError: There is no such column, or it names no classes; the error says whose it is. Or
            some write numbers, and others names.
    """
    found = {who: _names(rows, who, label) for who, rows in parts.items()}
    known = [_Given((places or {}).get(who, who), names, False) for who, names in found.items()]
    # Where one has both, both are classes: "1", "2" and "other".
    for other in known[1:] if all(_kind(one.names) for one in known) else ():
        if (error := _mixture(known[0], other, label)) is not None:
            raise error
    first, *others = found.values()
    union = in_order({name for names in found.values() for name in names})
    if not all(map(is_whole_number, union)):
        _tell_of_likes(union, label)
        return first if all(names == first for names in others) else union
    numbers = [str(number) for number in range(num_labels or 0)]
    # Classes that are numbered already keep their numbers, also where one has no rows.
    return numbers if set(union) <= set(numbers) else union


def _tell_of_likes(names: Sequence[str], label: str) -> None:
    """Warn of classes that are hardly meant to be several: "1" and "01", "yes" and "Yes "."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_gist(name), []).append(name)
    alike = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if alike:
        more = f", and {len(alike) - 3} more" if len(alike) > 3 else ""
        warnings.warn(
            f'Classes in column "{label}" differ only in how they are written, and are told '
            f"apart: {', '.join(alike[:3])}{more}. If they are one, write them alike in all files.",
            FedveilWarning,
            stacklevel=2,
        )


def _gist(name: str) -> str:
    """What a name of a class says, however it is written."""
    plain = unicodedata.normalize("NFKC", name).strip().casefold()
    number = _number(plain)
    return plain if number is None else str(number)


def _number(plain: str) -> Decimal | None:
    """The number that a text can be read as, in its plainest form; None if it can be as none."""
    with suppress(ArithmeticError):
        number = Decimal(plain)
        if number.is_finite():
            return number.normalize()
    return None


def _names(rows: datasets.Dataset, who: str, label: str) -> list[str]:
    try:
        return encode_labels(rows, label)[1]
    except DataError as error:
        raise _blame(who, error) from error


def _encode(
    rows: datasets.Dataset,
    who: str,
    label: str,
    names: Sequence[str],
    given: Callable[[], _Given | None],
    place: str,
) -> datasets.Dataset:
    try:
        return encode_labels(rows, label, names=names)[0]
    except DataError as error:
        if error.problem.startswith(_UNKNOWN) and (source := given()) is not None:
            here = _Given(place, _names(rows, who, label), listed=False)
            if (mixture := _mixture(source, here, label)) is not None:
                raise mixture from error
        raise _blame(who, error) from error


def _mixture(one: _Given, other: _Given, label: str) -> DataError | None:
    """The error for classes that are numbers here and names there; None if they are not."""
    kinds = [_kind(given.names) for given in (one, other)]
    if None in kinds or kinds[0] == kinds[1]:
        return None
    found = " and ".join(
        f"{kind} such as {given.names[0]!r} in {given.place}"
        for kind, given in zip(kinds, (one, other), strict=True)
    )
    if one.listed:
        fix = (
            "Write `labels` as the rows do, class for class in the same order, or the rows as they."
        )
    else:
        fix = (
            "Write the same in all of them. If all are classes of their own, list them in `labels` "
            "in [data]; a model that names its classes then needs `new_head = true`."
        )
    return DataError(
        "Labels are numbers in one place, and names in another",
        expected="the same in all: numbers, or names",
        found=found,
        where=f'column "{label}"',
        fix=fix,
    )


def _kind(names: Sequence[str]) -> str | None:
    """Whether classes are numbers or names; None if there are both, or some like "01" or "1.0"."""
    if names and all(map(is_whole_number, names)):
        return "numbers"
    return None if any(_number(name) is not None for name in names) or not names else "names"


def _blame(who: str, error: DataError) -> DataError:
    fix = None
    if error.problem.startswith(_UNKNOWN):
        fix = (
            "Classes are taken as they are written, and are those of the training rows; `labels` "
            "in [data] may name others."
        )
    return error.within(who, fix=fix)


def _divide(config: Config, rows: datasets.Dataset) -> Mapping[str, datasets.Dataset]:
    table = config.partition
    assert table is not None
    return partition(
        rows,
        table.clients,
        how=table.how,
        alpha=table.alpha,
        column=table.column or config.data.label,
        min_size=table.min_size,
        seed=config.federation.seed if table.seed is None else table.seed,
    )
