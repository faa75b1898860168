"""The comparison of recipes: that it runs and counts right, and what was tried is what it says."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import toys
from fedveil.schemes import FedAvg
from fedveil.state import read_state
from fedveil.training import ImageClassification, Training

HOME = Path(__file__).parents[2]
FOLDERS = (HOME / "publications" / "fedqsn", HOME / "benchmarks")
NAMES = ("results", "tried", "recipes", "scenes", "tables", "run", "leads")


@pytest.fixture(scope="module")
def modules():
    """Its modules by name, of which others have the same."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    path = sys.path[:]
    sys.path[:0] = map(str, FOLDERS)
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path[:] = path
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module})


@pytest.fixture
def scene(modules):
    """Of no size: an owner, ten clients, and a public model."""
    task = ImageClassification(num_labels=3)
    data = {f"c{number}": task.prepare(toys.rows(8, number)) for number in range(10)}
    plan = modules["scenes"].Plan(2, 5, Training(steps=2, batch_size=4, learning_rate=0.05))
    own, test = task.prepare(toys.rows(12, 50)), task.prepare(toys.rows(40, 60))
    return modules["scenes"].Scene(toys.mlp(1), toys.mlp(0), task, own, own, data, test, plan)


def released(scheme, rounds=2):
    """By client and round, what two clients were sent: tensors by name."""
    server, sent = scheme.server(toys.mlp(), toys.SECRET), {}
    for number in range(1, rounds + 1):
        server.begin_round(number)
        for client in ("a", "b"):
            message = server.release(client)
            sent[client, number] = {name: part.tensor for name, part in message.sections.items()}
            reply = toys.reply_of(scheme, message, toys.bare(toys.mlp()), toys.Nudge(seed=number))
            server.absorb(client, reply, 1.0)
        server.end_round()
    return sent


class TestTried:
    def test_none_or_all_of_the_gain(self, modules):
        lagging, plain = modules["tried"].Lagging, released(FedAvg())
        base = read_state(toys.mlp())
        assert all(toys.same(tensors, base) for tensors in released(lagging(shown=0.0)).values())
        for place, tensors in released(lagging(shown=1.0)).items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, plain[place][name])

    def test_half_of_the_gain(self, modules):
        base, sent = read_state(toys.mlp()), released(modules["tried"].Lagging(shown=0.5))
        assert toys.same(sent["a", 1], base)
        moved = [not torch.equal(tensor, base[name]) for name, tensor in sent["a", 2].items()]
        assert all(moved)

    def test_noise_is_the_clients_own_and_the_same_in_every_round(self, modules):
        sent = released(modules["tried"].Distorted(noise=0.5))
        base, plain = read_state(toys.mlp()), released(FedAvg())
        for name in (name for name, tensor in base.items() if tensor.ndim > 1):
            one, other = (sent[client, 1][name] - base[name] for client in "ab")
            again = sent["a", 2][name] - plain["a", 2][name]
            assert float(one.std() / base[name].std()) == pytest.approx(0.5, rel=0.2)
            torch.testing.assert_close(one, again, atol=1e-5, rtol=1e-4)
            assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.2


@pytest.mark.parametrize("name", ["FedAvg", "public", "once, 20 %", "noise of 1"])
def test_a_recipe_runs_and_its_figures_are_those_of_its_attacks(modules, scene, name):
    recipes = {**modules["recipes"].recipes_of("bbc"), **modules["recipes"].recipes_of("digits")}
    found = modules["run"].run(scene, recipes[name], 0, full=False)
    json.dumps(found)
    assert 0 <= found["B"] <= 100
    assert bool(found["attacks"]) == (name != "FedAvg")
    for attack in found["attacks"].values():
        alone = [v for kind, v in attack["kinds"].items() if kind.startswith("own data")]
        stolen = [v for kind, v in attack["kinds"].items() if not kind.startswith("own data")]
        assert (attack["A"], attack["O"]) == (max(stolen), max(alone))
        if attack["leak"] is not None:
            share = (attack["A"] - attack["O"]) / (found["G"] - attack["O"])
            assert attack["leak"] == pytest.approx(share)


def test_every_recipe_of_every_scene_can_be_begun(modules, scene):
    for name in modules["scenes"].SCENES:
        for recipe in modules["recipes"].recipes_of(name).values():
            if recipe.scheme.name != "fedlpp":
                assert recipe.scheme.server(scene.base, toys.SECRET).views
            plan = scene.plan.at_once(10, recipe.releases or 1, recipe.work)
            assert plan.clients_per_round == 10
            assert plan.training.steps >= 1


def test_all_at_once_is_the_same_work(modules):
    plan = modules["scenes"].Plan(5, 8, Training(steps=10))
    assert plan.at_once(10).training.steps == 40
    assert plan.at_once(10, 2).training.steps == 20
    assert plan.at_once(10, 1, 3.0).training.steps == 120
    assert (plan.at_once(10, 2).rounds, plan.at_once(10, 2).clients_per_round) == (2, 10)


def test_shares_are_of_means_over_seeds(modules, tmp_path):
    results = modules["results"].Results(tmp_path)
    for seed, (base, far, reached, own, end) in enumerate(
        [(50, 90, 60, 40, 90), (60, 80, 60, 50, 80)]
    ):
        blank = {"metric": "accuracy", "B": base, "attacks": {}}
        results.add("bbc: FedAvg", seed, {**blank, "G": far})
        attack = {"A": reached, "O": own, "leak": 0.4}
        results.add("bbc: public", seed, {**blank, "G": end, "attacks": {"1": attack, "3": attack}})
    found = modules["tables"].summary(results, "bbc")["public"]
    assert found["kept"] == pytest.approx(1.0)
    assert found["attacks"][1]["leak"] == pytest.approx((60 - 45) / (85 - 45))
    assert found["attacks"][1]["gain"] == pytest.approx((60 - 55) / (85 - 55))
    assert "| public | 85.0 (90.0, 80.0) | 100 % |" in modules["tables"].table(results, "bbc")
    modules["tables"].draw(results, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
