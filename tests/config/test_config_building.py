import json

import pytest
import torch

from fedveil import ConfigurationError, DataError
from fedveil.config import build, load_config
from fedveil.config.sources import load_rows
from fedveil.hub.models import load_model
from fedveil.hub.names import find_function, place_of
from fedveil.hub.settings import ModelTable

pytest.importorskip("flwr_datasets")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with image rows of four clients' classes, and an own model."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_model_for_test.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build(num_labels=2):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, 300), nn.ReLU(),\n"
        "                         nn.Linear(300, num_labels))\n"
        "def fails():\n    raise RuntimeError('no luck')\n"
        "def other():\n    return 3\n"
        "def double(image):\n    return 2 * image\n"
        "number = 3\n"
    )
    return tmp_path


def write_rows(path, labels):
    rows = [{"image": [[float(n), 0.0], [0.0, 1.0]], "label": v} for n, v in enumerate(labels)]
    path.write_text(json.dumps(rows))


def config_of(home, data="", model="", rest="", clients=None):
    sources = 'train = "train.json"\n' if clients is None else ""
    text = (
        f'[model]\nname = "own_model_for_test:build"\n{model}\n'
        f'[data]\ntask = "image-classification"\n{sources}{data}\n{rest}\n'
    )
    if clients is None:
        text += "[partition]\nclients = 2\n"
    else:
        text += "[clients]\n" + "".join(f'{name} = "{name}.json"\n' for name in clients)
    (home / "f.toml").write_text(text)
    return load_config(home / "f.toml")


def test_labels_mean_the_same_for_all_clients_and_the_test_set(home):
    write_rows(home / "a.json", ["tech", "art", "tech"])
    write_rows(home / "b.json", ["sport", "sport", "sport"])
    write_rows(home / "test.json", ["sport", "art", "tech"])
    rows = load_rows(config_of(home, 'test = "test.json"', clients=["a", "b"]))
    assert rows.names == ["art", "sport", "tech"]
    assert rows.clients["a"]["label"] == [2, 0, 2]
    assert rows.clients["b"]["label"] == [1, 1, 1]
    assert rows.test is not None
    assert rows.test["label"] == [1, 0, 2]


def test_numbers_are_ordered_as_numbers(home):
    write_rows(home / "train.json", [10, 2, 1, 10, 2, 1])
    assert load_rows(config_of(home)).names == ["1", "2", "10"]


def test_numbers_keep_their_value_where_the_model_has_room(home):
    write_rows(home / "train.json", [0, 3, 0, 3, 0, 3])
    rows = load_rows(config_of(home, model="num_labels = 5"))
    assert rows.names == ["0", "1", "2", "3", "4"]
    assert sorted(v for share in rows.clients.values() for v in share["label"]) == [0] * 3 + [3] * 3


def test_given_labels_decide_the_order(home):
    write_rows(home / "train.json", ["no", "yes"] * 3)
    assert load_rows(config_of(home, 'labels = ["yes", "no"]')).names == ["yes", "no"]


def test_class_that_only_the_test_set_has(home):
    write_rows(home / "train.json", ["a", "b"] * 3)
    write_rows(home / "test.json", ["a", "c"])
    with pytest.raises(DataError, match="the test set") as caught:
        load_rows(config_of(home, 'test = "test.json"'))
    assert "'c'" in caught.value.found


def test_data_at_fault_name_their_client(home):
    write_rows(home / "a.json", ["x", "y"])
    (home / "b.json").write_text('[{"image": [[0.0]], "klass": "x"}]')
    with pytest.raises(DataError, match="client b"):
        load_rows(config_of(home, clients=["a", "b"]))


def test_limits_draw_rows_at_random_and_the_same_each_time(home):
    write_rows(home / "train.json", ["a"] * 50 + ["b"] * 50)
    write_rows(home / "test.json", ["a"] * 10 + ["b"] * 10)
    config = config_of(home, 'train_limit = 40\ntest = "test.json"\ntest_limit = 100')
    one, two = load_rows(config), load_rows(config)
    assert sum(map(len, one.clients.values())) == 40
    assert one.names == ["a", "b"]
    assert one.test is not None
    assert len(one.test) == 20
    assert one.clients["client-00"].to_dict() == two.clients["client-00"].to_dict()


def test_build_twice_gives_the_same_federation(home):
    write_rows(home / "train.json", ["a", "b"] * 6)
    config = config_of(home, 'transform = "own_model_for_test:double"')
    state = torch.get_rng_state()
    one, two = build(config).configuration(), build(config).configuration()
    assert one == two
    assert torch.equal(state, torch.get_rng_state())
    other = config.change(secret_file="other.secret")
    assert build(other).configuration()["secret"] != one["secret"]
    assert config.secret_path.stat().st_mode & 0o077 == 0


def test_text_needs_a_tokenizer(home):
    write_rows(home / "train.json", ["a", "b"] * 6)
    config = config_of(home)
    text = (home / "f.toml").read_text().replace("image-cl", "text-cl")
    (home / "f.toml").write_text(text)
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        build(load_config(config.path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_model_for_test:absent", "has no 'absent'"),
        ("own_model_for_test:number", "no function 'number'"),
        ("own_model_for_test:fails", "RuntimeError: no luck"),
        ("own_model_for_test:other", "torch.nn.Module"),
        ("absent_module:build", "cannot be imported"),
        ("./absent", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_models_that_are_none(home, name, words):
    table = ModelTable(name=name)
    with pytest.raises(ConfigurationError, match=words):
        load_model(table, "image-classification", ["a", "b"], home, seed=0)


def test_model_with_too_few_classes(home):
    table = ModelTable(name="own_model_for_test:build", num_labels=2)
    with pytest.raises(ConfigurationError, match="num_labels"):
        load_model(table, "image-classification", ["a", "b", "c"], home, seed=0)


def test_functions_and_places(home):
    assert find_function("own_model_for_test:double", home)(2) == 4
    (home / "here").mkdir()
    assert place_of("here", home) == str(home / "here")
    assert place_of("owner/name", home) == "owner/name"


def test_model_types_and_seeds(home):
    def make(seed, dtype="float32"):
        table = ModelTable(name="own_model_for_test:build", dtype=dtype)
        return load_model(table, "image-classification", ["a", "b"], home, seed=seed)

    assert torch.equal(make(1)[1].weight, make(1)[1].weight)
    assert not torch.equal(make(1)[1].weight, make(2)[1].weight)
    assert make(1, "bfloat16")[1].weight.dtype == torch.bfloat16
