"""No bytes that reach a client hold the global model: not messages, not what workers are handed."""

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fedveil.federation.facade as facade
from fedveil import Evaluation, FedQSN
from fedveil.schemes.fedqsn import FedQSNServer
from fedveil.training import evaluate
from fedveil.updates import SMALL
from fedveil.wire import Message
from toys import (
    SECRET,
    bare,
    bert,
    convnet,
    federation,
    mlp,
    rows,
    same,
    snapshot,
    texts,
    weights,
    withheld,
)  # fmt: skip

SCHEME = FedQSN(server_mask=0.25, client_mask=0.25, units="neurons", policy="fresh", bits=4)
WINDOW = 4


def windows(tensor: torch.Tensor) -> Iterator[bytes]:
    """Runs of consecutive float32 numbers along each axis, and what is shorter as a whole."""
    for axis in range(tensor.dim()):
        lines = tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis]).numpy()
        for line in lines:
            for start in range(0, max(len(line) - WINDOW, 0) + 1, WINDOW):
                yield np.ascontiguousarray(line[start : start + WINDOW]).tobytes()


@pytest.fixture(params=[mlp, convnet, bert])
def run(request, tmp_path, monkeypatch):
    """A run with all that clients were handed, and the global model at the start of each round."""
    globals_, places = [], []
    begin, crew = FedQSNServer.begin_round, facade.workers  # type: ignore[attr-defined]

    def spy_begin(server, number):
        globals_.append(snapshot(server.state().tensors))
        begin(server, number)

    def spy_crew(place, workers):
        places.append((place, weights(place.architecture), pickle.dumps(place)))
        return crew(place, workers)

    monkeypatch.setattr(FedQSNServer, "begin_round", spy_begin)
    monkeypatch.setattr(facade, "workers", spy_crew)
    model = request.param()
    data = texts(9) if request.param is bert else rows(9)
    result = federation(
        model,
        scheme=SCHEME,
        out=tmp_path,
        keep_messages=True,
        test=data,
        evaluation=Evaluation(proxies_every=1),
    ).run(2)
    return model, result, globals_, places[0], tmp_path / "messages"


def test_messages_hold_no_number_of_a_quantized_or_withheld_row(run):
    model, _, globals_, _, messages = run
    sent = sorted(messages.rglob("*.safetensors"))
    assert len(sent) == 12
    quantized = withheld_rows = 0
    for path in sent:
        data = path.read_bytes()
        number = int(path.parent.name[6:])
        proxy = Message.from_bytes(
            path.with_name(f"{path.name.split('.')[0]}.proxy.safetensors").read_bytes()
        )
        gone = withheld(proxy, model, SCHEME.units)
        for name, tensor in globals_[number - 1].items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() >= 2 and tensor.numel() >= SMALL:
                for window in windows(tensor):
                    quantized += 1
                    assert window not in data, (path, name)
            # What is not quantized travels exactly, but not where it is withheld.
            for axis in range(tensor.dim()):
                other = [a for a in range(tensor.dim()) if a != axis]
                for unit in torch.nonzero(gone[name].all(dim=other) if other else gone[name]):
                    row = tensor.select(axis, int(unit))
                    withheld_rows += 1
                    assert row.contiguous().numpy().tobytes() not in data, (path, name)
    assert quantized > 1000
    assert withheld_rows > 20


def test_workers_get_an_architecture_of_zeros_and_nothing_else_of_the_owner(run):
    _, _, globals_, (_, before_round_1, pickled), _ = run
    assert all(not bool(tensor.any()) for tensor in before_round_1.values())
    for spelling in (bytes(range(32)), bytes(range(32)).hex().encode(), b"FedQSNServer"):
        assert spelling not in pickled
    for name, tensor in globals_[0].items():
        if tensor.dim() >= 2 and tensor.numel() >= SMALL:
            assert not any(window in pickled for window in windows(tensor)), name


def test_nothing_that_workers_get_leads_to_the_server_or_its_secret(run):
    *_, (place, _, _), _ = run
    seen, waiting = set(), [place]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        assert type(thing).__name__ not in {"Secret", "Masks", "GlobalModel", "FedQSNServer"}
        if isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            waiting += list(thing)
        elif not isinstance(thing, (type, torch.Tensor)):
            waiting += list(getattr(thing, "__dict__", {}).values())
            waiting += [
                getattr(thing, n) for n in ("func", "args", "keywords") if hasattr(thing, n)
            ]
    assert len(seen) > 50


def test_what_is_measured_on_clients_is_the_proxy_in_the_message(run):
    model, result, _, (place, *_), messages = run
    for number, record in enumerate(result.rounds, start=1):
        losses = []
        for path in (messages / f"round-{number:06d}").glob("*.proxy.safetensors"):
            proxy = bare(model)
            SCHEME.client().load(Message.from_bytes(path.read_bytes()), proxy)
            losses.append(evaluate(proxy, place.task, place.test)["loss"])
        assert record.measures["proxy_before"]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
        assert record.measures["proxy_before"]["loss"] != record.measures["global"]["loss"]
        assert record.measures["proxy_after"]["loss"] != record.measures["proxy_before"]["loss"]


def test_a_secret_refuses_to_be_pickled():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(SECRET)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(federation(mlp()))


def test_releasing_and_measuring_leave_the_global_model_as_it_was():
    server = SCHEME.server(mlp(), SECRET)
    server.begin_round(1)
    for client in "abc":
        server.release(client).to_bytes()
    for view in server.views:
        server.view(view)
    assert same(server.state().tensors, weights(mlp()))
