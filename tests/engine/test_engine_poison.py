"""A reply of which no model comes costs its round, and never the run."""

import copy
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from engine_samples import filled, run_with, times
from torch import nn

import toys
from fedveil import (
    Bounds,
    CheckpointError,
    ConfigurationError,
    Evaluation,
    FedAvg,
    FedQSN,
    ImageClassification,
    Observer,
    RegMean,
    Training,
    TrainingError,
)
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.errors import FedveilWarning
from fedveil.run.checkpoint import CheckpointFolder
from fedveil.schemes.fedavg import FedAvgServer
from fedveil.training import Trainer
from fedveil.wire import Dense, Message
from toys import federation, same, weights

CLIENTS = {f"c{i}": toys.rows(6, seed=i) for i in range(4)}
TEST = toys.rows(12, seed=9)


def deep(seed=0):
    """Layer upon layer: large weights leave what float32 can hold."""
    torch.manual_seed(seed)
    middle = [layer for _ in range(8) for layer in (nn.Linear(96, 96), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 96), nn.ReLU(), *middle, nn.Linear(96, 3))


def built(**changes):
    settings = {"clients": CLIENTS, "scheme": FedAvg(), "test": TEST, "bounds": Bounds.none()}
    return federation(deep(), **{**settings, **changes})


def in_round(number, lie):
    """A client that lies in one round only."""

    def maybe(reply):
        return lie(reply) if reply.round == number else reply

    return {"c2": maybe}


POISON = {"1e6 everywhere": filled(1e6), "1e5 everywhere": filled(1e5)}


SCHEMES = {
    "fedavg": FedAvg(),
    "fedqsn": FedQSN(units="neurons"),
    "regmean": FedAvg(aggregation=RegMean()),
}


class Away(InTurn):
    """Clients of whom one gives no answer in one round."""

    def __init__(self, place, client, number):
        super().__init__(place)
        self._away = client, number

    def answers(self, jobs):
        for answer in super().answers(jobs):
            assert answer.reply is not None
            number = Message.from_bytes(bytearray(answer.reply)).round
            if (answer.client, number) == self._away:
                yield Answer(answer.client, None, TrainingError("away"))
            else:
                yield answer


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
class TestOneWhoPoisonsARound:
    def test_is_left_out_of_it_and_the_others_are_not(self, name, scheme, tmp_path):
        heard = []

        class Ear(Observer):
            def client_left_out(self, number, client, reason):
                heard.append((number, client))

        run = built(scheme=scheme, out=tmp_path, observer=Ear())
        result = run_with(run, in_round(2, POISON[name]), 3)
        assert heard == [(2, "c2")]
        assert [list(record.failed) for record in result.rounds] == [[], ["c2"], []]
        assert not any(record.rejected for record in result.rounds)
        assert "c2" not in result.rounds[1].bytes_up
        # The same as if it had not answered.
        other = built(scheme=scheme)
        expected = other.run(3, crew=Away(other.workplace(), "c2", 2))
        assert same(weights(result.global_model), weights(expected.global_model))
        # What is written down is JSON that anybody can read.
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)

    def test_is_seen_also_in_a_round_that_is_not_measured(self, name, scheme):
        words = {"scheme": scheme, "evaluation": Evaluation(every=0)}
        result = run_with(built(**words), in_round(1, POISON[name]), 2)
        assert list(result.rounds[0].failed) == ["c2"]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
class TestTwoWhoPoisonARound:
    def lies(self, number):
        def maybe(reply):
            return filled(1e6)(reply) if reply.round == number else reply

        return {"c1": maybe, "c2": maybe}

    def test_cost_the_round_and_are_named(self, scheme):
        heard = []

        class Ear(Observer):
            def round_rejected(self, number, reason):
                heard.append((number, reason))

        result = run_with(built(scheme=scheme, observer=Ear()), self.lies(2), 3)
        one, two, three = result.rounds
        assert (one.rejected, three.rejected) == ("", "")
        assert "c1" in two.rejected or "c2" in two.rejected
        assert heard == [(2, two.rejected)]
        assert two.measures["global"] == one.measures["global"]
        assert math.isfinite(three.measures["global"]["loss"])

    def test_leave_the_model_as_it_was(self, scheme):
        poisoned = run_with(built(scheme=scheme), self.lies(1), 1)
        assert same(weights(poisoned.global_model), weights(deep()))

    def test_and_the_run_goes_on_from_its_folder(self, scheme, tmp_path):
        whole = run_with(built(scheme=scheme), self.lies(2), 4)
        run_with(built(scheme=scheme, out=tmp_path), self.lies(2), 2)
        resumed = run_with(built(scheme=scheme, out=tmp_path), {}, 4, resume=True)
        assert same(weights(whole.global_model), weights(resumed.global_model))


def bomb(model, length):
    """The step of this length that raises the loss most, by gradient ascent."""
    model = copy.deepcopy(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = toys.rows(30, seed=7)
    images = torch.stack([row["image"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            size = math.sqrt(sum(float(g.square().sum()) for g in gradients)) or 1.0
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter += length / 10 * gradient / size
            step = {n: p - start[n] for n, p in model.named_parameters()}
            far = max(1.0, math.sqrt(sum(float(s.square().sum()) for s in step.values())) / length)
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + step[name] / far)
    return {n: p.detach() - start[n] for n, p in model.named_parameters()}


def trained():
    """A net that knows its task, so that its loss can rise."""
    model, task = toys.mlp(), ImageClassification()
    data = task.prepare(toys.rows(60, seed=50))
    Trainer(task, data, Training(steps=60, batch_size=8, learning_rate=0.02)).train(model, seed=0)
    return model


class TestWhoIsLeftOut:
    """The one without whom the round gives the best model: no larger update takes the blame."""

    def attack(self, model, size):
        def lie(reply):
            step = bomb(model, size)
            length = math.sqrt(sum(float(s.square().sum()) for s in step.values()))
            sections = {n: Dense(size / length * s) for n, s in step.items()}
            scalars = {**reply.scalars, "examples": 10**6}
            return replace(reply, sections=sections, scalars=scalars)

        return lie

    def lengths(self, clients, model, settings):
        """Of honest updates."""
        found = {}

        def look(reply):
            squares = (float(s.tensor.square().sum()) for s in reply.sections.values())
            found[reply.client] = math.sqrt(sum(squares))
            return reply

        run_with(federation(model, clients=clients, **settings), dict.fromkeys(clients, look))
        return found

    def run(self, count, larger, share, **settings):
        """Honest clients of whom c01 has a larger update, and one whose is a share of that."""
        model = trained()
        settings |= {
            "scheme": FedAvg(), "test": toys.rows(60, seed=99),
            "training": Training(steps=30, batch_size=4, learning_rate=0.01, schedule="constant"),
        }  # fmt: skip
        clients = {f"c{i:02d}": toys.rows(12, seed=i) for i in range(count)}
        lengths = self.lengths(clients, model, settings)
        hostile = f"c{count - 1:02d}"
        size = share * larger * lengths["c01"]
        lies = {"c01": times(larger), hostile: self.attack(model, size)}
        run = federation(model, clients=clients, **settings)
        return hostile, run_with(run, lies).rounds[0]

    @pytest.mark.parametrize(("larger", "share"), [(3.0, 0.9), (6.0, 0.7)])
    def test_of_three_it_is_not_the_honest_one_with_the_largest(self, larger, share):
        hostile, record = self.run(3, larger, share)
        assert set(record.failed) == {hostile}
        assert not record.rejected

    def test_of_three_of_whom_two_make_no_model_nobody_is_blamed(self):
        _, record = self.run(3, 12.0, 0.99)
        assert record.rejected
        assert not record.failed

    def test_of_many_it_is_found_though_another_is_larger(self):
        hostile, record = self.run(12, 3.0, 0.9, bounds=Bounds.none())
        assert set(record.failed) == {hostile}
        assert not record.rejected

    @pytest.mark.parametrize("share", [3.0, 20.0])
    def test_of_many_the_bounds_leave_none_to_be_found(self, share):
        hostile, record = self.run(12, 1.0, share)
        assert hostile in record.bounded
        assert not record.failed
        assert not record.rejected
        assert record.measures["global"]["loss"] < 1.0


class TestAVarianceBelowZero:
    """One number within every bound on an update's length, of which no batch norm makes a model."""

    @pytest.mark.parametrize(
        "scheme", [FedAvg(), FedQSN(units="neurons")], ids=["fedavg", "fedqsn"]
    )
    def test_costs_its_sender_the_round(self, scheme):
        def lie(reply):
            sections = {
                name: Dense(torch.full_like(section.tensor, -5.0))
                if name.endswith("running_var")
                else section
                for name, section in reply.sections.items()
            }
            return replace(reply, sections=sections)

        model = toys.convnet()
        largest = max(float(t.max()) for n, t in weights(model).items() if "running_var" in n)
        assert largest < 5.0
        result = run_with(federation(model, clients=CLIENTS, scheme=scheme), {"c2": lie}, 2)
        assert "variance" in result.rounds[0].failed["c2"]
        after = weights(result.global_model)
        assert all(bool((t >= 0).all()) for n, t in after.items() if "running_var" in n)


@dataclass(frozen=True)
class Overflowing(FedAvg):
    """Its second round has no finite step."""

    def server(self, model, secret):
        return OverflowingServer(self, model)


class OverflowingServer(FedAvgServer):
    def step(self, name):
        step = super().step(name)
        assert step is not None
        return step * math.inf if self._ledger.round == 2 else step


def test_a_weight_that_is_not_finite_needs_no_test_set_to_be_seen(tmp_path):
    run = built(scheme=Overflowing(), test=None, out=tmp_path)
    one, two, three = run.run(3).rounds
    assert "weight that is not finite" in two.rejected
    assert (one.rejected, three.rejected) == ("", "")
    assert all(
        bool(t.isfinite().all()) for t in weights(run.run(3, resume=True).global_model).values()
    )


def test_bounds_keep_the_round_where_one_of_several_is_hostile():
    result = run_with(built(bounds=Bounds()), in_round(1, filled(1e6)), 1)
    assert result.rounds[0].rejected == ""
    assert "c2" in result.rounds[0].bounded


class TestAPublicModel:
    def run(self, lies, rounds):
        words = {"public": deep(1), "owner": toys.rows(12, seed=8), "scheme": FedAvg()}
        return run_with(built(**words), lies, rounds)

    def test_is_taught_by_the_others_where_one_poisons_it(self):
        poisoned = self.run(in_round(1, filled(1e6)), 2)
        assert list(poisoned.rounds[0].failed) == ["c2"]
        assert poisoned.rounds[1].failed == {}
        assert math.isfinite(poisoned.rounds[1].measures["global"]["loss"])

    def test_goes_back_to_what_it_was_where_two_do(self):
        lies = {**in_round(1, filled(1e6)), "c1": in_round(1, filled(1e6))["c2"]}
        poisoned = self.run(lies, 2)
        assert "public" in poisoned.rounds[0].rejected
        assert poisoned.rounds[1].rejected == ""


class TestCheckpoints:
    def test_of_the_last_rounds_are_kept(self, tmp_path):
        built(out=tmp_path).run(5)
        assert CheckpointFolder(tmp_path / "checkpoints").rounds() == [3, 4, 5]
        built(out=tmp_path / "two", checkpoints=2).run(5)
        assert CheckpointFolder(tmp_path / "two" / "checkpoints").rounds() == [4, 5]

    def test_their_size_is_said(self, tmp_path):
        heard = []

        class Ear(Observer):
            def checkpoint_saved(self, number, nbytes, kept):
                heard.append((number, nbytes, kept))

        built(out=tmp_path, observer=Ear()).run(2)
        held = sum(f.stat().st_size for f in (tmp_path / "checkpoints" / "round-000002").iterdir())
        assert heard[1] == (2, held, 3)

    @pytest.mark.parametrize(
        "scheme",
        [FedAvg(update_bits=2, error_feedback=True), FedQSN(units="neurons", policy="fresh")],
        ids=["feedback", "masks"],
    )
    @pytest.mark.parametrize("number", [3, 4])
    def test_a_run_goes_back_to_one_and_on_to_the_same_result(self, scheme, number, tmp_path):
        whole = built(scheme=scheme).run(6)
        built(scheme=scheme, out=tmp_path).run(5)
        again = built(scheme=scheme, out=tmp_path).run(6, resume=True, from_round=number)
        assert same(weights(again.global_model), weights(whole.global_model))
        assert [record.round for record in again.rounds] == [1, 2, 3, 4, 5, 6]
        assert toys.metrics(tmp_path)[-1]["round"] == 6

    def test_what_a_client_did_after_it_is_gone(self, tmp_path):
        clean = built().run(3)
        poisoned = in_round(3, filled(0.5))
        run_with(built(out=tmp_path), poisoned, 3)
        honest = built(out=tmp_path).run(3, resume=True, from_round=2)
        assert same(weights(honest.global_model), weights(clean.global_model))

    def test_from_there_on_a_client_may_be_left_out_and_bounds_be_others(self, tmp_path):
        built(out=tmp_path).run(3)
        rest = {name: rows for name, rows in CLIENTS.items() if name != "c2"}
        later = built(out=tmp_path, clients=rest, bounds=Bounds())
        records = later.run(4, resume=True, from_round=2).rounds
        assert [sorted(record.bytes_down) for record in records[2:]] == [sorted(rest)] * 2

    def test_but_nothing_else(self, tmp_path):
        built(out=tmp_path).run(3)
        with pytest.raises(CheckpointError, match="'seed' differs"):
            built(out=tmp_path, seed=4).run(4, resume=True, from_round=2)
        with pytest.raises(CheckpointError, match="'bounds' differs"):
            built(out=tmp_path, bounds=Bounds()).run(4, resume=True)
        assert CheckpointFolder(tmp_path / "checkpoints").rounds() == [1, 2, 3]

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            ({"resume": True, "from_round": 1}, "expected 2 or 3 or 4, found 1"),
            ({"resume": True, "from_round": 9}, "Nothing would be run"),
            ({"resume": True, "from_round": 0}, "from_round"),
            ({"resume": True, "from_round": True}, "from_round"),
            ({"from_round": 2}, "is resumed"),
        ],
    )
    def test_a_round_that_nobody_can_go_back_to_is_refused(self, words, problem, tmp_path):
        built(out=tmp_path).run(4)
        with pytest.raises((CheckpointError, ConfigurationError), match=problem):
            built(out=tmp_path).run(5, **words)
        assert CheckpointFolder(tmp_path / "checkpoints").rounds() == [2, 3, 4]

    @pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "emptied"])
    def test_a_damaged_one_is_passed_over_for_the_one_before(self, damage, tmp_path):
        whole = built().run(5)
        built(out=tmp_path).run(4)
        harm(tmp_path / "checkpoints" / "round-000004", damage)
        told = r"^The checkpoint of round 4 is damaged \(.+\)\. Going on after round 3\.$"
        with pytest.warns(FedveilWarning, match=told):
            again = built(out=tmp_path).run(5, resume=True)
        assert same(weights(again.global_model), weights(whole.global_model))

    def test_who_cannot_resume_for_what_may_differ_is_told_how(self, tmp_path):
        built(out=tmp_path).run(4)
        with pytest.raises(CheckpointError, match="'bounds' differs") as caught:
            built(out=tmp_path, bounds=Bounds(weight=2.5)).run(5, resume=True)
        assert "go back with --from-round N, from where clients and bounds" in caught.value.fix
        with pytest.raises(CheckpointError, match="'seed' differs") as caught:
            built(out=tmp_path, seed=9).run(5, resume=True)
        assert "--from-round" not in caught.value.fix

    def test_of_a_round_that_is_gone_the_kept_ones_are_named(self, tmp_path):
        built(out=tmp_path).run(4)
        with pytest.raises(CheckpointError, match="expected 2 or 3 or 4") as caught:
            built(out=tmp_path).run(5, resume=True, from_round=1)
        assert caught.value.fix == (
            "Checkpoints of the last 3 rounds are kept (`checkpoints` in [federation])."
        )

    def test_only_if_all_are_damaged_the_run_is_lost(self, tmp_path):
        built(out=tmp_path).run(4)
        for number in (2, 3, 4):
            harm(tmp_path / "checkpoints" / f"round-{number:06d}", "cut")
        with pytest.raises(CheckpointError, match="damaged"):
            built(out=tmp_path).run(5, resume=True)


def harm(folder, damage):
    model, state = folder / "model.safetensors", folder / "state.json"
    data = bytearray(model.read_bytes())
    if damage == "cut":
        model.write_bytes(data[:-7])
    elif damage == "flipped":
        data[-3] ^= 1
        model.write_bytes(data)
    elif damage == "gone":
        state.unlink()
    else:
        state.write_text("")
