"""What a refusal may cost: a receiver asks for no more memory than `docs/wire-format.md` says."""

import json
import struct
from collections.abc import Callable

import pytest
import torch
from fuzz_caps import under_caps
from fuzz_forge import Forged, Piece, take_apart

from fedveil.quantization import quantize
from fedveil.wire import Dense, Message, UnitIndex

MIB = 2**20
HEADER = MIB // 2
SMALL = Message("update", "s", 0, "c")

# Bytes of memory for a byte that arrives, as docs/wire-format.md has it.
CONSTANT = 8 * MIB
PER_BYTE = 2.0
PER_HEADER_BYTE = 32.0
PER_INDEX_BYTE = 88.0


def container(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def padded(unit: bytes) -> bytes:
    """A header full of the same small things."""
    room = b'{"__metadata__":{"fedveil":""},"a":[' + unit * (HEADER // len(unit)) + b"0]}"
    return container(room)


def inner(unit: str) -> bytes:
    """The same in the message header."""
    text = '{"a":[' + unit * (HEADER // len(unit)) + "0]}"
    return container(json.dumps({"__metadata__": {"fedveil": text}}).encode())


def names() -> bytes:
    entries = b",".join(b'"%07x":0' % number for number in range(HEADER // 12))
    return container(b'{"__metadata__":{"fedveil":""},' + entries + b"}")


def forged(message: Message, change: Callable[[Forged], None]) -> bytes:
    parts = take_apart(bytes(message.to_bytes()))
    assert parts is not None
    change(parts)
    return parts.sealed()


def unreadable_last(parts: Forged) -> None:
    """A section that is looked at after all others, and refused."""
    info = {"axis": 0, "bits": 4, "block": 1, "double": False, "shape": [1, 1], "type": "quantized"}
    parts.header["sections"]["~"] = info
    parts.pieces["q:~"] = Piece("U8", [1, 1], b"\0")
    parts.pieces["s:~"] = Piece("F32", [1, 1], b"\0\0\xc0\x7f")


def whole_index(parts: Forged) -> None:
    parts.pieces["i:i"].octets = b"\xff" * MIB
    unreadable_last(parts)


def two_for_true(parts: Forged) -> None:
    parts.pieces["t:w"].octets = bytes(16 * MIB - 1) + b"\2"


def more_than_there_is(parts: Forged) -> None:
    parts.header["sections"]["w"]["shape"] = [2**10, 2**24]


def altered(message: Message) -> bytes:
    data = message.to_bytes()
    data[-1] ^= 1
    return bytes(data)


def index(size: int) -> Message:
    units = UnitIndex(size, torch.empty(0, dtype=torch.int64))
    return Message("update", "s", 0, "c", {"i": units})


ZEROS = Message("update", "s", 0, "c", {"w": Dense(torch.zeros(4 * MIB))})
FLAGS = Message("update", "s", 0, "c", {"w": Dense(torch.zeros(16 * MIB, dtype=torch.bool))})
PACKED = Message("update", "s", 0, "c", {"w": quantize(torch.ones(2**10, 2**13), bits=2)})

BOMBS = {
    "lists": lambda: padded(b"[],"),
    "objects": lambda: padded(b"{},"),
    "pairs": lambda: padded(b'{"":0},'),
    "numbers": lambda: padded(b"7,"),
    "texts": lambda: padded(b'"",'),
    "names": names,
    "inner lists": lambda: inner("[],"),
    "inner objects": lambda: inner("{},"),
    "altered": lambda: altered(ZEROS),
    "a bool of two": lambda: forged(FLAGS, two_for_true),
    "codes of a section refused later": lambda: forged(PACKED, unreadable_last),
    "codes for too many": lambda: forged(PACKED, more_than_there_is),
    "an index refused later": lambda: forged(index(8 * MIB), whole_index),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "first").write_bytes(SMALL.to_bytes())  # imports what is imported late
    for name, bomb in BOMBS.items():
        (folder / name).write_bytes(bomb())
    paths = [str(folder / name) for name in ("first", *BOMBS)]
    return dict(zip(("first", *BOMBS), under_caps("read", paths), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_refusal_costs_no_more_memory_than_is_declared(name, measured):
    data, found = BOMBS[name](), measured[name]
    header = int.from_bytes(data[:8], "little")
    bitmap = MIB if "index" in name else 0
    allowed = CONSTANT + PER_HEADER_BYTE * header + PER_INDEX_BYTE * bitmap
    allowed += PER_BYTE * (len(data) - header - bitmap)
    # The entry makes a copy of what it is handed, to see whether somebody writes into it.
    used = max(found["grown"], found["traced"]) - len(data)
    assert found["said"] != "taken"
    assert used < allowed, f"{used / MIB:.1f} of {allowed / MIB:.1f} MiB"
    assert found["seconds"] < 5
