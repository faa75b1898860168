"""One door for data: a file of rows, or the name of a data set on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedveil.errors import ConfigurationError, DataError
from fedveil.hub.csv_files import read_csv
from fedveil.hub.library import library, quiet

if TYPE_CHECKING:
    import datasets

__all__ = ["load_data"]


def load_data(
    source: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    numbers: bool = True,
) -> datasets.Dataset:
    """Load rows from a file or from the hub.

    A file is read into memory: unlike the libraries' own readers this leaves no copy of private
    rows in a cache folder. In csv files every value is text as it stands ("007", "1e5", "NA"), and
    an empty cell is a missing value.

    Args:
        source: A .csv, .json (a list of records), .jsonl or .parquet file; or a hub name such as
            "owner/name". A Path, a known suffix, or anything that exists is taken for a file.
        split: Which part of a hub data set, such as "train" or "train[:10%]". A file has only one.
        config: Which variant of a hub data set, such as "sst2" of "nyu-mll/glue".
        revision: Which branch, tag or commit of a hub data set; its newest by default.
        numbers: Whether a column of a csv file that is nothing but whole numbers, written as they
            usually are, becomes one of numbers. False where its texts or classes may look so.

    Raises:
        DataError: The file is missing, of another kind, empty or broken, or a row of it has more or
            fewer values than there are columns; or the hub has no such data set or cannot be
            reached.
        ConfigurationError: One of the three was given for a file, or the `hf` extra is missing.
    """
    path = Path(source)
    is_file = isinstance(source, Path) or path.suffix.lower() in _READERS or path.exists()
    if is_file and (split != "train" or config is not None or revision is not None):
        raise ConfigurationError(
            "a file has no splits or variants to choose from",
            found=f"split={split!r}, config={config!r}, revision={revision!r}",
            where=str(source),
            fix="Leave them out, and keep each split in a file of its own.",
        )
    with quiet():
        dataset = (
            _from_file(path, numbers)
            if is_file
            else _from_hub(str(source), split, config, revision)
        )
    if len(dataset) == 0:
        raise DataError(
            "the data set is empty",
            expected="at least one row",
            found="0 rows",
            where=str(source),
            fix="Leave whoever has no rows out, or name another file or split.",
        )
    return dataset


def _from_file(path: Path, numbers: bool) -> datasets.Dataset:
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        raise _no_file(path)
    if reader is None:
        raise DataError(
            "this kind of file is not known",
            expected=", ".join(_READERS),
            found=path.suffix or "no suffix",
            where=str(path),
            fix="Convert it; pandas reads most formats.",
        )
    try:
        return reader(path, numbers)
    except DataError:
        raise
    # RecursionError: JSON that is nested without end.
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            "the file cannot be read", found=_first_line(error), where=str(path)
        ) from error


def _from_hub(name: str, split: str, config: str | None, revision: str | None) -> datasets.Dataset:
    if "/" not in name:
        # To the library such a name may be one of its own readers ("pandas", "arrow"), which takes
        # whatever lies in the current folder, and unpickles it.
        raise DataError(
            "This is neither a file nor the name of a hub data set",
            expected='a file with a suffix, or "owner/name"',
            found=repr(name)[:80],
            fix="Data sets of the hub have the name of their owner before their own.",
        )
    try:
        return library("datasets").load_dataset(name, config, split=split, revision=revision)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            "the hub data set is made by a program, which is not run",
            where=name,
            fix='Read the hub\'s own copy of its rows: revision="refs/convert/parquet". That has '
            "no other variants than those it shows.",
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            "the hub data set cannot be loaded",
            found=_first_line(error),
            where=name,
            fix="Check the name, split and config. Without a network name a local file, or a data "
            "set loaded before, with HF_HUB_OFFLINE=1 to skip the waiting.",
        ) from error


def _no_file(path: Path) -> DataError:
    if path.is_dir():
        return DataError("a folder is no data set", expected="a file", where=str(path))
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    fix = f"Did you mean {str(folder / near[0])!r}?" if near else f"Look in {folder.absolute()}."
    return DataError("there is no such file", where=str(path), fix=fix)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(".: ")


def _read_csv(path: Path, numbers: bool) -> datasets.Dataset:
    return read_csv(path, numbers=numbers)


def _read_json(path: Path, numbers: bool) -> datasets.Dataset:
    # Not with pandas, which guesses at dates and so would change texts.
    twice: list[_Twice] = []
    decoder = json.JSONDecoder(object_pairs_hook=partial(_record, twice))
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".jsonl":
            records = _from_lines(path, file, decoder, twice)
        else:
            records = decoder.decode(file.read())
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        raise ValueError("not a list of records")
    if twice:
        row = next(number for number, one in enumerate(records) if _holds(one, twice[0].record))
        raise _key_twice(f"{path}, row {row}", twice[0].key)
    # Dataset.from_list would drop every column that the first record lacks.
    names = dict.fromkeys(name for row in records for name in row)
    columns = {name: [row.get(name) for row in records] for name in names}
    _check_types(path, columns)
    return library("datasets").Dataset.from_dict(columns)


class _Twice(NamedTuple):
    """A record in which a key stands twice."""

    record: dict[str, object]
    key: str


def _record(twice: list[_Twice], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A record of JSON. One with a key twice is noted: Python keeps the last of its values."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice.append(_Twice(record, next(name for name in names if names.count(name) > 1)))
    return record


def _from_lines(
    path: Path, file: Iterable[str], decoder: json.JSONDecoder, twice: list[_Twice]
) -> list[Any]:
    records = []
    for number, line in enumerate(file, start=1):
        if line.strip():
            records.append(decoder.decode(line))
        if twice:
            raise _key_twice(f"{path}, line {number}", twice[0].key)
    return records


def _holds(value: object, record: dict[str, object]) -> bool:
    """Whether a value of JSON is a record, this very one, or has it inside."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one is record:
            return True
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return False


def _key_twice(where: str, key: str) -> DataError:
    return DataError(
        "the file cannot be read: a record has a key twice",
        expected="each key once in a record",
        found=repr(key)[:80],
        where=where,
        fix="Rename or remove one of them: which of the values is meant would be a guess.",
    )


def _check_types(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Refuse a column that no table could hold, and say which."""
    for name, values in columns.items():
        kinds = {type(value).__name__ for value in values if value is not None}
        large = next((v for v in values if type(v) is int and v.bit_length() > 63), None)
        if len(kinds) > 1 and kinds != {"int", "float"}:
            found = " and ".join(sorted(kinds))
        elif large is not None:
            found = f"{str(large)[:40]}, of more than 64 bits"
        else:
            continue
        raise DataError(
            "the file cannot be read: a column holds what does not go together",
            expected="values of one type; whole numbers of at most 64 bits",
            found=found,
            where=f'{path}, column "{name}"',
            fix="Write all of it as texts, in quotation marks.",
        )


def _read_parquet(path: Path, numbers: bool) -> datasets.Dataset:
    table = library("pyarrow.parquet").read_table(path)
    return library("datasets").Dataset(table)


_READERS: dict[str, Callable[[Path, bool], datasets.Dataset]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
