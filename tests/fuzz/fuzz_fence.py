"""Memory that ends in a page nobody may touch: a byte too far, read or written, ends the process.

    python fuzz_fence.py SEED COUNT

decodes, adds and gathers random packed tensors in such memory, compares every result with the
arithmetic in PyTorch, and says before each case what it is, so that a crash has a name.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor

from fedveil.quantization import BITS, QuantizedTensor, part_layout
from fedveil.quantization.blockwise import kernels_in_use
from fedveil.quantization.kernels import reference

_LIBC = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0


class Fence:
    """One piece of memory between two pages without access, used over and over."""

    def __init__(self, room: int) -> None:
        pages = -(-room // _PAGE)
        self._memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._begin, self._end = _PAGE, (pages + 1) * _PAGE
        for page in (start, start + self._end):
            if _LIBC.mprotect(ctypes.c_void_p(page), _PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, count: int, dtype: torch.dtype, *, at_end: bool, short: int = 0) -> Tensor:
        """A flat tensor that touches one of the two fences; its numbers are whatever lay there.

        With `short` it ends so many bytes before the fence, perhaps at an odd address.
        """
        size = count * dtype.itemsize
        assert size + short <= self._end - self._begin
        if not count:
            return torch.empty(0, dtype=dtype)
        offset = self._end - size - short if at_end else self._begin
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)


ROOM = 2**21
FENCES = {name: Fence(ROOM) for name in ("codes", "scales", "unit_scales", "out")}
SHAPES = (
    [1], [7], [130], [1, 1], [1, 65], [65, 1], [3, 70], [0, 5], [5, 0, 3], [17, 63], [16, 64],
    [33, 129], [129, 33], [2, 3, 5], [1, 1000], [1000, 1], [40, 16, 3, 3], [7, 2, 0], [128, 128],
)  # fmt: skip
BLOCKS = (1, 2, 3, 7, 63, 64, 65, 128, 192, 1000, 2**31 - 1)
VALUES = (0.0, -0.0, 1.0, 1e-45, 3.4e38, -2.5, float("inf"), float("nan"), 2.0**-126)


def random_tensor(dice: Random) -> QuantizedTensor:
    """Any codes and scales that the constructor takes: also spare bits, NaN, negative scales."""
    while True:
        shape = [*dice.choice(SHAPES)]
        axis = dice.randrange(len(shape))
        if 0 not in shape[:axis] + shape[axis + 1 :]:
            break
    bits, block = dice.choice(BITS), dice.choice(BLOCKS)
    double = dice.random() < 0.5
    layout = part_layout(tuple(shape), bits=bits, axis=axis, block=block, double=double)
    parts = {}
    for name, (dtype, extents) in layout.items():
        at_end, short = dice.random() < 0.6, dice.choice((0, 0, 0, 1, 2, 3))
        flat = FENCES[name].place(prod(extents), dtype, at_end=at_end, short=short)
        if dtype == torch.uint8:
            octets = dice.randbytes(len(flat))
            flat.copy_(torch.frombuffer(bytearray(octets), dtype=dtype) if octets else flat)
        else:
            flat.copy_(torch.tensor([dice.choice(VALUES) for _ in range(len(flat))]))
        parts[name] = flat.view(extents)
    return QuantizedTensor(bits, block, axis, tuple(shape), **parts)


def expected(packed: QuantizedTensor) -> Tensor:
    """Decoded by the arithmetic in PyTorch, from copies."""
    codes, scales = packed.codes.clone(), packed.scales.clone()
    unit_scales = packed.unit_scales.clone() if packed.unit_scales is not None else None
    settings = {"bits": packed.bits, "block": packed.block, "fan_in": packed.fan_in}
    rows = reference.decode(codes, scales, unit_scales, **settings)
    moved = [packed.units, *packed.shape[: packed.axis], *packed.shape[packed.axis + 1 :]]
    return rows.reshape(moved).movedim(0, packed.axis)


def same(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN, whatever its payload."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(0.0, 1e39, -1e39), other.nan_to_num(0.0, 1e39, -1e39)
    )


def _strided(shape: tuple[int, ...], dice: Random) -> tuple[Tensor, Tensor]:
    """Float32 in fenced memory in some order of axes, perhaps with gaps; and all of that memory."""
    order = list(range(len(shape)))
    if dice.random() < 0.5:
        dice.shuffle(order)
    gap = dice.choice((0, 0, 1, 5))
    strides, step = [0] * len(shape), 1
    for number, axis in enumerate(order):
        strides[axis] = step
        step *= max(1, shape[axis])
        step += gap if number == 0 else 0
    span = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    flat = FENCES["out"].place(
        span if 0 not in shape else 0, torch.float32, at_end=dice.choice((True, False))
    )
    return flat.as_strided(shape, strides), flat


def check_decode(packed: QuantizedTensor, dice: Random) -> None:
    """All numbers are right and nothing between them is touched."""
    out, memory = _strided(packed.shape, dice)
    memory.fill_(7.0)
    packed.dequantize(out=out)
    assert same(out, expected(packed))
    out.fill_(7.0)
    assert bool((memory == 7.0).all()), "wrote between the rows"


def check_decode_elsewhere(packed: QuantizedTensor, dice: Random) -> None:
    """Other dtypes, and float32 across the processor's words."""
    want = expected(packed)
    assert same(packed.dequantize(torch.empty(packed.shape, dtype=torch.float64)).float(), want)
    count, shift = want.numel(), dice.choice((1, 2, 3))
    if not count:
        return
    octets = FENCES["out"].place(4 * count + shift, torch.uint8, at_end=True)
    octets.fill_(0xAB)
    odd = FENCES["out"].place(count, torch.float32, at_end=True, short=shift)
    packed.dequantize(out=odd.view(packed.shape))
    assert same(odd.view(packed.shape), want)
    assert bool((octets[4 * count :] == 0xAB).all()), "wrote behind the end"


def check_add(packed: QuantizedTensor, dice: Random) -> None:
    """Units are added where they belong; units in between keep their bits."""
    extra = dice.choice((0, 1, 3, 40))
    units = torch.tensor(sorted(dice.sample(range(packed.units + extra), packed.units))).long()
    shape = list(packed.shape)
    shape[packed.axis] += extra
    total, memory = _strided(tuple(shape), dice)
    memory.fill_(0.25)
    weight = dice.choice((1.0, 0.5, 3.0))
    packed.add_to(total, units, weight)
    want = torch.full(shape, 0.25).index_add_(packed.axis, units, expected(packed) * weight)
    assert same(total, want)
    total.fill_(0.25)
    assert bool((memory == 0.25).all()), "wrote between the rows"


def check_select(packed: QuantizedTensor, dice: Random) -> None:
    """Rows of every width, in any order, into views of fenced memory."""
    count = dice.choice((0, 1, 2, 40)) if packed.units else 0
    units = torch.tensor([dice.randrange(packed.units) for _ in range(count)]).long()
    shape = (*packed.shape[: packed.axis], count, *packed.shape[packed.axis + 1 :])
    copies: dict[str, Any] = {}
    for field in fields(packed):
        part = getattr(packed, field.name)
        if isinstance(part, Tensor):
            extents = (count, *part.shape[1:])
            copies[field.name] = torch.empty(extents, dtype=part.dtype)
            if field.name == "codes":
                flat = FENCES["out"].place(prod(extents), part.dtype, at_end=dice.random() < 0.5)
                copies[field.name] = flat.view(extents)
    out = replace(packed, shape=shape, **copies)
    packed.select(units, out=out)
    for name in copies:
        own, whole = getattr(out, name), getattr(packed, name)
        wanted = whole.clone()[units]
        assert torch.equal(own.view(torch.uint8), wanted.view(torch.uint8)) if own.numel() else True


CHECKS: tuple[Callable[[QuantizedTensor, Random], None], ...] = (
    check_decode,
    check_decode_elsewhere,
    check_add,
    check_select,
)


def main(seed: int, count: int) -> None:
    """Check `count` tensors."""
    assert kernels_in_use() == "numba", "there are no kernels here"
    for number in range(seed, seed + count):
        dice = Random(number)
        packed = random_tensor(dice)
        for check in CHECKS:
            settings = (packed.bits, packed.block, packed.axis, packed.shape, packed.double)
            print(number, check.__name__, *settings, flush=True)
            check(packed, dice)
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
