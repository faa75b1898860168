"""An owner who sends code, to clients that run the shipped scripts: with real processes."""

import json
import shutil
import stat
from contextlib import closing
from pathlib import Path

import pytest
from deploy_machines import Machines, free_port
from deploy_samples import put_rows

import toys
from fedveil.config import load_config
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.checking import Survey
from fedveil.flower.runtime import LostError, Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc"),
]

NAMES = ("clinic-1", "clinic-2")
NET = """
import time
from pathlib import Path

import torch
from torch import nn

def linger(module, inputs):
    while Path("slow").exists():  # in the folder of the client whose program this is
        Path("at-work").touch()
        time.sleep(0.1)

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    net.register_forward_pre_hook(linger)
    return net
"""
EVIL = """
import json, os, time
from pathlib import Path

CANARY = Path({canary!r})

def spoil():
    CANARY.write_text(os.getcwd())

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ClientApp()
server = ServerApp()

@app.train()
def train(message, context):
    spoil()
    stolen = dict()
    for place in map(Path, {folders!r}):
        for name in ("data.parquet", "node.key"):
            stolen[str(place / name)] = (place / name).read_bytes()
    return Message(content=RecordDict(dict(loot=ConfigRecord(stolen))), reply_to=message)

@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    asked = [
        Message(content=RecordDict(dict()), dst_node_id=node, message_type="train")
        for node in nodes
    ]
    told = []
    for reply in grid.send_and_receive(asked, timeout=120):
        error = (reply.error.code, reply.error.reason) if reply.has_error() else None
        told.append(dict(error=error, content=None if error else repr(reply.content)))
    Path({told!r}).write_text(json.dumps(told))
"""


@pytest.fixture
def machines(folder):
    """An owner's folder and two clients', with data and approved code."""
    (folder / "net.py").write_text(NET)
    text = (folder / "federation.toml").read_text()
    more = "deadline = 100\nquorum = 1\ngive_up = 200\n[federation]\nrounds = 1\n"
    (folder / "federation.toml").write_text(text + more)
    config = load_config(folder / "federation.toml")
    write_deployment(config, Address("127.0.0.1", free_port()), folder / "deployment")
    for number, name in enumerate(NAMES):
        put_rows(folder / "deployment" / name, number)
    machines = Machines(folder)
    yield machines
    machines.close()


def approve(folder):
    Survey.of(load_config(folder / "partner.toml")).approve()


def write_app(machines, name, clientapp, **files):
    """A copy of the owner's app that carries code."""
    owner = machines.folder / "deployment" / "owner"
    app = owner / name
    shutil.copytree(owner / "app", app)
    text = (app / "pyproject.toml").read_text()
    text = text.replace("fedveil.flower.apps:client", clientapp)
    (app / "pyproject.toml").write_text(text.replace("fedveil.flower.apps:server", "evil:server"))
    told, canary = machines.folder / f"{name}.json", machines.folder / f"{name}.canary"
    folders = [str(machines.folder / "deployment" / one) for one in NAMES]
    evil = EVIL.format(canary=str(canary), told=str(told), folders=folders)
    (app / "evil.py").write_text(evil)
    return told, canary


def run_app(machines, name):
    owner = machines.folder / "deployment" / "owner"
    return machines.start(
        "flwr", "run", str(owner / name), "owner", "--stream",
        FLWR_HOME=str(owner / "flwr"), FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1",
    )  # fmt: skip


def test_an_app_that_carries_code_is_not_run_and_the_honest_one_still_is(machines):
    folder = machines.folder
    owner, *clinics = (folder / "deployment" / name for name in ("owner", *NAMES))
    machines.start(owner / "superlink.sh")
    ports = [str(free_port()) for _ in NAMES]
    nodes = [
        machines.start_node(name, FEDVEIL_PORT=port)
        for name, port in zip(NAMES, ports, strict=True)
    ]

    # Nobody has approved the owner's net.py yet: no client connects.
    for node in nodes:
        machines.wait("a refusal", lambda n=node: "is not approved" in machines.log_of(n))
    assert not any(machines.find(clinic, "flower-supernode") for clinic in clinics)
    for clinic in clinics:
        approve(clinic)
    for node in nodes:
        machines.wait("readiness", lambda n=node: "is ready" in machines.log_of(n))

    # The honest app registers the keys, and works.
    honest = machines.start(owner / "start.sh")
    assert honest.wait(200) == 0, machines.told()
    assert toys.metrics(folder / "runs" / "federation")[0]["failed"] == {}

    # Somebody else on a client's machine is given no message, and takes nobody in.
    link = clinics[0] / "flwr" / "link"
    token, authority = (link / "token").read_bytes(), (link / "ca.crt").read_bytes()
    assert stat.S_IMODE(link.stat().st_mode) == 0o700
    with closing(Runtime(f"127.0.0.1:{ports[0]}", token, authority)) as own:
        assert own.take() is None
    other = (clinics[1] / "flwr" / "link" / "ca.crt").read_bytes()
    for secret, root in ((b"a guess", authority), (token, other)):
        stranger = Runtime(f"127.0.0.1:{ports[0]}", secret, root)
        with closing(stranger), pytest.raises(LostError):
            stranger.take()

    # Code beside the client program that it names; and code beside fedveil's own.
    for name, clientapp, found in (
        ("evil-a", "evil:app", "evil.py"),
        ("evil-b", "fedveil.flower.apps:client", "evil.py"),
    ):
        told, canary = write_app(machines, name, clientapp)
        assert run_app(machines, name).wait(200) == 0, machines.told()
        machines.wait("replies", told.exists, 120)
        replies = json.loads(told.read_text())
        assert len(replies) == 2, machines.told()
        assert all(reply["content"] is None for reply in replies), replies
        assert all(reply["error"][1] == "refused" for reply in replies), replies
        assert not canary.exists()
        for node in nodes:
            log = machines.log_of(node)
            assert "is refused, and nothing of its app was run" in log
            assert found in log
    assert not list(folder.rglob("*.canary"))
    assert not any((clinic / "flwr" / "apps").exists() for clinic in clinics)

    # What was refused has cost nothing: the honest app goes on. A program that is killed in the
    # middle of its work, and one that is told to end, cost that reply.
    first, second = clinics
    text = (folder / "federation.toml").read_text()
    (folder / "federation.toml").write_text(text.replace("rounds = 1", "rounds = 4"))
    (second / "slow").touch()
    sent = machines.log_of(nodes[0]).count("Sent successfully")
    again = machines.start(owner / "start.sh")
    machines.wait("work", (second / "at-work").exists)
    machines.wait("a reply", lambda: machines.log_of(nodes[0]).count("Sent successfully") > sent)
    (first / "slow").touch()
    assert machines.kill(second, "fedveil partner run")
    (second / "slow").unlink()
    machines.wait("work", (first / "at-work").exists)
    nodes[0].terminate()
    assert nodes[0].wait(60) == 0
    machines.wait("an end", lambda: not machines.find(first, ""))
    (first / "slow").unlink()
    nodes[0] = machines.start_node("clinic-1")
    assert again.wait(300) == 0, machines.told()
    _, two, three, four = toys.metrics(folder / "runs" / "federation")
    assert set(two["failed"]) == {"clinic-2"}, machines.told()
    assert set(three["failed"]) == {"clinic-1"}, machines.told()
    assert four["failed"] == {}
    assert set(four["bytes_up"]) == set(NAMES)
