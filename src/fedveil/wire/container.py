"""The safetensors container: what its header claims, checked against the bytes that are there.

`safetensors` itself reads and writes the file. This module reads the header a second time, before,
because the caps must hold before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import prod
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedveil.errors import WireError
from fedveil.wire.canonical import read_json, write_json
from fedveil.wire.limits import Limits

__all__ = [
    "DTYPES",
    "MAX_AXES",
    "METADATA_KEY",
    "Container",
    "Entry",
    "check_extents",
    "contiguous_parts",
    "digest",
    "open_container",
    "write_container",
]

METADATA_KEY: Final = "fedveil"
"""The only key of the container's metadata: several would come in a random order."""

DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Container dtype names that are spoken."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES: Final = 8
MAX_AXES: Final = 8
"""Most axes that a tensor on the wire has."""

_HASH_BYTES: Final = 16


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `begin` and `end` count from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Container:
    """A file whose header agrees with its length; no tensor has been made yet."""

    metadata: str
    entries: dict[str, Entry]
    raw: memoryview
    data: memoryview

    def payload(self, name: str) -> memoryview:
        """The bytes of one tensor, not copied."""
        entry = self.entries[name]
        return self.data[entry.begin : entry.end]

    def digest(self, header: str) -> str:
        """Checksum over `header` and every tensor present."""
        parts = {n: (e.dtype, e.shape, self.payload(n)) for n, e in self.entries.items()}
        return digest(header, parts)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own.

        Raises:
            WireError: safetensors finds fault with the file, or a bool is neither 0 nor 1.
        """
        try:
            tensors = load(_as_bytes_object(self.raw))
        except (SafetensorError, ValueError) as error:
            raise WireError("not a safetensors file", found=f"{error}"[:200]) from None
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise WireError("a bool is neither 0 nor 1", where=name)
        return tensors


def digest(header: str, parts: dict[str, tuple[str, tuple[int, ...], memoryview]]) -> str:
    """BLAKE2b-128 as hex over header and tensors; each piece follows its length as 8 bytes.

    Not keyed: whoever alters a message on purpose computes a new one.

    Args:
        header: the canonical JSON without its digest.
        parts: tensor name -> container dtype, shape, bytes.
    """
    state = blake2b(digest_size=_HASH_BYTES)
    pieces: list[bytes | memoryview] = [header.encode("ascii")]
    for name in sorted(parts):
        dtype, shape, payload = parts[name]
        pieces += [write_json([name, dtype, list(shape)]).encode("ascii"), payload]
    for piece in pieces:
        state.update(len(piece).to_bytes(_LENGTH_BYTES, "little"))
        state.update(piece)
    return state.hexdigest()


def contiguous_parts(
    tensors: dict[str, Tensor],
) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """Contiguous CPU tensors as `digest` wants them, without copying."""
    parts = {}
    for name, tensor in tensors.items():
        # Contiguous tensors of no or one number may have any stride; bytes are only seen through 1.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        payload = flat.view(torch.uint8).numpy().data
        parts[name] = (_NAMES[tensor.dtype], tuple(tensor.shape), payload)
    return parts


def write_container(tensors: dict[str, Tensor], metadata: str) -> bytes:
    """A safetensors file of contiguous CPU tensors and one metadata string.

    Raises:
        WireError: safetensors cannot write it (a header past its own cap of 100 MB).
    """
    try:
        return save({name: tensors[name] for name in sorted(tensors)}, {METADATA_KEY: metadata})
    except SafetensorError as error:
        raise WireError("the message cannot be written", found=f"{error}"[:200]) from None


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
    if raw.nbytes > limits.max_bytes:
        raise WireError(
            "message too large",
            expected=f"up to {limits.max_bytes} bytes",
            found=f"{raw.nbytes} bytes",
            fix="Raise Limits.max_bytes if this is meant.",
        )
    plain = raw.ndim == 1 and raw.format == "B" and raw.c_contiguous
    return raw if plain else memoryview(raw.tobytes())


def _as_bytes_object(raw: memoryview) -> bytes:
    """The `bytes` that were handed in, or a copy if it was something else."""
    source = raw.obj
    return source if isinstance(source, bytes) and len(source) == len(raw) else bytes(raw)


def _split(raw: memoryview, limits: Limits) -> tuple[str, memoryview]:
    if len(raw) < _LENGTH_BYTES:
        raise WireError("message cut off", expected="at least 8 bytes", found=f"{len(raw)}")
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        raise WireError(
            "header too large",
            expected=f"up to {limits.max_header_bytes} bytes",
            found=f"{length} bytes",
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
