"""Which tensors a quantized weight consists of, and which settings are possible."""

from __future__ import annotations

from math import prod
from typing import Final

import torch

from fedveil.errors import ConfigurationError
from fedveil.quantization.codebook import NormalFloat
from fedveil.quantization.packing import packed_bytes

__all__ = ["MAX_BLOCK", "block_count", "part_layout", "values_per_unit"]

MAX_BLOCK: Final = 2**31 - 1
"""Largest block size in values; larger than any unit means one scale per unit."""


def values_per_unit(shape: tuple[int, ...], axis: int) -> int:
    """Values in one unit, its fan-in: the product of all other axes."""
    return prod(shape[:axis]) * prod(shape[axis + 1 :])


def block_count(fan_in: int, block: int) -> int:
    """Blocks along a unit; the last one may be shorter than `block` values."""
    return -(-fan_in // block)


def part_layout(
    shape: tuple[int, ...], *, bits: int, axis: int, block: int, double: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor that a `QuantizedTensor` of these settings consists of.

    Returns:
        Entries "codes", "scales" and, when `double`, "unit_scales", in this order.

    Raises:
        ConfigurationError: a setting is impossible, or a unit has no values.
    """
    NormalFloat(bits)
    _check_block(block)
    _check_shape(shape, axis)
    units, fan_in = shape[axis], values_per_unit(shape, axis)
    blocks = block_count(fan_in, block)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (units, packed_bytes(fan_in, bits))),
        "scales": (torch.uint8 if double else torch.float32, (units, blocks)),
    }
    if double:
        layout["unit_scales"] = (torch.float32, (units,))
    return layout


def _check_block(block: int) -> None:
    if type(block) is not int or not 1 <= block <= MAX_BLOCK:
        raise ConfigurationError(
            "impossible block size",
            expected=f"a whole number from 1 to {MAX_BLOCK}",
            found=f"{block!r}",
            where="block",
        )


def _check_shape(shape: tuple[int, ...], axis: int) -> None:
    if not shape or any(type(extent) is not int or extent < 0 for extent in shape):
        raise ConfigurationError(
            "not the shape of a weight", expected="one axis or more", found=f"{list(shape)}"
        )
    if type(axis) is not int or not 0 <= axis < len(shape):
        raise ConfigurationError(
            "the tensor has no such axis",
            expected=f"0 to {len(shape) - 1} for shape {list(shape)}",
            found=f"{axis!r}",
            where="axis",
        )
    if values_per_unit(shape, axis) == 0:
        raise ConfigurationError(
            "a unit has no values", expected="at least one per unit", found=f"shape {list(shape)}"
        )
