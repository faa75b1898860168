"""The owner repeats its tuning on what clients taught the public model."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transfer_samples import ONCE, OWNER, TEXTS, first, sent, transfer, tuned

import toys
from fedveil import (
    CheckpointError,
    ConfigurationError,
    DataError,
    FedAvg,
    ImageClassification,
    Training,
    TrainingError,
    Tuning,
)
from fedveil.schemes.transfer import COEFFICIENTS, STRETCHES
from fedveil.training import Trainer


def tune(state):
    """What an owner's tuning might do."""
    return {n: t * 1.5 + 0.25 if t.is_floating_point() else t for n, t in state.items()}


def first_stretch(stretch):
    """A judge who prefers a model on the way to what tuning makes."""
    losses = iter([2.0] * len(COEFFICIENTS) + [float(one != stretch) for one in STRETCHES])
    return lambda state: next(losses)


def worse_afterwards(judge):
    """For whom nothing is better than what the first judge has seen."""

    def judged(state):
        try:
            return judge(state)
        except StopIteration:
            return 9.0

    return judged


def named_tuned():
    """A model whose tensors are called as if they were tuned."""
    model = nn.Sequential()
    model.add_module("tuned", nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()))
    model.add_module("head", nn.Linear(8, 3))
    return model


class TestTheOwnerRepeatsHisTuning:
    @pytest.mark.parametrize("kind", sorted(toys.MODELS))
    @pytest.mark.parametrize("stretch", STRETCHES)
    def test_on_what_was_taught_and_goes_as_far_as_his_data_say(self, kind, stretch):
        public = toys.MODELS[kind](0)
        judge = first_stretch(stretch)
        server = transfer(FedAvg(), public, tuned(public, 7), judge=judge, tune=tune)
        sent(server, public, FedAvg(), rounds=1)
        taught = server.state().tensors
        assert server.state().values["coefficients"] == [0.0, 1.0]
        for name, tensor in server.final().items():
            if tensor.is_floating_point():
                wanted = taught[name] + stretch * (0.5 * taught[name] + 0.25)
                torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
        assert toys.same(server.view("global"), server.final())

    def test_or_leaves_it(self):
        public = toys.bert()
        server = transfer(FedAvg(), public, tuned(public, 7), judge=first(0.5, 1.0))
        tuning = transfer(
            FedAvg(), public, tuned(public, 7), tune=tune,
            judge=worse_afterwards(first(0.5, 1.0)),
        )  # fmt: skip
        for one in (server, tuning):
            sent(one, public, FedAvg(), rounds=1)
        assert toys.same(server.final(), tuning.final())

    def test_a_tuning_that_fails_loses_nothing(self):
        def fail(state):
            raise TrainingError("The loss is not finite")

        public = toys.bert()
        server = transfer(FedAvg(), public, tuned(public, 7), judge=first(1.0, 1.0), tune=fail)
        with pytest.warns(UserWarning, match="left out: The loss is not finite"):
            sent(server, public, FedAvg(), rounds=1)
        plain = transfer(FedAvg(), public, tuned(public, 7), judge=first(1.0, 1.0))
        sent(plain, public, FedAvg(), rounds=1)
        assert toys.same(server.final(), plain.final())

    @pytest.mark.parametrize("stretch", [0.0, 0.5])
    @pytest.mark.parametrize("make", [toys.convnet, named_tuned], ids=["convnet", "tuned.tuned"])
    def test_a_state_holds_what_was_chosen(self, stretch, make):
        public = make()
        judge = first_stretch(stretch) if stretch else first(0.5, 1.0)
        server = transfer(FedAvg(), public, tuned(public, 7), judge=worse_afterwards(judge),
                          tune=tune)  # fmt: skip
        sent(server, public, FedAvg(), rounds=1)
        other = transfer(FedAvg(), public, tuned(public, 7), tune=tune)
        other.restore(server.state())
        assert toys.same(server.final(), other.final())
        assert server.state().values == other.state().values

    def test_and_no_backbone_that_is_frozen(self):
        public = toys.mlp()
        public[1].requires_grad_(False)
        own = tuned(public, 7)
        server = transfer(FedAvg(), public, own, judge=first_stretch(1.0), tune=tune)
        server.begin_round(1)
        assert server.end_round()["tuned"] == 1.0
        held = {name.removeprefix(".tuned.") for name in server.state().tensors}
        assert held == {name for name in toys.weights(own) if not name.startswith("1.")}
        assert torch.equal(server.final()["1.weight"], toys.weights(own)["1.weight"])

    def test_in_double_precision_nothing_is_rounded(self):
        public = toys.mlp().double()
        server = transfer(FedAvg(), public, tuned(public, 7), judge=first_stretch(1.0), tune=tune)
        sent(server, public, FedAvg(), rounds=1)
        taught = server.state().tensors
        for name, tensor in server.final().items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, tune(taught)[name], atol=1e-12, rtol=0)

    def test_from_what_has_nothing_to_do_with_his_model(self):
        rows, training = toys.rows(60, seed=9), Training(30, batch_size=4, learning_rate=0.05)
        own = toys.mlp(3)
        short = replace(training, steps=4)
        Trainer(ImageClassification(num_labels=3), rows, short).train(own, seed=1)
        runs = {
            name: toys.federation(
                own, public=toys.mlp(5), owner=toys.rows(30, seed=10), scheme=ONCE,
                training=short, test=toys.rows(90, seed=8), **more,
            ).run()
            for name, more in {"sums": {}, "tuned": {"tuning": Tuning(rows, training)}}.items()
        }  # fmt: skip
        reached = {name: run.rounds[0].measures["global"]["loss"] for name, run in runs.items()}
        assert reached["tuned"] < reached["sums"]
        assert runs["tuned"].rounds[0].metrics["tuned"] > 0
        assert "tuned" not in runs["sums"].rounds[0].metrics

    def test_no_byte_depends_on_it_and_a_resumed_run_is_the_same(self, tmp_path):
        public, kept, models = toys.bert(), [], []
        own = tuned(public, 7)
        for seed in (1, 2):
            out = tmp_path / str(seed)
            tuning = Tuning(toys.texts(12, seed=seed), Training(2, batch_size=4))
            run = {"public": public, "out": out, "tuning": tuning, "keep_messages": True, **TEXTS}
            toys.federation(own, **run).run(1)
            resumed = toys.federation(own, **run).run(2, resume=True)
            whole = toys.federation(own, **{**run, "out": None, "keep_messages": False}).run(2)
            models.append(toys.weights(resumed.global_model))
            assert toys.same(models[-1], toys.weights(whole.global_model))
            kept.append({n: d for n, d in toys.files(out).items() if n.startswith("messages")})
        assert kept[0] == kept[1]
        assert len(kept[0]) == 2 * 2 * 3

    def test_a_run_is_not_resumed_with_another_tuning(self, tmp_path):
        own, rows = tuned(toys.bert(), 7), toys.texts(12, seed=1)
        run = {"public": toys.bert(), "out": tmp_path, **TEXTS}
        toys.federation(own, tuning=Tuning(rows, Training(2)), **run).run(1)
        for other in ({"tuning": Tuning(rows, Training(3))}, {}):
            with pytest.raises(CheckpointError, match="configuration"):
                toys.federation(own, **other, **run).run(2, resume=True)

    def test_his_rows_and_settings_are_looked_at_first(self):
        run = {"public": toys.mlp(), **OWNER}
        with pytest.raises(DataError, match="the rows of the owner's tuning"):
            toys.federation(toys.mlp(), tuning=Tuning([{"image": 1}], Training()), **run)
        frozen = Training(frozen=("nothing.*",))
        with pytest.raises(ConfigurationError, match=r"nothing\.\*"):
            toys.federation(toys.mlp(), tuning=Tuning(toys.rows(8), frozen), **run)
        with pytest.raises(ConfigurationError, match="no public model"):
            toys.federation(toys.mlp(), tuning=Tuning(toys.rows(8), Training()))
