"""A reply of which no model comes costs its round, and never the run."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from engine_samples import filled, run_with
from torch import nn

import toys
from fedveil import (
    Bounds,
    CheckpointError,
    ConfigurationError,
    FedAvg,
    FedQSN,
    Observer,
    RegMean,
)
from fedveil.engine.checkpoint import CheckpointFolder
from fedveil.schemes.fedavg import FedAvgServer
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


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize(
    "scheme",
    [FedAvg(), FedQSN(units="neurons", client_mask=0.0), FedAvg(aggregation=RegMean())],
    ids=["fedavg", "fedqsn", "regmean"],
)
class TestAPoisonedRound:
    def test_is_not_applied_and_names_the_client(self, name, scheme, tmp_path):
        heard = []

        class Ear(Observer):
            def round_rejected(self, number, reason):
                heard.append((number, reason))

        whole = run_with(built(scheme=scheme), in_round(2, POISON[name]), 3)
        run = built(scheme=scheme, out=tmp_path, observer=Ear())
        result = run_with(run, in_round(2, POISON[name]), 3)
        one, two, three = result.rounds
        assert (one.rejected, three.rejected) == ("", "")
        assert "c2" in two.rejected
        assert "median" in two.rejected
        assert heard == [(2, two.rejected)]
        assert two.measures["global"] == one.measures["global"]
        assert math.isfinite(three.measures["global"]["loss"])
        assert same(weights(whole.global_model), weights(result.global_model))
        # What is written down is JSON that anybody can read.
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        for line in lines:
            json.loads(line, parse_constant=pytest.fail)

    def test_leaves_everything_as_a_round_that_was_never_used(self, name, scheme):
        # What comes afterwards begins from the same weights, the same masks, the next number.
        poisoned = run_with(built(scheme=scheme), in_round(1, POISON[name]), 1)
        assert same(weights(poisoned.global_model), weights(deep()))


@dataclass(frozen=True)
class Overflowing(FedAvg):
    """Its second round has no finite step."""

    def server(self, model, secret):
        return OverflowingServer(self, model)


class OverflowingServer(FedAvgServer):
    def step(self, name):
        step = super().step(name)
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
    def test_that_is_poisoned_goes_back_to_what_it_was(self):
        def run(lies, rounds):
            words = {"public": deep(1), "owner": toys.rows(12, seed=8), "scheme": FedAvg()}
            return run_with(built(**words), lies, rounds)

        poisoned = run(in_round(1, filled(1e6)), 1)
        assert "public" in poisoned.rounds[0].rejected
        assert same(weights(poisoned.global_model), weights(deep()))
        later = run(in_round(1, filled(1e6)), 2)
        assert later.rounds[1].rejected == ""
        assert later.rounds[1].metrics["taught"] >= 0


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
        with pytest.warns(UserWarning, match="goes on after round 3"):
            again = built(out=tmp_path).run(5, resume=True)
        assert same(weights(again.global_model), weights(whole.global_model))

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
