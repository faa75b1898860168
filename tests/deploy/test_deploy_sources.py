"""A client's file makes its machine load the client's own rows from one file, and nothing else."""

import os
import pickle

import pytest

from fedveil import ConfigurationError, DataError
from fedveil.config import load_config
from fedveil.config.sources import load_rows
from fedveil.hub import load_data

FILE = """
[partner]
name = "clinic-1"
[model]
name = "architecture"
[data]
task = "text-classification"
labels = ["x", "y"]
{keys}
"""


class Canary:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A client's folder, in which the client stands, with pickles of the owner's."""
    (tmp_path / "mine.csv").write_text("text,label\nhello,x\nworld,y\n")
    for name in ("test.pkl", "train.pkl", "validation.pkl", "data.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Canary()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder, keys):
    (folder / "partner.toml").write_text(FILE.format(keys=keys))
    return load_rows(load_config(folder / "partner.toml"))


def test_its_own_file_is_loaded(folder):
    rows = load(folder, 'train = "mine.csv"')
    assert rows.clients["clinic-1"]["label"] == [0, 1]
    assert (rows.test, rows.owner, rows.tuned) == (None, None, None)


@pytest.mark.parametrize("reader", ["pandas", "arrow", "text", "csv", "json", "parquet", "pickle"])
@pytest.mark.parametrize("key", ["test", "owner", "tuned"])
def test_nothing_of_the_owners_is(key, reader, folder):
    more = "\n[tuning]" if key == "tuned" else ""
    with pytest.raises(ConfigurationError):
        load(folder, f'train = "mine.csv"\n{key} = "{reader}"\n{key}_split = "test"{more}')
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize(
    "source", ["pandas", "owner/set", "test.pkl", "data.pt", "mine", ".", "/etc", "rows.arrow"]
)
def test_nor_anything_but_a_file_of_rows(source, folder):
    with pytest.raises(ConfigurationError, match="in a file on its machine"):
        load(folder, f'train = "{source}"')
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize("keys", ['train_split = "test"', 'variant = "v"', 'revision = "r"'])
def test_nor_a_part_of_a_set_on_a_hub(keys, folder):
    with pytest.raises(ConfigurationError, match="nothing else"):
        load(folder, f'train = "mine.csv"\n{keys}')


@pytest.mark.parametrize("name", ["pandas", "arrow", "text", "generator", "imagefolder", "sql"])
def test_no_name_of_a_reader_passes_for_a_data_set(name, folder):
    """Also at the owner's: the library would read, and unpickle, what lies in the folder."""
    with pytest.raises(DataError, match="neither a file nor"):
        load_data(name, split="test")
    assert not (folder / "unpickled").exists()
