"""A client's program at work, on messages that come from a list."""

import logging

import pytest
from flwr.app import Context, Message, RecordDict
from test_deploy_bundle import bundle, changed

from fedveil.errors import ConfigurationError
from fedveil.flower import serving
from fedveil.flower.client import Partner
from fedveil.flower.payload import pack, unpack
from fedveil.flower.runtime import LostError
from fedveil.flower.serving import StopServing, serve
from fedveil.wire import Message as Wire
from grids import LocalGrid

SECRET = "row 7: Jane Roe"


class Given:
    """A message that waits at a SuperNode."""

    def __init__(self, data=None, kind="query", is_client=True, lost=False):
        self.run, self.is_client = 7, is_client
        self.bundle = bundle() if data is None else data
        LocalGrid({})  # as the owner's program, which writes messages
        self.message = Message(content=pack(None), dst_node_id=3, message_type=kind)
        self.message.metadata.__dict__["_message_id"] = "1"
        self.lost, self.replies, self.fetched = lost, [], 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def open(self):
        if self.lost:
            raise LostError("gone")
        state = RecordDict()
        return self.message, Context(7, 3, {}, state, {}), self.bundle

    def content(self):
        self.fetched += 1
        return self.message

    def answer(self, reply, patience=60.0):
        self.replies.append(reply)


class Queue:
    """Hands out what there is, and then ends the program."""

    def __init__(self, *given):
        self.given = list(given)

    def take(self):
        if not self.given:
            raise StopServing
        found = self.given.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(serving, "_POLL", 0.001)


def serve_all(*given, partner=None):
    with pytest.raises(StopServing):
        serve(partner or Partner("clinic-1", None), Queue(*given))  # type: ignore[arg-type]
    return [reply for one in given if isinstance(one, Given) for reply in one.replies]


def test_a_message_is_answered_by_the_installed_program():
    (reply,) = serve_all(Given())
    assert unpack(reply.content) == (None, {"client": "clinic-1"})


@pytest.mark.parametrize(
    ("data", "is_client", "found"),
    [
        (bundle(**{"evil.py": "x"}), True, "evil.py"),
        (bundle(changed("tool/flwr/app/components/clientapp", "os:abort")), True, "os:abort"),
        (b"no zip", True, "zip"),
        (bundle(), False, "an agent"),
    ],
    ids=["code", "another program", "no bundle", "an agent"],
)
@pytest.mark.parametrize("kind", ["query", "train"])
def test_an_app_of_another_kind_is_refused_and_the_log_says_why(
    data, is_client, found, kind, caplog
):
    (reply,) = serve_all(Given(data, kind, is_client))
    assert reply.error.reason == "refused"
    assert not reply.has_content()
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert line.startswith("Run 7 is refused, and nothing of its app was run.")
    assert found in line
    assert "\n" not in line


def test_what_was_refused_keeps_nobody_from_being_answered():
    evil, honest = Given(bundle(**{"evil.py": "x"})), Given()
    _, reply = serve_all(evil, honest)
    assert reply.has_content()


@pytest.mark.parametrize("kind", ["train", "evaluate", "train.other"])
def test_of_what_goes_wrong_the_owner_learns_the_kind_alone(kind, monkeypatch, caplog):
    def explode(message, partner):
        raise ConfigurationError(SECRET, found=SECRET)

    monkeypatch.setattr("fedveil.flower.client._train", explode)
    (reply,) = serve_all(Given(kind=kind))
    told = repr(reply.content) if reply.has_content() else reply.error.reason
    assert SECRET not in told
    assert ("ConfigurationError" if kind == "train" else "other") in told


def test_a_message_that_is_lost_costs_that_message(caplog):
    (reply,) = serve_all(Given(lost=True), Given())
    assert reply.has_content()
    assert "a reply is lost" in caplog.text


def test_each_update_that_was_sent_is_a_line_in_the_clients_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fedveil")
    update = Wire("update", "fedqsn", 4, "clinic-1", scalars={"examples": 60})
    monkeypatch.setattr("fedveil.flower.client._train", lambda *_: update.to_bytes())
    serve_all(Given(kind="train"), Given())
    assert [one.getMessage() for one in caplog.records] == [
        "round 4: trained on 60 examples, update sent"
    ]
    assert caplog.records[0].levelno == logging.INFO


def test_an_update_that_is_lost_is_not_told_as_sent(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fedveil")
    update = Wire("update", "fedqsn", 4, "clinic-1", scalars={"examples": 60})
    monkeypatch.setattr("fedveil.flower.client._train", lambda *_: update.to_bytes())

    def lose(reply, patience=60.0):
        raise LostError("gone")

    given = Given(kind="train")
    given.answer = lose  # type: ignore[method-assign]
    serve_all(given)
    assert "a reply is lost" in caplog.text
    assert "sent" not in caplog.text


def test_a_supernode_that_is_away_is_waited_for_and_told_of_once(caplog):
    caplog.set_level(logging.INFO, "fedveil")
    away = [LostError("no answer")] * 4
    (reply,) = serve_all(*away, Given())
    assert reply.has_content()
    assert caplog.text.count("Waiting for the SuperNode") == 1
    (there,) = [one for one in caplog.records if one.getMessage() == "The SuperNode is there"]
    assert there.levelno == logging.INFO


def test_who_is_told_to_end_while_training_says_so_and_ends(monkeypatch):
    def stop(message, partner):
        raise StopServing

    monkeypatch.setattr("fedveil.flower.client._train", stop)
    first, second = Given(kind="train"), Given()
    with pytest.raises(StopServing):
        serve(Partner("clinic-1", None), Queue(first, second))  # type: ignore[arg-type]
    (reply,) = first.replies
    assert reply.error.reason == "stopped"
    assert not second.replies


@pytest.mark.parametrize("problem", [LostError("gone"), StopServing()], ids=["gone", "told twice"])
def test_who_is_told_to_end_ends_when_nobody_takes_the_last_reply(problem, monkeypatch):
    def stop(message, partner):
        raise StopServing

    def lose(reply, patience=60.0):
        raise problem

    monkeypatch.setattr("fedveil.flower.client._train", stop)
    first, second = Given(kind="train"), Given()
    first.answer = lose  # type: ignore[method-assign]
    with pytest.raises(StopServing):
        serve(Partner("clinic-1", None), Queue(first, second))  # type: ignore[arg-type]
    assert not second.replies
