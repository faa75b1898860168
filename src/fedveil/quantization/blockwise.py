"""Rows of float32 to codes and scales, and back: the one door to the arithmetic.

Behind it are two ways of doing the same, bit for bit: kernels compiled by numba, for tensors on the
CPU, and PyTorch, everywhere else. numba is imported only once PyTorch has had enough to do to make
up for the time that takes; a process that handles small models never imports it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.quantization.kernels import reference
from fedveil.quantization.kernels.reference import SMALLEST_SCALE, scale_values

__all__ = [
    "SMALLEST_SCALE",
    "Pieces",
    "add_part",
    "add_rows",
    "as_matrix",
    "decode_rows",
    "encode_rows",
    "gather_rows",
    "in_place",
    "kernels_in_use",
    "scale_values",
]

_PAYS_OFF: Final = 2**24
"""Values after which importing numba, about a third of a second, would have been the faster way."""


class _Work:
    """What PyTorch has done in this process so far, in values."""

    done = 0


def kernels_in_use(device: torch.device | str = "cpu") -> Literal["numba", "torch"]:
    """Which arithmetic works on large tensors of a device; its results are the same either way.

    Asking makes up the mind: from then on tensors of any size are worked on by it. The environment
    variable `FEDVEIL_KERNELS=torch`, set before the first use, leaves numba aside.
    """
    if torch.device(device).type == "cpu" and _load() is not None:
        _Work.done = _PAYS_OFF
        return "numba"
    return "torch"


def as_matrix(unit_first: Tensor) -> Tensor | None:
    """A view of a tensor [units, ...] as [units, fan_in], if there is one."""
    fan_in = prod(unit_first.shape[1:])
    try:
        return unit_first.view(len(unit_first), fan_in)
    except RuntimeError:  # the values of a unit are not all at the same distance from the next
        return None


def in_place(unit_first: Tensor) -> Tensor | None:
    """The same view, if kernels work on it where it lies: it may then be handed over whole.

    If not, what is handed over should be small, for PyTorch makes several copies of it. To be asked
    once for each tensor: asking is how it is known what there is to do.
    """
    _count(unit_first)
    compiled, matrix = _compiled(unit_first), as_matrix(unit_first)
    return (
        matrix if compiled is not None and matrix is not None and compiled.suits(matrix) else None
    )


def encode_rows(
    rows: Tensor, out: Mapping[str, Tensor], *, bits: int, block: int, first_unit: int = 0
) -> None:
    """Quantize whole units; no unit's result depends on another's.

    Args:
        rows: float32 [units, fan_in], one unit a row, any strides; not modified.
        out: where to write, contiguous. "codes" uint8 [units, ceil(fan_in * bits / 8)], and either
            "scales" uint8 [units, blocks] with "unit_scales" float32 [units], or only "scales"
            float32 [units, blocks].
        bits: code width.
        block: values per scale.
        first_unit: the number of the first row's unit, for errors.

    Raises:
        ConfigurationError: a value is NaN or infinite.
    """
    compiled = _compiled(rows)
    if compiled is not None and compiled.suits(rows):
        if compiled.encode(rows, out, bits=bits, block=block):
            return
        raise _not_finite(rows, first_unit)
    if not _is_finite(rows):
        raise _not_finite(rows, first_unit)
    encoded = reference.encode(rows, bits=bits, block=block, double="unit_scales" in out)
    for name, part in out.items():
        part.copy_(encoded[name])


def decode_rows(parts: Mapping[str, Tensor], out: Tensor, *, bits: int, block: int) -> None:
    """Undo `encode_rows`: level times scale, one float32 multiplication a value.

    Args:
        parts: as `encode_rows` writes them.
        out: float32 [units, fan_in], any strides.
        bits: code width.
        block: values per scale.
    """
    compiled = _compiled(out)
    if compiled is not None and compiled.suits(out):
        compiled.decode(parts, out, bits=bits, block=block)
    else:
        out.copy_(_decode(parts, out.shape[1], bits, block))


def add_rows(
    parts: Mapping[str, Tensor], out: Tensor, units: Tensor, weight: float, *, bits: int, block: int
) -> None:
    """Decode, multiply by `weight`, add to rows: three float32 roundings a value.

    Args:
        parts: as `encode_rows` writes them.
        out: float32 [rows, fan_in], any strides.
        units: int64 [units], strictly ascending: the row that each unit is added to.
        weight: rounded to float32.
        bits: code width.
        block: values per scale.
    """
    compiled = _compiled(out)
    if compiled is not None and compiled.suits(out):
        compiled.decode(parts, out, bits=bits, block=block, units=units, weight=weight)
    else:
        out.index_add_(0, units, _decode(parts, out.shape[1], bits, block) * weight)


def add_part(part: Tensor, cuts: Mapping[int, Tensor], out: Tensor, weight: float) -> None:
    """Add part of a tensor times `weight` to the elements that it is a part of.

    Two float32 (or float64) roundings a value, whichever axes are cut, if any.

    Args:
        part: of `out`'s dtype and shape, but for the axes that are cut; or one number for all.
        cuts: axis -> int64 [k], positions along it, ascending and in range (not checked); axes
            ascending.
        out: changed in place.
        weight: rounded to the dtype of `out`.
    """
    _count(out)
    compiled = _compiled(out)
    plain = out.dtype == part.dtype == torch.float32 and out.is_contiguous() and not out.is_neg()
    if compiled is not None and plain and len(cuts) <= 2:
        compiled.add_part(part, list(cuts.items()), out, weight)
    else:
        _add_at(list(cuts.items()), out, part * weight)


def _add_at(cuts: list[tuple[int, Tensor]], out: Tensor, part: Tensor) -> None:
    if not cuts:
        out.add_(part)
        return
    (axis, positions), *inner_cuts = cuts
    inner = out.index_select(axis, positions)
    _add_at(inner_cuts, inner, part)
    out.index_copy_(axis, positions, inner)


def gather_rows(source: Tensor, units: Tensor, out: Tensor) -> None:
    """Copy rows; both tensors have the same dtype, device and row length.

    Args:
        source: [rows, ...].
        units: int64 [k], numbers of rows.
        out: [k, ...].
    """
    compiled = _compiled(source)
    if compiled is not None and source.is_contiguous() and out.is_contiguous():
        compiled.gather_rows(source, units, out)
    else:
        torch.index_select(source, 0, units, out=out)


class Pieces:
    """Tensors, or rows of them, that are copied one after the other into memory, without a gap.

    Where they lie is looked up once; they must stay there as long as this is used.

    Args:
        pieces: contiguous tensors on the CPU, each with the rows that are wanted, int64 [k], or
            None for all.

    Attributes:
        nbytes: bytes of all pieces.

    Raises:
        ConfigurationError: there is no such row.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self._whole: list[tuple[int, NDArray[np.uint8]]] = []
        self._gathered: list[tuple[Tensor, Tensor, int]] = []
        self._prepared: Any = None
        self.nbytes = 0
        for tensor, rows in pieces:
            if rows is None:
                self._whole.append((self.nbytes, _octets(tensor)))
                self.nbytes += tensor.nbytes
            else:
                check_rows(rows, len(tensor))
                self._gathered.append((tensor, rows, self.nbytes))
                self.nbytes += len(rows) * (tensor.nbytes // len(tensor) if len(tensor) else 0)

    def write_to(self, out: NDArray[np.uint8]) -> None:
        """Copy everything to the beginning of `out`, contiguous and at least `nbytes` long."""
        for begin, octets in self._whole:
            out[begin : begin + len(octets)] = octets
        compiled = _compiled(self._gathered[0][0]) if self._gathered else None
        if compiled is not None:
            self._prepared = self._prepared or compiled.prepare(self._gathered)
            compiled.gather_pieces(self._prepared, out)
        else:
            for tensor, rows, begin in self._gathered:
                part = _octets(tensor.index_select(0, rows))
                out[begin : begin + len(part)] = part


def check_rows(rows: Tensor, count: int) -> None:
    """Refuse numbers of rows that are not there.

    Raises:
        ConfigurationError: `rows` is not an int64 vector, or names a row from `count` on.
    """
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ConfigurationError("units are chosen by an int64 vector", where="units")
    if rows.numel():
        least, most = (int(bound) for bound in rows.aminmax())
        if least < 0 or most >= count:
            raise ConfigurationError(
                "no such unit",
                expected=f"0 to {count - 1}",
                found=f"{least} to {most}",
                where="units",
            )


def _octets(tensor: Tensor) -> NDArray[np.uint8]:
    # Contiguous tensors of no or one number may have any stride; bytes are only seen through 1.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    octets: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return octets


def _decode(parts: Mapping[str, Tensor], fan_in: int, bits: int, block: int) -> Tensor:
    scales, unit_scales = parts["scales"], parts.get("unit_scales")
    return reference.decode(
        parts["codes"], scales, unit_scales, bits=bits, block=block, fan_in=fan_in
    )


def _count(tensor: Tensor) -> None:
    """Know that there is so much to do."""
    if tensor.device.type == "cpu":
        _Work.done = min(_Work.done + tensor.numel(), _PAYS_OFF)


def _compiled(tensor: Tensor) -> ModuleType | None:
    """The module of compiled kernels, if it is to be used."""
    return _load() if tensor.device.type == "cpu" and _Work.done == _PAYS_OFF else None


@cache
def _load() -> ModuleType | None:
    """The module of compiled kernels, or None where it does not work."""
    if os.environ.get("FEDVEIL_KERNELS") == "torch" or sys.byteorder != "little":
        return None
    try:
        import numba
    except ImportError:
        return None
    if getattr(numba.config, "DISABLE_JIT", 0):  # kernels would run in the interpreter
        return None
    from fedveil.quantization.kernels import compiled

    return compiled


def _is_finite(rows: Tensor) -> bool:
    if not rows.numel():
        return True
    low, high = rows.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _not_finite(rows: Tensor, first_unit: int) -> ConfigurationError:
    bad = ~torch.isfinite(rows)
    return ConfigurationError(
        "a weight to be quantized holds NaN or infinity (as float32)",
        expected="finite values",
        found=f"{int(bad.sum())} of {rows.numel()} looked at, first in unit "
        f"{first_unit + int(bad.any(1).nonzero()[0])}",
        where="weight",
        fix="Find the round in which training diverged; lower the learning rate or clip.",
    )
