import datasets
import pytest

from fedveil.errors import DataError
from fedveil.hub import encode_labels


def data(labels):
    return datasets.Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})


def test_strings_are_numbered_in_order(capfd):
    encoded, names = encode_labels(data(["tech", "art", "tech"]))
    assert names == ["art", "tech"]
    assert list(encoded["label"]) == [1, 0, 1]
    assert encoded.features["label"].names == names
    assert list(encoded["text"]) == ["x"] * 3
    assert capfd.readouterr() == ("", "")


def test_numbers_are_sorted_as_numbers():
    encoded, names = encode_labels(data([10, 2, 10]))
    assert names == ["2", "10"]
    assert list(encoded["label"]) == [1, 0, 1]


def test_class_labels_stay():
    original, names = encode_labels(data(["b", "a"]))
    again, same = encode_labels(original)
    assert again is original
    assert same == names


def test_given_names_decide_the_numbers():
    names = ["tech", "art", "sport"]
    encoded, returned = encode_labels(data(["art", "art"]), names=names)
    assert returned == names
    assert list(encoded["label"]) == [1, 1]
    # Also for a client whose own numbering was another.
    own, _ = encode_labels(data(["sport", "art"]))
    assert list(own["label"]) == [1, 0]
    assert list(encode_labels(own, names=names)[0]["label"]) == [2, 1]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", None], {}, "first in row 1"),
        (["a"], {"column": "klass"}, "no column 'klass'"),
        ([0.5, 1.0], {}, "strings or whole numbers"),
        (["a", "z"], {"names": ["a", "b"]}, "expected 'a', 'b', found 'z'"),
    ],
)
def test_columns_that_do_not_serve(labels, options, message):
    with pytest.raises(DataError, match=message):
        encode_labels(data(labels), **options)


@pytest.mark.parametrize("labels", [[[1], [2]], [{"a": 1}, {"a": 2}], [["x"], []]], ids=str)
def test_lists_and_tables_name_no_classes(labels):
    with pytest.raises(DataError, match=r'names no classes \(in column "label"\)'):
        encode_labels(data(labels))
