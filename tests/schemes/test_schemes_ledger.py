import pytest

from fedveil import ProtocolError
from fedveil.schemes.ledger import RoundLedger
from fedveil.wire import Message


def ledger() -> RoundLedger[str]:
    """Round 1 is open; "a" was sent something."""
    made = RoundLedger[str]("fedqsn")
    made.begin(1)
    made.record("a", "sent")
    return made


def reply(**changes) -> Message:
    return Message(**{"kind": "update", "scheme": "fedqsn", "round": 1, "client": "a", **changes})


def test_a_reply_is_paired_with_its_release():
    assert ledger().expect("a", reply(), 1.0) == "sent"


@pytest.mark.parametrize(
    "change", [{"kind": "proxy"}, {"scheme": "fedavg"}, {"round": 0}, {"round": 2}, {"client": "b"}]
)
def test_a_reply_to_something_else_is_refused(change):
    with pytest.raises(ProtocolError, match="not the one awaited"):
        ledger().expect("a", reply(**change), 1.0)


def test_a_client_that_was_sent_nothing_is_refused():
    with pytest.raises(ProtocolError, match="sent nothing"):
        ledger().expect("b", reply(client="b"), 1.0)


def test_a_second_answer_is_refused_but_a_refused_one_may_be_repeated():
    book = ledger()
    book.expect("a", reply(), 1.0)
    book.expect("a", reply(), 1.0)
    book.accept("a")
    with pytest.raises(ProtocolError, match="twice"):
        book.expect("a", reply(), 1.0)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), 1e39, 1e300, 1e-300])
def test_weights_that_would_spoil_a_mean_are_refused(weight):
    with pytest.raises(ProtocolError, match="weight"):
        ledger().expect("a", reply(), weight)


@pytest.mark.parametrize("number", [-1, 0, 1, 3])
def test_rounds_follow_one_another(number):
    book = ledger()
    book.end()
    with pytest.raises(ProtocolError, match="expected round 2"):
        book.begin(number)
    book.begin(2)
    assert book.get("a") is None


def test_a_round_does_not_begin_inside_another():
    with pytest.raises(ProtocolError, match="while 1 is open"):
        ledger().begin(2)


def test_nothing_is_sent_or_taken_outside_a_round():
    book = ledger()
    book.end()
    calls = (
        book.end,
        lambda: book.get("a"),
        lambda: book.record("a", "x"),
        lambda: book.expect("a", reply(), 1.0),
    )
    for call in calls:
        with pytest.raises(ProtocolError, match="No round is open"):
            call()
