"""What a message can carry: four types of sections, and sections gathered only when written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedveil.errors import WireError
from fedveil.quantization import QuantizedTensor
from fedveil.wire.container import DTYPES, MAX_AXES

__all__ = ["Dense", "Gathered", "Section", "Sections", "Statistics", "UnitIndex"]


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor as it is: bit for bit, NaN and infinity included (the receiver decides).

    Attributes:
        tensor: float32, float16, bfloat16, float64, int64, int32, uint8 or bool; at most 8 axes;
            any strides or device (the bytes are those of its contiguous form).

    What it does NOT protect: everything in it is shown.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.tensor, type(self).__name__)


@dataclass(frozen=True, eq=False)
class Statistics:
    """A tensor of statistics about data (Gram matrices, class means) rather than of weights.

    Same bytes as `Dense`, another type on the wire, so that a receiver cannot take one for the
    other.

    What it does NOT protect: statistics of private data are private data; nothing is added here.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.tensor, type(self).__name__)


@dataclass(frozen=True, eq=False)
class UnitIndex:
    """Which units of a unit group were released; on the wire a bitmap of ceil(size / 8) bytes.

    Attributes:
        size: units the group has.
        released: int64 [k], strictly ascending unit numbers below `size`.
        scale: factor that makes the released units' sum unbiased; finite and above 0.

    What it does NOT protect: the number and the places of withheld units are shown (FedQSN,
    arXiv 2508.18911, shows them too: the receiver needs them to place what it gets).

    Raises:
        WireError: the numbers are not ascending, not in range, or of the wrong type.
    """

    size: int
    released: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 0:
            raise WireError("a unit group's size is a whole number", found=f"{self.size!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise WireError("a unit index's scale is a number", found=f"{self.scale!r}")
        object.__setattr__(self, "scale", float(self.scale))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise WireError("a unit index's scale is finite and above 0", found=f"{self.scale}")
        _check_released(self.released, self.size)

    def bitmap(self) -> Tensor:
        """Uint8 [ceil(size / 8)]: unit u is bit u % 8 (value 2^(u % 8)) of byte u // 8."""
        present = np.zeros(self.size, dtype=bool)
        present[self.released.cpu().numpy()] = True
        return torch.from_numpy(np.packbits(present, bitorder="little"))

    @staticmethod
    def from_bitmap(size: int, bitmap: Tensor, scale: float) -> UnitIndex:
        """Undo `bitmap`.

        Raises:
            WireError: a bit after the last unit is set.
        """
        bits = np.unpackbits(bitmap.numpy(), bitorder="little").view(bool)
        if bits[size:].any():
            raise WireError("a unit index names units after its last one", expected="zero bits")
        released = np.flatnonzero(bits[:size]).astype(np.int64, copy=False)
        return UnitIndex(size, torch.from_numpy(released), scale)


Section = Dense | QuantizedTensor | UnitIndex | Statistics


@dataclass(frozen=True, eq=False)
class Gathered:
    """Some units of a section: gathered straight into a message's bytes, not before.

    Attributes:
        source: the whole. It must stay as it is as long as this is used.
        units: int64 [k], numbers of units along the source's axis (axis 0 of a `Dense`), each in
            range (checked when they are gathered).

    What it does NOT protect: this object holds the whole; only the message's bytes are cut.
    """

    source: QuantizedTensor | Dense
    units: Tensor

    def __post_init__(self) -> None:
        if self.units.dtype != torch.int64 or self.units.dim() != 1:
            raise WireError("units are chosen by an int64 vector", where="units")
        if isinstance(self.source, Dense) and not self.source.tensor.dim():
            raise WireError("a tensor without axes has no units to gather", where="source")

    def section(self) -> QuantizedTensor | Dense:
        """The section of these units alone, in memory of its own."""
        if isinstance(self.source, QuantizedTensor):
            return self.source.select(self.units)
        return Dense(self.source.tensor.index_select(0, self.units))


class Sections(Mapping[str, Section]):
    """A message's sections by name; those that are `Gathered` are gathered when asked for.

    Messages may share one: what it takes to write it is found out once.

    Attributes:
        as_built: the sections as they were given.
        written_as: what the writer of messages remembers.
    """

    def __init__(self, sections: Mapping[str, Section | Gathered]) -> None:
        self.as_built = dict(sections)
        self.written_as: Any = None

    def __getitem__(self, name: str) -> Section:
        section = self.as_built[name]
        return section.section() if isinstance(section, Gathered) else section

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_built)

    def __len__(self) -> int:
        return len(self.as_built)

    def __contains__(self, name: Any) -> bool:
        return name in self.as_built


def _check_tensor(tensor: Tensor, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise WireError("not a tensor", found=type(tensor).__name__, where=where)
    if tensor.dtype not in DTYPES.values():
        raise WireError(
            "tensors of this dtype are not sent",
            expected=", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values()),
            found=f"{tensor.dtype}",
            where=where,
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        raise WireError("only dense tensors with values are sent", where=where)
    if tensor.dim() > MAX_AXES:
        raise WireError("too many axes", expected=f"up to {MAX_AXES}", found=f"{tensor.dim()}")


def _check_released(released: Tensor, size: int) -> None:
    if not isinstance(released, Tensor) or released.dtype != torch.int64 or released.dim() != 1:
        raise WireError("released units are an int64 vector", where="released")
    if not released.numel():
        return
    ascending = bool((released[1:] > released[:-1]).all())
    if not ascending or int(released[0]) < 0 or int(released[-1]) >= size:
        raise WireError(
            "released units must be strictly ascending and in range",
            expected=f"0 to {size - 1}",
            found=f"{int(released.min())} to {int(released.max())}",
            where="released",
        )
