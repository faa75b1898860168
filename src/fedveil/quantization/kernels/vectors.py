"""Sixty-four values at a time: the few vector instructions that plain loops do not become.

numba turns loops into vector code only where LLVM sees how, and it does not see a table look-up
inside registers. So these functions write LLVM instructions themselves. The instructions name no
processor, each is exact or rounds once, and none may be fused with another: on any little-endian
processor the results are those of scalar code, bit for bit.

They are called from compiled loops only. Arrays are one-dimensional and contiguous, an index counts
elements from 0, and nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

__all__ = [
    "CHUNK",
    "LANES",
    "add_2",
    "add_3",
    "add_4",
    "copy_4",
    "copy_8",
    "copy_16",
    "copy_64",
    "decode_2",
    "decode_3",
    "decode_4",
    "encode_2",
    "encode_3",
    "encode_4",
    "memory_at",
    "peak_bits",
    "prefetch",
    "turn",
]

CHUNK: Final = 64
"""Values that one instruction works on: whole bytes at every code width."""

LANES: Final = 16
"""Values in one vector, whatever the length of the processor's own registers."""

# llvmlite and numba describe none of their types.
Context = Any
Builder = Any
Value = Any

_BYTE: Final = ir.IntType(8)
_WORD: Final = ir.IntType(32)
_FLOAT: Final = ir.FloatType()
_FLOATS: Final = ir.VectorType(_FLOAT, LANES)
_ZEROS: Final = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
_READ_ONCE: Final = (0, 1)
"""Of a prefetch: for reading, of little use afterwards."""


def _instruction(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def _encoder(bits: int) -> Any:
    """`encode(values, i, divisor, thresholds, codes, j)`: 64 float32 -> 8 * bits bytes.

    A code is the number of thresholds below `value / divisor`. `thresholds` holds 16 numbers, those
    past the last threshold infinite.
    """

    @_instruction
    def encode(
        typing: Any, values: Any, i: Any, divisor: Any, thresholds: Any, codes: Any, j: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
            source = _address(context, build, sig.args[0], args[0], args[1])
            table = _load(
                build, _address(context, build, sig.args[3], args[3], _number(0)), _FLOATS, 4
            )
            scale = _splat(build, args[2])
            parts = []
            for part in range(CHUNK // LANES):
                lanes = _load(build, build.gep(source, [_number(part * LANES)]), _FLOATS, 4)
                count = _count_below(context, build, build.fdiv(lanes, scale), table, bits)
                parts.append(build.trunc(count, ir.VectorType(_BYTE, LANES)))
            packed = _pack(build, _join(build, parts), bits)
            _store(build, packed, _address(context, build, sig.args[4], args[4], args[5]))
            return context.get_dummy_value()

        return types.void(values, i, divisor, thresholds, codes, j), generate

    return encode


def _decoder(bits: int) -> Any:
    """`decode(codes, i, levels, scale, values, j)`: 8 * bits bytes -> 64 float32.

    A value is the code's level times `scale`. `levels` holds 16 numbers.
    """

    @_instruction
    def decode(
        typing: Any, codes: Any, i: Any, levels: Any, scale: Any, values: Any, j: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
            target = _address(context, build, sig.args[4], args[4], args[5])
            decoded = _decoded(context, build, sig, args, bits)
            for part, lanes in enumerate(decoded):
                _store(build, lanes, build.gep(target, [_number(part * LANES)]), 4)
            return context.get_dummy_value()

        return types.void(codes, i, levels, scale, values, j), generate

    return decode


def _adder(bits: int) -> Any:
    """`add(codes, i, levels, scale, values, j, weight)`: decode, times `weight`, add to `values`.

    Both products and the sum are rounded, one after the other.
    """

    @_instruction
    def add(
        typing: Any, codes: Any, i: Any, levels: Any, scale: Any, values: Any, j: Any, weight: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
            target = _address(context, build, sig.args[4], args[4], args[5])
            weights = _splat(build, args[6])
            for part, lanes in enumerate(_decoded(context, build, sig, args, bits)):
                place = build.gep(target, [_number(part * LANES)])
                total = build.fadd(_load(build, place, _FLOATS, 4), build.fmul(lanes, weights))
                _store(build, total, place, 4)
            return context.get_dummy_value()

        return types.void(codes, i, levels, scale, values, j, weight), generate

    return add


def _copier(count: int) -> Any:
    """`copy(source, i, target, j)`: `count` bytes."""

    @_instruction
    def copy(
        typing: Any, source: Any, i: Any, target: Any, j: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
            octets = ir.VectorType(_BYTE, count)
            read = _load(build, _address(context, build, sig.args[0], args[0], args[1]), octets)
            _store(build, read, _address(context, build, sig.args[2], args[2], args[3]))
            return context.get_dummy_value()

        return types.void(source, i, target, j), generate

    return copy


@_instruction
def peak_bits(typing: Any, values: Any, i: Any) -> tuple[Any, Callable[..., Any]]:
    """`peak_bits(values, i)` of 64 float32: the largest absolute value's bits, as an int32.

    Without their sign, floats are in the order of their bits; infinity and NaN come last.
    """

    def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
        words = ir.VectorType(_WORD, CHUNK)
        source = _address(context, build, sig.args[0], args[0], args[1])
        unsigned = build.and_(
            _load(build, source, words, 4), _constants(_WORD, [2**31 - 1] * CHUNK)
        )
        function = get_or_insert_function(  # type: ignore[no-untyped-call]
            build.module, ir.FunctionType(_WORD, [words]), f"llvm.vector.reduce.umax.v{CHUNK}i32"
        )
        return build.call(function, [unsigned])

    return types.int32(values, i), generate


@_instruction
def prefetch(typing: Any, source: Any, i: Any) -> tuple[Any, Callable[..., Any]]:
    """`prefetch(source, i)`: have the element's cache line fetched; it must be there."""

    def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
        address = _address(context, build, sig.args[0], args[0], args[1])
        for_reading, passing, data = _WORD(0), _WORD(0), _WORD(1)
        kind = ir.FunctionType(ir.VoidType(), [address.type, _WORD, _WORD, _WORD])
        function = build.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        build.call(function, [address, for_reading, passing, data])
        return context.get_dummy_value()

    return types.void(source, i), generate


@_instruction
def memory_at(typing: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """`memory_at(address)`: where an int64 points to, for `numba.carray`."""

    def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
        return build.inttoptr(args[0], _BYTE.as_pointer())

    return types.CPointer(types.uint8)(address), generate  # type: ignore[no-untyped-call]


def _turner(adding: bool) -> Any:
    """`turn(source, i, pitch, target, j, target_pitch)`: transpose 16 by 16 float32.

    A pitch is the distance between the beginnings of two rows, in elements.
    """

    @_instruction
    def turn(
        typing: Any, source: Any, i: Any, pitch: Any, target: Any, j: Any, target_pitch: Any
    ) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Context, build: Builder, sig: Any, args: Any) -> Value:
            start = _address(context, build, sig.args[0], args[0], args[1])
            end = _address(context, build, sig.args[3], args[3], args[4])
            rows = [
                _load(build, build.gep(start, [build.mul(args[2], _number(row))]), _FLOATS, 4)
                for row in range(LANES)
            ]
            for distance in (1, 2, 4, 8):
                rows = _swap_halves(build, rows, distance)
            for row, lanes in enumerate(rows):
                place = build.gep(end, [build.mul(args[5], _number(row))])
                if adding:
                    lanes = build.fadd(_load(build, place, _FLOATS, 4), lanes)
                _store(build, lanes, place, 4)
            return context.get_dummy_value()

        return types.void(source, i, pitch, target, j, target_pitch), generate

    return turn


def _count_below(context: Context, build: Builder, lanes: Value, table: Value, bits: int) -> Value:
    """<16 x i32>: how many of the table's 2^bits - 1 thresholds are below each lane."""
    count: Value = _ZEROS
    found: list[int] = []
    for step in (2**bit for bit in reversed(range(bits))):
        threshold = _look_up(context, build, table, count, found, step - 1)
        above = build.fcmp_ordered(">", lanes, threshold)
        count = build.or_(count, build.select(above, _constants(_WORD, [step] * LANES), _ZEROS))
        found = [*found, step]
    return count


def _decoded(context: Context, build: Builder, sig: Any, args: Any, bits: int) -> list[Value]:
    """Four <16 x float>: level times scale."""
    source = _address(context, build, sig.args[0], args[0], args[1])
    octets = _load(build, source, ir.VectorType(_BYTE, CHUNK * bits // 8))
    table = _load(build, _address(context, build, sig.args[2], args[2], _number(0)), _FLOATS, 4)
    scale = _splat(build, args[3])
    places = [2**bit for bit in reversed(range(bits))]
    levels = [
        _look_up(context, build, table, _unpack(build, octets, bits, part), places, 0)
        for part in range(CHUNK // LANES)
    ]
    return [build.fmul(lanes, scale) for lanes in levels]


def _look_up(
    context: Context,
    build: Builder,
    table: Value,
    number: Value,
    places: Sequence[int],
    offset: int,
) -> Value:
    """Per lane, element `number + offset` of a table of 16.

    Args:
        context: numba's, which knows the processor.
        build: writes the instructions.
        table: <16 x float>.
        number: <16 x i32>, sums of some of `places`.
        places: different powers of two.
        offset: the same for all lanes.
    """
    if not places:
        return _splat(build, build.extract_element(table, _WORD(offset)))
    width = _register_width(context)
    if width:
        moved = _pick(build, table, [min(place + offset, LANES - 1) for place in range(LANES)])
        return _permute(build, moved, number, width)
    place, *others = places
    mask = _constants(_WORD, [place] * LANES)
    is_set = build.icmp_unsigned("!=", build.and_(number, mask), _ZEROS)
    upper = _look_up(context, build, table, number, others, offset + place)
    lower = _look_up(context, build, table, number, others, offset)
    return build.select(is_set, upper, lower)


def _register_width(context: Context) -> int:
    """How many float32 the processor looks up at once in a register: 16, 8, or 0 for none."""
    features = context.codegen().magic_tuple()[2].split(",")
    return 16 if "+avx512f" in features else 8 if "+avx2" in features else 0


def _permute(build: Builder, table: Value, number: Value, width: int) -> Value:
    """Per lane, element `number` of a table of 16 that fills one or two registers."""
    halves = [_pick(build, table, range(start, start + width)) for start in range(0, LANES, width)]
    parts = []
    for start in range(0, LANES, width):
        lanes = _pick(build, number, range(start, start + width))
        within = build.and_(lanes, _constants_like(lanes, width - 1))
        found = [_permute_register(build, half, within) for half in halves]
        if len(found) > 1:
            upper = build.icmp_unsigned(">=", lanes, _constants_like(lanes, width))
            found = [build.select(upper, found[1], found[0])]
        parts += found
    return _join(build, parts)


def _permute_register(build: Builder, table: Value, number: Value) -> Value:
    """Element by element: LLVM knows this pattern as one instruction."""
    lanes = ir.Constant(table.type, ir.Undefined)
    for lane in range(table.type.count):
        chosen = build.extract_element(table, build.extract_element(number, _WORD(lane)))
        lanes = build.insert_element(lanes, chosen, _WORD(lane))
    return lanes


def _pack(build: Builder, codes: Value, bits: int) -> Value:
    """<64 x i8>, one code each -> <8 * bits x i8>.

    Neighbours are joined within words as wide as the shortest run of codes that fills whole bytes.
    """
    width = {2: 32, 3: 64, 4: 16}[bits]
    words = build.bitcast(codes, ir.VectorType(ir.IntType(width), CHUNK * 8 // width))
    joined, span = bits, 8
    while span < width:
        shift, keep = span - joined, 2 ** (2 * joined) - 1
        pattern = sum(keep << start for start in range(0, width, 2 * span))
        words = build.or_(words, build.lshr(words, _constants_like(words, shift)))
        words = build.and_(words, _constants_like(words, pattern))
        joined, span = 2 * joined, 2 * span
    octets = build.bitcast(words, ir.VectorType(_BYTE, CHUNK))
    step = width // 8
    return _pick(build, octets, [i for i in range(CHUNK) if i % step < joined // 8])


def _unpack(build: Builder, octets: Value, bits: int, part: int) -> Value:
    """<16 x i32>: codes number 16 * part and on of <8 * bits x i8>."""
    begins = [bits * code for code in range(part * LANES, (part + 1) * LANES)]
    words = _widen(build, octets, [begin // 8 for begin in begins])
    if any(begin % 8 + bits > 8 for begin in begins):
        last = octets.type.count - 1
        following = _widen(build, octets, [min(begin // 8 + 1, last) for begin in begins])
        words = build.or_(words, build.shl(following, _constants(_WORD, [8] * LANES)))
    words = build.lshr(words, _constants(_WORD, [begin % 8 for begin in begins]))
    return build.and_(words, _constants(_WORD, [2**bits - 1] * LANES))


def _widen(build: Builder, octets: Value, places: Sequence[int]) -> Value:
    return build.zext(_pick(build, octets, places), ir.VectorType(_WORD, LANES))


def _swap_halves(build: Builder, rows: list[Value], distance: int) -> list[Value]:
    """One of four steps of a transposition: lanes trade places with rows `distance` apart."""
    lanes = range(LANES)
    first = [lane if not lane & distance else LANES + lane - distance for lane in lanes]
    second = [lane + distance if not lane & distance else LANES + lane for lane in lanes]
    turned = list(rows)
    for row in (row for row in lanes if not row & distance):
        pair = rows[row], rows[row + distance]
        turned[row] = _pick(build, pair[0], first, pair[1])
        turned[row + distance] = _pick(build, pair[0], second, pair[1])
    return turned


def _join(build: Builder, parts: list[Value]) -> Value:
    """Vectors on end; their number is a power of two."""
    while len(parts) > 1:
        length = 2 * parts[0].type.count
        parts = [
            _pick(build, one, range(length), other)
            for one, other in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _pick(build: Builder, one: Value, places: Sequence[int], other: Value = None) -> Value:
    """Elements at constant places of one vector, or of two on end."""
    return build.shuffle_vector(one, one if other is None else other, _constants(_WORD, places))


def _splat(build: Builder, scalar: Value) -> Value:
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = build.insert_element(empty, scalar, _WORD(0))
    return build.shuffle_vector(first, empty, _ZEROS)


def _constants(element: Any, values: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def _constants_like(vector: Value, value: int) -> Value:
    return _constants(vector.type.element, [value] * vector.type.count)


def _number(value: int) -> Value:
    return ir.Constant(ir.IntType(64), value)


def _address(context: Context, build: Builder, kind: Any, array: Value, index: Value) -> Value:
    return build.gep(context.make_array(kind)(context, build, array).data, [index])


def _load(build: Builder, address: Value, kind: Any, align: int = 1) -> Value:
    return build.load(build.bitcast(address, kind.as_pointer()), align=align)


def _store(build: Builder, value: Value, address: Value, align: int = 1) -> None:
    build.store(value, build.bitcast(address, value.type.as_pointer()), align=align)


encode_2, encode_3, encode_4 = _encoder(2), _encoder(3), _encoder(4)
decode_2, decode_3, decode_4 = _decoder(2), _decoder(3), _decoder(4)
add_2, add_3, add_4 = _adder(2), _adder(3), _adder(4)
copy_4, copy_8, copy_16, copy_64 = _copier(4), _copier(8), _copier(16), _copier(64)
turn, turn_add = _turner(adding=False), _turner(adding=True)
