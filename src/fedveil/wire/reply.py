"""How large the reply to a message may be."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from fedveil.quantization import QuantizedTensor
from fedveil.wire.limits import Limits
from fedveil.wire.message import Message
from fedveil.wire.sections import Dense, Gathered, Section, Sections

__all__ = ["reply_limits"]


def reply_limits(sent: Message, beside: Mapping[str, int]) -> Limits:
    """The most that a client may honestly return: an update of every tensor that it was sent.

    Args:
        sent: What it was sent; nothing in it is gathered or decoded.
        beside: What the scheme asks for beside an update: by section the most numbers in it.
    """
    sections = sent.sections
    parts = sections.as_built if isinstance(sections, Sections) else sections
    return Limits.of_reply({**{n: _numbers(part) for n, part in parts.items()}, **beside})


def _numbers(part: Section | Gathered) -> int:
    """Numbers of a part, or what a receiver takes them for where an axis has none."""
    source = part.source if isinstance(part, Gathered) else part
    if not isinstance(source, Dense | QuantizedTensor):
        return 0  # units and the like are not returned
    shape = list(source.shape if isinstance(source, QuantizedTensor) else source.tensor.shape)
    if isinstance(part, Gathered):
        shape[source.axis if isinstance(source, QuantizedTensor) else 0] = len(part.units)
    return prod(max(extent, 1) for extent in shape)
