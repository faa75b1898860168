"""A client whose settings are not the owner's does not train, and only its own log says which."""

import logging

import pytest
from flower_samples import federation

import toys
from fedveil import FedAvg, FedQSN, ImageClassification, Training
from fedveil.errors import WireError
from fedveil.flower import FlowerCrew, Partner, Patience, client_app
from fedveil.flower.agreement import (
    DisagreementError,
    check_agreement,
    digests_of,
    packed,
    settings_of,
)
from fedveil.flower.payload import unpack
from grids import LocalGrid, Node

QUICK = Patience(deadline=0.05, give_up=1.0, poll=0.01)


class Keys:
    def find(self, grid):
        return {node.public_key.decode(): node.node_id for node in grid.get_nodes()}


def settings(run, **training):
    changed = Training(**{**vars(run.training), **training})
    return settings_of(run.scheme, changed, run.task, run.released)


def nodes(run, odd):
    """A node for each client; those in `odd` train with settings of their own."""
    found = {}
    for number, name in enumerate(sorted(run.workplace().trainers), start=10):
        own = settings(run, **odd.get(name, {}))
        partner = Partner(name, run.workplace(), settings=own)
        app = client_app(lambda context, partner=partner: partner)  # type: ignore[misc]
        found[number] = Node(app, key=name.encode())
    return LocalGrid(found)


def test_an_altered_learning_rate_costs_its_client_the_round_and_the_owner_learns_no_more(caplog):
    run = federation()
    grid = nodes(run, {"partner-1": {"learning_rate": 0.25}})
    with caplog.at_level(logging.ERROR, logger="fedveil"):
        result = run.run(1, crew=FlowerCrew(grid, Keys(), QUICK, settings=settings(run)))
    record = result.rounds[0]
    assert set(record.bytes_up) == {"partner-0", "partner-2"}
    assert "settings" in record.failed["partner-1"]
    assert "learning_rate" not in record.failed["partner-1"]
    assert "0.25" not in str(record.to_json())
    assert "training.learning_rate = 0.25" in caplog.text


def test_clients_that_agree_train_as_without_being_asked():
    run = federation()
    asked = run.run(1, crew=FlowerCrew(nodes(run, {}), Keys(), QUICK, settings=settings(run)))
    expected = federation().run(1)
    assert toys.same(toys.weights(asked.global_model), toys.weights(expected.global_model))


def test_no_value_travels():
    run = federation()
    grid = nodes(run, {})
    run.run(1, crew=FlowerCrew(grid, Keys(), QUICK, settings=settings(run)))
    for message in grid.sent:
        _, facts = unpack(message.content)
        assert set(facts) == {"seed", "settings"}
        assert "image-classification" not in str(facts["settings"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.2), ("frozen", ("x",)), ("steps", 7), ("batch_size", 5),
     ("optimizer", "adamw"), ("weight_decay", 0.5), ("own_classes", True),
     ("max_grad_norm", None)],
)  # fmt: skip
def test_every_setting_that_changes_a_result_is_compared(name, value):
    run = federation()
    with pytest.raises(DisagreementError, match=f"training.{name} = "):
        check_agreement(packed(settings(run)), settings(run, **{name: value}))


@pytest.mark.parametrize(("name", "value"), [("device", "cpu"), ("gradient_accumulation_steps", 2)])
def test_what_is_each_machines_own_is_not(name, value):
    run = federation()
    check_agreement(packed(settings(run)), settings(run, **{name: value}))


def test_schemes_tasks_and_the_order_of_classes_are_compared():
    class Config:
        id2label = {0: "no", 1: "yes"}  # noqa: RUF012

    def found(scheme=FedQSN(), length=8, labels=("no", "yes")):  # noqa: B008
        model, task = toys.mlp(), ImageClassification()
        model.config, task.max_length = Config(), length  # type: ignore[attr-defined]
        model.config.id2label = dict(enumerate(labels))
        return settings_of(scheme, Training(), task, model)

    told = packed(found())
    check_agreement(told, found())
    check_agreement(told, found(scheme=FedQSN(server_mask=0.2)))  # the owner's affair
    for other, words in (
        (found(scheme=FedQSN(units="neurons")), "scheme.units"),
        (found(scheme=FedAvg()), "scheme.name"),
        (found(length=9), "task.max_length = 9"),
        (found(labels=("yes", "no")), "labels"),
    ):
        with pytest.raises(DisagreementError, match=words):
            check_agreement(told, other)


def test_numbers_are_compared_by_value_and_what_one_side_lacks_is_passed_over():
    model, task = toys.mlp(), ImageClassification()
    one = settings_of(FedAvg(), Training(max_grad_norm=1), task, model)
    other = settings_of(FedAvg(), Training(max_grad_norm=1.0), task, model)
    assert digests_of(one) == digests_of(other)
    check_agreement(packed({**one, "of a later version": 1}), {**one, "mine": 2})
    check_agreement(None, one)


@pytest.mark.parametrize("told", [3, "", "[1]", "{", '{"a": 1}', "[" * 9000, "x" * 99999])
def test_rubbish_is_refused(told):
    with pytest.raises(WireError, match="settings"):
        check_agreement(told, {})
