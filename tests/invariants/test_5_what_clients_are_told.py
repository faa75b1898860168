"""What clients are told follows from the secret: it foretells nothing, and repeats nothing else."""

import dataclasses
import hashlib
import json

import pytest
import torch

from fedveil import FedAvg, FedQSN, Secret
from fedveil.config import build, build_workplace, load_config
from fedveil.config.code import Approvals, code_of
from fedveil.engine.in_process import InTurn
from fedveil.state import read_state
from toys import SECRET, federation, mlp, rows, same, weights

OTHER = Secret(bytes(range(1, 33)))
CLIENTS = {f"c{i}": rows(4, seed=i) for i in range(6)}


class Listening(InTurn):
    """Clients that write down what they are told."""

    def __init__(self, place):
        super().__init__(place)
        self.jobs = []

    def answers(self, jobs):
        for job in jobs:
            self.jobs.append((job.client, job.seed))
            yield from super().answers([job])


def told(secret=SECRET, seed=0, rounds=4):
    """By round: who took part, and with which seed."""
    run = federation(
        mlp(), clients=CLIENTS, clients_per_round=3, secret=secret, seed=seed, scheme=FedAvg()
    )
    crew = Listening(run.workplace())
    run.run(rounds, crew=crew)
    return [crew.jobs[3 * n : 3 * n + 3] for n in range(rounds)]


class TestSeedsOfTraining:
    def test_are_those_of_no_small_number(self):
        seeds = {seed for jobs in told(seed=7) for _, seed in jobs}
        words = [
            f"{n}/train/{number}/{c}" for n in range(3000) for number in (1, 2) for c in CLIENTS
        ]
        guessed = {
            int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") for word in words
        }
        assert len(seeds & (guessed | set(range(100_000)))) <= 1  # by chance, one in 10^4 runs

    def test_differ_for_every_client_and_round_and_under_every_secret(self):
        one, other = ([s for jobs in told(secret) for _, s in jobs] for secret in (SECRET, OTHER))
        assert len({*one, *other}) == len(one) + len(other)
        assert not {*one} & {s for jobs in told(seed=1) for _, s in jobs}

    def test_do_not_tell_who_takes_part(self):
        # The same seed under another secret: another cohort.
        cohorts = [
            [sorted(client for client, _ in jobs) for jobs in told(Secret(bytes([n]) * 32))]
            for n in range(6)
        ]
        assert len({json.dumps(cohort) for cohort in cohorts}) > 4

    def test_are_the_same_when_a_run_is_repeated(self):
        assert told() == told()


OWN = """
import torch
from torch import nn

def build(num_labels=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, num_labels))

def seeded(num_labels=2):
    torch.manual_seed(0)
    return build(num_labels)
"""


def configured(folder, monkeypatch, *, function="build", secret="one", seed=0):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "net_for_invariants.py").write_text(OWN)
    table = [{"image": [[float(n), 0.0], [0.0, 1.0]], "label": n % 2} for n in range(8)]
    for name in ("train.json", "test.json"):
        (folder / name).write_text(json.dumps(table))
    (folder / "f.toml").write_text(
        f'[model]\nname = "net_for_invariants:{function}"\n'
        '[data]\ntask = "image-classification"\ntrain = "train.json"\ntest = "test.json"\n'
        '[scheme]\nunits = "neurons"\n'
        "[partition]\nclients = 2\n"
        f'[federation]\nseed = {seed}\nsecret_file = "{secret}.secret"\n'
    )
    return build(load_config(folder / "f.toml")).model


@pytest.mark.parametrize("function", ["build", "seeded"])
class TestAModelThatIsDrawn:
    def test_follows_from_the_secret(self, function, tmp_path, monkeypatch):
        words = {"function": function}
        one = weights(configured(tmp_path, monkeypatch, **words))
        assert same(one, weights(configured(tmp_path, monkeypatch, **words)))
        for change in ({"secret": "two"}, {"seed": 1}):
            other = weights(configured(tmp_path, monkeypatch, **words, **change))
            assert not any(bool((tensor == other[name]).any()) for name, tensor in one.items())

    def test_is_drawn_by_nobody_who_has_the_function_and_tries_seeds(
        self, function, tmp_path, monkeypatch
    ):
        base = weights(configured(tmp_path, monkeypatch, function=function))
        import net_for_invariants

        for seed in range(200):
            torch.manual_seed(seed)
            guess = read_state(getattr(net_for_invariants, function)())
            assert not any(bool((tensor == guess[name]).any()) for name, tensor in base.items())


class Half(FedAvg):
    """Sends one layer; says nothing of who holds the others."""

    name = "fedavg"

    def tensors(self, model):
        return {n: t for n, t in read_state(model).items() if n.startswith("1.")}


class Known(Half):
    clients_hold_rest = True


class TestBeforeTheFirstMessage:
    def test_a_client_has_zeros_also_of_what_is_never_sent(self):
        run = federation(mlp(), scheme=Half())
        held = read_state(run.workplace().architecture)
        assert held.keys() == read_state(mlp()).keys()
        assert not any(bool(tensor.any()) for tensor in held.values())

    def test_unless_the_scheme_says_that_clients_hold_it(self):
        held = read_state(federation(mlp(), scheme=Known()).workplace().architecture)
        for name, tensor in weights(mlp()).items():
            expected = torch.zeros_like(tensor) if name.startswith("1.") else tensor
            assert torch.equal(held[name], expected)

    @pytest.mark.parametrize("kind", [Half, FedAvg, FedQSN])
    def test_nor_has_one_on_a_machine_of_its_own(self, kind, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
        folder = tmp_path / "partner"
        folder.mkdir()
        (folder / "net_of_partner.py").write_text(OWN)
        table = [{"image": [[float(n), 0.0], [0.0, 1.0]], "label": n % 2} for n in range(4)]
        (folder / "data.json").write_text(json.dumps(table))
        (folder / "partner.toml").write_text(
            '[partner]\nname = "a"\n[model]\nname = "net_of_partner:build"\n'
            '[data]\ntask = "image-classification"\ntrain = "data.json"\nlabels = ["0", "1"]\n'
        )
        config = dataclasses.replace(load_config(folder / "partner.toml"), scheme=kind())
        code = code_of(config)
        Approvals.of(folder).keep(folder, code.files.values(), code.functions)
        held = read_state(build_workplace(config).architecture)
        assert len(held) == 4
        assert not any(bool(tensor.any()) for tensor in held.values())
