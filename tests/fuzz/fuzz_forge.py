"""Messages taken apart, changed on purpose, and put together again with a checksum that is right.

Against bytes changed at random only the checksum would ever be tested. Here the layout and the
checksum follow a change, unless they are what is changed, so that it reaches the checks behind.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

import torch

from fedveil.errors import FedveilError, WireError
from fedveil.quantization import part_layout, spare_bits
from fedveil.wire.canonical import write_json
from fedveil.wire.container import DTYPES, METADATA_KEY, NO_DIGEST, seal

__all__ = ["Forged", "Piece", "mutate", "respell", "sealed", "spliced", "take_apart", "written"]

PARTS = {"dense": "t", "statistics": "t", "units": "i", "quantized": "qsu"}


@dataclass
class Piece:
    """One tensor: container dtype, shape and bytes."""

    dtype: str
    shape: list[int]
    octets: bytes


@dataclass
class Forged:
    """A message in pieces, any of which may be a lie."""

    header: dict[str, Any]
    pieces: dict[str, Piece]

    def laid_out(self) -> tuple[dict[str, Any], bytes]:
        """The container's header without metadata, and the data, in the order of writers."""
        order = list(DTYPES)
        names = sorted(self.pieces, key=lambda n: (_place(order, self.pieces[n].dtype), n))
        container, body = {}, b""
        for name in names:
            piece = self.pieces[name]
            ends = [len(body), len(body) + len(piece.octets)]
            container[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": ends}
            body += piece.octets
        return container, body

    def sealed(self) -> bytes:
        """Bytes with a right layout and a right checksum."""
        return written(self.header, *self.laid_out())


def _place(order: list[str], dtype: Any) -> int:
    return order.index(dtype) if dtype in order else len(order)


def take_apart(data: bytes) -> Forged | None:
    """Undo `Forged.sealed`; None for what is too broken."""
    try:
        length = int.from_bytes(data[:8], "little")
        container = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        header = json.loads(container.pop("__metadata__")[METADATA_KEY])
        header.pop("digest", None)
        for info in header["sections"].values():
            info["type"]
        pieces = {}
        for name, entry in container.items():
            begin, end = entry["data_offsets"]
            pieces[name] = Piece(entry["dtype"], list(entry["shape"]), body[begin:end])
        return Forged(header, pieces)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def written(header: dict[str, Any], container: dict[str, Any], body: bytes) -> bytes:
    """A message with the checksum that a reader will find."""
    header = {**header, "digest": NO_DIGEST}
    try:
        text = write_json(header)
    except FedveilError:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    whole = {"__metadata__": {METADATA_KEY: text}, **container}
    return sealed(_joined(json.dumps(whole, separators=(",", ":")).encode(), body))


def sealed(data: bytes) -> bytes:
    """Bytes with a right checksum, if there is a place for one."""
    message = bytearray(data)
    with suppress(WireError, BufferError):
        seal(message)
    return bytes(message)


def _joined(text: bytes, body: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 63, 64, 65, 255, 256, 4096, 2**31 - 1, 2**31, 2**32, 2**33,
    2**34 - 1, 2**34, 2**34 + 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, 10**30, 10**4000,
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, 1e-45, 1e-30, 1e6, 1.00001e6, 1e30, 3.4e38, 5e-324, 1e308)
TEXTS = (
    "", "proxy", "update", "statistics", "fedavg", "fedqsn", "regmean", "fisher", "low-rank",
    "blocks", "\x1b[2J", "\udc80", "\U0001f600", "a/b", "units/", "gram/", "x" * 65, "w" * 257,
    "dense", "quantized", "units", "F32", "F8_E4M3", "BOOL", "\\", '"', "\n", "\0",
)  # fmt: skip
SPECIAL = (
    b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x00\x00\x00\x80",
    b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00", b"\x00\x00\x80\xbf", b"\x00\x24\x74\x49",
    b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x00\x00\x80\x3f", b"\xf2\x04\x35\x7f",
)  # fmt: skip


def _anything(dice: Random) -> Any:
    """A JSON value that some check should have an opinion about."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: dice.choice(NUMBERS),
        lambda: -dice.choice(NUMBERS),
        lambda: dice.choice(FLOATS) * dice.choice((1, -1)),
        lambda: dice.choice(TEXTS),
        lambda: dice.choice((None, True, False, [], {}, [[[[[[[[[]]]]]]]]])),
        lambda: [dice.choice(NUMBERS) for _ in range(dice.randrange(10))],
        lambda: {dice.choice(TEXTS): dice.choice(NUMBERS)},
    )
    return dice.choice(kinds)()


def _change_one(root: dict[str, Any], dice: Random) -> None:
    """Replace, remove or add one value anywhere in a JSON object."""
    target: Any = root
    while True:
        if not target:
            return
        key = dice.choice(list(target) if isinstance(target, dict) else range(len(target)))
        below = target[key]
        if not isinstance(below, dict | list) or not below or dice.random() < 0.15:
            break
        target = below
    what = dice.random()
    if what < 0.1:
        del target[key]
    elif what < 0.2 and isinstance(target, dict):
        target[dice.choice(TEXTS)] = copy.deepcopy(below)
    elif what < 0.5 and type(below) is int:
        target[key] = below + dice.choice((-8, -1, 1, 8, below))
    else:
        target[key] = _anything(dice)


_MOST_VALUES = 10**6


def _octets(count: int, dice: Random) -> bytes:
    pattern = dice.choice((b"\0", b"\xff", b"\x77", b"", b"\x01\x80"))
    return (pattern * (count + 1))[:count] if pattern else dice.randbytes(count)


def _shape(dice: Random, most: int = 6000) -> list[int]:
    shape = [dice.choice((0, 1, 1, 2, 3, 5, 8, 17, 64, 65, 96)) for _ in range(dice.randrange(5))]
    while prod(shape) > most:
        shape.pop()
    return shape


def _section(dice: Random, forged: Forged) -> str | None:
    names = sorted(forged.header["sections"])
    return dice.choice(names) if names else None


def _drop(forged: Forged, name: str) -> None:
    forged.header["sections"].pop(name, None)
    for part in "tiqsu":
        forged.pieces.pop(f"{part}:{name}", None)


def _put_plain(forged: Forged, name: str, kind: str, dice: Random) -> None:
    """A dense or statistics section of any dtype and shape."""
    dtype = dice.choice(("F32",) * 4 + tuple(DTYPES))
    old = forged.pieces.get(f"t:{name}")
    # An old shape may be a lie that was told before: no such tensor can be made.
    honest = old is not None and prod(old.shape) <= _MOST_VALUES
    shape = list(old.shape) if old and honest and dice.random() < 0.7 else _shape(dice)
    count = prod(shape) * DTYPES[dtype].itemsize
    octets = bytes(count) if dtype == "BOOL" else _octets(count, dice)
    if old and dtype == "F32" and len(old.octets) == count:
        octets = old.octets
    _drop(forged, name)
    forged.header["sections"][name] = {"type": kind}
    forged.pieces[f"t:{name}"] = Piece(dtype, shape, octets)


def _put_quantized(forged: Forged, name: str, dice: Random) -> None:
    """A quantized section of any settings, whose parts fit them."""
    old = forged.header["sections"].get(name, {})
    shape = list(old.get("shape", ())) if dice.random() < 0.7 else _shape(dice)
    shape = shape if shape and all(type(extent) is int for extent in shape) else [3, 70]
    axis, double = dice.randrange(len(shape)), dice.random() < 0.6
    bits = dice.choice((2, 3, 4, 8))
    block = dice.choice((1, 2, 7, 63, 64, 65, 128, 2**31 - 1))
    try:
        layout = part_layout(tuple(shape), bits=bits, axis=axis, block=block, double=double)
    except FedveilError:
        return
    if sum(prod(extents) for _, extents in layout.values()) > 100_000:
        return
    _drop(forged, name)
    info = {"bits": bits, "axis": axis, "block": block, "double": double, "shape": shape}
    forged.header["sections"][name] = {"type": "quantized", **info}
    for part, (dtype, extents) in zip("qsu", layout.values(), strict=False):
        wide = dtype == torch.float32
        count = prod(extents)
        octets = dice.choice(SPECIAL[4:]) * count if wide else _octets(count, dice)
        if part == "q" and dice.random() < 0.9:
            octets = _without_spare(octets, extents[1], spare_bits(prod(shape) // shape[axis], bits)
                                    if shape[axis] else 0)  # fmt: skip
        forged.pieces[f"{part}:{name}"] = Piece("F32" if wide else "U8", list(extents), octets)


def _without_spare(octets: bytes, row: int, spare: int) -> bytes:
    changed = bytearray(octets)
    for last in range(row - 1, len(changed), row):
        changed[last] &= 0xFF >> spare
    return bytes(changed)


def _put_units(forged: Forged, name: str, dice: Random) -> None:
    """A unit index whose bitmap fits its size."""
    old = forged.header["sections"].get(name, {}).get("size")
    size = old if type(old) is int and dice.random() < 0.7 else dice.choice((0, 1, 7, 8, 9, 96))
    if not 0 <= size <= 4096:
        return
    octets = _without_spare(_octets((size + 7) // 8, dice), max(1, (size + 7) // 8), -size % 8)
    scale = dice.choice((1.0, 2.5, 1e308, 5e-324, 0.0))
    _drop(forged, name)
    forged.header["sections"][name] = {"type": "units", "size": size, "scale": scale}
    forged.pieces[f"i:{name}"] = Piece("U8", [(size + 7) // 8], octets)


def _replace_section(forged: Forged, dice: Random) -> None:
    """One section becomes another that is well-formed, perhaps under another name."""
    name = _section(dice, forged)
    if name is None or dice.random() < 0.1:
        name = dice.choice(("w", "1.weight", "units/x", "gram/1.weight/pairs", "fisher/1.bias"))
    kind = dice.choice(("dense", "statistics", "quantized", "units"))
    if kind in ("dense", "statistics"):
        _put_plain(forged, name, kind, dice)
    elif kind == "quantized":
        _put_quantized(forged, name, dice)
    else:
        _put_units(forged, name, dice)


def _move_section(forged: Forged, dice: Random) -> None:
    """Drop a section, or give it another's name, or copy it to another's place."""
    source = _section(dice, forged)
    target = _section(dice, forged)
    if source is None or target is None:
        return
    info = forged.header["sections"][source]
    pieces = {
        p: forged.pieces[f"{p}:{source}"] for p in "tiqsu" if f"{p}:{source}" in forged.pieces
    }
    if dice.random() < 0.6:
        _drop(forged, source)
    if dice.random() < 0.8 and source != target:
        _drop(forged, target)
        forged.header["sections"][target] = copy.deepcopy(info)
        forged.pieces |= {f"{part}:{target}": piece for part, piece in pieces.items()}


def _poke_values(forged: Forged, dice: Random) -> None:
    """Other numbers in a tensor that stays as it is otherwise."""
    filled = sorted(name for name, piece in forged.pieces.items() if piece.octets)
    if not filled:
        return
    piece = forged.pieces[dice.choice(filled)]
    octets = bytearray(piece.octets)
    what = dice.random()
    if what < 0.3:
        at = dice.randrange(len(octets))
        octets[at] = dice.randrange(256)
    elif what < 0.8:
        at = 4 * dice.randrange(max(1, len(octets) // 4))
        octets[at : at + 4] = dice.choice(SPECIAL)[: len(octets) - at]
    else:
        octets = bytearray((dice.choice(SPECIAL) * (len(octets) // 4 + 1))[: len(octets)])
    piece.octets = bytes(octets)


def _poke_scalars(forged: Forged, dice: Random) -> None:
    """A scalar of another value or name."""
    scalars = forged.header["scalars"]
    if not isinstance(scalars, dict):
        return
    name = dice.choice([*sorted(scalars), "examples", "gram/1.weight", "model", "bits", "a b"])
    scalars[name] = dice.choice((True, 0, 1, -1, 2**63 - 1, 2**63, 1e30, "1.weight", *TEXTS))


def _poke_header(forged: Forged, dice: Random) -> None:
    _change_one(forged.header, dice)


def _break_piece(forged: Forged, dice: Random) -> None:
    """A part of other bytes, dtype or shape than its section asks for."""
    if not forged.pieces:
        return
    name = dice.choice(sorted(forged.pieces))
    piece = forged.pieces[name]
    what = dice.randrange(4)
    if what == 0:
        del forged.pieces[name]
    elif what == 1:
        piece.octets = piece.octets[: dice.randrange(len(piece.octets) + 1)]
    elif what == 2:
        piece.shape = [*piece.shape, 1] if dice.random() < 0.5 else piece.shape[::-1]
    else:
        piece.dtype = dice.choice(tuple(DTYPES))


CHANGES = (
    (_poke_header, 5),
    (_replace_section, 4),
    (_move_section, 2),
    (_poke_values, 6),
    (_poke_scalars, 2),
    (_break_piece, 1),
)


def _lie_about_layout(container: dict[str, Any], body: bytes, dice: Random) -> bytes:
    """Gaps, overlaps, other orders, bytes that nobody reads."""
    what = dice.randrange(5)
    entries = list(container.values())
    if what == 0 and entries:
        _change_one(container, dice)
    elif what == 1:
        return body + _octets(dice.randrange(1, 20), dice)
    elif what == 2 and len(entries) > 1:
        one, other = dice.sample(entries, 2)
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif what == 3 and entries:
        at = dice.choice(entries)["data_offsets"]
        step = dice.choice((1, 4, 8, -1))
        at[0], at[1] = at[0] + step, at[1] + step
    else:  # a right layout in another order: floats that begin at odd places
        names = list(container)
        dice.shuffle(names)
        old, fresh = dict(container), b""
        container.clear()
        for name in names:
            begin, end = old[name]["data_offsets"]
            spot = [len(fresh), len(fresh) + end - begin]
            container[name] = {**old[name], "data_offsets": spot}
            fresh += body[begin:end]
        return fresh
    return body


def respell(data: bytes, dice: Random) -> bytes:
    """The same JSON, or nearly, in other characters."""
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    what = dice.randrange(7)
    if what == 0:
        text = text.replace(b":", b" : ", dice.randrange(1, 4))
    elif what == 1:
        text = text.rstrip() + b" " * dice.randrange(20)
    elif what == 2:
        text = text.replace(b"F32", b"\\u0046\\u0033\\u0032", 1)
    elif what == 3:
        text = text.rstrip()[:-1] + b',"t:w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    elif what == 4:
        text = text.replace(b'"shape":[', b'"shape":[' + dice.choice((b"NaN,", b"-0,", b"1e2,")), 1)
    elif what == 5:
        text = text.replace(b"[0,", b"[-0,", 1)
    else:
        size = dice.choice((0, 1, len(text) - 1, len(text) + 1, 2**24, 2**24 + 1, 2**63, 2**64 - 1))
        return struct.pack("<Q", size) + text + body
    return sealed(struct.pack("<Q", len(text)) + text + body)


def mutate(data: bytes, dice: Random) -> bytes | None:
    """A message that differs from `data` in a few places; None if `data` is no message."""
    forged = take_apart(data)
    if forged is None:
        return None
    changes, weights = zip(*CHANGES, strict=True)
    try:
        for change in dice.choices(changes, weights, k=dice.choice((0, 1, 1, 1, 2, 3))):
            change(forged, dice)
        container, body = forged.laid_out()
        if dice.random() < 0.2:
            body = _lie_about_layout(container, body, dice)
        result = written(forged.header, container, body)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return None  # an earlier lie was in the way
    return respell(result, dice) if dice.random() < 0.1 else result


def spliced(one: bytes, other: bytes, dice: Random) -> bytes | None:
    """Some sections and words of one message in another."""
    base, donor = take_apart(one), take_apart(other)
    if base is None or donor is None:
        return None
    try:
        for name, info in donor.header["sections"].items():
            if dice.random() < 0.4:
                _drop(base, name)
                base.header["sections"][name] = info
                parts = (f"{part}:{name}" for part in "tiqsu")
                base.pieces |= {part: donor.pieces[part] for part in parts if part in donor.pieces}
        for word in ("kind", "scheme", "round", "client", "scalars"):
            if dice.random() < 0.3:
                base.header[word] = donor.header[word]
        return base.sealed()
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
