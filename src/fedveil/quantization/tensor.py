"""`quantize` a weight along its units, and the `QuantizedTensor` that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.quantization.blockwise import (
    add_rows,
    as_matrix,
    check_rows,
    decode_rows,
    encode_rows,
    gather_rows,
    in_place,
)
from fedveil.quantization.kernels.reference import bounds
from fedveil.quantization.layout import part_layout, values_per_unit

__all__ = ["QuantizedTensor", "quantize"]

_CHUNK_VALUES: Final = 2**17
"""Values worked on at once (whole units, at least one) where kernels cannot work in place: what a
second-level cache holds. Up to eight times as many if they make fewer than `_FEWEST_UNITS`."""

_FEWEST_UNITS: Final = 64
"""Units that should be worked on together: where units lie across rows, these are whole cache lines
of every row."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight as packed codes and scales, cut into independent units along `axis`.

    A unit is one index along `axis`; the other axes, in order, are its `fan_in` values. Blocks of
    `block` consecutive values run along a unit, and every byte here belongs to exactly one unit, so
    leaving a unit out leaves no trace of it.

    Attributes:
        bits: code width: 2, 3, 4 or 8.
        block: values per scale; the last block of a unit may be shorter.
        axis: which axis of `shape` counts the units.
        shape: logical shape.
        codes: uint8 [units, ceil(fan_in * bits / 8)], packed as in `fedveil.quantization.packing`.
        scales: uint8 [units, blocks], in 255ths of the unit's scale; float32 [units, blocks]
            without double quantization.
        unit_scales: float32 [units]; None without double quantization.

    What it does NOT protect: the codes are the weights to within a few per cent, and quantizing the
    same weights again shows nothing new but hides nothing more either.

    Raises:
        ConfigurationError: the parts do not fit together.
    """

    bits: int
    block: int
    axis: int
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    unit_scales: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        layout = part_layout(
            self.shape, bits=self.bits, axis=self.axis, block=self.block, double=self.double
        )
        for name, (dtype, shape) in layout.items():
            _check_part(name, getattr(self, name), dtype, shape)
        if len({part.device for part in self._parts().values()}) > 1:
            raise ConfigurationError("codes and scales of a quantized tensor lie on two devices")

    @property
    def double(self) -> bool:
        """Whether the scales are quantized too."""
        return self.unit_scales is not None

    @property
    def units(self) -> int:
        """Indices along `axis`."""
        return self.shape[self.axis]

    @property
    def fan_in(self) -> int:
        """Values in one unit."""
        return values_per_unit(self.shape, self.axis)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and all scales."""
        return sum(part.numel() * part.element_size() for part in self._parts().values())

    @property
    def largest(self) -> float:
        """No decoded value is larger in size: the largest scale."""
        scales = self.scales if self.unit_scales is None else self.unit_scales
        return float(scales.max()) if scales.numel() else 0.0

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """Decode to numbers.

        Args:
            out: where to write: logical shape, any floating dtype, device and strides. Float32 on
                the CPU with units along or across its rows is written without a copy.

        Returns:
            `out`, or a new contiguous float32 tensor of the logical shape.

        Raises:
            ConfigurationError: `out` has another shape or is not floating point.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        elif tuple(out.shape) != self.shape or not out.is_floating_point():
            raise ConfigurationError(
                "cannot decode into this tensor",
                expected=f"a floating dtype of shape {list(self.shape)}",
                found=f"{out.dtype} {list(out.shape)}",
                where="out",
            )
        target = out.detach().movedim(self.axis, 0)
        matrix = self._in_place(target)
        if matrix is not None:
            decode_rows(self._parts(), matrix, bits=self.bits, block=self.block)
        else:
            for rows, values in self._decoded(target):
                target[rows].copy_(values)
        return out

    def interval(self) -> tuple[Tensor, Tensor]:
        """Between which values the quantized numbers lay.

        Each code stands for all numbers that are nearest to its level. What a receiver knows of a
        number is this interval and nothing more, as rounding is deterministic.

        Returns:
            Lower and upper ends, float32 of the logical shape.
        """
        low, high = bounds(
            self.codes, self.scales, self.unit_scales,
            bits=self.bits, block=self.block, fan_in=self.fan_in,
        )  # fmt: skip
        return self._shaped(low), self._shaped(high)

    def _shaped(self, rows: Tensor) -> Tensor:
        rest = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return rows.view(self.units, *rest).movedim(0, self.axis).contiguous()

    def add_to(self, total: Tensor, units: Tensor, weight: float = 1.0) -> None:
        """Add the decoded values times `weight` to some units of a running sum, in one pass.

        With a float32 sum on the CPU nothing is decoded beside it. The result is that of
        `total.index_add_(axis, units, dequantize() * weight)`, bit for bit.

        Args:
            total: float32 or float64, of the logical shape but for `axis`; changed in place.
            units: int64 [units], strictly ascending: where in `total` each unit belongs.
            weight: what values are multiplied by, as float32, before they are added.

        Raises:
            ConfigurationError: `total` or `units` is not as described; nothing was added.
        """
        _check_total(total, self.shape, self.axis)
        _check_selection(units, total.shape[self.axis])
        if len(units) != self.units or not bool((units[1:] > units[:-1]).all()):
            raise ConfigurationError(
                "units to add to are strictly ascending, one for each unit",
                expected=f"{self.units} units",
                found=f"{len(units)}",
                where="units",
            )
        target, units = total.detach().movedim(self.axis, 0), units.to(total.device)
        matrix = self._in_place(target)
        if matrix is not None:
            add_rows(self._parts(), matrix, units, weight, bits=self.bits, block=self.block)
        else:
            for rows, values in self._decoded(target):
                target.index_add_(0, units[rows], (values * weight).to(target))

    def select(self, units: Tensor, out: QuantizedTensor | None = None) -> QuantizedTensor:
        """Gather units along `axis`: the very bits that quantizing the gathered weight would give.

        Args:
            units: int64 [k], each from 0 to units - 1, in any order, repeats allowed.
            out: where to write: a tensor of the same settings whose `shape[axis]` is k, for
                instance views of a buffer that is sent; its parts are overwritten.

        Returns:
            `out`, or a tensor with memory of its own.

        Raises:
            ConfigurationError: `units` is not an int64 vector or names a unit that is not there;
                `out` does not fit.
        """
        _check_selection(units, self.units)
        chosen = units.to(self.codes.device)
        shape = (*self.shape[: self.axis], len(chosen), *self.shape[self.axis + 1 :])
        if out is None:
            empty: dict[str, Any] = {
                name: part.new_empty((len(chosen), *part.shape[1:]))
                for name, part in self._parts().items()
            }
            out = replace(self, shape=shape, **empty)
        elif out._settings() != (*self._settings()[:-1], shape):
            raise ConfigurationError(
                "cannot gather into a tensor of other settings",
                expected=f"{(*self._settings()[:-1], shape)}",
                found=f"{out._settings()}",
                where="out",
            )
        targets = out._parts()
        for name, part in self._parts().items():
            gather_rows(part, chosen, targets[name])
        return out

    def _settings(self) -> tuple[int, int, int, bool, tuple[int, ...]]:
        return self.bits, self.block, self.axis, self.double, self.shape

    def _parts(self) -> dict[str, Tensor]:
        names = ("codes", "scales", "unit_scales") if self.double else ("codes", "scales")
        return {name: getattr(self, name) for name in names}

    def _in_place(self, unit_first: Tensor) -> Tensor | None:
        return in_place(unit_first) if unit_first.device == self.codes.device else None

    def _decoded(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some units at a time in float32, with which they are.

        Args:
            like: at least as many units, units first: values lie in memory in its order.
        """
        parts = self._parts()
        for rows in _chunks(self.units, self.fan_in):
            model = like[: rows.stop - rows.start]
            values = torch.empty_like(model, dtype=torch.float32, device=self.codes.device)
            matrix = as_matrix(values)
            if matrix is None:
                values = torch.empty(model.shape, dtype=torch.float32, device=self.codes.device)
                matrix = values.view(-1, self.fan_in)
            chunk = {name: part[rows] for name, part in parts.items()}
            decode_rows(chunk, matrix, bits=self.bits, block=self.block)
            yield rows, values


def quantize(
    weight: Tensor, *, bits: int = 4, axis: int = 0, block: int = 64, double: bool = True
) -> QuantizedTensor:
    """Quantize `weight` unit by unit: absolute maximum per block, nearest NormalFloat level.

    With [1536, 384], 4 bits, axis 0, block 64: codes [1536, 192], scales [1536, 6], unit scales
    [1536]; 4.208 bits per parameter (4 + 8/64 + 32/384).

    Deterministic and without shared state between units, so it commutes with `select`: a proxy is a
    gather. The same weights quantized in T rounds say no more than once.

    Args:
        weight: floating point, any strides, at least one axis; never modified.
        bits: code width: 2, 3, 4 or 8.
        axis: the axis that counts units (0 for `nn.Linear`, 1 for a `Conv1D` of [in, out]).
        block: values per scale.
        double: keep scales as 8-bit fractions of a float32 scale per unit (QLoRA's idea, confined
            to one unit); otherwise as float32 per block.

    Raises:
        ConfigurationError: a setting is impossible, `weight` is not floating point or has no axis,
            a unit has no values, or a value is NaN or infinite (in float32).

    What it does NOT protect: a released unit is known to about 9 % relative error at 4 bits, 21 %
    at 3. Only withheld units are unknown. Source of the levels:
    QLoRA, arXiv 2305.14314.
    """
    _check_weight(weight)
    shape = tuple(weight.shape)
    layout = part_layout(shape, bits=bits, axis=axis, block=block, double=double)
    parts = {
        name: torch.empty(extents, dtype=dtype, device=weight.device)
        for name, (dtype, extents) in layout.items()
    }
    unit_first = weight.detach().movedim(axis, 0)
    matrix = in_place(unit_first)
    if matrix is not None:
        encode_rows(matrix, parts, bits=bits, block=block)
    else:
        fan_in = values_per_unit(shape, axis)
        for rows in _chunks(shape[axis], fan_in):
            values = unit_first[rows].float().reshape(-1, fan_in)
            chunk = {name: part[rows] for name, part in parts.items()}
            encode_rows(values, chunk, bits=bits, block=block, first_unit=rows.start)
    return QuantizedTensor(bits, block, axis, shape, **parts)


def _chunks(units: int, fan_in: int) -> Iterator[slice]:
    few = min(_FEWEST_UNITS, 8 * _CHUNK_VALUES // fan_in)
    step = max(1, few, _CHUNK_VALUES // fan_in)
    for start in range(0, units, step):
        yield slice(start, min(start + step, units))


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigurationError(
            "only floating-point tensors can be quantized", found=f"{found}", where="weight"
        )


def _check_part(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
        fits = isinstance(part, Tensor)
        found = f"{part.dtype} {list(part.shape)}" if fits else type(part).__name__
        raise ConfigurationError(
            "a part of the quantized tensor does not fit its shape",
            expected=f"{dtype} {list(shape)}",
            found=found,
            where=name,
        )


def _check_selection(units: Tensor, count: int) -> None:
    if not isinstance(units, Tensor):
        raise ConfigurationError("units are chosen by an int64 vector", where="units")
    check_rows(units, count)


def _check_total(total: Tensor, shape: tuple[int, ...], axis: int) -> None:
    fits = isinstance(total, Tensor) and total.dtype in (torch.float32, torch.float64)
    if (
        not fits
        or total.dim() != len(shape)
        or _without(total.shape, axis) != _without(shape, axis)
    ):
        found = f"{total.dtype} {list(total.shape)}" if isinstance(total, Tensor) else f"{total!r}"
        raise ConfigurationError(
            "cannot add to this tensor",
            expected=f"float32 or float64 of shape {list(shape)}, axis {axis} of any length",
            found=found,
            where="total",
        )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
