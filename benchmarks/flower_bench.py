"""The programs that benchmarks/deployment.py lets Flower start: rounds of several kinds in one run.

Nothing is imported at the top that an empty round would not need.
"""

import json
import os
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.query("empty")
def _empty(message: Message, context: Context) -> Message:
    return Message(content=RecordDict(), reply_to=message)


@client.query("ready")
def _ready(message: Message, context: Context) -> Message:
    """A client's program that does all but train: it has its model and its data."""
    from fedveil.flower import apps

    apps.find_partner(context)
    return Message(content=RecordDict(), reply_to=message)


@client.train("plain")
def _plain(message: Message, context: Context) -> Message:
    """FedAvg as in Flower's tutorials: the whole model down, the whole model up."""
    from fedveil.flower import apps
    from fedveil.training import LocalRun

    partner = apps.find_partner(context)
    model = partner.place.architecture
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    record = LocalRun(partner.place.trainers[partner.name], seed=0)(model)
    metrics = MetricRecord({"num-examples": record.examples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server.main()
def _main(grid: Grid, context: Context) -> None:
    """Every kind of round, so many times, each with when it began and ended."""
    from fedveil.config import build, load_config
    from fedveil.flower import apps

    config = load_config(os.environ[apps.FEDERATION])
    times = int(os.environ["FEDVEIL_BENCH_ROUNDS"])
    assert config.partners is not None
    clients = len(config.partners.names)
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(1)
    spans: dict[str, list[tuple[float, float]]] = {}
    for kind in ("query.empty", "query.ready"):
        spans[kind] = [_round(grid, nodes, kind, None) for _ in range(times)]
    model = build(config).model
    spans["train.plain"] = [
        _round(grid, nodes, "train.plain", ArrayRecord(model.state_dict())) for _ in range(times)
    ]
    Path(os.environ["FEDVEIL_BENCH_OUT"]).write_text(json.dumps(spans))


def _round(
    grid: Grid, nodes: list[int], kind: str, arrays: ArrayRecord | None
) -> tuple[float, float]:
    """One round of messages without fedveil's; answers are looked for as often as fedveil does."""
    began = time.time()
    config = ConfigRecord({"round": int(began)})
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {"config": config}
    if arrays is not None:
        records = {"arrays": arrays, **records}
    messages = [
        Message(content=RecordDict(records), dst_node_id=node, message_type=kind) for node in nodes
    ]
    missing = set(grid.push_messages(messages))
    while missing:
        time.sleep(0.5)
        for reply in grid.pull_messages(list(missing)):
            missing.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                raise RuntimeError(f"a {kind} round failed: {reply.error.reason}")
    return began, time.time()
