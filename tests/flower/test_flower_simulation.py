"""The same federation in Flower's simulation: real nodes in Ray's processes."""

import os
import sys
from typing import Any

import pytest
import torch
from flower_samples import federation
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedMedian
from flwr.simulation import run_simulation
from test_flower_strategy import ordinary_app

import toys
from fedveil import FedAvg, FedQSN
from fedveil.errors import ConfigurationError, ExposureError
from fedveil.flower import ModelPrivacy, proxy_mod, simulate

pytest.importorskip("ray", reason="needs Ray: pip install 'fedveil[simulation]'")
pytestmark = pytest.mark.slow


def test_the_result_is_that_of_the_in_process_engine_bit_for_bit(tmp_path):
    expected = federation().run(2)
    found = simulate(federation(out=tmp_path), 2, processes=2)
    assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
    assert [r.bytes_up for r in found.rounds] == [r.bytes_up for r in expected.rounds]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    # What stops the owner's half is the error that the owner sees.
    with pytest.raises(ExposureError):
        simulate(federation(exposure_limit=0.001), 1)


@pytest.mark.filterwarnings("ignore")  # of Flower and Ray, about each other
def test_an_ordinary_app_behind_its_mod_and_a_strategy_inside_another(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    scheme, found = FedQSN(units="neurons"), []
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = ModelPrivacy(
            scheme, model=toys.mlp(), secret=toys.SECRET, out=tmp_path,
            inner=FedMedian(min_train_nodes=3, min_available_nodes=3),
        )  # fmt: skip
        arrays, config = ArrayRecord(toys.mlp().state_dict()), ConfigRecord({"lr": 0.5})
        found.append(strategy.start(grid, arrays, num_rounds=2, train_config=config))

    run_simulation(
        server,
        ordinary_app(proxy_mod(scheme, toys.mlp)),
        num_supernodes=3,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    losses: list[Any] = [m["train_loss"] for m in found[0].train_metrics_clientapp.values()]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert torch.isfinite(found[0].arrays.to_torch_state_dict()["1.weight"]).all()
    assert (tmp_path / "exposure.jsonl").read_text().count('"client"') == 6


def test_schemes_whose_clients_keep_something_are_refused():
    scheme = FedAvg(update_bits=4, error_feedback=True)
    with pytest.raises(ConfigurationError, match="keep nothing"):
        simulate(toys.federation(toys.mlp(), scheme=scheme), 1)
