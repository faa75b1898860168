"""The comparison of recipes: that it runs and counts right, and what was tried is what it says."""

import importlib
import json

import pytest
import torch
from torch import nn

import toys
from fedveil.schemes import FedAvg, FedQSN
from fedveil.state import read_state
from fedveil.tasks import ImageClassification
from fedveil.training import Training

NAMES = ("tried", "recipes", "scenes", "retuning", "pool", "tables", "run", "leads")


@pytest.fixture(scope="module")
def modules():
    """Its modules by name."""
    return {
        "results": importlib.import_module("studies.results"),
        **{name: importlib.import_module(f"studies.fedqsn.{name}") for name in NAMES},
    }


@pytest.fixture
def scene(modules):
    """Of no size: an owner, ten clients, and a public model."""
    task = ImageClassification(num_labels=3)
    data = {f"c{number}": task.prepare(toys.rows(8, number)) for number in range(10)}
    plan = modules["scenes"].Plan(2, 5, Training(steps=2, batch_size=4, learning_rate=0.05))
    own, test = task.prepare(toys.rows(12, 50)), task.prepare(toys.rows(40, 60))
    return modules["scenes"].Scene(
        toys.mlp(1), toys.mlp(0), task, own, own, data, test, plan, plan.training
    )


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

    def test_a_ternary_matrix_has_three_values(self, modules):
        base = read_state(toys.mlp())
        for name, tensor in released(modules["tried"].Ternary())["a", 1].items():
            if tensor.ndim > 1:
                scale = float(base[name].abs().mean())
                assert sorted(set(tensor.flatten().tolist())) == pytest.approx([-scale, 0, scale])
                assert float((tensor - base[name]).abs().mean()) < scale
            else:
                assert torch.equal(tensor, base[name])

    def test_a_layer_that_is_held_is_another_for_clients_and_stays_for_the_owner(self, modules):
        base, scheme = read_state(toys.mlp()), modules["tried"].Held(layers=("1.*",))
        sent = released(scheme)
        held = {name for name in base if name.startswith("1.")}
        for name in base:
            one, other, later = sent["a", 1][name], sent["b", 1][name], sent["a", 2][name]
            assert torch.equal(one, other)
            assert torch.equal(one, base[name]) == (name not in held)
            assert torch.equal(one, later) == (name in held)
        server = scheme.server(toys.mlp(), toys.SECRET)
        server.begin_round(1)
        reply = toys.reply_of(scheme, server.release("a"), toys.bare(toys.mlp()), toys.Nudge(1))
        server.absorb("a", reply, 1.0)
        server.end_round()
        same = {name for name, tensor in server.final().items() if torch.equal(tensor, base[name])}
        assert same == held

    def test_masks_that_rise_with_depth(self, modules):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(),
            nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 3),
        )  # fmt: skip
        scheme = modules["tried"].Deepening.once(server_mask=0.2)
        server = scheme.server(model, toys.SECRET)
        kept = [len(units) for units in server._masks.server().values()]
        assert kept == [50, 40, 30]
        server.begin_round(1)
        assert server.release("a").nbytes < _plain_bytes(model)

    @pytest.mark.parametrize("name", ["momentum", "adam"])
    def test_a_server_with_an_optimizer_follows_the_mean_update(self, modules, name):
        models = {}
        for scheme in (FedQSN(), modules["tried"].WithOptimizer(optimizer=name)):
            server = scheme.server(toys.mlp(), toys.SECRET)
            for number in (1, 2):
                server.begin_round(number)
                message = server.release("a")
                reply = toys.reply_of(scheme, message, toys.bare(toys.mlp()), toys.Nudge(3, 0.05))
                server.absorb("a", reply, 1.0)
                server.end_round()
                models[type(scheme).__name__, number] = server.final()
        base = read_state(toys.mlp())
        for key in base:
            plain = [models["FedQSN", number][key] - base[key] for number in (1, 2)]
            mine = [models["WithOptimizer", number][key] - base[key] for number in (1, 2)]
            if name == "momentum":
                torch.testing.assert_close(mine[0], plain[0])
            elif plain[0].abs().max() > 0.01:
                assert float(mine[0].abs().max()) <= 0.0101
            moved = plain[0] != 0
            assert torch.equal(mine[0][moved].sign(), plain[0][moved].sign())
            assert plain[1].norm() == 0 or mine[1].norm() > mine[0].norm()


def _plain_bytes(model):
    server = FedQSN.once(server_mask=0.0).server(model, toys.SECRET)
    server.begin_round(1)
    return server.release("a").nbytes


@pytest.mark.parametrize(
    "name",
    ["FedAvg", "FedAvg, tuned again", "public", "once, 20 %", "noise of 1"],
)
def test_a_recipe_runs_and_its_figures_are_those_of_its_attacks(modules, scene, name):
    recipes = {**modules["recipes"].recipes_of("bbc"), **modules["recipes"].recipes_of("digits")}
    found = modules["run"].run(scene, recipes[name], 0, full=False)
    json.dumps(found)
    assert 0 <= found["B"] <= 100
    assert bool(found["attacks"]) == recipes[name].attacked
    for attack in found["attacks"].values():
        alone = [v for kind, v in attack["kinds"].items() if kind.startswith("own data")]
        stolen = [v for kind, v in attack["kinds"].items() if not kind.startswith("own data")]
        assert (attack["A"], attack["O"]) == (max(stolen), max(alone))


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
        blank = {"metric": "accuracy", "B": base, "attacks": {}, "seconds": [1000, 800]}
        results.add("bbc: FedAvg", seed, {**blank, "G": far})
        attack = {"A": reached, "O": own}
        results.add("bbc: public", seed, {**blank, "G": end, "attacks": {"1": attack, "3": attack}})
    found = modules["tables"].summary(results, "bbc")["public"]
    assert found["kept"] == pytest.approx(1.0)
    assert found["attacks"][1]["leak"] == pytest.approx((60 - 45) / (85 - 45))
    assert found["attacks"][1]["range"] == pytest.approx([20 / 50, 10 / 30])
    assert found["attacks"][1]["own gain"] == pytest.approx((45 - 55) / (85 - 55))
    assert found["attacks"][1]["gain"] == pytest.approx((60 - 55) / (85 - 55))
    assert "| public | 85.0 (90.0, 80.0) | 100 % |" in modules["tables"].table(results, "bbc")
    page = modules["tables"].page(results)
    assert "took 2.0 hours of one core" in page
    assert "B by seed: 50.0, 60.0 (accuracy)" in page
    assert "| bbc | public | 55.0 | 85.0 | 85.0 | 100 % | 38 % | 38 % | 2 |" in page
    modules["tables"].draw(results, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_ways_to_learn_stand_side_by_side_in_the_order_of_seeds(modules, tmp_path):
    results = modules["results"].Results(tmp_path)
    for seed in (2, 0, 1):
        results.add("bbc, as ever", seed, {"B": 50.0 + seed, "P + X": 60.0})
    results.add("bbc, own classes", 0, {"B": 50.0, "P + X": 61.0})
    lines = modules["leads"].table(results, "bbc").splitlines()
    assert lines[0] == "|  | as ever | own classes |"
    assert lines[2] == "| B | 51.0 (50.0, 51.0, 52.0) | 50.0 (50.0) |"
    assert lines[3] == "| P + X | 60.0 (60.0, 60.0, 60.0) | 61.0 (61.0) |"
