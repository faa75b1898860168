import copy
import math
import pickle
from dataclasses import replace
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import toys
from fedveil import FedAvg, FedQSN
from fedveil.errors import ConfigurationError, DataError, FedveilError, TrainingError
from fedveil.tasks import ImageClassification
from fedveil.training import Trainer, Training, TrainingRecord, evaluate, modes
from fedveil.training.batches import Batches, pieces_of
from training_samples import images, perceptron, same, state

TASK = ImageClassification(num_labels=3)
FAST = Training(epochs=3, batch_size=4, learning_rate=0.05)


def trained(model, *, rows=None, training=FAST, seed=1):
    record = Trainer(TASK, rows or images(18), training).train(model, seed=seed)
    return model, record


def test_it_learns():
    _, record = trained(
        perceptron(), training=Training(epochs=10, batch_size=4, learning_rate=0.05)
    )
    assert record.loss_last < 0.3 * record.loss_first
    assert (record.examples, record.steps) == (18, 50)


def test_same_seed_same_bytes():
    first, record = trained(perceptron(dropout=0.3))
    second, again = trained(perceptron(dropout=0.3))
    assert same(state(first), state(second))
    assert record == again


def test_another_seed_differs():
    first, _ = trained(perceptron())
    second, _ = trained(perceptron(), seed=2)
    assert not same(state(first), state(second))


def test_dropout_depends_on_the_seed_only():
    # One batch of everything: the order cannot matter, dropout can.
    whole = Training(steps=1, batch_size=18, learning_rate=0.05)
    torch.manual_seed(5)
    first, _ = trained(perceptron(dropout=0.5), training=whole)
    torch.manual_seed(6)
    second, _ = trained(perceptron(dropout=0.5), training=whole)
    third, _ = trained(perceptron(dropout=0.5), training=whole, seed=9)
    assert same(state(first), state(second))
    assert not same(state(first), state(third))


def test_the_callers_generator_is_undisturbed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained(perceptron(dropout=0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_and_flags_are_given_back():
    model = perceptron(norm=True)
    model.train()
    model.norm.eval()
    model.hidden.bias.requires_grad_(False)
    with torch.no_grad():
        trained(model)
    assert model.training
    assert model.hidden.training
    assert not model.norm.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["hidden.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_modes_and_flags_are_given_back_after_an_error():
    model = perceptron().eval()
    before = torch.get_rng_state()
    training = Training(steps=20, learning_rate=1e30, optimizer="sgd", max_grad_norm=None)
    with pytest.raises(TrainingError, match=r"not finite.*step \d+ of 20.*learning rate"):
        Trainer(TASK, images(18), training).train(model, seed=0)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_that_is_not_finite_is_found_although_the_loss_is():
    model = perceptron()
    model.out.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        trained(model, training=Training(steps=1, max_grad_norm=None))


def test_one_sgd_step_by_hand():
    rows = images(6)
    model = perceptron()
    start = state(model)
    training = Training(
        steps=1, batch_size=6, learning_rate=0.1, optimizer="sgd", weight_decay=0.0,
        max_grad_norm=None,
    )  # fmt: skip
    _, record = trained(model, rows=rows, training=training)

    x = torch.stack([row["image"] for row in rows]).double().flatten(1)
    y = F.one_hot(torch.tensor([row["label"] for row in rows]), 3).double()
    w1, b1 = start["hidden.weight"].double(), start["hidden.bias"].double()
    w2, b2 = start["out.weight"].double(), start["out.bias"].double()
    before = x @ w1.T + b1
    hidden = before.clamp(min=0)
    p = (hidden @ w2.T + b2).softmax(dim=1)
    error = (p - y) / 6
    below = (error @ w2) * (before > 0)
    expected = {
        "hidden.weight": w1 - 0.1 * below.T @ x,
        "hidden.bias": b1 - 0.1 * below.sum(0),
        "out.weight": w2 - 0.1 * error.T @ hidden,
        "out.bias": b2 - 0.1 * error.sum(0),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(state(model)[name].double(), tensor, atol=1e-6, rtol=1e-5)
    loss = float(-(p.log() * y).sum(1).mean())
    assert record == TrainingRecord(6, 1, pytest.approx(loss), pytest.approx(loss))  # type: ignore[arg-type]


def test_gradients_are_clipped_to_the_limit():
    model = perceptron()
    start = state(model)
    training = Training(
        steps=1, learning_rate=1.0, optimizer="sgd", weight_decay=0.0, max_grad_norm=0.01
    )
    trained(model, training=training)
    moved = torch.cat([(state(model)[k] - start[k]).flatten() for k in start])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_frozen_parameters_do_not_change():
    model = perceptron()
    start = state(model)
    trainer = Trainer(TASK, images(9), Training(learning_rate=0.1, frozen=("hidden.*", "*.bias")))
    assert trainer.trainable(model) == {"out.weight"}
    trainer.train(model, seed=0)
    changed = {k for k, v in state(model).items() if not torch.equal(v, start[k])}
    assert changed == {"out.weight"}


def test_a_tied_parameter_is_frozen_by_any_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    trainer = Trainer(TASK, images(3), Training(frozen=("second.weight",)))
    assert trainer.trainable(Tied()) == {"first.bias", "second.bias"}


@pytest.mark.parametrize("frozen", [("nothing.*",), ("*",), ("HIDDEN.*",)])
def test_impossible_frozen_patterns(frozen):
    with pytest.raises(ConfigurationError, match=r"Training\.frozen"):
        Trainer(TASK, images(3), Training(frozen=frozen)).trainable(perceptron())


def test_steps_beyond_an_epoch_reshuffle():
    batches = Batches(5, 2)
    drawn = list(islice(batches.endless(0), 6))
    assert len(batches) == 3
    assert [len(batch) for batch in drawn] == [2, 2, 1] * 2
    first, second = list(chain(*drawn[:3])), list(chain(*drawn[3:]))
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second
    assert trained(perceptron(), training=Training(steps=17, batch_size=4))[1].steps == 17


@given(st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_batches_of_a_pass(size, batch_size, avoid_single):
    batches = Batches(size, batch_size, avoid_single=avoid_single)
    drawn = list(islice(batches.endless(0), len(batches)))
    rows = list(chain(*drawn))
    lost = size - len(rows)
    assert len(set(rows)) == len(rows)
    assert lost == int(avoid_single and size % batch_size == 1 and size > batch_size > 1)
    assert all(drawn)
    assert all(len(batch) <= batch_size for batch in drawn)


def test_batch_norm_survives_a_last_batch_of_one():
    model, record = trained(
        perceptron(norm=True), rows=images(9), training=Training(epochs=2, batch_size=4)
    )
    assert record.steps == 4
    assert all(torch.isfinite(tensor).all() for tensor in state(model).values())


@pytest.mark.parametrize("options", [{"rows": images(1)}, {"training": Training(batch_size=1)}])
def test_batch_norm_on_single_examples_is_explained(options):
    with pytest.raises(TrainingError, match="batch of one example"):
        trained(perceptron(norm=True), **options)


def test_one_example_is_enough_without_batch_norm():
    _, record = trained(perceptron(), rows=images(1))
    assert (record.examples, record.steps) == (1, 3)


def test_bf16_weights_train():
    model = perceptron().bfloat16()
    _, record = trained(model, training=Training(epochs=10, batch_size=4, learning_rate=0.05))
    assert record.loss_last < 0.5 * record.loss_first
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_fp16_weights_are_refused():
    with pytest.raises(ConfigurationError, match=r"fp16.*hidden\.weight.*bfloat16"):
        trained(perceptron().half())


def test_a_trainer_survives_pickling():
    trainer = Trainer(TASK, images(10), FAST)
    first, second = perceptron(dropout=0.2), perceptron(dropout=0.2)
    again = pickle.loads(pickle.dumps(trainer))
    assert trainer.train(first, seed=4) == again.train(second, seed=4)
    assert same(state(first), state(second))


def test_unusable_data_is_refused_before_training():
    with pytest.raises(DataError, match="empty"):
        Trainer(TASK, [], FAST)


def test_other_value_errors_pass_unchanged():
    class Broken(nn.Linear):
        def forward(self, images):
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$") as caught:
        trained(Broken(2, 2))
    assert not isinstance(caught.value, FedveilError)


class TestLessMemory:
    def run(self, model, task, data, **changes):
        settings = {"steps": 3, "batch_size": 6, "learning_rate": 0.01, **changes}
        model = copy.deepcopy(model)
        record = Trainer(task, data, Training(**settings)).train(model, seed=5)
        return record, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @pytest.mark.parametrize("pieces", [2, 4, 6])
    def test_the_same_step_in_pieces(self, pieces):
        model, data = toys.mlp(), toys.rows(10)
        record, whole = self.run(model, ImageClassification(), data)
        other, parts = self.run(
            model, ImageClassification(), data, gradient_accumulation_steps=pieces
        )
        assert other.steps == record.steps
        assert other.loss_last == pytest.approx(record.loss_last, rel=1e-4)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("pieces", [2, 3, 4, 6])
    @pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
    def test_batch_norm_gets_no_piece_of_one_example(self, pieces, count):
        model, data = perceptron(norm=True), images(count)
        record, state_ = self.run(model, TASK, data, gradient_accumulation_steps=pieces)
        assert math.isfinite(record.loss_last)
        assert not torch.equal(state_["norm.running_mean"], model.norm.running_mean)

    def test_batch_norm_of_a_single_example_is_still_refused(self):
        with pytest.raises(TrainingError, match="one example"):
            self.run(perceptron(norm=True), TASK, images(1), gradient_accumulation_steps=2)

    @given(st.integers(1, 40), st.integers(1, 16), st.booleans())
    def test_pieces_hold_every_example_once(self, size, count, avoid_single):
        indices = list(range(size))
        pieces = pieces_of(indices, count, avoid_single=avoid_single)
        assert [index for piece in pieces for index in piece] == indices
        assert len(pieces) <= count
        assert not avoid_single or size == 1 or all(len(piece) > 1 for piece in pieces)
        if all(len(piece) > 1 for piece in pieces):
            usual = pieces_of(indices, count, avoid_single=False)
            assert pieces == usual or any(len(piece) == 1 for piece in usual)

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("pieces", [1, 3])
    @pytest.mark.parametrize("norm", [1.0, None])
    def test_sparse_embeddings_train_as_dense_ones(self, optimizer, pieces, norm):
        class Words(nn.Module):
            def __init__(self, sparse):
                super().__init__()
                torch.manual_seed(0)
                self.embed, self.out = nn.Embedding(272, 8, sparse=sparse), nn.Linear(8, 272)

            def forward(self, input_ids):
                return SimpleNamespace(logits=self.out(self.embed(input_ids)))

        settings = {
            "optimizer": optimizer, "gradient_accumulation_steps": pieces, "max_grad_norm": norm
        }  # fmt: skip
        found = [self.run(Words(s), toys.NextToken(), toys.texts(8), **settings)
                 for s in (True, False)]  # fmt: skip
        for name, tensor in found[1][1].items():
            torch.testing.assert_close(found[0][1][name], tensor)

    def test_activations_computed_twice_change_nothing(self):
        model, data = toys.gpt2(), toys.texts(8)
        _, kept = self.run(model, toys.NextToken(), data)
        _, twice = self.run(model, toys.NextToken(), data, gradient_checkpointing=True)
        for name, tensor in kept.items():
            torch.testing.assert_close(twice[name], tensor)
        with pytest.raises(ConfigurationError, match="activations twice"):
            self.run(toys.mlp(), ImageClassification(), toys.rows(6), gradient_checkpointing=True)

    @pytest.mark.parametrize(
        "words",
        [{"gradient_accumulation_steps": 0}, {"gradient_accumulation_steps": 17},
         {"gradient_checkpointing": 1}, {"own_classes": "yes"}],
    )  # fmt: skip
    def test_impossible_settings(self, words):
        with pytest.raises(ConfigurationError, match=next(iter(words))):
            Training(**words)


class TestOwnClasses:
    """Restricted softmax: classes of which a client has no example."""

    SETTINGS = Training(
        steps=5, batch_size=4, learning_rate=0.05, own_classes=True, weight_decay=0.0
    )

    @pytest.mark.parametrize("own", [True, False])
    def test_others_keep_their_rows_of_the_head(self, own):
        rows = [row for row in images(18) if row["label"] != 1]
        model, before = perceptron(), state(perceptron())
        trained(model, rows=rows, training=replace(self.SETTINGS, own_classes=own))
        for name in ("out.weight", "out.bias"):
            kept = (model.state_dict()[name] == before[name]).flatten(1 if "w" in name else 0)
            kept = kept.all(1) if kept.ndim > 1 else kept
            assert kept.tolist() == [False, own, False]

    def test_who_has_all_classes_trains_as_ever(self):
        one, record = trained(perceptron(), training=self.SETTINGS)
        other, again = trained(perceptron(), training=replace(self.SETTINGS, own_classes=False))
        assert same(state(one), state(other))
        assert record == again

    def test_who_has_one_class_learns_nothing_of_it(self):
        rows = [row for row in images(18) if row["label"] == 1]
        model, record = trained(perceptron(), rows=rows, training=self.SETTINGS)
        assert (record.loss_first, record.loss_last) == (0.0, 0.0)
        assert same(state(model), state(perceptron()))

    def test_what_is_measured_stays_over_all_classes(self):
        rows = [row for row in images(18) if row["label"] != 1]
        task = ImageClassification(num_labels=3)
        trainer = Trainer(task, rows, self.SETTINGS)
        expected = evaluate(perceptron(), TASK, images(18))
        trainer.train(perceptron(), seed=0)
        assert evaluate(perceptron(), task, images(18)) == expected
        assert evaluate(perceptron(), trainer.task, images(18)) == expected

    def test_a_task_without_classes(self):
        with pytest.raises(ConfigurationError, match="no classes") as error:
            Trainer(toys.NextToken(), toys.texts(8), self.SETTINGS)
        assert error.value.where == "Training.own_classes"


class TestDevices:
    @pytest.fixture
    def elsewhere(self, monkeypatch):
        """Stands in for another device: tensors there have memory of their own."""
        monkeypatch.setattr(modes, "check_device", lambda name: torch.float64)
        return Training(epochs=2, batch_size=4, learning_rate=0.05, device="elsewhere")

    def test_a_model_is_back_where_it_was_with_what_it_learned(self, elsewhere, monkeypatch):
        monkeypatch.setattr("fedveil.training.trainer.check_device", lambda name: None)
        here = Training(epochs=2, batch_size=4, learning_rate=0.05)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
        expected, _ = trained(copy.deepcopy(model), rows=images(18), training=here)
        held = dict(model.state_dict())
        places = {name: tensor.data_ptr() for name, tensor in held.items()}
        trained(model, rows=images(18), training=elsewhere)
        for name, tensor in model.state_dict().items():
            assert tensor.data_ptr() == places[name]
            assert tensor.dtype == expected.state_dict()[name].dtype
            torch.testing.assert_close(tensor, expected.state_dict()[name])
            assert torch.equal(held[name], tensor)

    def test_tied_weights_stay_tied(self, elsewhere):
        model: Any = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        model[1].weight = model[0].weight
        with modes.on_device(model, "elsewhere"):
            assert model[0].weight is model[1].weight
            assert model[0].weight.dtype == torch.float64
            model[0].weight.data += 1
        assert model[1].weight.data_ptr() == model[0].weight.data_ptr()

    def test_one_that_is_not_there_is_refused(self):
        for name in ("cuda:97", "nowhere"):
            with pytest.raises(ConfigurationError, match=r"no such device.*expected cpu"):
                Trainer(TASK, images(2), Training(device=name))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_federation_learns_the_same_on_a_gpu(self):
        for scheme in (FedAvg(), FedQSN(client_mask=0.25)):
            one, other = (
                toys.federation(
                    toys.mlp(), scheme=scheme, training=Training(steps=3, device=device)
                ).run(2)
                for device in (None, "cuda")
            )
            for name, tensor in toys.weights(other.global_model).items():
                assert tensor.device.type == "cpu"
                torch.testing.assert_close(tensor, toys.weights(one.global_model)[name])
