"""Clients of one process share nothing that does not travel: workers and order change no result."""

import random

import pytest
import torch
from engine_leftovers import KINDS, Counting, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from fedveil import FedAvg, FedLPP, ImageClassification, Training
from fedveil.engine.beginning import Beginning
from fedveil.engine.crew import Job
from fedveil.engine.in_process import work
from fedveil.training import evaluate
from fedveil.wire import Message

TRAINING = Training(steps=3, batch_size=4, learning_rate=0.05)


def federation(kind, **changes):
    scheme = FedLPP(bits=None) if kind.endswith("frozen") else FedAvg()
    words = {"training": TRAINING, "scheme": scheme, "test": toys.rows(6, seed=9), **changes}
    return toys.federation(make(kind), task=ImageClassification(), **words)


def replies(kind, order):
    """What clients answer in round 1, who come in this order, all in one process."""
    run = federation(kind)
    place, server = run.workplace(), run.scheme.server(run.model, toys.SECRET)
    server.begin_round(1)
    told = {}
    for name in order:
        message = server.release(name).to_bytes()
        if name == "broken":
            message = message[:100]
        job = Job(name, message, 7, () if name == "broken" else ("before", "after"))
        answer = work(place, job, Message.to_bytes)
        told[name] = (bytes(answer.reply or b""), answer.before, answer.after)
    return told


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, deadline=None)
@given(order=st.permutations(["partner-0", "partner-1", "partner-2"]))
def test_a_reply_and_what_is_measured_depend_on_nobody_before(kind, order):
    together = replies(kind, order)
    for name in order:
        assert together[name] == replies(kind, [name])[name]
        assert together[name][0]


def test_two_workers_give_the_models_of_one():
    for kind in ("spectral frozen", "counting"):
        one = federation(kind).run(2)
        two = federation(kind, workers=2).run(2)
        assert toys.same(toys.weights(one.global_model), toys.weights(two.global_model))
        measured = [[record.measures for record in result.rounds] for result in (one, two)]
        assert measured[0] == measured[1]


def test_training_that_fails_leaves_nothing_to_the_next():
    """A client whose rows break the training half way comes first."""
    run = federation("counting")
    place, server = run.workplace(), run.scheme.server(run.model, toys.SECRET)
    server.begin_round(1)
    jobs = [Job(name, server.release(name).to_bytes(), 7) for name in ("partner-0", "partner-1")]
    alone = work(place, jobs[1], Message.to_bytes).reply
    place.trainers["partner-0"].data.rows[1]["image"] = torch.full((1, 4, 4), torch.nan)
    assert work(place, jobs[0], Message.to_bytes).failure is not None
    assert place.architecture.calls > 0
    assert work(place, jobs[1], Message.to_bytes).reply == alone


class TestBeginning:
    def test_all_that_modules_hold_is_put_back(self):
        model = Counting()
        before = {**model.state_dict()}
        before = {name: tensor.clone() for name, tensor in before.items()}
        beginning = Beginning(model, set())
        model(torch.ones(2, 1, 4, 4))
        model.train(False).requires_grad_(False)
        model.seen.append(3)
        model.memory = torch.zeros(1)
        model.known["a"] = 1
        model.fresh = "left over"  # type: ignore[assignment]
        model._buffers["state"] = torch.full((1,), 5.0)
        with torch.no_grad():
            model.last.weight.fill_(0)
        beginning.restore()
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert (model.calls, model.seen, model.known) == (0, [], {})
        assert torch.equal(model.memory, torch.ones(1))
        assert not hasattr(model, "fresh")
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.seen is model.same_as_seen

    def test_what_messages_bring_is_left_alone(self):
        model = nn.Linear(2, 2)
        beginning = Beginning(model, {"weight"})
        with torch.no_grad():
            model.weight.fill_(1)
            model.bias.fill_(1)
        beginning.restore()
        assert (model.weight == 1).all()
        assert not (model.bias == 1).all()

    def test_values_that_are_elsewhere_are_not_copied(self):
        model, origin = nn.Linear(2, 2), {"weight": torch.ones(2, 2)}
        beginning = Beginning(model, {"bias"}, origin)
        beginning.restore()
        assert (model.weight == 1).all()
        assert [slot.value for slot in beginning._slots] == [origin["weight"], None]


class Noisy(nn.Module):
    """Draws numbers in every mode, as some layers do."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 3)

    def forward(self, images):
        flat = images.flatten(1)
        return self.last(flat + torch.randn_like(flat) + random.random())


def test_a_model_that_draws_is_measured_the_same_everywhere_and_draws_nothing_of_the_callers():
    model, rows = Noisy(), toys.rows(6)
    torch.manual_seed(1)
    random.seed(1)
    state = torch.get_rng_state(), random.getstate()
    first = evaluate(model, ImageClassification(), rows)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    torch.randn(3)
    random.random()
    assert evaluate(model, ImageClassification(), rows) == first
