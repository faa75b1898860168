"""Comma-separated files, read as they stand: no value, column or row is guessed."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedveil.errors import DataError
from fedveil.hub.labels import is_whole_number
from fedveil.hub.library import library

if TYPE_CHECKING:
    import datasets

__all__ = ["read_csv"]

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as that of UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_INT64 = range(-(2**63), 2**63)
_LONGEST = len(str(-(2**63)))


class _Lines(Protocol):
    """A reader of the csv library."""

    @property
    def line_num(self) -> int:
        """Lines that have been read."""

    def __next__(self) -> list[str]: ...


def read_csv(path: Path, *, numbers: bool) -> datasets.Dataset:
    """The rows of a file in UTF-8 (with or without a mark at its start) with a header.

    Every cell is text as it stands, and an empty one is missing. Lines without anything are no
    rows. A column without a name, such as one after a last comma, is none if nothing is in it.

    Args:
        path: Of the file.
        numbers: Make a column int64 if all of it are whole numbers, written as they usually are:
            "1", not "01", "+1", "1.0" or one of more than 64 bits. What was written can be told
            from these numbers, so nothing is lost.

    Raises:
        DataError: It is no such file; the error names the row.
        OSError: It cannot be read.
    """
    _check_encoding(path)
    with _long_cells(), path.open(encoding="utf-8-sig", newline="") as file:
        try:
            names, columns = _read(path, csv.reader(file, strict=True))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
    kinds = ["int64" if numbers and _are_numbers(column) else "string" for column in columns]
    data = library("datasets")
    return data.Dataset.from_dict(
        {
            name: _as_numbers(column) if kind == "int64" else column
            for name, column, kind in zip(names, columns, kinds, strict=True)
        },
        features=data.Features(
            {name: data.Value(kind) for name, kind in zip(names, kinds, strict=True)}
        ),
    )


def _read(path: Path, lines: _Lines) -> tuple[list[str], list[list[str | None]]]:
    """Names of columns, and the columns."""
    header = next(_rows(path, lines), None)
    if header is None:
        raise DataError(
            "the file cannot be read: it is empty",
            expected="a line with the names of columns, and rows below it",
            found="nothing",
            where=str(path),
        )
    names = header[1]
    _check_header(path, names)
    named = [place for place, name in enumerate(names) if name.strip()]
    # What a row lacks of nameless columns at the end is nothing.
    lengths = range(max(named, default=0) + 1, len(names) + 1)
    columns: list[list[str | None]] = [[] for _ in named]
    for number, (line, row) in enumerate(_rows(path, lines)):
        if len(row) not in lengths:
            raise _odd_row(path, number, line, row, names)
        if len(named) < len(names):
            _check_nameless(path, line, row, names)
        for column, place in zip(columns, named, strict=True):
            column.append(row[place] or None)
    return [names[place] for place in named], columns


def _rows(path: Path, lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold anything, each with the line that it begins in, from 1."""
    while True:
        begins = lines.line_num + 1
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise _bad_quotes(path, begins, error) from error
        if any("\0" in cell for cell in row):
            raise DataError(
                "the file cannot be read: it holds a character that no text has",
                expected="a text file in UTF-8",
                found="NUL",
                where=f"{path}, line {begins}",
                fix="If it is in UTF-16, or no text file at all, convert it.",
            )
        if row:
            yield begins, row


def _check_header(path: Path, names: Sequence[str]) -> None:
    if len(names) == 1:
        for sign, word in _SEPARATORS.items():
            if sign in names[0]:
                raise DataError(
                    "the file cannot be read: its values are not separated by commas",
                    expected="commas",
                    found=f"one column named {names[0][:80]!r}, which looks like {word}",
                    where=str(path),
                    fix="Save it as comma-separated values.",
                )
    twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
    if twice:
        raise DataError(
            "the file cannot be read: two of its columns have one name",
            expected="a name of its own for each column",
            found=", ".join(repr(name)[:80] for name in twice),
            where=f"{path}, its first line",
            fix="Rename or remove one of them.",
        )


def _check_nameless(path: Path, line: int, row: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a cell with something in it whose column has no name."""
    for place, (name, cell) in enumerate(zip(names, row, strict=False)):
        if cell.strip() and not name.strip():
            raise DataError(
                "the file cannot be read: a column without a name has something in it",
                expected=f"a name in the first line for column {place + 1} of {len(names)}",
                found=repr(cell)[:80],
                where=f"{path}, line {line}, column {place + 1}",
                fix="Name or remove it. pandas writes such a column of row numbers unless it is "
                "told to_csv(..., index=False).",
            )


def _odd_row(
    path: Path, number: int, line: int, row: Sequence[str], names: Sequence[str]
) -> DataError:
    more = len(row) > len(names)
    return DataError(
        f"a row has {'more' if more else 'fewer'} values than the file has columns",
        expected=f"{len(names)}: {', '.join(map(repr, islice(names, 8)))}"[:200],
        found=f"{len(row)}",
        where=f"{path}, row {number} (line {line})",
        fix="A value with a comma in it stands in quotation marks."
        if more
        else "A missing value still has its comma.",
    )


def _bad_quotes(path: Path, line: int, error: csv.Error) -> DataError:
    ended = "unexpected end" in str(error)
    return DataError(
        "the file cannot be read: its quotation marks do not fit together",
        expected="marks around a whole value, and those inside it doubled",
        found="one that is never closed" if ended else str(error),
        where=f"{path}, the row that begins in line {line}",
        fix="The mark may also stand in a row before that one.",
    )


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise DataError(
                "the file cannot be read: it is in another encoding",
                expected="UTF-8",
                found=name,
                where=str(path),
                fix=f"Save it as UTF-8, or: iconv -f {name} -t UTF-8 OLD > NEW",
            )


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    """Readers are ahead of the row that they have come to: look for the line."""
    line = 0
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):  # noqa: B007
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as found:
                error = found
                break
    return DataError(
        "the file cannot be read: it is in another encoding",
        expected="UTF-8",
        found=f"UnicodeDecodeError: byte 0x{error.object[error.start]:02x}",
        where=f"{path}, line {line}",
        fix="Save it as UTF-8; most tables that are not are in Latin-1: "
        "iconv -f LATIN1 -t UTF-8 OLD > NEW",
    )


@contextmanager
def _long_cells() -> Iterator[None]:
    """A text may be longer than the 131,072 characters that the csv library takes for the most."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _are_numbers(column: Sequence[str | None]) -> bool:
    cells = [cell for cell in column if cell is not None]
    return bool(cells) and all(map(_is_int64, cells))


def _is_int64(cell: str) -> bool:
    return len(cell) <= _LONGEST and is_whole_number(cell) and int(cell) in _INT64


def _as_numbers(column: Sequence[str | None]) -> list[int | None]:
    return [None if cell is None else int(cell) for cell in column]
