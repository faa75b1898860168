"""Attacks on messages whose truth is known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from audit_samples import CLIENTS, Recorded, across_units, net, stochastic

import toys
from fedveil.audit import Evidence
from fedveil.audit.attacks import (
    FACTORS,
    SHARES,
    PartialModel,
    average,
    distil,
    extrapolate,
    federate,
    fine_tune,
    impute,
    infer_updates,
    interpolate,
    lacks_classes,
    pool,
    reconstruct,
    restricted,
    scale_task_vector,
)
from fedveil.audit.attacks.fine_tuning import PIECES
from fedveil.quantization import quantize
from fedveil.schemes import FedAvg, FedQSN
from fedveil.state import load_state
from fedveil.tasks import ImageClassification
from fedveil.training import Training, evaluate

EXACT: dict[str, Any] = {"units": "neurons", "server_mask": 0.2, "client_mask": 0.5, "bits": None}


def error(state, truth, where=None):
    """Relative, over the elements at `where`."""
    apart = size = 0.0
    for name, wanted in truth.items():
        mask = torch.ones_like(wanted, dtype=torch.bool) if where is None else where[name]
        apart += float((state[name] - wanted)[mask].square().sum())
        size += float(wanted[mask].square().sum())
    return (apart / size) ** 0.5


def drift(number, tensors):
    """The model moves by the same amount in each round."""
    if number > 1:
        for name, tensor in tensors.items():
            torch.manual_seed(len(name))
            tensor += 0.1 * torch.randn(tensor.shape)


class TestPooling:
    def test_holds_the_newest_value_of_all_that_was_ever_shown(self, tmp_path):
        recorder = Recorded(tmp_path, FedQSN(**EXACT, policy="fresh"), move=drift)
        evidence = recorder.play(4)
        held = pool(evidence, evidence.proxies(["a"]))
        newest = {n: torch.zeros(t.shape) for n, t in recorder.truth[1].items()}
        for kept in evidence.proxies(["a"]):
            selection = evidence.open(kept).selection
            for name, tensor in recorder.truth[kept.round].items():
                selection.scatter(name, selection.gather(name, tensor), newest[name])
        for name, tensor in newest.items():
            assert torch.equal(held.values[name], tensor)
            assert torch.equal(held.values[name] != 0, held.known[name])

    @pytest.mark.parametrize(("policy", "grows"), [("fresh", True), ("sticky", False)])
    def test_over_rounds_it_grows_under_fresh_masks_alone(self, tmp_path, policy, grows):
        evidence = Recorded(tmp_path, FedQSN(**EXACT, policy=policy)).play(5)
        shares = [pool(evidence, evidence.proxies(["a"])[:n]).share() for n in (1, 5)]
        assert (shares[1] > shares[0] + 0.2) is grows

    def test_a_coalition_holds_what_its_masks_differ_in(self, tmp_path):
        evidence = Recorded(tmp_path, FedQSN(**EXACT, policy="sticky")).play(1)
        alone = pool(evidence, evidence.proxies(["a"]))
        together = pool(evidence, evidence.proxies(CLIENTS))
        assert together.share() > alone.share() + 0.2
        for name in alone.known:
            assert (together.known[name] | ~alone.known[name]).all()

    def test_what_is_under_the_server_mask_is_in_nobodys(self, tmp_path):
        recorder = Recorded(tmp_path, FedQSN(**EXACT, policy="fresh"))
        evidence = recorder.play(6)
        known = pool(evidence, evidence.proxies()).known["1.bias"]
        assert int((~known).sum()) == round(0.2 * 256)


class TestImputation:
    def test_holes_are_filled_and_nothing_else(self, tmp_path):
        recorder = Recorded(tmp_path, FedQSN(**EXACT))
        evidence = recorder.play(1)
        held = pool(evidence, evidence.proxies(["a"]))
        public = toys.weights(net(seed=5))
        state = impute(held, evidence.manifest, public)
        for name, tensor in state.items():
            known = held.known[name]
            assert torch.equal(tensor[known], recorder.truth[1][name][known])
            assert torch.equal(tensor[~known], public[name][~known])
        zeros = impute(held, evidence.manifest)
        assert all((zeros[name][~held.known[name]] == 0).all() for name in zeros)

    def test_a_public_base_gives_away_all_that_training_did_not_change(self, tmp_path):
        recorder = Recorded(tmp_path, FedQSN(**EXACT))
        evidence = recorder.play(1)
        held = pool(evidence, evidence.proxies(["a"]))
        state = impute(held, evidence.manifest, toys.weights(net()))
        assert error(state, recorder.truth[1]) == 0


class TestManyViews:
    PLAIN = FedQSN(units="neurons", policy="sticky", client_mask=0.0, server_mask=0.1, bits=4)

    def released_error(self, held, recorder, last):
        return error(held.values, recorder.truth[last], held.known)

    @pytest.mark.parametrize("collect", [average, reconstruct])
    def test_of_deterministic_rounding_gain_nothing(self, tmp_path, collect):
        recorder = Recorded(tmp_path, self.PLAIN)
        evidence = recorder.play(6)
        sent = evidence.proxies()
        one = self.released_error(pool(evidence, sent), recorder, 6)
        many = self.released_error(collect(evidence, sent), recorder, 6)
        assert many == pytest.approx(one, rel=1e-3)

    def test_of_stochastic_rounding_average_gains_much(self, tmp_path):
        scheme = replace(self.PLAIN, bits=None)
        one, many = self.gain(tmp_path, scheme, stochastic, average)
        assert many < 0.6 * one

    @pytest.mark.parametrize(("collect", "left"), [(average, 0.95), (reconstruct, 0.75)])
    def test_of_blocks_across_units_gain_much(self, tmp_path, collect, left):
        # What else is in a block changes with the mask, and with it the scale.
        scheme = FedQSN(
            units="neurons", policy="fresh", server_mask=0.0, client_mask=0.5, bits=None
        )
        one, many = self.gain(tmp_path, scheme, across_units, collect)
        assert many < left * one

    def gain(self, folder, scheme, spoil, collect):
        """Relative error of the newest value, and of what is made of twelve rounds."""
        recorder = Recorded(folder, scheme, spoil=spoil)
        evidence = recorder.play(12)
        sent = evidence.proxies()
        models = pool(evidence, sent), collect(evidence, sent)
        return [self.released_error(held, recorder, 12) for held in models]

    def test_reconstruction_forgets_what_the_model_was_before(self, tmp_path):
        def jump(number, tensors):
            if number == 4:
                tensors["1.weight"] += 1.0

        recorder = Recorded(tmp_path, self.PLAIN, move=jump)
        evidence = recorder.play(4)
        sent = evidence.proxies()
        newest = self.released_error(pool(evidence, sent), recorder, 4)
        assert self.released_error(reconstruct(evidence, sent), recorder, 4) <= 1.01 * newest
        assert self.released_error(average(evidence, sent), recorder, 4) > 2 * newest

    def test_an_interval_holds_its_value(self):
        torch.manual_seed(0)
        for bits in (2, 3, 4, 8):
            for axis in (0, 1):
                weight = torch.randn(40, 70) * torch.rand(40, 1).pow(9)
                weight[:, :5] *= 1e-3
                packed = quantize(weight, bits=bits, axis=axis, block=16)
                low, high = packed.interval()
                assert ((low <= weight + 1e-7) & (weight - 1e-7 <= high)).all()
                middle = packed.dequantize()
                assert ((low <= middle) & (middle <= high)).all()


class TestWeightExtrapolation:
    def test_guesses_a_model_that_moves_evenly(self, tmp_path):
        scheme = FedQSN(
            units="neurons", policy="sticky", server_mask=0.0, client_mask=0.0, bits=None
        )
        recorder = Recorded(tmp_path, scheme, move=drift)
        evidence = recorder.play(3)
        coming = {n: 2 * recorder.truth[3][n] - recorder.truth[2][n] for n in recorder.truth[3]}
        guess = extrapolate(evidence, evidence.proxies(["a"]))
        assert error(guess.values, coming) < 1e-5
        assert error(pool(evidence, evidence.proxies(["a"])).values, coming) > 0.05

    def test_is_the_pooled_model_where_there_was_one_release(self, tmp_path):
        evidence = Recorded(tmp_path, FedQSN(**EXACT)).play(1)
        sent = evidence.proxies()
        for name, value in pool(evidence, sent).values.items():
            assert torch.equal(extrapolate(evidence, sent).values[name], value)


class TestFineTuning:
    TASK = ImageClassification(num_labels=3)
    TRAINING = Training(steps=15, batch_size=8, learning_rate=5e-3)

    def test_fine_tuning_makes_a_model_better_on_data_like_its_own(self):
        data, model = self.TASK.prepare(toys.rows(60)), net()
        tuned = fine_tune(model, self.TASK, data, self.TRAINING, toys.weights(net()))
        load_state(model, tuned.state)
        after = evaluate(model, self.TASK, data)["loss"]
        assert after < evaluate(net(), self.TASK, data)["loss"]
        assert 0 < tuned.pieces <= PIECES

    def test_fine_tuning_stops_before_it_does_harm(self):
        # A rate so high that every step makes it worse.
        wild = Training(steps=5, batch_size=8, learning_rate=1.0, optimizer="sgd")
        start = toys.weights(net())
        data = self.TASK.prepare(toys.rows(40))
        tuned = fine_tune(net(), self.TASK, data, wild, start)
        if tuned.pieces == 0:
            assert all(torch.equal(tuned.state[name], start[name]) for name in start)

    def test_fine_tuning_takes_a_single_example(self):
        data = self.TASK.prepare(toys.rows(1))
        assert fine_tune(net(), self.TASK, data, self.TRAINING, toys.weights(net())).state

    def test_fine_tuning_repeats_itself(self):
        data = self.TASK.prepare(toys.rows(20))
        one, other = (
            fine_tune(net(), self.TASK, data, self.TRAINING, toys.weights(net())) for _ in range(2)
        )
        assert toys.same(one.state, other.state)

    def test_a_student_learns_its_teachers_answers_without_labels(self):
        rows = toys.rows(80)
        task, data = self.TASK, self.TASK.prepare(rows)
        teacher = fine_tune(net(), task, data, self.TRAINING, toys.weights(net())).state
        student = distil(net(), task, data, self.TRAINING, teacher, toys.weights(net(seed=9))).state
        images = torch.stack([row["image"] for row in rows])
        answers = []
        for state in (teacher, student, toys.weights(net(seed=9))):
            model = net()
            model.load_state_dict(state)
            answers.append(model(images).argmax(1))
        agree = [(answers[0] == other).float().mean() for other in answers[1:]]
        assert agree[0] > 0.8
        assert agree[0] > agree[1] + 0.2


class TestRestrictedSoftmax:
    TASK = ImageClassification(num_labels=3)

    def mine(self):
        """All classes but one."""
        rows = [row for row in toys.rows(150, 3) if row["label"] != 1]
        return self.TASK.prepare(rows[:60])

    @pytest.mark.parametrize("own_classes", [False, True])
    def test_keeps_of_the_other_classes_what_fine_tuning_loses(self, own_classes):
        test, model = self.TASK.prepare(toys.rows(300, seed=50)), net()
        everything = self.TASK.prepare(toys.rows(300, 1))
        taught = Training(steps=30, batch_size=16, learning_rate=5e-3)
        torch.manual_seed(0)
        stolen = {  # as if released with few bits
            name: tensor + tensor.std() * torch.randn_like(tensor)
            for name, tensor in fine_tune(
                model, self.TASK, everything, taught, toys.weights(net())
            ).state.items()
        }
        training = replace(taught, learning_rate=0.02, own_classes=own_classes)
        reached = {}
        for how in (training, restricted(training)):
            found = fine_tune(model, self.TASK, self.mine(), how, stolen, rounds=6)
            load_state(model, found.state)
            reached[how.own_classes] = evaluate(model, self.TASK, test)["accuracy"]
        assert reached[True] > reached[False] + 10

    def test_is_for_who_lacks_a_class(self):
        test = self.TASK.prepare(toys.rows(30))
        assert lacks_classes(self.TASK, self.mine(), test)
        assert not lacks_classes(self.TASK, test, test)
        assert not lacks_classes(self.TASK, test, self.mine())
        assert not lacks_classes(toys.NextToken(), self.mine(), test)


class TestUpdateInference:
    def run(self, folder, scheme, **changes):
        toys.federation(
            toys.mlp(),
            scheme=scheme,
            out=folder,
            keep_messages=True,
            clients=changes.pop("c", None),
        ).run(2)
        return Evidence(folder)

    def test_with_two_clients_fedavg_hides_nothing(self, tmp_path):
        clients = {"a": toys.rows(8), "b": toys.rows(8, seed=1)}
        evidence = self.run(tmp_path, FedAvg(), c=clients)
        (guess,) = infer_updates(evidence, "a")
        assert (guess.client, guess.round) == ("a", 1)
        assert guess.cosine > 0.9
        assert guess.share > 0.99

    def test_coarse_proxies_show_less_of_fewer_elements(self, tmp_path):
        scheme = FedQSN(units="neurons", policy="sticky", bits=2)
        (coarse,) = infer_updates(self.run(tmp_path / "q", scheme), "partner-0")
        (exact,) = infer_updates(self.run(tmp_path / "f", FedAvg()), "partner-0")
        assert coarse.cosine < exact.cosine
        assert coarse.share < exact.share

    def test_a_client_of_one_round_learns_nothing(self, tmp_path):
        evidence = Recorded(tmp_path, FedQSN(**EXACT)).play(1)
        assert list(infer_updates(evidence, "a")) == []


def test_an_empty_partial_model_knows_nothing(tmp_path):
    evidence = Recorded(tmp_path, FedQSN(**EXACT)).play(1)
    assert PartialModel.empty(evidence.manifest).share() == 0
    assert pool(evidence, []).share() == 0


def states(dtype=torch.float32):
    """Two models' tensors, with a counter that is no weight."""
    torch.manual_seed(3)
    one, other = ({"w": torch.randn(40, 5).to(dtype), "b": torch.randn(5)} for _ in range(2))
    return {**one, "n": torch.tensor(3)}, {**other, "n": torch.tensor(8)}


class TestWeightInterpolation:
    @pytest.mark.parametrize("share", [0.0, *SHARES, 1.0])
    def test_is_a_point_on_the_line(self, share):
        start, end = states()
        found = interpolate(start, end, share)
        for name in "wb":
            torch.testing.assert_close(found[name], (1 - share) * start[name] + share * end[name])
        assert int(found["n"]) == 8

    def test_keeps_dtypes(self):
        start, end = states(torch.bfloat16)
        assert interpolate(start, end, 0.5)["w"].dtype == torch.bfloat16


class TestTaskArithmetic:
    @pytest.mark.parametrize("factor", FACTORS)
    def test_undoes_a_release_of_a_fraction(self, factor):
        public, own = states()
        shown = interpolate(public, own, 1 / factor)
        assert error({**scale_task_vector(public, shown, factor), "n": own["n"]}, own) < 1e-5
        assert error(shown, own) > 0.3

    def test_is_of_no_use_where_nothing_was_shown(self):
        public, _ = states()
        assert toys.same(scale_task_vector(public, dict(public), 10.0), public)


class TestOneShotFederation:
    def test_attackers_with_other_classes_each_know_more_together(self):
        task, test = ImageClassification(num_labels=3), toys.rows(300, seed=50)
        data = {
            f"a{label}": task.prepare(
                [row for row in toys.rows(90, label) if row["label"] != label]
            )
            for label in range(3)
        }
        training = Training(steps=20, batch_size=16, learning_rate=0.01)
        model, start = net(), toys.weights(net())
        prepared = task.prepare(test)
        reached = {}
        for name in ([*data][:1], [*data]):
            chosen = {one: data[one] for one in name}
            found = federate(model, task, chosen, training, start, rounds=2, seed=1)
            load_state(model, found)
            reached[len(name)] = evaluate(model, task, prepared)["accuracy"]
        assert reached[1] < 70
        assert reached[3] > reached[1] + 20

    def test_what_it_begins_with_stays_as_it_is(self):
        task, start = ImageClassification(num_labels=3), toys.weights(net())
        before = {name: tensor.clone() for name, tensor in start.items()}
        data = {"a": task.prepare(toys.rows(12)), "b": task.prepare(toys.rows(12, 1))}
        federate(net(seed=4), task, data, toys.FAST, start)
        assert toys.same(start, before)
