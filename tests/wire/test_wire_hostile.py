"""Whatever bytes arrive, the answer is a message or a WireError."""

import json
import math
import struct
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_samples import messages, put_together, small_message, taken_apart

from fedveil.errors import WireError
from fedveil.quantization import quantize
from fedveil.wire import Dense, Limits, Message, UnitIndex
from fedveil.wire.canonical import write_json
from fedveil.wire.container import NO_DIGEST, seal

SMALL = small_message().to_bytes()


def refused(data, match=None, **limits):
    with pytest.raises(WireError, match=match) as caught:
        Message.from_bytes(data, limits=Limits(**limits))
    str(caught.value).encode("utf-8")
    return caught.value


def forged(change_header=None, change_container=None, body=None, message=None):
    """A message changed on purpose: with a digest that is right."""
    container, data = taken_apart((message or small_message()).to_bytes())
    header = json.loads(container.pop("__metadata__")["fedveil"])
    header["digest"] = NO_DIGEST
    data = bytearray(data)
    for change, target in ((change_header, header), (change_container, container), (body, data)):
        if change:
            change(target)
    try:
        text = write_json(header)
    except WireError:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return sealed(put_together({"__metadata__": {"fedveil": text}, **container}, bytes(data)))


def sealed(data):
    """With the right digest, if there is a place for one."""
    data = bytearray(data)
    with suppress(WireError):
        seal(data)
    return bytes(data)


def setter(*path, value):
    def change(target):
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def remover(*path):
    def change(target):
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


def test_forging_nothing_gives_a_message():
    assert Message.from_bytes(forged()).to_bytes() == SMALL


def test_any_flipped_bit_is_noticed():
    for place in range(len(SMALL) * 8):
        data = bytearray(SMALL)
        data[place // 8] ^= 1 << place % 8
        refused(bytes(data))


def test_any_missing_end_is_noticed():
    for length in range(len(SMALL)):
        refused(SMALL[:length])


@given(st.binary(min_size=1, max_size=64))
def test_anything_appended_is_noticed(tail):
    refused(SMALL + tail)


@given(st.binary(max_size=400))
@example(b"")
@example(bytes(8))
@example(b"\xff" * 8)
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 4) + b"null")
@example(struct.pack("<Q", 17) + b'{"__metadata__":1')
def test_random_bytes_are_refused(data):
    refused(data)


@given(st.text('{}[]":,0123456789-.eE\\ntruefalsu _', max_size=200))
@settings(max_examples=300)
def test_random_headers_are_refused(text):
    refused(struct.pack("<Q", len(text)) + text.encode())


@given(messages(), st.data())
@settings(max_examples=400, deadline=None)
def test_mutated_messages_are_refused(message, data):
    octets = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(octets) - 1))
        end = data.draw(st.integers(place, min(place + 9, len(octets))))
        octets[place:end] = data.draw(st.binary(max_size=9))
    if bytes(octets) != message.to_bytes():
        refused(bytes(octets))


HOSTILE_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**4000])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
    | st.lists(st.integers(-2, 2**64) | st.none(), max_size=10)
    | st.dictionaries(st.text(max_size=4), st.integers(), max_size=2)
)


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_forged_headers_are_messages_or_refused(data):
    """The digest is right: only the checks stand between the sender and the receiver."""
    container, _ = taken_apart(SMALL)
    header = json.loads(container.pop("__metadata__")["fedveil"])
    root = data.draw(st.sampled_from(["header", "container"]))
    target, path = (header if root == "header" else container), []
    while True:
        keys = sorted(target) if isinstance(target, dict) else range(len(target))
        path.append(data.draw(st.sampled_from(list(keys))))
        target = target[path[-1]]
        if not isinstance(target, (dict, list)) or not target or data.draw(st.booleans()):
            break
    change = setter(*path, value=data.draw(HOSTILE_VALUES))
    if data.draw(st.integers(0, 4)) == 0:
        change = remover(*path)
    try:
        octets = forged(**{f"change_{root}": change})
    except (KeyError, ValueError, TypeError):
        return  # the forger's own tools could not write this one
    try:
        arrived = Message.from_bytes(octets)
    except WireError as error:
        str(error).encode("utf-8")
    else:
        assert Message.from_bytes(arrived.to_bytes()).to_bytes() == arrived.to_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setter("version", value=1), "version 2, found 1"),
        (setter("version", value=True), "version 2"),
        (setter("version", value="2"), "version 2"),
        (remover("version"), "version 2"),
        (remover("round"), "keys are wrong"),
        (setter("extra", value=1), "keys are wrong"),
        (setter("round", value=-1), "round"),
        (setter("round", value=1.0), "round"),
        (setter("round", value=10**100), "round"),
        (setter("client", value="a/b"), "in client"),
        (setter("kind", value=""), "in kind"),
        (setter("scheme", value=["x"]), "in scheme"),
        (setter("scalars", value=[]), "not an object"),
        (setter("sections", value=None), "not an object"),
        (setter("scalars", "lr", value=None), "not a scalar"),
        (setter("scalars", "lr", value=[[[[[[[[[[1]]]]]]]]]]), "nested too deeply"),
        (setter("scalars", "lr", value=1e308 * 10), "not valid JSON"),
        (setter("scalars", "a b", value=1), "not a name"),
        (setter("sections", "up.weight", "type", value="pickle"), "unknown section type"),
        (setter("sections", "up.weight", "type", value=[]), "unknown section type"),
        (setter("sections", "up.weight", value=3), "unknown section type"),
        (setter("sections", "up.weight", "bits", value=5), "2, 3, 4 or 8"),
        (setter("sections", "up.weight", "bits", value=8), "does not fit.*section 'up.weight'"),
        (setter("sections", "up.weight", "bits", value=3), "bits after the last code"),
        (setter("sections", "up.weight", "bits", value=4.0), "2, 3, 4 or 8"),
        (setter("sections", "up.weight", "block", value=0), "block"),
        (setter("sections", "up.weight", "block", value=1), "does not fit"),
        (setter("sections", "up.weight", "axis", value=2), "axis"),
        (setter("sections", "up.weight", "shape", value=[3, 4000]), "does not fit"),
        (setter("sections", "up.weight", "shape", value=[3, 2**40]), "too large"),
        (setter("sections", "up.weight", "shape", value=[0, 2**62, 2**62]), "too large"),
        (setter("sections", "up.weight", "shape", value=[]), "impossible quantization"),
        (setter("sections", "up.weight", "shape", value=[3] + [1] * 8), "not a shape"),
        (setter("sections", "up.weight", "shape", value=[3, True]), "not a shape"),
        (setter("sections", "up.weight", "double", value=False), "does not fit"),
        (setter("sections", "up.weight", "double", value=1), "true or false"),
        (remover("sections", "up.weight", "axis"), "keys are wrong"),
        (setter("sections", "up.bias", "extra", value=0), "keys are wrong"),
        (remover("sections", "up.bias"), "belong to no section"),
        (setter("sections", "ghost", value={"type": "dense"}), "missing .in section 'ghost'"),
        (setter("sections", "mlp", "size", value=10), "after its last one"),
        (setter("sections", "mlp", "size", value=17), "does not fit"),
        (setter("sections", "mlp", "size", value=-1), "not a shape"),
        (setter("sections", "mlp", "size", value=2**60), "too large"),
        (setter("sections", "mlp", "scale", value=0.0), "above 0"),
        (setter("sections", "mlp", "scale", value=2), "with a point"),
        (setter("sections", "mlp", "scale", value=None), "with a point"),
    ],
)
def test_a_forged_header_is_refused_with_its_reason(change, said):
    refused(forged(change_header=change), match=said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setter("t:up.bias", "dtype", value="F8_E4M3"), "unknown dtype"),
        (setter("t:up.bias", "dtype", value=7), "unknown dtype"),
        (setter("t:up.bias", "shape", value=[3]), "shape and bytes disagree"),
        (setter("t:up.bias", "shape", value=[2**62, 2**62]), "too large"),
        (setter("t:up.bias", "shape", value=[1] * 9), "not a shape"),
        (setter("t:up.bias", "shape", value=[-2]), "not a shape"),
        (setter("t:up.bias", "shape", value="2"), "not a shape"),
        (setter("t:up.bias", "data_offsets", value=[0, 4, 4]), "not a range"),
        (setter("t:up.bias", "data_offsets", value=[4, 0]), "not a range"),
        (setter("t:up.bias", "data_offsets", value=[2**70, 2**70 + 4]), "exactly"),
        (setter("t:up.bias", "data_offsets", value=[0, 4]), "exactly"),
        (setter("t:up.bias", value={}), "not described"),
        (setter("t:up.bias", "extra", value=1), "not described"),
        (remover("t:up.bias"), "exactly"),
    ],
)
def test_a_forged_container_is_refused_with_its_reason(change, said):
    refused(forged(change_container=change), match=said)


def test_impossible_values_are_refused():
    container, _ = taken_apart(SMALL)
    first_code = container["q:up.weight"]["data_offsets"][0]
    unit_scale = container["u:up.weight"]["data_offsets"][0]
    spare_bits = setter(first_code + 1, value=0xF0)
    refused(forged(body=spare_bits), match="bits after the last code of a unit")
    for value in (math.nan, math.inf, -1.0):
        change = setter(slice(unit_scale, unit_scale + 4), value=struct.pack("<f", value))
        refused(forged(body=change), match="scale is negative, NaN or infinite")


def test_a_bool_that_is_neither_is_refused():
    message = Message("update", "s", 0, "c", {"b": Dense(torch.tensor([True]))})
    refused(forged(message=message, body=setter(0, value=2)), match="neither 0 nor 1")


def test_limits_are_kept():
    refused(SMALL, match="message too large", max_bytes=len(SMALL) - 1)
    refused(
        SMALL,
        match=r"header too large: expected up to 100 bytes, found \d+ bytes.*max_header_bytes",
        max_header_bytes=100,
    )
    refused(SMALL, match="too many sections", max_sections=3)
    refused(SMALL, match="too large", max_elements=8)
    refused(SMALL, match="too many numbers", max_elements=23)
    Message.from_bytes(SMALL, limits=Limits(len(SMALL), 2000, 4, 24))


def test_a_few_bytes_cannot_ask_for_much_memory():
    many = Message("proxy", "s", 0, "c", {"w": quantize(torch.zeros(4, 64), bits=2)})
    refused(
        forged(
            message=many,
            change_header=setter("sections", "w", "shape", value=[2**16, 2**17]),
        ),
        match="does not fit",
    )


def test_two_metadata_keys_or_none_are_refused():
    container, body = taken_apart(SMALL)
    text = container["__metadata__"]["fedveil"]
    for metadata in ({}, {"fedveil": text, "a": "b"}, {"format": "pt"}, {"fedveil": 1}, None, 3):
        refused(put_together({**container, "__metadata__": metadata}, body), match="not a fedveil")


def test_another_spelling_of_the_header_is_refused():
    container, body = taken_apart(SMALL)
    text = container["__metadata__"]["fedveil"]
    for other in (text + " ", text.replace(":", ": ", 1), text.replace("proxy", "pr\\u006fxy")):
        container["__metadata__"]["fedveil"] = other
        refused(put_together(container, body), match="canonical")


def test_a_key_that_stands_twice_is_refused():
    container, body = taken_apart(SMALL)
    text = json.dumps(container)
    twice = (text[:-1] + ', "t:gram": ' + json.dumps(container["t:gram"]) + "}").encode()
    refused(struct.pack("<Q", len(twice)) + twice + body, match="stands twice")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '\\"' * 200_000,
        '"' * 200_001,
        '{"a":' + "9" * 200_000 + "}",
        '{"a":"' + "\\" * 200_001,
        "[" + "[]," * 200_000,
        "NaN",
        '{"a":1e999}',
        '{"\\ud800":{}}',
        '{"é":1}',
    ],
)
def test_text_that_hurts_parsers_is_refused_quickly(text):
    data = text.encode()
    began = time.process_time()
    refused(struct.pack("<Q", len(data)) + data)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("data", [None, "text", 7, [1, 2], {}])
def test_what_is_not_bytes_is_refused(data):
    refused(data, match="not bytes")


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath, ("sprung",))

    torch.save(Trap(), tmp_path / "trap.pt")
    refused((tmp_path / "trap.pt").read_bytes())


def test_errors_say_where(monkeypatch):
    error = refused(forged(change_header=setter("sections", "mlp", "scale", value=-1.0)))
    assert error.where == "section 'mlp'"
    with pytest.raises(WireError, match="section 'w'"):
        Message("proxy", "s", 0, "c", {"w": object()})  # type: ignore[dict-item]
    with pytest.raises(WireError, match="ascending"):
        UnitIndex(3, torch.tensor([2, 0]))
