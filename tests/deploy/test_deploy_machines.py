"""A deployment at work: a SuperLink, three SuperNodes, TLS and keys, in processes of their own."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from deploy_machines import Machines, free_port

import toys
from fedveil.config import build, load_config
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.keys import write_node_key
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.errors import TrainingError
from fedveil.hub import bbc_news, minilm_folder
from fedveil.shards import open_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc"),
]

NAMES = ("clinic-1", "clinic-2", "clinic-3")
TABLES = """
[model]
name = "model"
num_labels = 5
[training]
steps = 2
batch_size = 4
[federation]
rounds = 3
"""
DATA = """
[data]
task = "text-classification"
labels = ["business", "entertainment", "politics", "sports", "tech"]
max_length = 32
"""
PARTNERS = """
[partners]
names = ["clinic-1", "clinic-2", "clinic-3"]
deadline = 100
quorum = 2
give_up = 200
"""


@pytest.fixture
def machines(tmp_path):
    """An owner's and three clients' folders, ready to be started."""
    write_files(tmp_path)
    config = load_config(tmp_path / "federation.toml")
    write_deployment(config, Address("127.0.0.1", free_port()), tmp_path / "deployment")
    for name in NAMES:
        rows = (tmp_path / f"{name}.csv").read_text()
        (tmp_path / "deployment" / name / "data.csv").write_text(rows)
    machines = Machines(tmp_path)
    yield machines
    machines.close()


def write_files(folder):
    """The demo's task on a small model."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, num_labels=5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = bbc_news().shuffle(seed=1)
    for number, name in enumerate(("test", *NAMES)):
        table = rows.select(range(12 * number, 12 * number + 12)).to_pandas()
        table["label"] = rows.features["label"].int2str(table["label"].tolist())
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "federation.toml").write_text(f'{TABLES}{DATA}test = "test.csv"{PARTNERS}')
    files = "".join(f'{name} = "{name}.csv"\n' for name in NAMES)
    (folder / "local.toml").write_text(f'{TABLES}{DATA}test = "test.csv"\n[clients]\n{files}')


@dataclasses.dataclass
class Absent(InTurn):
    """Clients at work, of whom some stay away from some rounds, as it happened."""

    rounds: tuple = ()

    def answers(self, jobs):
        away = self.rounds[0]
        self.rounds = self.rounds[1:]
        for answer in super().answers(jobs):
            absent = Answer(answer.client, None, TrainingError("away"))
            yield absent if answer.client in away else answer


def records(folder):
    run = folder / "runs" / "federation"
    return toys.metrics(run) if (run / "metrics.jsonl").exists() else []


def test_a_federation_survives_what_happens_to_its_programs(machines):
    folder = machines.folder
    owner, first, second, third = (folder / "deployment" / n for n in ("owner", *NAMES))
    machines.start(owner / "superlink.sh")
    nodes = [machines.start_node(name) for name in NAMES]
    programs = {}
    for node, name in zip(nodes, NAMES, strict=True):
        machines.wait("readiness", lambda n=node: "is ready" in machines.log_of(n))
        (programs[name],) = machines.find(folder / "deployment" / name, "fedveil partner run")
    # Whose program holds still has a message that nobody answers, for as long as it takes.
    machines.freeze(third)
    machines.freeze(first)
    run = machines.start(owner / "start.sh")

    # In round 1 a SuperNode is killed while it has a message; what systemd does, its script does.
    machines.wait("a message", lambda: "Receiving: train" in machines.log_of(nodes[2]))
    assert machines.kill(third, "flower-supernode")
    machines.freeze(third, go_on=True)

    # Meanwhile strangers come: with a key that nobody registered, and with one that is in use.
    write_node_key(folder / "stranger.key", folder / "stranger.pub", "stranger")
    for key in (folder / "stranger.key", first / "node.key"):
        assert refused(machines, first, key), machines.told()

    # In round 2 the owner's program is killed, and started again.
    machines.freeze(first, go_on=True)
    machines.wait("round 1", lambda: len(records(folder)) == 1, 200)
    machines.freeze(first)
    machines.wait("round 2", lambda: machines.log_of(nodes[0]).count("Receiving: train") == 2)
    machines.wait("answers", lambda: machines.log_of(nodes[1]).count("Sent successfully") == 2)
    assert machines.kill(owner, "flwr-serverapp")
    run.kill()
    again = machines.start(owner / "start.sh")

    # In round 3 a client's program is killed, which has not answered yet.
    machines.wait("answers", lambda: machines.log_of(nodes[1]).count("Sent successfully") == 3)
    machines.freeze(second)
    machines.freeze(first, go_on=True)
    machines.wait("round 2", lambda: len(records(folder)) == 2, 200)
    machines.wait("round 3", lambda: machines.log_of(nodes[1]).count("Receiving: train") == 4)
    assert machines.kill(second, "fedveil partner run")
    assert again.wait(200) == 0, machines.told()

    # No process was started for a message, and whoever was not killed is who it was.
    for name, folder_of in (("clinic-1", first), ("clinic-3", third)):
        assert machines.find(folder_of, "fedveil partner run") == [programs[name]]
        assert not machines.find(folder_of, "flwr-clientapp")
    machines.wait("its return", lambda: machines.find(second, "fedveil partner run"))

    # Who stops a client's script stops both programs.
    nodes[0].terminate()
    assert nodes[0].wait(60) == 0
    machines.wait("the end of a client", lambda: not machines.find(first, ""))

    one, two, three = records(folder)
    assert set(one["failed"]) == {"clinic-3"}, machines.told()
    assert not two["failed"], machines.told()
    assert set(two["bytes_up"]) == set(NAMES)
    assert set(three["failed"]) == {"clinic-2"}, machines.told()
    assert "your tuned model" in machines.log_of(again)
    assert re.search(
        r"INFO: round 3: trained on \d+ examples, update sent", machines.log_of(nodes[0])
    )

    # The same, on one machine, without the updates that were lost.
    local = build(load_config(folder / "local.toml"))
    crew = Absent(local.workplace(), rounds=tuple(one["failed"] for one in (one, two, three)))
    expected = toys.weights(local.run(3, crew=crew).global_model)
    assert toys.same(dict(open_shards(folder / "runs" / "federation" / "model")), expected)


def refused(machines, folder, key):
    """Whether a SuperNode with this key is turned away by the SuperLink."""
    address = (folder / "supernode.sh").read_text().split("FEDVEIL_SUPERLINK:-")[1].split("}")[0]
    node = machines.start(
        "flower-supernode", "--root-certificates", str(folder / "ca.crt"), "--superlink", address,
        "--auth-supernode-private-key", str(key), "--host", "127.0.0.1",
        "--port", str(free_port()), "--isolation", "process",
        FLWR_HOME=str(machines.folder / "deployment" / "stranger" / "flwr"),
        FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1",
    )  # fmt: skip
    try:
        return node.wait(60) != 0
    except subprocess.TimeoutExpired:
        node.kill()
        return False
