import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedveil import FedQSN, Secret
from process import standard
from toys import CHOICES, bert, digest, federation, files, gpt2, metrics, mlp, same, weights


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder and final weights of the run that all others must repeat."""
    folder = tmp_path_factory.mktemp("first")
    return folder, digest(weights(standard(folder, keep_messages=True).run(2).global_model))


def messages(folder):
    found = files(folder / "messages")
    assert len(found) == 12
    return found


def test_a_second_run_repeats_every_byte(first, tmp_path):
    torch.manual_seed(99)
    again = standard(tmp_path, keep_messages=True).run(2)
    assert messages(tmp_path) == messages(first[0])
    assert metrics(tmp_path) == metrics(first[0])
    assert digest(weights(again.global_model)) == first[1]


def test_one_federation_run_twice_repeats_itself():
    federation_ = standard(None)
    one, other = federation_.run(2), federation_.run(2)
    assert same(weights(one.global_model), weights(other.global_model))


def test_worker_processes_repeat_every_byte(first, tmp_path):
    result = standard(tmp_path, keep_messages=True, workers=2).run(2)
    assert messages(tmp_path) == messages(first[0])
    assert metrics(tmp_path) == metrics(first[0])
    assert digest(weights(result.global_model)) == first[1]


def test_a_fresh_interpreter_with_workers_repeats_every_byte(first, tmp_path):
    script = Path(__file__).parent.parent / "process.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2", "--workers", "2"],
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == first[1]
    assert messages(tmp_path) == messages(first[0])
    assert metrics(tmp_path) == metrics(first[0])


@pytest.mark.parametrize("build", [mlp, gpt2], ids=lambda b: b.__name__)
def test_with_regmean_worker_processes_repeat_every_byte(build, tmp_path):
    scheme = FedQSN(units="neurons", policy="sticky", aggregation="regmean")
    folders, finals = (tmp_path / "one", tmp_path / "two"), []
    for workers, folder in enumerate(folders, start=1):
        settings = {"scheme": scheme, "out": folder, "keep_messages": True, "workers": workers}
        finals.append(digest(weights(federation(build(), **settings).run(2).global_model)))
    assert finals[0] == finals[1]
    assert messages(folders[0]) == messages(folders[1])
    assert metrics(folders[0]) == metrics(folders[1])


@pytest.mark.parametrize("change", [{"seed": 4}, {"secret": Secret(bytes(32))}])
def test_seed_and_secret_both_matter(first, tmp_path, change):
    standard(tmp_path, keep_messages=True, **change).run(2)
    assert messages(tmp_path) != messages(first[0])


@pytest.mark.parametrize("choice", CHOICES)
def test_the_order_in_which_clients_are_named_does_not_matter(choice):
    scheme = FedQSN(units=choice)
    clients = federation(bert())._trainers
    data = {name: trainer._data for name, trainer in clients.items()}
    turned = dict(reversed(data.items()))
    results = [federation(bert(), scheme=scheme, clients=c).run(1) for c in (data, turned)]
    assert same(*(weights(result.global_model) for result in results))


def test_the_owners_model_may_be_used_in_between():
    model = mlp()
    federation_ = federation(model)
    model[1].weight.data.zero_()
    assert same(
        weights(federation_.run(1).global_model), weights(federation(mlp()).run(1).global_model)
    )
