import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.errors import ConfigurationError, DataError
from fedveil.hub import partition

CLASSES = 4


def numbered(rows):
    return datasets.Dataset.from_dict({
        "id": list(range(rows)),
        "label": [number % CLASSES for number in range(rows)],
        "site": [f"site {number % 3}" for number in range(rows)],
    })  # fmt: skip


def ids(shares):
    return {name: list(share["id"]) for name, share in shares.items()}


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(40, 200),
    clients=st.integers(1, 6),
    how=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_goes_to_exactly_one_client(rows, clients, how, seed):
    shares = partition(numbered(rows), clients, how=how, alpha=5, seed=seed)
    together = [row for share in ids(shares).values() for row in share]
    assert sorted(together) == list(range(rows))
    assert len(shares) == clients
    assert min(len(share) for share in shares.values()) >= 2


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_the_seed_decides(how):
    first, again, other = (
        ids(partition(numbered(100), 4, how=how, alpha=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_iid_shares_are_equal_and_mixed():
    shares = partition(numbered(103), 4)
    assert list(shares) == ["client-00", "client-01", "client-02", "client-03"]
    assert sorted(len(share) for share in shares.values()) == [25, 26, 26, 26]
    assert all(set(share["label"]) == set(range(CLASSES)) for share in shares.values())
    assert all(list(share["id"]) != sorted(share["id"]) for share in shares.values())


def test_small_alpha_skews_and_large_alpha_does_not():
    def largest_class(alpha):
        shares = partition(numbered(2000), 5, how="dirichlet", alpha=alpha, seed=3)
        tops = []
        for share in shares.values():
            labels = list(share["label"])
            tops.append(max(map(labels.count, set(labels))) / len(labels))
        return sum(tops) / len(tops)

    assert largest_class(0.1) > 0.6
    assert largest_class(1000) < 0.3


def test_one_client_per_value_of_a_column():
    shares = partition(numbered(30), how="column", column="site")
    assert list(shares) == ["site-0", "site-1", "site-2"]
    assert all(set(share["site"]) == {name.replace("-", " ")} for name, share in shares.items())
    assert partition(numbered(30), 3, how="column", column="site").keys() == shares.keys()


def test_a_column_of_class_labels_gives_their_names():
    data = numbered(12).cast_column("label", datasets.ClassLabel(names=["d", "c", "b", "a"]))
    shares = partition(data, how="column")
    assert {name: set(share["label"]) for name, share in shares.items()} == {
        "d": {0}, "c": {1}, "b": {2}, "a": {3},
    }  # fmt: skip


def test_client_names_are_safe_and_distinct():
    paths = datasets.Dataset.from_dict({"who": ["../Ünï/x y"] * 2 + [""] * 2})
    assert set(partition(paths, how="column", column="who")) == {"n-x-y", "client"}
    clash = datasets.Dataset.from_dict({"who": ["a b", "a b", "a/b", "a/b"]})
    with pytest.raises(DataError, match=r"same client name.*'a b', 'a/b'"):
        partition(clash, how="column", column="who")


def test_more_than_a_hundred_clients_still_sort():
    names = list(partition(numbered(202), 101))
    assert names == sorted(names)
    assert names[-1] == "client-100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 21}, "at least 2 each, found 40 rows for 21 clients"),
        ({"clients": 4, "how": "dirichlet", "alpha": 1e-3}, "no division.*alpha=0.001"),
        ({"clients": 4, "how": "dirichlet", "column": "klass"}, "no column 'klass'.*'id', 'label'"),
        ({"how": "column", "column": "klass"}, "no column 'klass'"),
        ({"how": "column", "column": "id"}, "too few rows.*found 1 for '0'"),
    ],
)
def test_data_that_cannot_be_divided(arguments, message):
    with pytest.raises(DataError, match=message):
        partition(numbered(40), **arguments)


def test_rows_without_a_class():
    gaps = datasets.Dataset.from_dict({"label": ["a", None] * 5})
    with pytest.raises(DataError, match="row 1"):
        partition(gaps, 2, how="dirichlet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 0}, "clients"),
        ({}, "clients is impossible"),
        ({"clients": 2, "how": "random"}, "how"),
        ({"clients": 2, "how": "dirichlet", "alpha": 0}, "alpha"),
        ({"clients": 2, "min_size": 0}, "min_size"),
        ({"clients": 2, "how": "column", "column": "site"}, "expected 3, or None, found 2"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        partition(numbered(40), **arguments)


@pytest.mark.parametrize("how", ["iid", "dirichlet", "column"])
def test_it_is_quiet_and_restores_the_callers_choice(how, capfd):
    clients = None if how == "column" else 3
    partition(numbered(100), clients, how=how, alpha=5, column="label")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
