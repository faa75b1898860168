"""The safetensors container: where everything lies in a file, and what a file's header claims.

The format is that of the `safetensors` library, byte for byte. This module lays a file out itself,
so that a message is gathered straight into its final buffer, and reads the header itself, because
the caps must hold before anything is allocated and tensors need not be copied out of the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_128

from fedveil.errors import WireError
from fedveil.wire.canonical import read_json
from fedveil.wire.limits import Limits

__all__ = [
    "DTYPES",
    "MAX_AXES",
    "METADATA_KEY",
    "NO_DIGEST",
    "Container",
    "Entry",
    "Plan",
    "check_extents",
    "digest",
    "open_container",
    "place_of_digest",
    "plan_container",
    "seal",
]

METADATA_KEY: Final = "fedveil"
"""The only key of the container's metadata: several would come in a random order."""

DTYPES: Final = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Container dtype names that are spoken, in the order of their tensors in a file."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ORDER: Final = {dtype: number for number, dtype in enumerate(DTYPES.values())}
_LENGTH_BYTES: Final = 8
_ALIGNED: Final = 8
_LARGEST_HEADER: Final = 100_000_000
"""Bytes; what the safetensors library reads at most."""

MAX_AXES: Final = 8
"""Most axes that a tensor on the wire has."""

_HEX_DIGITS: Final = 32
NO_DIGEST: Final = "0" * _HEX_DIGITS
"""What stands in a message in place of its digest while that is computed."""

_BEFORE_DIGEST: Final = rb"\"digest\":\""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `begin` and `end` count from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """The tensors of a file before there is any of it.

    Attributes:
        described: the header's text about them.
        names: in the order of the file.
        ranges: where each begins and ends, counted from the end of the header.
    """

    described: str
    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.ranges[-1][1] if self.ranges else 0

    def header(self, metadata: str) -> bytes:
        """The bytes before the tensors, with their own length.

        Args:
            metadata: ASCII.

        Raises:
            WireError: the header would be longer than the safetensors library reads.
        """
        first = f'"__metadata__":{{"{METADATA_KEY}":{json.dumps(metadata)}}}'
        text = f"{{{first}{self.described}}}"
        length = -(-len(text) // _ALIGNED) * _ALIGNED
        if length > _LARGEST_HEADER:
            raise WireError(
                "the message cannot be written: its header is too long",
                expected=f"up to {_LARGEST_HEADER} bytes",
                found=f"{length} bytes",
                fix="It grows with the number of tensors, and with the texts among the scalars.",
            )
        return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length).encode("ascii")


@dataclass(frozen=True)
class Container:
    """A file whose header agrees with its length; no tensor has been made yet."""

    metadata: str
    entries: dict[str, Entry]
    raw: memoryview
    data: memoryview

    def digest(self) -> str:
        """The checksum that the file should carry."""
        header = bytes(self.raw[: len(self.raw) - len(self.data)])
        ranges = sorted((entry.begin, entry.end) for entry in self.entries.values())
        return digest(header, [xxh3_128(self.data[i:j]).digest() for i, j in ranges])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors: views of the bytes if these can be written to, else of a copy of them.

        Raises:
            WireError: a bool is neither 0 nor 1.
        """
        memory = np.frombuffer(self.data, np.uint8)
        memory = memory if memory.flags.writeable else memory.copy()
        address = memory.ctypes.data
        return {name: _view(name, memory, address, e) for name, e in self.entries.items()}


def plan_container(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Plan:
    """Lay out a safetensors file as that library does: by dtype, then by name.

    Args:
        tensors: name -> dtype and shape.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name][0]], name))
    described, ranges, at = [], [], 0
    for name in names:
        dtype, shape = tensors[name]
        end = at + prod(shape) * dtype.itemsize
        extents = ",".join(map(str, shape))
        described.append(
            f',"{name}":{{"dtype":"{_NAMES[dtype]}","shape":[{extents}],"data_offsets":[{at},{end}]}}'
        )
        ranges.append((at, end))
        at = end
    return Plan("".join(described), tuple(names), tuple(ranges))


def place_of_digest(header: bytes) -> int:
    """Where the digits of the digest begin in the bytes before the tensors.

    Raises:
        WireError: there is no digest where the message header has its own.
    """
    found = header.find(_BEFORE_DIGEST)
    if found < 0:
        raise WireError("the message carries no digest")
    return found + len(_BEFORE_DIGEST)


def digest(header: bytes, tensors: Iterable[bytes]) -> str:
    """XXH3-128 as hex: of the bytes before the tensors, zeros in place of the digest, and of
    each tensor's own XXH3-128.

    Not keyed: whoever alters a message on purpose computes a new one.

    Args:
        header: with its length.
        tensors: the 16 bytes of each tensor's, in the order of the file.

    Raises:
        WireError: the header has no place for it.
    """
    place = place_of_digest(header)
    state = xxh3_128(header[:place])
    state.update(NO_DIGEST.encode("ascii"))
    state.update(header[place + _HEX_DIGITS :])
    for own in tensors:
        state.update(own)
    return state.hexdigest()


def seal(message: bytearray) -> None:
    """Write the right digest into a message, whatever stood there: for tests and tools.

    Raises:
        WireError: the message has no place for one, or no header that could be read.
    """
    text, data = _split(memoryview(message), Limits())
    entries = read_json(text, "container header")
    if not isinstance(entries, dict):
        raise WireError("the container header is not an object")
    ranges = sorted(
        tuple(entry["data_offsets"])
        for entry in entries.values()
        if isinstance(entry, dict) and _are_counts(entry.get("data_offsets"))
    )
    header = bytes(message[: len(message) - len(data)])
    place = place_of_digest(header)
    tensors = [xxh3_128(data[slice(*offsets)]).digest() for offsets in ranges if len(offsets) == 2]
    message[place : place + _HEX_DIGITS] = digest(header, tensors).encode("ascii")


def _view(name: str, memory: NDArray[np.uint8], address: int, entry: Entry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:  # numpy gives nothing at all no stride that could be seen anew
        return torch.empty(entry.shape, dtype=dtype)
    octets = memory[entry.begin : entry.end]
    # Other writers may order tensors so that some lie across the processor's words.
    if (address + entry.begin) % dtype.itemsize:
        octets = octets.copy()
    tensor = torch.from_numpy(octets).view(dtype).view(entry.shape)
    if dtype == torch.bool and bool((octets > 1).any()):
        raise WireError("a bool is neither 0 nor 1", where=name)
    return tensor


def open_container(data: bytes | bytearray | memoryview, limits: Limits) -> Container:
    """Check lengths, header, and that the tensors fill the data exactly.

    Raises:
        WireError: this is not a safetensors file of the kind that messages are.
    """
    raw = _as_bytes(data, limits)
    text, body = _split(raw, limits)
    header = read_json(text, "container header")
    if not isinstance(header, dict):
        raise WireError("the container header is not an object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [METADATA_KEY]:
        raise WireError("not a fedveil message", expected=f"one metadata key {METADATA_KEY!r}")
    if not isinstance(metadata[METADATA_KEY], str):
        raise WireError("not a fedveil message", expected="metadata that is text")
    entries = {name: _entry(name, value, limits) for name, value in header.items()}
    _check_filled(entries, len(body))
    return Container(metadata[METADATA_KEY], entries, raw, body)


def _as_bytes(data: bytes | bytearray | memoryview, limits: Limits) -> memoryview:
    """One axis of bytes; copied only if it was something else."""
    try:
        raw = memoryview(data)
    except TypeError:
        raise WireError("not bytes", found=type(data).__name__) from None
    limits.check_length(raw.nbytes)
    plain = raw.ndim == 1 and raw.format == "B" and raw.c_contiguous
    return raw if plain else memoryview(raw.tobytes())


def _split(raw: memoryview, limits: Limits) -> tuple[str, memoryview]:
    if len(raw) < _LENGTH_BYTES:
        raise WireError("message cut off", expected="at least 8 bytes", found=f"{len(raw)}")
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        raise WireError(
            "header too large",
            expected=f"up to {limits.max_header_bytes} bytes",
            found=f"{length} bytes",
            fix="It has some hundred bytes for each tensor of a model. Raise "
            "Limits.max_header_bytes if one of so many tensors is meant; else this is no message "
            "of fedveil's, or a damaged one.",
        )
    if length > len(raw) - _LENGTH_BYTES:
        raise WireError(
            "message cut off",
            expected=f"a header of {length} bytes",
            found=f"{len(raw) - _LENGTH_BYTES} bytes",
        )
    try:
        text = bytes(raw[_LENGTH_BYTES : _LENGTH_BYTES + length]).decode("ascii")
    except UnicodeDecodeError:
        raise WireError("the container header is not ASCII") from None
    return text, raw[_LENGTH_BYTES + length :]


def _entry(name: str, value: Any, limits: Limits) -> Entry:
    where = f"tensor {name[:256]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WireError("a tensor is not described by dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError(
            "unknown dtype", expected=", ".join(DTYPES), found=f"{dtype!r}"[:80], where=where
        )
    check_extents(shape, where, limits)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise WireError("data_offsets are not a range", found=f"{offsets!r}"[:80], where=where)
    needed = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise WireError(
            "shape and bytes disagree",
            expected=f"{needed} bytes for {dtype} {shape}",
            found=f"{offsets[1] - offsets[0]} bytes",
            where=where,
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def check_extents(shape: Any, where: str, limits: Limits) -> None:
    """A shape is a short list of whole numbers whose product (zeros aside) is not absurd.

    Raises:
        WireError: it is not.
    """
    if not _are_counts(shape) or len(shape) > MAX_AXES:
        raise WireError("not a shape", found=f"{shape!r}"[:80], where=where)
    if prod(max(extent, 1) for extent in shape) > limits.max_elements:
        raise WireError(
            "tensor too large",
            expected=f"up to {limits.max_elements} numbers",
            found=f"shape {shape}"[:80],
            where=where,
            fix="Raise Limits.max_elements if this is meant.",
        )


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_filled(entries: dict[str, Entry], length: int) -> None:
    """No gap, no overlap, nothing left over: a byte that nobody reads can hide things."""
    ranges = sorted((entry.begin, entry.end) for entry in entries.values())
    joined = all(before[1] == after[0] for before, after in pairwise([(0, 0), *ranges]))
    end = ranges[-1][1] if ranges else 0
    if not joined or end != length:
        raise WireError(
            "tensors do not fill the message exactly",
            expected=f"{length} bytes without gap or overlap",
            found=f"tensors that end at byte {end}",
        )
