"""Files of comma-separated values: nothing in them is guessed, and what is odd is named."""

import csv

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.errors import DataError
from fedveil.hub import encode_labels, load_data


def loaded(tmp_path, content, **options):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_data(path, **options)


@pytest.mark.parametrize(
    "cells",
    [
        ["01", "02"],
        ["007", "7"],
        ["1.0", "2.0"],
        ["1e5", "2"],
        ["+1", "2"],
        ["-0", "1"],
        ["true", "False"],
        ["2024-01-02", "2024-1-3"],
        ["NA", "null"],
        ["None", "nan"],
        ["inf", "-inf"],
        ["12345678901234567890", "1"],
        ["9" * 5000, "1"],
        ["1_000", "1"],
        ["١", "٢"],
        [" 1", "1 "],
        ["1,5", "2"],
        ["+49 171 5550123", "0171"],
    ],
)
def test_cells_are_texts_as_they_stand(tmp_path, cells):
    lines = "".join(f'"{cell}",x\n' for cell in cells)
    assert list(loaded(tmp_path, "a,b\n" + lines)["a"]) == cells


def test_columns_of_whole_numbers_are_numbers_unless_one_says_otherwise(tmp_path):
    content = "n,text\n1,5\n-20,\n0,7\n"
    assert loaded(tmp_path, content).to_list() == [
        {"n": 1, "text": 5}, {"n": -20, "text": None}, {"n": 0, "text": 7},
    ]  # fmt: skip
    assert loaded(tmp_path, content, numbers=False).to_list() == [
        {"n": "1", "text": "5"}, {"n": "-20", "text": None}, {"n": "0", "text": "7"},
    ]  # fmt: skip


ROWS = st.lists(
    st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 2), min_size=1
)


@given(rows=ROWS, mark=st.booleans())
def test_what_the_csv_library_writes_comes_back(tmp_path_factory, rows, mark):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("first", "second"), *rows])
    found = load_data(path, numbers=False)
    expected = [{"first": a or None, "second": b or None} for a, b in rows]
    assert found.to_list() == expected


def test_a_text_may_be_longer_than_the_csv_library_takes_by_itself(tmp_path):
    before = csv.field_size_limit()
    assert len(loaded(tmp_path, f"text,label\n{'a' * 200_000},x\n")["text"][0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "content",
    [
        "text,label,\na,b,\nc,d,\n",
        "text,label,\na,b\nc,d,\n",
        "text,label,,\na,b,,\nc,d, ,\n",
        "text, ,,label\na,,,b\nc,,,d\n",
        ",text,label\n,a,b\n,c,d\n",
    ],
)
def test_columns_without_a_name_and_anything_in_them_are_none(tmp_path, content):
    rows = loaded(tmp_path, content)
    assert rows.to_list() == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]


def test_lines_without_anything_are_no_rows(tmp_path):
    assert len(loaded(tmp_path, "text,label\r\n\r\na,b\r\n\r\n")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\nc,d,e\n", r"more values.*rows\.csv, row 1 \(line 3\).*found 3"),
        ("text,label\na,b,\n", r"more values.*row 0 \(line 2\)"),
        ('text,label\n"a\nb",x\nc\n', r"fewer values.*row 1 \(line 4\).*found 1"),
        ("text,text\na,b\n", "two of its columns have one name.*found 'text'"),
        ("text,label,,text\na,b,,\n", "two of its columns have one name.*found 'text'"),
        ("text,label,\na,b,\nc,d,e\n", r"line 3, column 3\).*column 3 of 3, found 'e'"),
        (",text,label\n0,a,b\n", r"line 2, column 1\).*found '0'.*index=False"),
        ("text, ,,label\na,,1,b\n", r"without a name.*line 2, column 3\)"),
        ("text,,label\na,\n", r"fewer values.*row 0 \(line 2\)"),
        ("text,label,\na,b,,\n", r"more values.*row 0 \(line 2\)"),
        (",\na,b\n", r"without a name.*line 2, column 1"),
        ("text;label\na;b\n", "not separated by commas.*semicolons"),
        ("text\tlabel\na, b\tc\n", "not separated by commas.*tabs"),
        ('text,label\na,b\n"c,d\ne,f\n', "line 3.*never closed"),
        ('text,label\n"a" b,c\n', "line 2"),
        ('text,label\n"say \\"no\\"",c\n', "line 2"),
        ("text,label\na\0b,c\n", r"line 2.*NUL"),
        ("text,label\na,b\n".encode("utf-16"), "found UTF-16.*iconv -f UTF-16"),
        ("text,label\na,b\n".encode("utf-16-le"), "NUL"),
        ("text,label\na,b\n".encode("utf-32"), "found UTF-32"),
        ("text,label\na,b\ncafé,b\n".encode("latin-1"), r"line 3.*found UnicodeDecodeError.*0xe9"),
        (b"", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"text,label", "data set is empty.*found 0 rows"),
    ],
)
def test_files_that_are_odd_are_named_and_where(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        loaded(tmp_path, content)
    assert "rows.csv" in str(caught.value)
    assert caught.value.fix or "empty" in caught.value.problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"n": 12345678901234567890123}]',
            '"n".*found 12345678901234567890123, of more than 64 bits',
        ),
        ('[{"label": 1}, {"label": "01"}]', "found int and str"),
        ('[{"label": true}, {"label": "no"}]', "found bool and str"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_records_that_no_table_holds(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"x": 1}, {"x": 1, "y": 2, "x": 1}]', r"a\.json, row 1\).*found 'x'"),
        ("a.jsonl", '{"x": 1}\n\n{"y": 1, "y": 2}\n', r"a\.jsonl, line 3\).*found 'y'"),
        ("a.json", '[{"m": []}, {"m": [{"role": 1, "role": 2}]}]', r"row 1\).*found 'role'"),
        ("a.jsonl", '{"m": [{"n": {"role": 1, "role": 2}}]}', r"line 1\).*found 'role'"),
        ("a.json", '[{"x": 1, "\\u0078": 2}]', r"row 0\).*found 'x'"),
    ],
)
def test_records_with_a_key_twice_are_refused_and_both_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_records_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert load_data(tmp_path / "rows.json").to_list() == [{"a": 1}]


def test_classes_that_are_whole_numbers_are_in_their_order_whatever_their_type():
    texts = datasets.Dataset.from_dict({"label": ["10", "-3", "9", "-20"]})
    numbers = datasets.Dataset.from_dict({"label": [10, -3, 9, -20]})
    for rows in (texts, numbers):
        encoded, names = encode_labels(rows)
        assert names == ["-20", "-3", "9", "10"]
        assert list(encoded["label"]) == [3, 1, 2, 0]
    assert encode_labels(datasets.Dataset.from_dict({"label": ["10", "9", "09"]}))[1] == [
        "09", "10", "9",
    ]  # fmt: skip


def test_rows_without_a_label_do_not_get_the_last_class():
    feature = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"label": [-1, 0]}, features=feature)
    with pytest.raises(DataError, match="rows lack a label"):
        encode_labels(rows, names=["b", "a"])
