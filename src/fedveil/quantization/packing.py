"""Codes of 2, 3, 4 or 8 bits packed along each unit, and back.

A unit's codes are one string of bits, least significant bit first: code number i occupies bits
i*b ... i*b + b - 1, and bit number k is bit k % 8 (value 2^(k % 8)) of byte k // 8. So 4-bit codes
fill a byte low half first, and eight 3-bit codes fill three bytes. A unit ends on a whole byte; the
bits left over in it are zero.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pack", "packed_bytes", "spare_bits", "unpack"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits occupy."""
    return (count * bits + 7) // 8


def spare_bits(count: int, bits: int) -> int:
    """Bits of the last byte that no code uses: 0 to 7."""
    return packed_bytes(count, bits) * 8 - count * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Uint8 [units, count], each below 2^bits -> uint8 [units, ceil(count * bits / 8)]."""
    units, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    per_group, group_bytes, word = _group(bits)
    missing = -count % per_group
    whole = F.pad(codes, (0, missing)) if missing else codes
    groups = whole.reshape(units, (count + missing) // per_group, per_group)
    words = groups[..., 0].to(word)
    for position in range(1, per_group):
        words = words | (groups[..., position].to(word) << (bits * position))
    octets = [(words >> (8 * place)).to(torch.uint8) for place in range(group_bytes)]
    return torch.stack(octets, dim=-1).flatten(1)[:, : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Uint8 [units, ceil(count * bits / 8)] -> uint8 [units, count]; undoes `pack`."""
    if bits == 8:
        return packed
    units, length = packed.shape
    per_group, group_bytes, word = _group(bits)
    missing = -length % group_bytes
    whole = F.pad(packed, (0, missing)) if missing else packed
    octets = whole.reshape(units, (length + missing) // group_bytes, group_bytes)
    words = octets[..., 0].to(word)
    for place in range(1, group_bytes):
        words = words | (octets[..., place].to(word) << (8 * place))
    mask = 2**bits - 1
    codes = [((words >> (bits * i)) & mask).to(torch.uint8) for i in range(per_group)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :count]


def _group(bits: int) -> tuple[int, int, torch.dtype]:
    """The shortest run of codes that fills whole bytes: codes, bytes, and a word that holds it."""
    total = lcm(bits, 8)
    return total // bits, total // 8, torch.uint8 if total == 8 else torch.int32
