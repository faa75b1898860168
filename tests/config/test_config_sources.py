"""The classes of a federation: the same, whosever file is read, and with whatever others."""

import datasets
import pytest

from fedveil.config.file import load_config
from fedveil.config.sources import load_rows
from fedveil.errors import DataError, FedveilWarning


def federation(folder, files, data="", model=""):
    """Rows of a federation whose clients have these labels, one file each."""
    lines = []
    for number, labels in enumerate(files):
        rows = "".join(f"text,{label}\n" for label in labels)
        (folder / f"{number}.csv").write_text(f"text,label\n{rows}")
        lines.append(f'c{number} = "{number}.csv"')
    (folder / "f.toml").write_text(
        f'[model]\nname = "x"\n{model}\n[data]\n{data}\n[clients]\n' + "\n".join(lines)
    )
    return load_rows(load_config(folder / "f.toml"))


def classes(rows):
    return [rows.names[number] for share in rows.clients.values() for number in share["label"]]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([["01", "02"], ["01", "A3"]], ["01", "02", "A3"]),
        ([["1", "2"], ["2", "x"]], ["1", "2", "x"]),
        ([["1.5", "2.5"], ["1.5", "high"]], ["1.5", "2.5", "high"]),
        ([["True", "False"], ["maybe", "True"]], ["False", "True", "maybe"]),
        ([["2024-01-02"], ["never"]], ["2024-01-02", "never"]),
        ([["NA", "null"], ["None", "nan"]], ["NA", "None", "nan", "null"]),
        ([["1e5"], ["x"]], ["1e5", "x"]),
        ([["10", "9"], ["2"]], ["2", "9", "10"]),
        ([["12345678901234567890"], ["5"]], ["5", "12345678901234567890"]),
    ],
)
def test_are_what_stands_in_the_files(tmp_path, files, names, recwarn):
    rows = federation(tmp_path, files)
    assert rows.names == names
    assert classes(rows) == [label for labels in files for label in labels]
    assert not [one for one in recwarn if issubclass(one.category, FedveilWarning)]


def test_whole_numbers_keep_their_meaning_where_all_files_have_them(tmp_path):
    rows = federation(tmp_path, [["2", "0"], ["0"]], model="num_labels = 4")
    assert rows.names == ["0", "1", "2", "3"]
    assert [list(share["label"]) for share in rows.clients.values()] == [[2, 0], [0]]


@pytest.mark.parametrize(
    "files", [[["1"], ["01"]], [["1.0"], ["1"]], [["true"], ["True"]], [["yes "], ["yes"]]]
)
def test_that_differ_in_their_spelling_only_are_told_apart_and_told_of(tmp_path, files):
    with pytest.warns(FedveilWarning, match="differ only in how they are written") as caught:
        rows = federation(tmp_path, files)
    assert len(rows.names) == 2
    assert all(repr(labels[0]) in str(caught[0].message) for labels in files)


def test_of_columns_with_types_are_those_of_texts(tmp_path):
    for name, value in (("int", 1), ("text", "1")):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [value, value]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "c.csv").write_text("text,label\na,1\nb,x\n")
    (tmp_path / "f.toml").write_text(
        '[model]\nname = "x"\n[data]\n[clients]\n'
        'a = "int.parquet"\nb = "text.parquet"\nc = "c.csv"\n'
    )
    rows = load_rows(load_config(tmp_path / "f.toml"))
    assert rows.names == ["1", "x"]
    assert classes(rows) == ["1"] * 5 + ["x"]


@pytest.mark.parametrize("which", ["test", "owner", "tuned"])
def test_of_the_owners_files_are_read_alike(tmp_path, which):
    (tmp_path / "own.csv").write_text("text,label\n5,02\n6,01\n")
    extra = f'{which} = "own.csv"\n' + ('owner = "0.csv"' if which == "tuned" else "")
    public = {"owner": 'public = "y"', "tuned": 'public = "y"', "test": ""}[which]
    text = f'[model]\nname = "x"\n{public}\n[data]\n{extra}\n'
    if which == "tuned":
        text += "[tuning]\nsteps = 1\n"
    (tmp_path / "0.csv").write_text("text,label\n7,01\n8,02\n9,03\n")
    (tmp_path / "f.toml").write_text(text + '[clients]\na = "0.csv"\n')
    config = load_config(tmp_path / "f.toml")
    rows = load_rows(config)
    own = getattr(rows, which)
    assert rows.names == ["01", "02", "03"]
    assert own.to_list() == [{"text": "5", "label": 1}, {"text": "6", "label": 0}]
    (tmp_path / "own.csv").write_text("text,label\n5,2\n")
    with pytest.raises(
        DataError, match=r"expected '01', '02', '03', found '2'.*as they are written"
    ):
        load_rows(config)


def test_of_a_partners_own_file_are_the_owners(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\n12,02\n13,01\n")
    (tmp_path / "partner.toml").write_text(
        '[partner]\nname = "clinic"\n[model]\nname = "x"\n'
        '[data]\ntrain = "data.csv"\nlabels = ["01", "02", "A3"]\n'
    )
    rows = load_rows(load_config(tmp_path / "partner.toml"))
    assert rows.clients["clinic"].to_list() == [
        {"text": "12", "label": 1}, {"text": "13", "label": 0},
    ]  # fmt: skip


def both_orders(one, other):
    return [pytest.param(one, other, id="numbers-names"), pytest.param(other, one, id="reversed")]


NUMBERS, NAMES = ("numbers such as '0'", ["0", "1"]), ("names such as 'art'", ["art", "tech"])


@pytest.mark.parametrize(("one", "other"), both_orders(NUMBERS, NAMES))
class TestNumbersHereAndNamesThere:
    def test_of_clients_are_refused(self, tmp_path, one, other):
        with pytest.raises(DataError, match="numbers in one place") as caught:
            federation(tmp_path, [one[1], one[1], other[1]])
        assert (
            caught.value.found
            == f"{one[0]} in client c0 (0.csv) and {other[0]} in client c2 (2.csv)"
        )
        assert "`labels` in [data]" in caught.value.fix

    @pytest.mark.parametrize("which", ["test", "owner"])
    def test_of_the_owner_are_refused(self, tmp_path, one, other, which):
        lines = "".join(f"text,{label}\n" for label in other[1])
        (tmp_path / "own.csv").write_text(f"text,label\n{lines}")
        public = 'public = "y"' if which == "owner" else ""
        with pytest.raises(DataError, match="numbers in one place") as caught:
            federation(tmp_path, [one[1]], f'{which} = "own.csv"', public)
        assert f"{one[0]} in client c0 (0.csv) and {other[0]} in the" in caught.value.found
        assert caught.value.found.endswith("(own.csv)")

    def test_of_the_list_and_the_rows_are_refused(self, tmp_path, one, other):
        with pytest.raises(DataError, match="numbers in one place") as caught:
            federation(tmp_path, [other[1]], f"labels = {one[1]}")
        assert caught.value.found == (
            f"{one[0]} in `labels` in [data] and {other[0]} in client c0 (0.csv)"
        )
        assert "`labels` as the rows do" in caught.value.fix

    def test_of_a_partner_are_refused(self, tmp_path, one, other):
        (tmp_path / "data.csv").write_text(f"text,label\na,{other[1][0]}\n")
        (tmp_path / "partner.toml").write_text(
            '[partner]\nname = "clinic"\n[model]\nname = "x"\n'
            f'[data]\ntrain = "data.csv"\nlabels = {one[1]}\n'
        )
        with pytest.raises(DataError, match=r"labels.* and .*client clinic \(data\.csv\)"):
            load_rows(load_config(tmp_path / "partner.toml"))

    def test_are_taken_if_they_are_listed(self, tmp_path, one, other):
        names = [*one[1], *other[1]]
        assert federation(tmp_path, [one[1], other[1]], f"labels = {names}").names == names

    def test_are_taken_if_a_file_has_both(self, tmp_path, one, other):
        files = [one[1], other[1], ["0", "art"]]
        assert federation(tmp_path, files).names == ["0", "1", "art", "tech"]
