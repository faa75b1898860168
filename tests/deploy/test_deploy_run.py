"""A deployment at work: the two programs that Flower starts, on a grid in this process."""

import datasets
import pytest
from cryptography.hazmat.primitives import serialization

import toys
from fedveil.config import build, load_config
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.checking import Survey
from fedveil.errors import ConfigurationError
from fedveil.flower import apps
from fedveil.shards import open_shards
from grids import LocalGrid, Node, bytes_of

NAMES = ("clinic-1", "clinic-2")


def put(path, seed):
    rows = [{"image": r["image"].tolist(), "label": r["label"]} for r in toys.rows(12, seed=seed)]
    datasets.Dataset.from_list(rows).to_parquet(path)


def pem(path):
    key = serialization.load_ssh_public_key(path.read_bytes())
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture
def grid(folder):
    """A node for each client, as its SuperNode would be, and one of a stranger."""
    config = load_config(folder / "federation.toml")
    write_deployment(config, Address("127.0.0.1"), folder / "deployment")
    nodes = {}
    for number, name in enumerate(NAMES):
        own = folder / "deployment" / name / "partner.toml"
        put(own.parent / "data.parquet", number)
        own.write_text(own.read_text().replace("data.csv", "data.parquet"))
        Survey.of(load_config(own)).approve()
        key = pem(folder / "deployment" / "owner" / "keys" / f"{name}.pub")
        nodes[10 + number] = Node(apps.client, key, {"fedveil": str(own)})
    nodes[99] = Node(None, b"a stranger's key")
    return LocalGrid(nodes)


def test_the_model_is_that_of_fedveil_run_bit_for_bit(folder, grid, capsys):
    found = apps.run(load_config(folder / "federation.toml").change(rounds=5), grid)
    text = (folder / "federation.toml").read_text().split("[partners]")[0]
    files = "".join(f'{n} = "deployment/{n}/data.parquet"\n' for n in NAMES)
    (folder / "local.toml").write_text(f"{text}[clients]\n{files}")
    expected = build(load_config(folder / "local.toml")).run(5)
    assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
    saved = open_shards(folder / "runs" / "federation" / "model")
    assert toys.same(dict(saved), toys.weights(expected.global_model))
    told = capsys.readouterr().out
    assert "round 5/5: 2 of 2 clients" in told
    assert "your tuned model" in told


def test_a_finished_run_sends_nothing_more(folder, grid):
    apps.run(load_config(folder / "federation.toml"), grid)
    sent = len(grid.sent)
    apps.run(load_config(folder / "federation.toml"), grid)
    assert len(grid.sent) == sent


def test_no_byte_that_leaves_the_owners_program_is_of_a_model(folder, grid):
    config = load_config(folder / "federation.toml")
    models = [build(config).model]
    models += [apps.run(config.change(rounds=rounds), grid).global_model for rounds in (1, 2, 3)]
    sent = b"".join(bytes_of(message) for message in grid.sent)
    for model in models:
        rows = toys.weights(model)["1.weight"]
        assert len(rows) > 100
        assert all(row.numpy().tobytes() not in sent for row in rows)
    secret = config.secret_path.read_text().strip()
    assert all(word not in sent for word in (secret.encode(), bytes.fromhex(secret)))
    assert {message.metadata.dst_node_id for message in grid.sent} == {10, 11}
    assert {message.metadata.message_type for message in grid.sent} == {"train"}


def test_without_its_variable_the_owners_program_says_what_it_needs(monkeypatch, grid):
    monkeypatch.delenv(apps.FEDERATION, raising=False)
    with pytest.raises(ConfigurationError, match=apps.FEDERATION):
        apps.server(grid, None)  # type: ignore[arg-type]


def test_a_key_that_is_missing_is_named(folder, grid):
    (folder / "deployment" / "owner" / "keys" / "clinic-1.pub").unlink()
    with pytest.raises(ConfigurationError, match=r"clinic-1\.pub"):
        apps.run(load_config(folder / "federation.toml"), grid)
