"""Rounds over machines, on this one: where the time goes, and what crosses the wire.

    python benchmarks/deployment.py              # MiniLM-L6, three clients, TLS; 10 to 15 minutes
    python benchmarks/deployment.py --rounds 1   # once each: a quick look

One SuperLink and three clients run as `fedveil deploy init` sets them up, and play fedveil's
rounds. Then the same SuperLink plays rounds of Flower's own with three SuperNodes that start a
program for each message: empty ones, ones in which clients get model and data ready and train
nothing, and plain FedAvg as in Flower's tutorials. What passes between SuperNodes and SuperLink
goes through a relay that counts it, TLS and all. The work itself is timed in process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from fedveil.config import build, load_config
from fedveil.deploy import Address, write_deployment
from fedveil.hub import bbc_news, minilm_folder
from fedveil.training import TrainingRecord

HERE = Path(__file__).parent
NAMES = ("clinic-1", "clinic-2", "clinic-3")
FILE = """
[model]
name = "model"
num_labels = 5
[data]
task = "text-classification"
labels = ["business", "entertainment", "politics", "sports", "tech"]
test = "test.csv"
max_length = 64
[scheme]
name = "fedqsn"
update_bits = 8
[training]
steps = 2
batch_size = 8
[federation]
rounds = {rounds}
"""


class Relay:
    """Passes connections on to a port, and notes what came when in either direction."""

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(), port
        self.passed: list[tuple[float, str, int]] = []
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._meet, "127.0.0.1", self.port)
        await server.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back, "up"), self._pass(there, writer, "down"))

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str
    ) -> None:
        try:
            while data := await source.read(1 << 18):
                self.passed.append((time.time(), way, len(data)))
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    def between(self, began: float, ended: float, way: str) -> int:
        """Bytes that passed one way in a span of time."""
        return sum(n for when, which, n in self.passed if which == way and began <= when <= ended)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/deployment"))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind")
    options = parser.parse_args()
    folder = options.out.absolute()
    if folder.exists():
        print(f"{folder} is there already: remove it, or choose another --out")
        return 1
    write_files(folder, options.rounds)
    port = free_port()
    relay = Relay(port)
    config = load_config(folder / "federation.toml")
    write_deployment(config, Address("127.0.0.1", port), folder / "deployment")
    prepare_programs(folder)
    with running(folder, relay, options.rounds) as machines:
        began = time.time()
        code = machines.play("start.sh", [["./supernode.sh"]] * len(NAMES))
        span = began, time.time()
        code = code or machines.play("bench.sh", [machines.node(name) for name in NAMES])
    if code != 0 or not (folder / "spans.json").exists():
        print(f"the run failed: see the .log files in {folder}")
        return 1
    figures = figures_of(folder, relay, span)
    (folder / "results.json").write_text(json.dumps(figures, indent=1))
    show(figures)
    return 0


def write_files(folder: Path, rounds: int) -> None:
    """The owner's file, model and data, and the same federation on one machine."""
    (folder / "model").mkdir(parents=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_labels=5
    )
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder / "model")
    rows = bbc_news().shuffle(seed=1)
    for number, name in enumerate(("test", *NAMES)):
        table = rows.select(range(16 * number, 16 * number + 16)).to_pandas()
        table["label"] = rows.features["label"].int2str(table["label"].tolist())
        table.to_csv(folder / f"{name}.csv", index=False)
    names = ", ".join(f'"{name}"' for name in NAMES)
    text = FILE.format(rounds=rounds)
    (folder / "federation.toml").write_text(f"{text}[partners]\nnames = [{names}]\n")
    files = "".join(f'{name} = "{name}.csv"\n' for name in NAMES)
    (folder / "local.toml").write_text(f"{text}[clients]\n{files}")


def prepare_programs(folder: Path) -> None:
    """Clients' data; and beside the owner's app one of the benchmark's programs."""
    owner = folder / "deployment" / "owner"
    shutil.copytree(owner / "app", owner / "bench")
    app = owner / "bench" / "pyproject.toml"
    app.write_text(app.read_text().replace("fedveil.flower.apps:", "flower_bench:"))
    start = (owner / "start.sh").read_text()
    (owner / "bench.sh").write_text(start.replace("flwr run app", "flwr run bench"))
    (owner / "bench.sh").chmod(0o755)
    for name in NAMES:
        rows = (folder / f"{name}.csv").read_text()
        (folder / "deployment" / name / "data.csv").write_text(rows)


class Machines:
    """The programs of all sides."""

    def __init__(self, folder: Path, relay: Relay, rounds: int) -> None:
        self.folder, self.relay = folder, relay
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "FEDVEIL_SUPERLINK": f"127.0.0.1:{relay.port}", "FEDVEIL_RETRY": "1",
            "FEDVEIL_BENCH_ROUNDS": str(rounds), "FEDVEIL_BENCH_OUT": str(folder / "spans.json"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a program in a folder of the deployment."""
        folder = self.folder / "deployment" / name
        # Flower's own way puts the app on Python's path, where a client's folder must not be.
        home = self.folder / "flwr" / name
        more = {"FEDVEIL_PORT": str(free_port()), "FLWR_HOME": str(home)}
        with (self.folder / f"{len(self.started)}.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env={**self.environment, **more},
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def play(self, script: str, commands: list[list[str]]) -> int:
        """Start a client for each command, and the owner's script; its exit code, when it ends."""
        clients = [self.start(name, command) for name, command in zip(NAMES, commands, strict=True)]
        code = self.start("owner", [f"./{script}"]).wait()
        for client in clients:
            client.terminate()
            client.wait()
        return code

    def node(self, name: str) -> list[str]:
        """A SuperNode in Flower's own way, which starts a program for each message."""
        file = self.folder / "deployment" / name / "partner.toml"
        return [
            "flower-supernode", "--root-certificates", "ca.crt",
            "--superlink", f"127.0.0.1:{self.relay.port}",
            "--auth-supernode-private-key", "node.key", "--host", "127.0.0.1",
            "--port", str(free_port()), "--node-config", f'fedveil="{file}"',
        ]  # fmt: skip


@contextmanager
def running(folder: Path, relay: Relay, rounds: int) -> Iterator[Machines]:
    """A SuperLink, and whatever else is started until the context ends."""
    machines = Machines(folder, relay, rounds)
    machines.start("owner", ["./superlink.sh"])
    try:
        yield machines
    finally:
        for process in machines.started:
            process.kill()
        end_children(folder)


def end_children(folder: Path) -> None:
    """End what the programs started, which is known by its settings' folder."""
    mark = f"FLWR_HOME={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def figures_of(
    folder: Path, relay: Relay, span: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Per kind of round: seconds, and bytes that passed, all per round."""
    spans = json.loads((folder / "spans.json").read_text())
    lines = (folder / "runs" / "federation" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    began, ended = span
    figures = {
        kind: {
            "seconds": median(end - start for start, end in times),
            "down": median(relay.between(start, end, "down") for start, end in times),
            "up": median(relay.between(start, end, "up") for start, end in times),
        }
        for kind, times in spans.items()
    }
    figures["fedveil"] = {
        "seconds": median(record["seconds"] for record in records),
        "down": relay.between(began, ended, "down") / len(records),
        "up": relay.between(began, ended, "up") / len(records),
        "wire_down": median(sum(record["bytes_down"].values()) for record in records),
        "wire_up": median(sum(record["bytes_up"].values()) for record in records),
    }
    figures["in process"] = work_in_process(folder)
    return figures


def work_in_process(folder: Path) -> dict[str, float]:
    """Seconds of a round's work itself, one client after the other, by part."""
    from fedveil.engine.crew import threads
    from fedveil.secret import Secret
    from fedveil.training import LocalRun
    from fedveil.wire import Message

    config = load_config(folder / "local.toml")
    federation = build(config)
    place = federation.workplace()
    server = federation.scheme.server(federation.model, Secret.generate())
    parts: dict[str, list[float]] = {"server": [], "client": [], "training": []}
    for number in (1, 2, 3):
        spent = dict.fromkeys(parts, 0.0)

        class Timed(LocalRun):
            def __call__(self, model: nn.Module) -> TrainingRecord:
                started = time.perf_counter()
                record = super().__call__(model)
                spent["training"] += time.perf_counter() - started  # noqa: B023  used at once
                return record

        with threads(1):
            started = time.perf_counter()
            server.begin_round(number)
            spent["server"] += time.perf_counter() - started
            for name in NAMES:
                started = time.perf_counter()
                proxy = server.release(name).to_bytes()
                spent["server"] += time.perf_counter() - started
                started = time.perf_counter()
                run = Timed(place.trainers[name], number)
                message = Message.from_bytes(proxy)
                reply = place.side.fit(message, place.architecture, run).to_bytes()
                spent["client"] += time.perf_counter() - started
                started = time.perf_counter()
                server.absorb(name, Message.from_bytes(reply), 16.0)
                spent["server"] += time.perf_counter() - started
            started = time.perf_counter()
            server.end_round()
            spent["server"] += time.perf_counter() - started
        spent["client"] -= spent["training"]
        for part, seconds in spent.items():
            parts[part].append(seconds)
    return {part: median(seconds) for part, seconds in parts.items()}


def show(figures: dict[str, dict[str, float]]) -> None:
    """Two tables: where the time of a round goes, and what crossed the wire."""
    console = Console()
    ours, plain = figures["fedveil"], figures["train.plain"]
    floor, ready = figures["query.empty"]["seconds"], figures["query.ready"]["seconds"]
    work = figures["in process"]
    time_table = Table("of a fedveil round, three clients", "s", title="time")
    for name, seconds in (
        ("fedveil at the server: quantize, release, absorb, merge", work["server"]),
        ("fedveil at clients: decode, encode (one after the other)", work["client"]),
        ("training (one after the other)", work["training"]),
        ("the rest: polling, transfer, measuring", ours["seconds"] - sum(work.values())),
        ("all", ours["seconds"]),
        ("Flower, a program for each message: an empty round", floor),
        ("Flower: a round with model and data ready, no training", ready),
        ("Flower: plain FedAvg", plain["seconds"]),
    ):
        time_table.add_row(name, f"{seconds:.2f}")
    console.print(time_table)
    bytes_table = Table("a round", "down, MB", "up, MB", "both, MB", title="between the machines")
    for name, down, up in (
        ("fedveil's messages", ours["wire_down"], ours["wire_up"]),
        ("fedveil on the wire", ours["down"], ours["up"]),
        ("plain Flower FedAvg on the wire", plain["down"], plain["up"]),
        ("an empty round", figures["query.empty"]["down"], figures["query.empty"]["up"]),
    ):
        bytes_table.add_row(name, *(f"{size / 1e6:.2f}" for size in (down, up, down + up)))
    console.print(bytes_table)
    wire, messages = ours["down"] + ours["up"], ours["wire_down"] + ours["wire_up"]
    console.print(f"on the wire / messages: {wire / messages:.3f} (budget 1.1)")
    console.print(f"fedveil / plain FedAvg: {wire / (plain['down'] + plain['up']):.3f}")


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
