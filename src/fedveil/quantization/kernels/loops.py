"""The kernels: whole tensors, unit by unit, in one pass and without the interpreter (numba).

They give the bits of `reference` beside this file: the same float32 operations in the same order,
none fused and none reassociated. Only `compiled`, likewise, imports this module.

A kernel reads and writes weights where they lie. A *place* is (memory, unit stride, value stride):
value `i` of unit `u` is `memory[u * unit_stride + i * value_stride]`, and one of the strides is 1.
If it is the unit stride, units lie across rows: some at a time pass through a small buffer in which
they lie along rows. A *packed* weight is (codes, fractions, scales), flat: with double
quantization the scales of blocks as 8-bit fractions of a scale per unit, without it no fractions
and a scale per block. A *shape* is (fan_in, block, double).

Indices that depend on an offset are made unsigned: numba would otherwise ask of each whether it
counts from the end, and LLVM would then not use vector instructions. Tuples are taken apart once,
at the beginning of a kernel: each time costs several atomic operations.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Final, TypeVar

import numba
import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numpy.typing import NDArray

from fedveil.quantization.codebook import BITS
from fedveil.quantization.kernels import vectors
from fedveil.quantization.kernels.vectors import CHUNK, LANES

__all__ = [
    "CELLS_PER_ONE",
    "DECODERS",
    "ENCODERS",
    "FIRST_CELL",
    "Kernel",
    "add_part",
    "gather",
    "gather_pieces",
]

VECTORS: Final = "b2f6678cff313a83"
"""BLAKE2b-64 of vectors.py. numba's cache of compiled code notices changes of this file only, so
every change of that one must change this one."""

Array = NDArray[Any]
Place = tuple[Array, int, int]
Packed = tuple[Array, Array, Array]
Shape = tuple[int, int, bool]
Pair = tuple[Array, Array]
Extents = tuple[int, int, int, int, int]
F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: Final[Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}

_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_STEPS: Final = np.float32(255)
_BELOW_ALL_LEVELS: Final = np.float32(-2)
_NOTHING: Final = np.float32(-0.0)  # which changes no number that it is added to, not even -0.0

# Float32 numbers by their bits.
_SMALLEST_SCALE: Final = (127 - 100) << 23
_INFINITE: Final = 255 << 23
_MAGNITUDE: Final = 2**31 - 1

# Bytes: a cache line, and how far ahead of a gather memory is asked for.
_LINE: Final = 64
_AHEAD: Final = 4096

# Units across rows are read some at a time: several cache lines of each row, but no more values
# than a second-level cache holds. `_ROWS_AHEAD` rows ahead memory is asked for.
_READ_TILE: Final = 64
_READ_VALUES: Final = 2**18
_ROWS_AHEAD: Final = 32

# They are written chunk by chunk: so many units' chunks fit into a first-level cache, and a power
# of two between one and the next would put them into the same places of it.
_WRITE_TILE: Final = 128
_WRITE_PITCH: Final = CHUNK + LANES

# Cells of 8-bit codes: narrower than the narrowest gap between two thresholds.
CELLS_PER_ONE: Final = np.float32(256)
FIRST_CELL: Final = np.float32(257)


class Kernel:
    """A compiled function of exactly one signature: nothing is compiled again for another shape.

    It is compiled, or read from numba's cache, at the first call. Where no folder can be written
    it is compiled once per process.
    """

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self._function, self._signature, self._lock = function, signature, Lock()
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Run it; other threads of the interpreter run meanwhile."""
        if self._compiled is None:
            with self._lock:
                self._compiled = self._compiled or self._compile()
        return self._compiled(*arguments)

    @property
    def signatures(self) -> int:
        """For how many signatures it has been compiled."""
        return 0 if self._compiled is None else len(self._compiled.signatures)

    def _compile(self) -> Any:
        try:
            return numba.njit(self._signature, cache=True, **_OPTIONS)(self._function)
        except (OSError, RuntimeError):  # there is no folder for the cache, or the disk is full
            return numba.njit(self._signature, **_OPTIONS)(self._function)


def _part(function: F) -> F:
    """A function that becomes part of the kernels that call it."""
    compiled: F = numba.njit(forceinline=True, **_OPTIONS)(function)
    return compiled


@_part
def _peaks(memory: Array, words: Array, base: int, fan_in: int, block: int, peaks: Array) -> None:
    """The bits of each block's largest absolute value; `words` is `memory` as int32."""
    for number in range((fan_in + block - 1) // block):
        i, stop = number * block, min((number + 1) * block, fan_in)
        most = np.int32(0)
        while i + CHUNK <= stop:
            most = max(most, vectors.peak_bits(memory, base + i))
            i += CHUNK
        for k in range(i, stop):
            most = max(most, np.int32(words[np.uint64(base + k)] & _MAGNITUDE))
        peaks[number] = most


@_part
def _zero_small(peaks: Array) -> Any:
    """Peaks too small to count become zero; the largest peak's bits."""
    most = np.int32(0)
    for number in range(len(peaks)):
        peak = peaks[number] if peaks[number] >= _SMALLEST_SCALE else np.int32(0)
        peaks[number] = peak
        most = peak if peak > most else most
    return most


@_part
def _fractions(sizes: Array, unit_scale: Any, shares: Array, divisors: Array) -> None:
    """Peaks -> shares of the unit's scale in 255ths, and the scales that these stand for."""
    whole = unit_scale if unit_scale > _ZERO else _ONE
    for number in range(len(sizes)):
        share = np.rint(sizes[number] / whole * _STEPS)
        share = share if share > _ONE else _ONE
        share = share if sizes[number] > _ZERO else _ZERO
        shares[number] = np.uint8(np.int32(share))
        divisors[number] = unit_scale * (share / _STEPS)


@_part
def _write_scales(
    sizes: Array, unit: int, blocks: int, double: bool, fractions: Array, scales: Array,
    shares: Array, divisors: Array,
) -> None:  # fmt: skip
    """A unit's scales from its peaks, and in `divisors` what its values are divided by.

    `sizes`, `shares` and `divisors` have room for whole vectors, so that loops have no slow end.
    """
    first = unit * blocks
    if double:
        unit_scale = _ZERO
        for number in range(len(sizes)):
            unit_scale = sizes[number] if sizes[number] > unit_scale else unit_scale
        scales[unit] = unit_scale
        _fractions(sizes, unit_scale, shares, divisors)
        for number in range(blocks):
            fractions[np.uint64(first + number)] = shares[number]
    else:
        for number in range(blocks):
            divisors[number] = sizes[number]
            scales[np.uint64(first + number)] = sizes[number]
    for number in range(len(divisors)):
        divisors[number] = divisors[number] if divisors[number] > _ZERO else _ONE


@_part
def _scale(
    unit: int, number: int, blocks: int, double: bool, fractions: Array, scales: Array, parts: Array
) -> Any:
    """The scale of a block; `parts` holds the 255ths."""
    place = np.uint64(unit * blocks + number)
    if double:
        return scales[np.uint64(unit)] * parts[np.uint64(fractions[place])]
    return scales[place]


@_part
def _encode_chunk(
    bits: int, values: Array, i: int, divisor: Any, thresholds: Array, lower: Array,
    codes: Array, j: int, quotients: Array, cells: Array,
) -> None:  # fmt: skip
    """64 values -> codes.

    8-bit codes have too many thresholds for registers: a table of cells, at most one threshold in
    each, says how many thresholds are below the cell, and which one is to be compared with.
    """
    if bits == 2:
        vectors.encode_2(values, i, divisor, thresholds, codes, j)
    elif bits == 3:
        vectors.encode_3(values, i, divisor, thresholds, codes, j)
    elif bits == 4:
        vectors.encode_4(values, i, divisor, thresholds, codes, j)
    else:
        last = np.float32(len(thresholds) - 1)
        for k in range(CHUNK):
            value = values[np.uint64(i + k)] / divisor
            position = value * CELLS_PER_ONE + FIRST_CELL
            position = position if position > _ZERO else _ZERO
            position = position if position < last else last
            quotients[k], cells[k] = value, np.int32(position)
        for k in range(CHUNK):
            cell = np.uint64(cells[k])
            codes[np.uint64(j + k)] = lower[cell] + (quotients[k] > thresholds[cell])


@_part
def _decode_chunk(
    bits: int, codes: Array, i: int, levels: Array, scale: Any, values: Array, j: int
) -> None:
    """Codes -> 64 values."""
    if bits == 2:
        vectors.decode_2(codes, i, levels, scale, values, j)
    elif bits == 3:
        vectors.decode_3(codes, i, levels, scale, values, j)
    elif bits == 4:
        vectors.decode_4(codes, i, levels, scale, values, j)
    else:
        for k in range(CHUNK):
            values[np.uint64(j + k)] = levels[np.uint64(codes[np.uint64(i + k)])] * scale


@_part
def _add_chunk(
    bits: int, codes: Array, i: int, levels: Array, scale: Any, values: Array, j: int, weight: Any
) -> None:
    """Codes -> 64 values, added with a weight."""
    if bits == 2:
        vectors.add_2(codes, i, levels, scale, values, j, weight)
    elif bits == 3:
        vectors.add_3(codes, i, levels, scale, values, j, weight)
    elif bits == 4:
        vectors.add_4(codes, i, levels, scale, values, j, weight)
    else:
        for k in range(CHUNK):
            value = levels[np.uint64(codes[np.uint64(i + k)])] * scale
            values[np.uint64(j + k)] += value * weight


@_part
def _encode_unit(
    bits: int, memory: Array, base: int, fan_in: int, block: int, divisors: Array,
    thresholds: Array, lower: Array, codes: Array, at: int,
    values: Array, octets: Array, quotients: Array, cells: Array,
) -> None:  # fmt: skip
    """A unit's codes: straight from memory where a chunk has one scale, else through `values`."""
    chunk = 0
    if block % CHUNK == 0:
        for number in range((fan_in + block - 1) // block):
            end, divisor = min((number + 1) * block, fan_in) // CHUNK, divisors[number]
            while chunk < end:
                _encode_chunk(
                    bits, memory, base + chunk * CHUNK, divisor, thresholds, lower,
                    codes, at + chunk * (CHUNK * bits // 8), quotients, cells,
                )  # fmt: skip
                chunk += 1
    for start in range(chunk * CHUNK, fan_in, CHUNK):
        count = min(CHUNK, fan_in - start)
        values[count:] = _BELOW_ALL_LEVELS  # so that the bits left over are zero
        k = 0
        while k < count:
            number = (start + k) // block
            end = min((number + 1) * block - start, count)
            while k < end:
                values[k] = memory[np.uint64(base + start + k)] / divisors[number]
                k += 1
        _encode_chunk(bits, values, 0, _ONE, thresholds, lower, octets, 0, quotients, cells)
        for k in range((count * bits + 7) // 8):
            codes[np.uint64(at + start * bits // 8 + k)] = octets[k]


@_part
def _decode_odd_chunk(
    bits: int, codes: Array, fractions: Array, scales: Array, double: bool, unit: int,
    fan_in: int, block: int, start: int, levels: Array, parts: Array,
    memory: Array, base: int, adding: bool, weight: Any, values: Array, octets: Array,
) -> None:  # fmt: skip
    """The chunk of a unit that begins with value `start`: short, or of several scales."""
    blocks, row = (fan_in + block - 1) // block, (fan_in * bits + 7) // 8
    count, at = min(CHUNK, fan_in - start), unit * row + start * bits // 8
    for k in range((count * bits + 7) // 8):
        octets[k] = codes[np.uint64(at + k)]
    _decode_chunk(bits, octets, 0, levels, _ONE, values, 0)
    k = 0
    while k < count:
        number = (start + k) // block
        end = min((number + 1) * block - start, count)
        scale = _scale(unit, number, blocks, double, fractions, scales, parts)
        while k < end:
            place = np.uint64(base + k)
            if adding:
                memory[place] += values[k] * scale * weight
            else:
                memory[place] = values[k] * scale
            k += 1


@_part
def _decode_unit(
    bits: int, codes: Array, fractions: Array, scales: Array, double: bool, unit: int,
    fan_in: int, block: int, levels: Array, parts: Array,
    memory: Array, base: int, adding: bool, weight: Any, values: Array, octets: Array,
) -> None:  # fmt: skip
    """A unit's values, written to memory or added to it; the way of `_encode_unit` back."""
    blocks, row = (fan_in + block - 1) // block, (fan_in * bits + 7) // 8
    chunk = 0
    if block % CHUNK == 0:
        for number in range(blocks):
            end = min((number + 1) * block, fan_in) // CHUNK
            scale = _scale(unit, number, blocks, double, fractions, scales, parts)
            while chunk < end:
                i, j = unit * row + chunk * (CHUNK * bits // 8), base + chunk * CHUNK
                if adding:
                    _add_chunk(bits, codes, i, levels, scale, memory, j, weight)
                else:
                    _decode_chunk(bits, codes, i, levels, scale, memory, j)
                chunk += 1
    for start in range(chunk * CHUNK, fan_in, CHUNK):
        _decode_odd_chunk(
            bits, codes, fractions, scales, double, unit, fan_in, block, start, levels, parts,
            memory, base + start, adding, weight, values, octets,
        )  # fmt: skip


@_part
def _read_tile(fan_in: int) -> int:
    """How many units across rows are read together."""
    return max(LANES, min(_READ_TILE, _READ_VALUES // fan_in // LANES * LANES))


@_part
def _read_pitch(fan_in: int) -> int:
    return fan_in // LANES * LANES + 2 * LANES


@_part
def _turn_in(
    memory: Array, stride: int, start: int, count: int, fan_in: int, buffer: Array
) -> None:
    """Units `start` on, from across rows to along rows."""
    pitch, whole, units = _read_pitch(fan_in), fan_in // LANES * LANES, count // LANES * LANES
    for i in range(0, whole, LANES):
        for coming in range(i + _ROWS_AHEAD, min(i + _ROWS_AHEAD + LANES, fan_in)):
            for unit in range(0, units, LANES):
                vectors.prefetch(memory, start + unit + coming * stride)
        for unit in range(0, units, LANES):
            across, along = start + unit + i * stride, unit * pitch + i
            vectors.turn(memory, across, stride, buffer, along, pitch)
    for i in range(fan_in):
        for unit in range(units if i < whole else 0, count):
            value = memory[np.uint64(start + unit + i * stride)]
            buffer[np.uint64(unit * pitch + i)] = value


@_part
def _turn_out(
    buffer: Array, memory: Array, stride: int, start: int, count: int, begin: int, end: int,
    adding: bool,
) -> None:  # fmt: skip
    """Values `begin` to `end` of units `start` on, from along rows to across rows."""
    whole, units = begin + (end - begin) // LANES * LANES, count // LANES * LANES
    for i in range(begin, whole, LANES):
        for unit in range(0, units, LANES):
            across, along = start + unit + i * stride, unit * _WRITE_PITCH + i - begin
            if adding:
                vectors.turn_add(buffer, along, _WRITE_PITCH, memory, across, stride)
            else:
                vectors.turn(buffer, along, _WRITE_PITCH, memory, across, stride)
    for i in range(begin, end):
        for unit in range(units if i < whole else 0, count):
            value = buffer[np.uint64(unit * _WRITE_PITCH + i - begin)]
            spot = np.uint64(start + unit + i * stride)
            memory[spot] = memory[spot] + value if adding else value


@_part
def _decode_across(
    bits: int, codes: Array, fractions: Array, scales: Array, double: bool,
    fan_in: int, block: int, levels: Array, parts: Array, memory: Array, stride: int,
    units: Array, weight: Any, adding: bool, first: int, last: int, values: Array, octets: Array,
) -> None:  # fmt: skip
    """Units that lie across rows, chunk by chunk, so that memory is written along its rows."""
    blocks, row = (fan_in + block - 1) // block, (fan_in * bits + 7) // 8
    buffer = np.empty(_WRITE_TILE * _WRITE_PITCH, np.float32)
    for begin in range(0, fan_in, CHUNK):
        end, number = min(begin + CHUNK, fan_in), begin // block
        even = block % CHUNK == 0 and end - begin == CHUNK
        start = first
        while start < last:
            origin, unit = units[start], start
            if adding:
                buffer[:] = _NOTHING
            while unit < last and units[unit] < origin + _WRITE_TILE:
                i, j = unit * row + begin * bits // 8, (units[unit] - origin) * _WRITE_PITCH
                if not even:
                    _decode_odd_chunk(
                        bits, codes, fractions, scales, double, unit, fan_in, block, begin,
                        levels, parts, buffer, j, adding, weight, values, octets,
                    )  # fmt: skip
                else:
                    scale = _scale(unit, number, blocks, double, fractions, scales, parts)
                    if adding:
                        _add_chunk(bits, codes, i, levels, scale, buffer, j, weight)
                    else:
                        _decode_chunk(bits, codes, i, levels, scale, buffer, j)
                unit += 1
            count = units[unit - 1] + 1 - origin
            _turn_out(buffer, memory, stride, origin, count, begin, end, adding)
            start = unit


_U8: Final = types.uint8[::1]
_F32: Final = types.float32[::1]
_I64: Final = types.int64
_tuple: Final[Any] = types.Tuple
_PLACE: Final = _tuple([_F32, _I64, _I64])
_PACKED: Final = _tuple([_U8, _U8, _F32])
_SHAPE: Final = _tuple([_I64, _I64, types.boolean])
_THRESHOLDS: Final = _tuple([_F32, types.int32[::1]])
_LEVELS: Final = _tuple([_F32, _F32])


def _encoder(bits: int) -> Kernel:
    """`encode(place, shape, tables, packed, first, last)` quantizes the units `first` to `last`.

    `tables` are thresholds and, for 8 bits, how many of them are below each cell. It returns the
    number of the first unit with a value that is not finite, or -1; what is written for that unit
    and those after it means nothing.
    """

    def encode(
        place: Place, shape: Shape, tables: Pair, packed: Packed, first: int, last: int
    ) -> int:
        (memory, unit_stride, value_stride), (fan_in, block, double) = place, shape
        (thresholds, lower), (codes, fractions, scales) = tables, packed
        blocks, row = (fan_in + block - 1) // block, (fan_in * bits + 7) // 8
        room = (blocks + LANES - 1) // LANES * LANES
        peaks, divisors = np.zeros(room, np.int32), np.empty(room, np.float32)
        shares, octets = np.empty(room, np.uint8), np.empty(CHUNK, np.uint8)
        values, quotients = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        cells = np.empty(CHUNK, np.int32)
        along = value_stride == 1
        tile, pitch = (1, 0) if along else (_read_tile(fan_in), _read_pitch(fan_in))
        source = memory if along else np.empty(tile * pitch, np.float32)
        words, sizes = source.view(np.int32), peaks.view(np.float32)
        for start in range(first, last, tile):
            count = min(tile, last - start)
            if not along:
                _turn_in(memory, value_stride, start, count, fan_in, source)
            for unit in range(start, start + count):
                base = unit * unit_stride if along else (unit - start) * pitch
                _peaks(source, words, base, fan_in, block, peaks)
                if _zero_small(peaks) >= _INFINITE:
                    return unit
                _write_scales(sizes, unit, blocks, double, fractions, scales, shares, divisors)
                _encode_unit(
                    bits, source, base, fan_in, block, divisors, thresholds, lower,
                    codes, unit * row, values, octets, quotients, cells,
                )  # fmt: skip
        return -1

    return Kernel(encode, _I64(_PLACE, _SHAPE, _THRESHOLDS, _PACKED, _I64, _I64))


def _decoder(bits: int) -> Kernel:
    """`decode(packed, shape, tables, place, units, weight, adding, first, last)`.

    `tables` are the levels and the 255ths. Packed unit number n, from `first` to `last`, is written
    to unit `units[n]` of the place, or with `adding` times `weight` added to it. `units` ascend,
    and without `adding` have no gaps.
    """

    def decode(
        packed: Packed, shape: Shape, tables: Pair, place: Place, units: Array, weight: Any,
        adding: bool, first: int, last: int,
    ) -> None:  # fmt: skip
        (memory, unit_stride, value_stride), (fan_in, block, double) = place, shape
        (levels, parts), (codes, fractions, scales) = tables, packed
        values, octets = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
        if value_stride == 1:
            for unit in range(first, last):
                _decode_unit(
                    bits, codes, fractions, scales, double, unit, fan_in, block, levels, parts,
                    memory, units[unit] * unit_stride, adding, weight, values, octets,
                )  # fmt: skip
        else:
            _decode_across(
                bits, codes, fractions, scales, double, fan_in, block, levels, parts,
                memory, value_stride, units, weight, adding, first, last, values, octets,
            )  # fmt: skip

    signature = types.void(
        _PACKED, _SHAPE, _LEVELS, _PLACE, _I64[::1], types.float32, types.boolean, _I64, _I64
    )
    return Kernel(decode, signature)


@_part
def _copy_rows(
    source: Array, width: int, units: Array, first: int, last: int, target: Array, at: int
) -> None:
    """Copy rows of `width` bytes, those that `units` names from place `first` to `last`.

    Withheld rows in between make the processor's own guess of what comes next go wrong, so every
    row is asked for some time before it is copied.
    """
    ahead = _AHEAD // max(width, 1) + 1
    for number in range(first, last):
        i, j = units[number] * width, at + (number - first) * width
        coming, k = units[min(number + ahead, last - 1)] * width, 0
        while k + _LINE <= width:
            vectors.prefetch(source, coming + k)
            vectors.copy_64(source, i + k, target, j + k)
            k += _LINE
        while k + 16 <= width:
            vectors.copy_16(source, i + k, target, j + k)
            k += 16
        # What is left over is copied together with bytes before it, once more.
        if k < width and width >= 16:
            vectors.copy_16(source, i + width - 16, target, j + width - 16)
        elif k < width and width >= 8:
            vectors.copy_8(source, i, target, j)
            vectors.copy_8(source, i + width - 8, target, j + width - 8)
        elif k < width and width >= 4:
            vectors.copy_4(source, i, target, j)
            vectors.copy_4(source, i + width - 4, target, j + width - 4)
        else:
            for place in range(k, width):
                target[np.uint64(j + place)] = source[np.uint64(i + place)]


def _gather(source: Array, width: int, units: Array, target: Array, first: int, last: int) -> None:
    """Copy rows of `width` bytes: row `units[n]` to row `n`, for n from `first` to `last`."""
    _copy_rows(source, width, units, first, last, target, first * width)


def _gather_pieces(table: Array, units: Array, target: Array) -> None:
    """Copy rows of several tensors.

    A line of the table is (address, width, first, last, at): where the tensor lies, how many bytes
    a row has, which of `units` to copy, and to where in `target`.
    """
    for piece in range(len(table)):
        address, width, first, last, at = table[piece]
        source = carray(vectors.memory_at(address), (1,), np.uint8)  # of any length: unchecked
        _copy_rows(source, width, units, first, last, target, at)


def _add_part(
    part: Array, weight: Any, target: Array, extents: Extents, rows: Array, columns: Array
) -> None:
    """Add a part times `weight` to where it was cut from along two axes.

    `target` is [outer, height, between, width, inner] with `extents` (outer, height, between,
    width, inner), flat; of `height` there are `rows` in the part, of `width` `columns`. A part of
    one number stands for as many as are wanted.
    """
    outer, height, between, width, inner = extents
    whole, i = len(part) > 1, 0
    for one in range(outer):
        for row in range(len(rows)):
            for two in range(between):
                base = ((one * height + rows[row]) * between + two) * width
                for column in range(len(columns)):
                    j = (base + columns[column]) * inner
                    if not whole:
                        for k in range(inner):
                            target[np.uint64(j + k)] += weight * part[0]
                    else:
                        for k in range(inner):
                            target[np.uint64(j + k)] += part[np.uint64(i + k)] * weight
                    i += inner


ENCODERS: Final = {bits: _encoder(bits) for bits in BITS}
DECODERS: Final = {bits: _decoder(bits) for bits in BITS}
gather: Final = Kernel(_gather, types.void(_U8, _I64, _I64[::1], _U8, _I64, _I64))
add_part: Final = Kernel(
    _add_part,
    types.void(_F32, types.float32, _F32, _tuple([_I64] * 5), _I64[::1], _I64[::1]),
)
gather_pieces: Final = Kernel(_gather_pieces, types.void(_I64[:, ::1], _I64[::1], _U8))
