"""The arithmetic in PyTorch: what every kernel must agree with, and what runs where none can.

To make agreement to the last bit possible every step is one correctly rounded float32 operation (or
an exact one), and no value that counts is ever a subnormal number, so processors that flush those
agree too.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fedveil.quantization.codebook import NormalFloat
from fedveil.quantization.packing import pack, unpack

__all__ = ["SMALLEST_SCALE", "bounds", "decode", "encode", "scale_values"]

SMALLEST_SCALE: Final = 2.0**-100
"""A block whose absolute maximum is below this (7.9e-31) counts as a block of zeros."""

_STEPS: Final = 255
"""A block's scale is this many-th parts of its unit's scale: an 8-bit code."""


def encode(rows: Tensor, *, bits: int, block: int, double: bool) -> dict[str, Tensor]:
    """Codes and scales of finite float32 [units, fan_in]; see `blockwise.encode_rows`."""
    peaks = torch.cat([part.abs().amax(-1) for part in _block_views(rows, block)], dim=1)
    peaks = torch.where(peaks < SMALLEST_SCALE, 0.0, peaks)
    scales, unit_scales = _fractions(peaks) if double else (peaks, None)
    divisors = scale_values(scales, unit_scales)
    divisors = torch.where(divisors > 0, divisors, 1.0)
    normalized = rows.clone(memory_format=torch.contiguous_format)
    for part, divisor in zip(
        _block_views(normalized, block), _scale_views(divisors, rows.shape[1], block), strict=True
    ):
        part.div_(divisor)
    thresholds = NormalFloat(bits).thresholds.to(rows.device)
    codes = torch.bucketize(normalized, thresholds, out_int32=True).to(torch.uint8)
    parts = {"codes": pack(codes, bits), "scales": scales}
    return parts if unit_scales is None else {**parts, "unit_scales": unit_scales}


def decode(
    codes: Tensor, scales: Tensor, unit_scales: Tensor | None, *, bits: int, block: int, fan_in: int
) -> Tensor:
    """Undo `encode`: float32 [units, fan_in], level times scale."""
    parts = codes, scales, unit_scales
    return _decode(parts, NormalFloat(bits).levels, bits=bits, block=block, fan_in=fan_in)


def bounds(
    codes: Tensor, scales: Tensor, unit_scales: Tensor | None, *, bits: int, block: int, fan_in: int
) -> tuple[Tensor, Tensor]:
    """Between which values each encoded number lay: two float32 [units, fan_in].

    Rounding of a block's scale may leave its largest values outside the outermost levels: by half a
    255th part of the unit's scale.
    """
    parts, inner = (codes, scales, unit_scales), NormalFloat(bits).thresholds
    low = torch.cat([torch.tensor([-1.0]), inner])
    high = torch.cat([inner, torch.tensor([1.0])])
    ends = [_decode(parts, t, bits=bits, block=block, fan_in=fan_in) for t in (low, high)]
    if unit_scales is not None:
        numbers, steps = unpack(codes, bits, fan_in), scales.float().clamp(min=1)
        room = _decode_scales((steps + 0.5) / steps, numbers.shape, block)
        for end, outermost in zip(ends, (0, 2**bits - 1), strict=True):
            end.mul_(torch.where(numbers == outermost, room, 1.0))
    return ends[0], ends[1]


def _decode_scales(scales: Tensor, shape: torch.Size, block: int) -> Tensor:
    """[units, blocks] -> [units, fan_in]: each value's own."""
    rows = torch.ones(shape, device=scales.device)
    views = zip(_block_views(rows, block), _scale_views(scales, shape[1], block), strict=True)
    for part, scale in views:
        part.mul_(scale)
    return rows


def _decode(
    parts: tuple[Tensor, Tensor, Tensor | None], table: Tensor, *, bits: int, block: int,
    fan_in: int,
) -> Tensor:  # fmt: skip
    """An entry of a table for each code, times the scale of its block."""
    codes, scales, unit_scales = parts
    numbers = unpack(codes, bits, fan_in)
    levels = table.to(codes.device)
    rows = levels.index_select(0, numbers.flatten().int()).view(numbers.shape)
    values = scale_values(scales, unit_scales)
    for part, scale in zip(
        _block_views(rows, block), _scale_views(values, fan_in, block), strict=True
    ):
        part.mul_(scale)
    return rows


def scale_values(scales: Tensor, unit_scales: Tensor | None) -> Tensor:
    """Float32 [units, blocks]: the scales as numbers, unit scale times (code / 255)."""
    if unit_scales is None:
        return scales
    return unit_scales[:, None] * (scales.float() / _STEPS)


def _fractions(peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [units, blocks] of absolute maxima -> 8-bit codes of the same shape, unit scales.

    Rounded to the nearest (half to even), but at least 1 unless the block is zero: a small block
    beside a large one keeps its signs and does not divide by zero.
    """
    unit_scales = peaks.amax(dim=1)
    shares = peaks / torch.where(unit_scales > 0, unit_scales, 1.0)[:, None]
    codes = (shares * _STEPS).round().clamp(min=1)
    return torch.where(peaks > 0, codes, 0.0).to(torch.uint8), unit_scales


def _block_views(rows: Tensor, block: int) -> list[Tensor]:
    """[units, fan_in] -> views [units, whole blocks, block] and, if ragged, [units, 1, rest]."""
    fan_in = rows.shape[1]
    whole = fan_in // block
    views = [rows[:, : whole * block].view(len(rows), whole, block)] if whole else []
    if fan_in % block:
        views.append(rows[:, whole * block :].unsqueeze(1))
    return views


def _scale_views(scales: Tensor, fan_in: int, block: int) -> list[Tensor]:
    """[units, blocks] -> views that broadcast against those of `_block_views`."""
    whole = fan_in // block
    views = [scales[:, :whole, None]] if whole else []
    if fan_in % block:
        views.append(scales[:, whole:, None])
    return views
