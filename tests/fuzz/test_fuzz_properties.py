"""Messages changed at random, in their bytes and in their meaning, with a checksum that is right.

`tests/wire/test_wire_hostile.py` changes bytes under the old checksum, and one header value at a
time. `read_anything` and `receive_anything` raise if anything is wrong.
"""

from random import Random

import fuzz_entries
import pytest
from fuzz_entries import PLACES, Steady, place
from fuzz_forge import mutate, sealed, spliced, take_apart
from fuzz_known import besides_what_is_known
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import messages

from fedveil.errors import WireError
from fedveil.wire import Message

read_anything = besides_what_is_known(fuzz_entries.read_anything)
receive_anything = besides_what_is_known(fuzz_entries.receive_anything)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60)
@given(messages(), messages(), st.data())
def test_halves_of_two_messages_are_no_message(one, other, data):
    first, second = bytes(one.to_bytes()), bytes(other.to_bytes())
    cut = data.draw(st.integers(0, len(first)))
    rest = data.draw(st.integers(0, len(second)))
    both = first[:cut] + second[rest:]
    if both not in (first, second):
        with pytest.raises(WireError):
            Message.from_bytes(both)
    read_anything(sealed(both))


@settings(max_examples=80)
@given(messages(), st.data())
def test_changed_bytes_under_a_right_checksum_are_refused_or_read_as_they_are(message, data):
    octets = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(octets)))
        octets[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
    read_anything(sealed(bytes(octets)))


@settings(max_examples=80)
@given(messages(), st.lists(SEEDS, min_size=1, max_size=4))
def test_changed_meaning_is_refused_or_read_as_it_is(message, seeds):
    data = bytes(message.to_bytes())
    for seed in seeds:
        data = mutate(data, Random(seed)) or data
        read_anything(data)


@settings(max_examples=50)
@given(st.sampled_from(PLACES), SEEDS, st.booleans())
def test_whatever_a_client_answers_changes_the_server_or_is_refused(name, seed, whole):
    dice = Random(seed)
    data = replies(name, whole)
    for _ in range(4):
        data = mutate(data, dice) or data
        receive_anything(data)


@settings(max_examples=40)
@given(st.sampled_from(PLACES), SEEDS)
def test_whatever_a_server_sends_a_client_takes_or_refuses(name, seed):
    dice = Random(seed)
    data = proxies(name)
    for _ in range(3):
        data = mutate(data, dice) or data
        receive_anything(data)


@settings(max_examples=30)
@given(st.sampled_from(PLACES), st.sampled_from(PLACES), SEEDS)
def test_messages_crossed_with_others_change_nothing_or_are_taken(one, other, seed):
    crossed = spliced(replies(one, True), proxies(other), Random(seed))
    assert crossed is not None
    receive_anything(crossed)


CACHE: dict[tuple[str, object], bytes] = {}


def replies(name: str, whole: bool) -> bytes:
    trainer = Steady() if whole else Steady(("2.weight", "0.bias"))
    return CACHE.setdefault((name, whole), bytes(place(name).reply(trainer).to_bytes()))


def proxies(name: str) -> bytes:
    return CACHE.setdefault((name, "proxy"), bytes(place(name).proxy.to_bytes()))


def test_honest_messages_are_taken():
    for name in PLACES:
        for data in (proxies(name), replies(name, True), replies(name, False)):
            assert receive_anything(data) == "taken"
            assert read_anything(data) == "taken"


def test_mutations_get_past_the_checksum():
    """Without that the properties above would show nothing."""
    dice, said = Random(0), []
    for _ in range(250):
        data = mutate(replies("qsn-4", False), dice)
        said.append("untouched" if data is None else receive_anything(data))
    assert sum("altered" in one or "no digest" in one for one in said) < 15
    assert said.count("taken") > 25
    assert len({one[:40] for one in said}) > 35


def test_taking_apart_and_sealing_changes_nothing():
    for name in PLACES:
        for data in (proxies(name), replies(name, True)):
            assert take_apart(data).sealed() == data
