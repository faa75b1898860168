"""What would fail at every client fails before anything is released, and says what is wrong."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from fedveil import (
    ConfigurationError,
    FedAvg,
    FedLPP,
    FedQSN,
    FedveilError,
    ImageClassification,
    Training,
    TrainingError,
)
from fedveil.engine import Observer
from fedveil.federation import Remote
from fedveil.federation.preflight import Preflight, _small


class Silent:
    """Clients on other machines, who must not be sent anything."""

    one_at_a_time = True

    def present(self, wanted):
        return None

    def answers(self, jobs):
        raise AssertionError([job.client for job in jobs])


class Listener(Observer):
    def __init__(self):
        self.heard = []

    def untried(self, reason):
        self.heard.append(reason)


class Odd(nn.Module):
    """Its forward returns what `change` makes of its scores, [B, 3]."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(16, 3), change

    def forward(self, images):
        return self.change(self.layer(images.flatten(1)))


class Task(ImageClassification):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def loss(self, model, batch):
        return self.change(super().loss(model, batch))


def fails(error):
    def change(scores):
        raise error

    return change


OUTPUTS = {
    "detached": (lambda scores: scores.detach(), TrainingError, "No gradient reaches"),
    "of its inputs alone": (
        lambda scores: scores.detach().requires_grad_(), TrainingError, "No gradient reaches"
    ),
    "a tuple": (lambda scores: (scores,), ConfigurationError, "found tuple"),
    "a dictionary": (lambda scores: {"scores": scores}, ConfigurationError, "found dict"),
    "flat": (lambda scores: scores.sum(1), ConfigurationError, r"shape \[4\]"),
    "too deep": (lambda scores: scores[None], ConfigurationError, r"shape \[1, 4, 3\]"),
    "whole numbers": (lambda scores: scores.long(), ConfigurationError, "found int64"),
    "one row": (lambda scores: scores[:1], ConfigurationError, "scores for each example"),
    "not finite": (lambda scores: scores * torch.nan, TrainingError, "loss is not finite"),
    "an error": (fails(KeyError("mine")), TrainingError, "KeyError: 'mine'"),
}  # fmt: skip
LOSSES = {
    "a vector": (lambda loss: loss.expand(3), r"no single number.*shape \[3\]"),
    "a float": (lambda loss: loss.item(), "no single number.*found float"),
    "none": (lambda loss: None, "no single number.*NoneType"),
    "infinite": (lambda loss: loss + torch.inf, "not finite"),
}


def refused(model, tmp_path, error, words, **changes):
    """A run over machines that ends before anybody is sent anything, or anything is written."""
    settings = {"scheme": FedAvg(), "test": toys.rows(6), "out": tmp_path / "run", **changes}
    run = toys.federation(model, clients=Remote(("one", "two")), **settings)
    with pytest.raises(error, match=words):
        run.run(crew=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_nobody_can_learn_from(kind, tmp_path):
    change, error, words = OUTPUTS[kind]
    refused(Odd(change), tmp_path, error, f"{words}(.|\\n)*Nothing has been released")


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_none(kind, tmp_path):
    change, words = LOSSES[kind]
    refused(toys.mlp(), tmp_path, TrainingError, words, task=Task(change))


@pytest.mark.parametrize("test", [None, toys.rows(4)], ids=["no rows", "rows"])
def test_names_and_types_are_looked_at_without_any_rows(test, tmp_path):
    typo = Training(frozen=("*.embedings.*",))
    refused(toys.mlp(), tmp_path, ConfigurationError, "embedings", training=typo, test=test)
    refused(toys.mlp().half(), tmp_path, ConfigurationError, "fp16", test=test)


@pytest.mark.parametrize("where", ["a client", "the owner", "the test set"])
def test_whose_rows_are_tried(where):
    """A model that fails is found on whatever rows there are."""
    broken = Odd(fails(KeyError("mine")))
    words: dict[str, Any] = {"scheme": FedQSN.default(of_public=True)}
    clients = [toys.rows(4)] if where == "a client" else Remote(("one",))
    if where == "the test set":
        words = {"scheme": FedAvg(), "test": toys.rows(4)}
    elif where == "the owner":
        words = {"scheme": FedAvg(), "public": Odd(fails(KeyError("mine"))),
                 "owner": toys.rows(4)}  # fmt: skip
    else:
        words = {"scheme": FedAvg()}
    with pytest.raises(FedveilError, match="Nothing has been released"):
        toys.federation(broken, clients=clients, **words).run(crew=Silent())


def test_without_rows_the_owner_hears_that_nothing_was_tried():
    listener = Listener()
    run = toys.federation(toys.mlp(), clients=Remote(("one",)), observer=listener, scheme=FedAvg())
    with pytest.raises(AssertionError, match="one"):  # clients are asked
        run.run(crew=Silent())
    assert "no rows" in listener.heard[0]


def test_an_owners_small_machine_stops_no_one():
    listener, model = Listener(), Odd(fails(MemoryError()))
    run = toys.federation(model, clients=Remote(("one",)), observer=listener, scheme=FedAvg(),
                          owner=None)  # fmt: skip
    rows = run.task.prepare(toys.rows(4))
    words = (run.scheme, run.released, run.workplace(), run.training, rows)
    assert "too little memory" in Preflight(*words, here=False, processes=False).run()
    with pytest.raises(TrainingError, match=r"not enough memory.*batch_size"):
        Preflight(*words, here=True, processes=False).run()


@pytest.mark.parametrize(
    "scheme", [FedAvg(), FedQSN(units="neurons"), FedAvg(aggregation="regmean"), FedLPP()],
    ids=["fedavg", "fedqsn", "regmean", "fedlpp"],
)  # fmt: skip
def test_it_leaves_everything_as_it_was(scheme, tmp_path):
    model = toys.mlp()
    if scheme.name == "fedlpp":
        model[1].requires_grad_(False)
    run = toys.federation(model, scheme=scheme)
    before, generators = toys.weights(run.model), _generators()
    run._try_first(here=True)
    assert toys.same(toys.weights(run.model), before)
    assert all(np.array_equal(a, b) for a, b in zip(_generators(), generators, strict=True))
    tried = run.run(2)
    other = toys.federation(model, scheme=scheme)
    other._try_first = lambda here: None
    assert toys.same(toys.weights(tried.global_model), toys.weights(other.run(2).global_model))


def _generators():
    numbers: Any = np.random.get_state()
    return torch.get_rng_state().numpy(), numbers[1], random.getstate()[1]


def test_it_is_no_release(tmp_path):
    run = toys.federation(toys.mlp(), scheme=FedQSN(units="neurons"), out=tmp_path, releases=1)
    record = run.run(1).rounds[0]
    ledger = (tmp_path / "exposure.jsonl").read_text()
    assert "preflight" not in ledger
    assert set(record.bytes_down) == {"partner-0", "partner-1", "partner-2"}


def test_it_takes_few_rows_in_pieces_like_the_clients():
    def rows(batch, pieces):
        small = _small(Training(batch_size=batch, gradient_accumulation_steps=pieces, epochs=9))
        assert (small.steps, small.epochs) == (1, None)
        return small.batch_size, small.gradient_accumulation_steps

    assert [rows(64, 1), rows(1, 1), rows(64, 8), rows(4, 4)] == [(4, 1), (1, 1), (4, 2), (2, 2)]


def test_a_single_row_is_enough_with_batch_norm():
    run = toys.federation(toys.convnet(), scheme=FedAvg(), clients=Remote(("one",)),
                          test=toys.rows(1))  # fmt: skip
    run._try_first(here=False)
