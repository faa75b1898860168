"""What a message shows of a model: its values, and which units at how many bits."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedveil.errors import AuditError
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor
from fedveil.run.manifest import Manifest
from fedveil.schemes.client import UNIT_PREFIX
from fedveil.selection import Selection
from fedveil.units import UnitGroup
from fedveil.wire import Dense, Message, UnitIndex

__all__ = ["OvershownError", "Proxy", "Shown"]


class OvershownError(AuditError):
    """A message has more in it than the units that it says it releases."""


class Proxy:
    """What one message shows of a model.

    Args:
        message: What a client was sent.
        manifest: Of the run that it belongs to.

    Attributes:
        released: Per unit group that is cut, its released units.
        selection: Which elements of which tensor these are.

    Raises:
        AuditError: It is of another architecture.
        OvershownError: It has more in it than the released units.
    """

    def __init__(self, message: Message, manifest: Manifest) -> None:
        self.round, self.client = message.round, message.client
        self._sections = message.sections
        # The server may leave out a group: then nothing of it is cut.
        self.groups = [g for g in manifest.groups if UNIT_PREFIX + g.name in message.sections]
        self.released = {group.name: self._release(group) for group in self.groups}
        self._shapes = {name: torch.Size(info.shape) for name, info in manifest.tensors.items()}
        self.selection = Selection(self.groups, self.released, self._shapes)
        self._check_tensors()

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors of which it shows something."""
        return [name for name in self._sections if not name.startswith(UNIT_PREFIX)]

    def part(self, name: str) -> Tensor:
        """What is released of a tensor, decoded, at its released shape.

        Factors that make a proxy unbiased travel beside the values and are not applied. All is NaN
        of a tensor that was left out.
        """
        section = self._sections.get(name)
        if section is None:
            return torch.full(self.selection.shape(name, self._shapes[name]), torch.nan)
        assert isinstance(section, QuantizedTensor | Dense)
        return section.dequantize() if isinstance(section, QuantizedTensor) else section.tensor

    def whole(self, name: str) -> Tensor:
        """A tensor at its whole shape, float32: NaN where this proxy shows nothing of it."""
        return self.spread(name, self.part(name).float())

    def spread(self, name: str, part: Tensor) -> Tensor:
        """Values at a tensor's released shape, put where they belong; NaN elsewhere."""
        dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
        whole = torch.full(self._shapes[name], torch.nan, dtype=dtype)
        self.selection.scatter(name, part, whole)
        return whole

    def shows(self, name: str) -> Tensor:
        """Which elements of a tensor it shows: bool, whole shape."""
        shape = self._shapes[name]
        if name not in self._sections:
            return torch.zeros(shape, dtype=torch.bool)
        if not self.selection.positions(name):
            return torch.ones(shape, dtype=torch.bool)
        return self.selection.released(name, shape).bool()

    def interval(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Between which values the released part of a tensor lies; None if it is exact."""
        section = self._sections.get(name)
        return section.interval() if isinstance(section, QuantizedTensor) else None

    def bits(self, name: str) -> int:
        """Bits in which each released value of a tensor travels, scales not counted."""
        section = self._sections[name]
        if isinstance(section, QuantizedTensor):
            return section.bits
        assert isinstance(section, Dense)
        return 8 * section.tensor.element_size()

    def _release(self, group: UnitGroup) -> Release:
        section = self._sections[UNIT_PREFIX + group.name]
        if not isinstance(section, UnitIndex) or section.size != group.size:
            raise self._foreign(f"{group.size} units", "another number", group.name)
        return Release(section.released, section.scale)

    def _check_tensors(self) -> None:
        shapes = self._shapes
        # A backbone that is sent once is left out later on.
        if not shapes.keys() & set(self.tensors):
            raise self._foreign("the run's tensors", "none of them", next(iter(shapes), "the run"))
        if unknown := sorted(set(self.tensors) - shapes.keys()):
            raise self._overshown("the model's tensors alone", "another section", unknown[0])
        for name, full in shapes.items():
            section = self._sections.get(name)
            if section is None:
                continue
            if not isinstance(section, QuantizedTensor | Dense):
                raise self._foreign("a tensor", type(section).__name__, name)
            if isinstance(section, QuantizedTensor):
                shape = section.shape
            else:
                shape = tuple(section.tensor.shape)
            if shape != (expected := tuple(self.selection.shape(name, full))):
                more = math.prod(shape) > math.prod(expected)
                raise (self._overshown if more else self._foreign)(
                    f"{list(expected)}", f"{list(shape)}", name
                )

    def _overshown(self, expected: str, found: str, where: str) -> OvershownError:
        return OvershownError(
            f"The proxy of client {self.client} in round {self.round} shows more than the units "
            "that it releases",
            expected=expected,
            found=found,
            where=where,
            fix="Release nothing more with this scheme.",
        )

    def _foreign(self, expected: str, found: str, where: str) -> AuditError:
        return AuditError(
            f"The proxy of client {self.client} in round {self.round} is of another architecture",
            expected=expected,
            found=found,
            where=where,
            fix="Audit messages with the run.json of their own run.",
        )


@dataclass(frozen=True)
class Shown:
    """What one release shows, without its values: the same for all clients who share a mask.

    Attributes:
        units: Per unit group that is cut, which units: bool [units]. A group that is missing is
            shown whole.
        bits: Per tensor, bits of each value, scales not counted.
    """

    units: Mapping[str, np.ndarray]
    bits: Mapping[str, int]

    @classmethod
    def of(cls, proxy: Proxy) -> Shown:
        """What a proxy shows."""
        units = {}
        for group in proxy.groups:
            units[group.name] = np.zeros(group.size, bool)
            units[group.name][proxy.released[group.name].units.numpy()] = True
        return cls(units, {name: proxy.bits(name) for name in proxy.tensors})

    def __or__(self, other: Shown) -> Shown:
        """What both show together."""
        units = {
            name: mask | other.units[name]
            for name, mask in self.units.items()
            if name in other.units
        }
        bits = {
            name: max(self.bits.get(name, 0), other.bits.get(name, 0))
            for name in {**self.bits, **other.bits}
        }
        return Shown(units, bits)

    def to_json(self) -> dict[str, Any]:
        """Plain values: bitmaps in base64, least significant bit first."""
        return {
            "units": {
                name: base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode()
                for name, mask in self.units.items()
            },
            "bits": dict(self.bits),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Shown:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: A bitmap is of another size, or of a group that is not there.
        """
        units = {}
        for name, text in values["units"].items():
            octets = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
            if name not in sizes or len(octets) != (sizes[name] + 7) // 8:
                raise ValueError(f"the units of {name}")
            units[name] = np.unpackbits(octets, count=sizes[name], bitorder="little").astype(bool)
        return cls(units, {name: int(bits) for name, bits in values["bits"].items()})
