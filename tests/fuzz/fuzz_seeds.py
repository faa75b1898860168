"""The corpus: small messages that each reach a place of their own, and what becomes of them.

`python fuzz/build_corpus.py` writes them to `tests/fuzz/corpus/`. They are made by the library that
reads them, so that a new version of the format takes its corpus along; what a fuzzing program finds
is written down here as one more entry.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from fuzz_entries import Steady, net, place
from fuzz_forge import Forged, Piece, sealed, take_apart, written

from fedveil.quantization import QuantizedTensor, quantize
from fedveil.wire import Dense, Message, Statistics, UnitIndex

__all__ = ["Seed", "seeds"]

Seed = tuple[bytes, str]
"""Bytes, and what is said of them: "taken", or some words of the refusal."""

Change = Callable[[Forged], None]


def seeds() -> dict[str, Seed]:
    """Name -> seed, in a folder per entry: "read/..." and "receive/..."."""
    found: dict[str, Seed] = {}
    groups = (_honest, _containers, _headers, _spellings, _values, _expansions, _rounds, _replies)
    for group in groups:
        for name, data, said in group():
            assert name not in found
            found[name] = (bytes(data), said)
    return found


Named = tuple[str, bytes | bytearray, str]


def _small() -> Message:
    """Every section type in a few numbers."""
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]])
    return Message(
        kind="proxy",
        scheme="fedqsn",
        round=7,
        client="clinic-2",
        sections={
            "up.weight": quantize(weight, block=2),
            "up.bias": Dense(torch.tensor([0.5, -2.0], dtype=torch.bfloat16)),
            "mlp": UnitIndex(11, torch.tensor([0, 3, 10]), scale=2.5),
            "gram": Statistics(torch.tensor([[1, 2]], dtype=torch.int32)),
            "flags": Dense(torch.tensor([True, False, True])),
        },
        scalars={"lr": 0.001, "steps": 4, "text": "\u00fc\U0001f600\x1b[0m", "yes": True},
    )


def _forged(*changes: Change, message: Message | None = None) -> bytes:
    forged = _apart(message)
    for change in changes:
        change(forged)
    return forged.sealed()


def _apart(message: Message | None = None) -> Forged:
    forged = take_apart(bytes((message or _small()).to_bytes()))
    assert forged is not None
    return forged


def _set(*path: Any, to: Any) -> Change:
    """Set a value in the message header."""

    def change(forged: Forged) -> None:
        target: Any = forged.header
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return change


def _piece(name: str, **changes: Any) -> Change:
    def change(forged: Forged) -> None:
        forged.pieces[name] = replace(forged.pieces[name], **changes)

    return change


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _honest() -> Iterator[Named]:
    yield "read/every-section", _small().to_bytes(), "taken"
    yield "read/nothing", Message("update", "s", 0, "c").to_bytes(), "taken"
    weight = torch.arange(-260, 260, dtype=torch.float32).view(4, 130) / 260
    packed: dict[str, Any] = {
        f"w{bits}{axis}{double}": quantize(weight, bits=bits, axis=axis, block=block, double=double)
        for bits, axis, block, double in (
            (2, 0, 64, True), (3, 1, 3, False), (4, 1, 128, True), (8, 0, 7, False),
        )
    }  # fmt: skip
    yield "read/every-width", Message("proxy", "s", 1, "c", packed).to_bytes(), "taken"
    empty: dict[str, Any] = {
        "none": Dense(torch.empty(0)),
        "wide": Dense(torch.empty(0, 7, dtype=torch.int64)),
        "one": Dense(torch.tensor(1.5, dtype=torch.float64)),
        "nobody": UnitIndex(9, torch.empty(0, dtype=torch.int64)),
        "packed": quantize(torch.empty(0, 5)),
        "across": quantize(torch.empty(5, 0), axis=1, block=2),
    }
    yield "read/empty-tensors", Message("proxy", "s", 1, "c", empty).to_bytes(), "taken"
    none = {"w": Dense(torch.empty(0, 3))}
    yield "read/tensors-without-data", Message("update", "s", 1, "c", none).to_bytes(), "taken"
    floats = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    odd = {"f": Dense(floats), "h": Dense(floats.half()), "d": Dense(floats.double())}
    yield "read/odd-floats", Message("update", "s", 2**63 - 1, "c", odd).to_bytes(), "taken"


def _containers() -> Iterator[Named]:
    """Lies about where things are."""
    container, body = _apart().laid_out()
    header = _apart().header

    def lie(change: Callable[[dict[str, Any]], None], data: bytes = body) -> bytes:
        entries = json.loads(json.dumps(container))
        change(entries)
        return written(header, entries, data)

    def shifted(by: int) -> Callable[[dict[str, Any]], None]:
        def change(entries: dict[str, Any]) -> None:
            last = max(entries.values(), key=lambda e: e["data_offsets"][1])
            last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

        return change

    def twice(entries: dict[str, Any]) -> None:
        entries["q:up.weight"]["data_offsets"] = entries["s:up.weight"]["data_offsets"]

    def to(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda entries: entries[name].update({key: value})

    exactly = "do not fill the message exactly"
    yield "read/gap", lie(shifted(1), body + b"\0"), exactly
    yield "read/overlap", lie(twice), exactly
    yield "read/bytes-that-nobody-reads", lie(lambda entries: None, body + b"hidden"), exactly
    yield (
        "read/offsets-beyond-64-bits",
        lie(to("t:up.bias", "data_offsets", [2**70, 2**70 + 4])),
        (exactly),
    )
    huge = to("t:up.bias", "shape", [2**62, 2**62])
    yield "read/huge-shape-tiny-data", lie(huge), "too large"
    # Its product is 2: only each extent by itself is out of bounds.
    negative = to("t:up.bias", "shape", [-1, -2])
    yield "read/negative-shape", lie(negative), "not a shape"
    endless = to("t:up.bias", "shape", [10**4000, 2])
    yield "read/shape-of-4000-digits", lie(endless), "too large"
    backwards = dict(reversed(list(container.items())))
    turned, moved = {}, b""
    for name, entry in backwards.items():
        begin, end = entry["data_offsets"]
        turned[name] = {**entry, "data_offsets": [len(moved), len(moved) + end - begin]}
        moved += body[begin:end]
    yield "read/floats-at-odd-places", written(header, turned, moved), "taken"


def _headers() -> Iterator[Named]:
    """Lies about what things are."""
    section = ("sections", "up.weight")
    deep: Any = 1
    for _ in range(9):
        deep = [deep]
    for name, change, said in (
        ("scalar-beyond-64-bits", _set("scalars", "n", to=-(2**63) - 1), "64 bits"),
        ("name-with-a-surrogate", _set("scalars", "\ud800", to=1), "not a name"),
        ("deep-inside", _set("scalars", "t", to=deep), "nested too deeply"),
        ("axis-from-the-end", _set(*section, "axis", to=-1), "axis"),
        ("shape-beyond-all-memory", _set(*section, "shape", to=[3, 2**40]), "too large"),
        ("index-past-its-end", _set("sections", "mlp", "size", to=10), "after its last one"),
    ):
        yield f"read/{name}", _forged(change), said


def _spellings() -> Iterator[Named]:
    """JSON that hurts parsers, or says a thing in another way."""
    plain = bytes(_small().to_bytes())
    length = int.from_bytes(plain[:8], "little")
    text, body = plain[8 : 8 + length].rstrip(), plain[8 + length :]

    def spelled(text: bytes) -> bytes:
        return sealed(struct.pack("<Q", len(text)) + text + body)

    yield "read/header-longer-than-all", struct.pack("<Q", len(plain)) + plain[8:], "cut off"
    yield "read/header-of-2-to-the-64", b"\xff" * 8 + plain[8:], "header too large"
    yield "read/wrong-digest", plain.replace(b"clinic-2", b"clinic-3"), "altered on the way"
    yield "read/spaces-and-escapes", spelled(
        text.replace(b'"F32"', b' "\\u004632" ') + b"   "
    ), "taken"  # fmt: skip
    digest_hidden = text.replace(rb"\"digest\"", rb"\u0022digest\"")
    yield "read/digest-in-another-spelling", spelled(digest_hidden), "no digest"
    yield "read/key-twice", spelled(text[:-1] + b',"t:gram":0}'), "stands twice"
    yield "read/nan-in-json", spelled(text.replace(b'"shape":[2]', b'"shape":[NaN]')), "valid JSON"
    digits = text.replace(b'"shape":[2]', b'"shape":[' + b"9" * 5000 + b"]", 1)
    yield "read/number-of-5000-digits", spelled(digits), "valid JSON"
    deep = b'{"a":' * 300
    yield "read/deep-nesting", struct.pack("<Q", len(deep)) + deep, "nested too deeply"
    quotes = b'{"a":"' + b"\\" * 3001
    yield "read/backslashes", struct.pack("<Q", len(quotes)) + quotes, "valid JSON"
    spaced = text.replace(rb"\"round\":7", rb"\"round\": 7")
    yield "read/header-not-canonical", spelled(spaced), "canonical"


def _values() -> Iterator[Named]:
    for name, change, said in (
        ("bool-of-two", _piece("t:flags", octets=b"\1\2\0"), "neither 0 nor 1"),
        ("scale-of-nan", _piece("u:up.weight", octets=_floats(1, float("nan"), 3)), "NaN"),
        ("scale-below-zero", _piece("u:up.weight", octets=_floats(1, 0, -1e-45)), "negative"),
        (
            "spare-bits",
            _piece("q:up.weight", octets=bytes([0x11, 0xF1] * 3)),
            "after the last code",
        ),
        ("scale-of-minus-zero", _piece("u:up.weight", octets=_floats(1, -0.0, 3)), "taken"),
        ("largest-scale", _piece("u:up.weight", octets=_floats(3.4e38, 1e-45, 0)), "taken"),
    ):
        yield f"read/{name}", _forged(change), said


def _expansions() -> Iterator[Named]:
    """A few bytes that describe much."""

    def quantized(shape: list[int], axis: int, parts: dict[str, Piece], **more: Any) -> bytes:
        info = {"bits": 2, "block": 2**31 - 1, "double": False, "axis": axis, "shape": shape}
        forged = _apart(Message("update", "s", 1, "c"))
        forged.header["sections"]["w"] = {"type": "quantized", **info, **more}
        forged.pieces.update({f"{part}:w": piece for part, piece in parts.items()})
        return forged.sealed()

    # 64 KiB of 2-bit codes are a MiB of float32, under one scale.
    codes = {"q": Piece("U8", [1, 2**12], b"\x1b" * 2**12), "s": Piece("F32", [1, 1], _floats(1))}
    yield "read/2-bit-codes", quantized([1, 2**14], 0, codes), "taken"
    nothing = {"q": Piece("U8", [0, 2**32], b""), "s": Piece("F32", [0, 9], b"")}
    yield "read/2-to-the-34-values-of-no-units", quantized([0, 2**34], 0, nothing), "taken"
    beyond = {"q": Piece("U8", [0, 2**33], b""), "s": Piece("F32", [0, 1], b"")}
    yield "read/2-to-the-35-values-of-no-units", quantized([0, 2**35], 0, beyond), "too large"


def _rounds() -> Iterator[Named]:
    """What honest servers and clients say, without what says the same again."""
    few = Steady(("0.bias", "4.weight"))
    middle = Steady(("2.weight", "0.bias"))
    yield "receive/avg-few", place("avg").reply(few).to_bytes(), "taken"
    yield "receive/avg-4-reply", place("avg-4").reply(middle).to_bytes(), "taken"
    yield "receive/avg-regmean-reply", place("avg-regmean").reply(middle).to_bytes(), "taken"
    yield "receive/qsn-low-rank-proxy", place("qsn-low-rank").proxy.to_bytes(), "taken"
    low_rank = place("qsn-low-rank").reply(Steady(("4.weight",)))
    yield "receive/qsn-low-rank-reply", low_rank.to_bytes(), "taken"
    yield "receive/qsn-4-proxy", place("qsn-4").proxy.to_bytes(), "taken"
    yield "receive/qsn-4-reply", place("qsn-4").reply(middle).to_bytes(), "taken"
    blocks = place("qsn-8").reply(Steady(("2.weight",)))
    yield "receive/qsn-8-reply", blocks.to_bytes(), "taken"
    fisher = {f"fisher/{name}": Statistics(torch.ones_like(tensor)) for name, tensor in _biases()}
    scalars: dict[str, Any] = {"examples": 3, "model": "0" * 64}
    told = Message("statistics", "fisher", 0, "owner", fisher, scalars)
    yield "receive/fisher-of-some", told.to_bytes(), "one is missing"
    grams = place("avg-regmean").reply(Steady(("4.weight",)))
    kept = {n: s for n, s in grams.sections.items() if n.startswith("gram/")}
    named = {n: v for n, v in grams.scalars.items() if n.startswith("gram/")}
    scalars |= {"form": "blocks", "size": 96, "bits": 8}
    told = Message("statistics", "regmean", 0, "owner", kept, {**scalars, **named})
    yield "receive/grams", told.to_bytes(), "taken"


def _biases() -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p.detach()) for n, p in net().named_parameters() if n.endswith("bias"))


def _replies() -> Iterator[Named]:
    """Well-formed replies and proxies that are wrong."""
    base = place("avg").reply(Steady(("0.bias", "4.weight")))

    def reply(sections: dict[str, Any], **more: Any) -> bytearray:
        return replace(base, sections={**base.sections, **sections}, **more).to_bytes()

    ones = torch.ones(96)
    yield "receive/update-of-nan", reply({"0.bias": Dense(ones * float("nan"))}), "NaN, infinite"
    yield "receive/update-in-float64", reply({"0.bias": Dense(ones.double())}), "taken"
    packed = place("avg-4").reply(Steady(("2.weight",)))
    wide = quantize(torch.ones(128, 48), bits=4)
    other = replace(packed, sections={"2.weight": wide})
    yield "receive/update-of-another-shape", other.to_bytes(), "wrong shape"
    scales = _forged(
        lambda f: f.pieces.update({"u:2.weight": Piece("F32", [64], _floats(*[3.4e38] * 64))}),
        message=packed,
    )
    yield "receive/update-with-huge-scales", scales, "absurdly large"
    grams, gram = place("qsn-8").reply(Steady(("2.weight",))), ("scalars", "gram/2.weight")
    for name, change, said in (
        ("gram-of-nan", _bad_gram, "diagonal is impossible"),
        ("gram-name-that-steers-a-terminal", _set(*gram, to="\x1b[2J"), "A Gram"),
    ):
        yield f"receive/{name}", _forged(change, message=grams), said
    proxy = place("qsn-4").proxy
    bare = {n: s for n, s in proxy.sections.items() if not n.startswith("units/")}
    yield "receive/proxy-without-indices", replace(proxy, sections=bare).to_bytes(), "wrong shape"
    index = next(n for n in proxy.sections if n.startswith("units/"))
    units = proxy.sections[index]
    assert isinstance(units, UnitIndex)
    fewer = replace(units, released=torch.arange(3))
    scaled = replace(units, scale=1e39)
    loud = replace(proxy, sections={**proxy.sections, index: scaled})
    yield "receive/proxy-scaled-beyond-float32", loud.to_bytes(), "float32"
    large = {
        name: quantize(section.dequantize() * 1e25, bits=3)
        if isinstance(section, QuantizedTensor)
        else Dense(section.tensor * 1e25)
        if isinstance(section, Dense)
        else section
        for name, section in place("qsn-low-rank").proxy.sections.items()
    }
    shout = replace(place("qsn-low-rank").proxy, sections=large)
    yield "receive/proxy-too-large-to-measure", shout.to_bytes(), "measure"
    shown = replace(proxy, sections={**proxy.sections, index: fewer})
    yield "receive/proxy-of-another-cut", shown.to_bytes(), "wrong shape"


def _bad_gram(forged: Forged) -> None:
    piece = forged.pieces["t:gram/2.weight/diagonal"]
    piece.octets = _floats(float("nan")) * (len(piece.octets) // 4)
