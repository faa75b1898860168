"""A deployment at work: a SuperLink, three SuperNodes, TLS and keys, in processes of their own."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import toys
from fedveil.config import build, load_config
from fedveil.data import bbc_news, minilm_folder
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.keys import write_node_key
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.errors import TrainingError
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
rounds = 2
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


class Machines:
    """The programs of a deployment, each found again by its folder."""

    def __init__(self, folder):
        self.folder, self.logs, self.started = folder, [], []

    def start(self, program, *words, **settings):
        """Start a program as its user would; what it prints is kept."""
        log = self.folder / f"{len(self.logs)}.log"
        self.logs.append(log)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with log.open("w") as file:
            process = subprocess.Popen(
                [program, *words], stdout=file, stderr=file, env=environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def find(self, folder, word):
        """Ids of processes of one folder's programs that have a word in their command."""
        home = f"FLWR_HOME={folder / 'flwr'}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                if word.encode() in command and home in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue  # it has just ended, or is not ours
        return found

    def kill(self, folder, word):
        """Kill programs with -9; whether there were any."""
        found = self.find(folder, word)
        for number in found:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(found)

    def wait(self, for_what, condition, seconds=120.0):
        """Wait until something is so."""
        last = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > last:
                raise AssertionError(f"{for_what}: not in {seconds:.0f} s\n{self.told()}")
            time.sleep(0.2)
        return found

    def told(self):
        """The end of everything that was printed."""
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.logs)

    def close(self):
        """End everything: what was started, then what that started."""
        for process in self.started:
            process.kill()
            process.wait()
        for folder in self.folder.glob("deployment/*"):
            while self.kill(folder, ""):
                time.sleep(0.1)


@pytest.fixture
def machines(tmp_path):
    """An owner's and three clients' folders, ready to be started."""
    write_files(tmp_path)
    config = load_config(tmp_path / "federation.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_deployment(config, Address("127.0.0.1", port), tmp_path / "deployment")
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
    owner, first, _, third = (folder / "deployment" / n for n in ("owner", *NAMES))
    machines.start(owner / "superlink.sh")
    nodes = []
    for name in NAMES:
        settings = {"FEDVEIL_PORT": str(free_port()), "FEDVEIL_RETRY": "1"}
        nodes.append(machines.start(folder / "deployment" / name / "supernode.sh", **settings))
    run = machines.start(owner / "start.sh")

    # In round 1 a SuperNode is killed while it trains; what systemd does, its script does.
    machines.wait("training", lambda: machines.find(third, "flwr-clientapp"))
    assert machines.kill(third, "flower-supernode")

    # Meanwhile strangers come: with a key that nobody registered, and with one that is in use.
    write_node_key(folder / "stranger.key", folder / "stranger.pub", "stranger")
    for key in (folder / "stranger.key", first / "node.key"):
        assert refused(machines, first, key), machines.told()

    # In round 2 the owner's program is killed, and started again.
    machines.wait("round 1", lambda: len(records(folder)) == 1, 200)
    machines.wait("round 2", lambda: machines.find(first, "flwr-clientapp"))
    assert machines.kill(owner, "flwr-serverapp")
    run.kill()
    assert machines.start(owner / "start.sh").wait(200) == 0

    # Who stops a SuperNode's script stops the SuperNode.
    nodes[0].terminate()
    assert nodes[0].wait(60) == 0
    machines.wait("the end of a SuperNode", lambda: not machines.find(first, "flower-supernode"))

    one, two = records(folder)
    assert set(one["failed"]) == {"clinic-3"}, machines.told()
    assert not two["failed"], machines.told()
    assert set(two["bytes_up"]) == set(NAMES)
    assert "your tuned model" in machines.logs[-1].read_text()

    # The same, on one machine, without the update that was lost.
    local = build(load_config(folder / "local.toml"))
    crew = Absent(local.workplace(), rounds=(one["failed"], two["failed"]))
    expected = toys.weights(local.run(2, crew=crew).global_model)
    assert toys.same(dict(open_shards(folder / "runs" / "federation" / "model")), expected)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def refused(machines, folder, key):
    """Whether a SuperNode with this key is turned away by the SuperLink."""
    address = (folder / "supernode.sh").read_text().split("FEDVEIL_SUPERLINK:-")[1].split("}")[0]
    node = machines.start(
        "flower-supernode", "--root-certificates", str(folder / "ca.crt"), "--superlink", address,
        "--auth-supernode-private-key", str(key), "--host", "127.0.0.1",
        "--port", str(free_port()), "--node-config", f'fedveil="{folder / "partner.toml"}"',
        FLWR_HOME=str(machines.folder / "deployment" / "stranger" / "flwr"),
        FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1",
    )  # fmt: skip
    try:
        return node.wait(60) != 0
    except subprocess.TimeoutExpired:
        node.kill()
        return False
