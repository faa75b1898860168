"""The kernels on tensors: where their numbers lie in memory, which tables they need, and threads.

Only `fedveil.quantization.blockwise` imports this module, and only when there is enough to do:
importing numba takes longer than a small model's quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.quantization.codebook import NormalFloat
from fedveil.quantization.kernels import loops
from fedveil.quantization.kernels.loops import CELLS_PER_ONE, DECODERS, ENCODERS, FIRST_CELL, gather
from fedveil.quantization.kernels.vectors import LANES

__all__ = ["add_part", "decode", "encode", "gather_pieces", "gather_rows", "prepare", "suits"]

Array = NDArray[Any]

_FEWEST_VALUES: Final = 2**18
"""Values that make a thread of its own worthwhile: some tenths of a millisecond of work."""

_THREAD_UNITS: Final = 64
"""Threads get whole multiples of so many units: no two write to the same cache lines."""


def suits(rows: Tensor) -> bool:
    """Whether float32 [units, fan_in] can be read and written in place, unit by unit."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or rows.is_neg():
        return False
    return rows.data_ptr() % rows.itemsize == 0 and 1 in _strides(rows)


def encode(rows: Tensor, out: Mapping[str, Tensor], *, bits: int, block: int) -> bool:
    """Quantize rows that suit into contiguous parts; whether all values are finite."""
    call = partial(
        ENCODERS[bits], _place(rows), _shape(rows, out, block), _thresholds(bits), _packed(out)
    )
    first_bad: int = max(_in_threads(call, len(rows), rows.numel()))
    return first_bad < 0


def decode(
    parts: Mapping[str, Tensor],
    out: Tensor,
    *,
    bits: int,
    block: int,
    units: Tensor | None = None,
    weight: float = 1.0,
) -> None:
    """Write all units to rows that suit; or, with `units`, add them times `weight` to these."""
    count, adding = len(parts["codes"]), units is not None
    places = torch.arange(count) if units is None else units.contiguous()
    call = partial(
        DECODERS[bits],
        _packed(parts),
        _shape(out, parts, block),
        _levels(bits),
        _place(out),
        places.numpy(),
        np.float32(weight),
        adding,
    )
    _in_threads(call, count, count * out.shape[1])


def gather_rows(source: Tensor, units: Tensor, out: Tensor) -> None:
    """Copy the named rows of a contiguous tensor into another, also contiguous."""
    width = source.element_size() * (source[0].numel() if len(source) else 0)
    call = partial(gather, _octets(source), width, units.contiguous().numpy(), _octets(out))
    _in_threads(call, len(units), out.numel())


def prepare(pieces: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Array, Array]:
    """What the kernel needs to know to copy rows of contiguous tensors.

    Args:
        pieces: a tensor, which of its rows (all of which are there), and where they go.
    """
    table = np.empty((len(pieces), 5), np.int64)
    lists: dict[int, tuple[int, int]] = {}
    units, count = [], 0
    for number, (tensor, rows, at) in enumerate(pieces):
        if id(rows) not in lists:  # all tensors that a mask cuts share its list of units
            lists[id(rows)] = count, count + len(rows)
            units.append(rows.numpy())
            count += len(rows)
        width = tensor.nbytes // len(tensor) if len(tensor) else 0
        table[number] = tensor.data_ptr(), width, *lists[id(rows)], at
    return table, np.concatenate(units)


def gather_pieces(prepared: tuple[Array, Array], out: Array) -> None:
    """Copy what was prepared; `out` is contiguous and long enough."""
    loops.gather_pieces(*prepared, out)


def add_part(part: Tensor, cuts: Sequence[tuple[int, Tensor]], out: Tensor, weight: float) -> None:
    """Add a contiguous float32 part, or one number, to where at most two axes cut it from.

    Args:
        part: of `out`'s shape, but for the axes that are cut; or of one number.
        cuts: axis and positions along it, axes ascending.
        out: contiguous float32.
        weight: what the part is multiplied by.
    """
    shape = list(out.shape)
    (first, rows), (second, columns) = _two_cuts(list(cuts), len(shape))
    extents = (
        prod(shape[:first]),
        shape[first] if rows is not None else 1,
        prod(shape[first + 1 : second]) if rows is not None else prod(shape[first:second]),
        shape[second] if columns is not None else 1,
        prod(shape[second + 1 :]) if columns is not None else prod(shape[second:]),
    )
    loops.add_part(
        _flat(part),
        np.float32(weight),
        _flat(out),
        extents,
        _ONLY if rows is None else rows.numpy(),
        _ONLY if columns is None else columns.numpy(),
    )


_ONLY: Final = np.zeros(1, np.int64)
Cut = tuple[int, Tensor | None]


def _two_cuts(cuts: list[tuple[int, Tensor]], axes: int) -> tuple[Cut, Cut]:
    """Cuts along two places of a shape; those that are missing are made up beside the others."""
    if not cuts:
        return (0, None), (0, None)
    if len(cuts) == 2:
        return cuts[0], cuts[1]
    axis, _ = cuts[0]
    # The inner loops run along the second cut: the last axis is better there.
    return ((0, None), cuts[0]) if axis == axes - 1 else (cuts[0], (axis + 1, None))


def _in_threads(call: Callable[[int, int], Any], units: int, values: int) -> list[Any]:
    """Call with the bounds of as many parts of the units as PyTorch may use threads here.

    The threads end with the call: there is nothing that a process forked later could wait for.
    """
    count = max(1, min(torch.get_num_threads(), values // _FEWEST_VALUES, units // _THREAD_UNITS))
    step = -(-units // count // _THREAD_UNITS) * _THREAD_UNITS if count > 1 else max(units, 1)
    bounds = [(first, min(first + step, units)) for first in range(0, units, step)]
    if len(bounds) < 2:
        return [call(0, units)]
    with ThreadPoolExecutor(len(bounds)) as threads:
        return [done.result() for done in [threads.submit(call, *pair) for pair in bounds]]


def _place(rows: Tensor) -> tuple[Array, int, int]:
    """The memory of a strided matrix as one flat array, and its strides."""
    strides = _strides(rows)
    extents = zip(rows.shape, rows.stride(), strict=True)
    span = 1 + sum((extent - 1) * stride for extent, stride in extents) if rows.numel() else 0
    return (rows.detach().as_strided((span,), (1,)).numpy(), *strides)


def _strides(rows: Tensor) -> tuple[int, int]:
    """The strides of a matrix; one along which there is nothing to step over is 1."""
    unit_stride, value_stride = rows.stride()
    if rows.shape[1] == 1:
        return unit_stride, 1
    return (1 if len(rows) == 1 else unit_stride), value_stride


def _shape(rows: Tensor, parts: Mapping[str, Tensor], block: int) -> tuple[int, int, bool]:
    # A block longer than the unit is as good as the unit, and cannot overflow.
    return rows.shape[1], min(block, rows.shape[1]), "unit_scales" in parts


def _packed(parts: Mapping[str, Tensor]) -> tuple[Array, Array, Array]:
    codes, scales = _flat(parts["codes"]), _flat(parts["scales"])
    if "unit_scales" in parts:
        return codes, scales, _flat(parts["unit_scales"])
    return codes, np.empty(0, np.uint8), scales


def _flat(part: Tensor) -> Array:
    """A tensor's numbers in order; a copy, should they not lie so in memory."""
    flat: Array = part.detach().contiguous().view(-1).numpy()
    return flat if flat.flags.aligned else flat.copy()


def _octets(part: Tensor) -> Array:
    octets: Array = part.detach().view(-1).view(torch.uint8).numpy()
    return octets


@cache
def _levels(bits: int) -> tuple[Array, Array]:
    """All levels, at least a vector of them, and the 255ths that scales are written in."""
    levels: Array = NormalFloat(bits).levels.numpy()
    parts = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.pad(levels, (0, max(0, LANES - len(levels)))), parts


@cache
def _thresholds(bits: int) -> tuple[Array, Array]:
    """What the kernels compare with.

    Up to 4 bits a vector of thresholds, of which those that are missing are infinite. For 8 bits
    the threshold in each cell, or infinity, and the number of thresholds below the cell: cells are
    numbered as the kernel does it, in a way that never decreases, so all thresholds in earlier
    cells are below a value, and none in later ones.
    """
    thresholds: Array = NormalFloat(bits).thresholds.numpy()
    if bits < 8:
        missing = (0, LANES - len(thresholds))
        return np.pad(thresholds, missing, constant_values=np.inf), np.zeros(1, np.int32)
    cells = (thresholds * CELLS_PER_ONE + FIRST_CELL).astype(np.int32)
    assert len(np.unique(cells)) == len(cells)
    found = np.full(int(2 * FIRST_CELL) + 1, np.inf, np.float32)
    found[cells] = thresholds
    return found, np.searchsorted(cells, np.arange(len(found))).astype(np.int32)
