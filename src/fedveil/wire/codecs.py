"""How each section type is written and read; both directions of a type in one class.

A section becomes a small JSON object (its `info`) and one to three tensors, its parts, that the
container names `<part>:<section>`, for instance "q:layer.weight".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Final, Protocol

import torch
from torch import Tensor

from fedveil.errors import ConfigurationError, WireError
from fedveil.quantization import QuantizedTensor, part_layout, spare_bits
from fedveil.wire.container import MAX_AXES, Entry, check_extents
from fedveil.wire.limits import Limits
from fedveil.wire.sections import Dense, Gathered, Section, Statistics, UnitIndex

__all__ = ["Codec", "Part", "codec_for_section", "codec_for_type", "encode"]

Info = dict[str, Any]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Part -> container dtype and shape."""


@dataclass(frozen=True)
class Part:
    """A tensor, or some of its rows, on the way into a message.

    Attributes:
        tensor: contiguous, on the CPU.
        rows: int64 [k], which rows of it and in which order; None for all of it.
    """

    tensor: Tensor
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is sent."""
        shape = tuple(self.tensor.shape)
        return shape if self.rows is None else (len(self.rows), *shape[1:])


class Codec(Protocol):
    """One section type on the wire."""

    @property
    def name(self) -> str:
        """The type's name, `info["type"]`."""

    @property
    def keys(self) -> frozenset[str]:
        """What `info` holds besides "type"."""

    def encode(self, section: Any) -> tuple[Info, dict[str, Tensor]]:
        """The section's `info` without "type", and its parts."""

    def check_values(self, section: Any) -> None:
        """Refuse a section that nobody would read.

        Raises:
            WireError: its values are impossible.
        """

    def parts(self, info: Info) -> tuple[str, ...]:
        """Which parts there must be."""

    def check(self, info: Info, entries: Mapping[str, Entry], limits: Limits) -> int:
        """Check everything that can be checked without values; the section's count of numbers.

        Raises:
            WireError: `info` is impossible or contradicts the parts' dtypes and shapes.
        """

    def decode(self, info: Info, parts: Mapping[str, Tensor]) -> Section:
        """Build the section from parts that `check` accepted.

        Raises:
            WireError: the values are impossible.
        """


@dataclass(frozen=True)
class PlainCodec:
    """`Dense` and `Statistics`: the tensor as it is, part "t"."""

    name: str
    section: type[Dense] | type[Statistics]
    keys: frozenset[str] = frozenset()

    def encode(self, section: Dense | Statistics) -> tuple[Info, dict[str, Tensor]]:
        """See `Codec`."""
        return {}, {"t": section.tensor}

    def check_values(self, section: Any) -> None:
        """See `Codec`: all values are possible."""

    def parts(self, info: Info) -> tuple[str, ...]:
        """See `Codec`."""
        return ("t",)

    def check(self, info: Info, entries: Mapping[str, Entry], limits: Limits) -> int:
        """See `Codec`."""
        return prod(entries["t"].shape)

    def decode(self, info: Info, parts: Mapping[str, Tensor]) -> Section:
        """See `Codec`."""
        return self.section(parts["t"])


class QuantizedCodec:
    """`QuantizedTensor`: parts "q" codes, "s" scales and, if double, "u" unit scales."""

    name = "quantized"
    keys = frozenset({"axis", "bits", "block", "double", "shape"})
    _ATTRIBUTES: ClassVar = {"q": "codes", "s": "scales", "u": "unit_scales"}

    def encode(self, section: QuantizedTensor) -> tuple[Info, dict[str, Tensor]]:
        """See `Codec`."""
        if len(section.shape) > MAX_AXES:
            raise WireError("too many axes", expected=f"up to {MAX_AXES}", found=f"{section.shape}")
        info = {
            "axis": section.axis,
            "bits": section.bits,
            "block": section.block,
            "double": section.double,
            "shape": list(section.shape),
        }
        return info, {part: getattr(section, self._ATTRIBUTES[part]) for part in self.parts(info)}

    def check_values(self, section: QuantizedTensor) -> None:
        """Scales are finite and not negative; bits after a unit's last code are zero."""
        for scales in (section.scales, section.unit_scales):
            if scales is not None and scales.is_floating_point() and scales.numel():
                low, high = scales.aminmax()
                if not (float(low) >= 0 and float(high) < float("inf")):
                    raise WireError("a scale is negative, NaN or infinite")
        spare = spare_bits(section.fan_in, section.bits)
        if spare and bool((section.codes[:, -1] >> (8 - spare)).any()):
            raise WireError("bits after the last code of a unit are not zero")

    def parts(self, info: Info) -> tuple[str, ...]:
        """See `Codec`."""
        if type(info["double"]) is not bool:
            raise WireError("double is true or false", found=f"{info['double']!r}"[:80])
        return ("q", "s", "u") if info["double"] else ("q", "s")

    def check(self, info: Info, entries: Mapping[str, Entry], limits: Limits) -> int:
        """See `Codec`."""
        check_extents(info["shape"], "shape", limits)
        settings = {key: info[key] for key in ("bits", "axis", "block", "double")}
        try:
            layout = part_layout(tuple(info["shape"]), **settings)
        except ConfigurationError as error:
            raise WireError("impossible quantization", found=f"{error}"[:200]) from None
        for part, entry in entries.items():
            dtype, shape = layout[self._ATTRIBUTES[part]]
            _check_entry(part, entry, "F32" if dtype == torch.float32 else "U8", shape)
        return prod(info["shape"])

    def decode(self, info: Info, parts: Mapping[str, Tensor]) -> Section:
        """See `Codec`."""
        section = QuantizedTensor(
            info["bits"],
            info["block"],
            info["axis"],
            tuple(info["shape"]),
            **{self._ATTRIBUTES[part]: tensor for part, tensor in parts.items()},
        )
        self.check_values(section)
        return section


class UnitIndexCodec:
    """`UnitIndex`: part "i", a bitmap."""

    name = "units"
    keys = frozenset({"scale", "size"})

    def encode(self, section: UnitIndex) -> tuple[Info, dict[str, Tensor]]:
        """See `Codec`."""
        return {"scale": section.scale, "size": section.size}, {"i": section.bitmap()}

    def check_values(self, section: Any) -> None:
        """See `Codec`: all values are possible."""

    def parts(self, info: Info) -> tuple[str, ...]:
        """See `Codec`."""
        return ("i",)

    def check(self, info: Info, entries: Mapping[str, Entry], limits: Limits) -> int:
        """See `Codec`."""
        check_extents([info["size"]], "size", limits)
        if type(info["scale"]) is not float:
            raise WireError("scale is a number with a point", found=f"{info['scale']!r}"[:80])
        size: int = info["size"]
        _check_entry("i", entries["i"], "U8", ((size + 7) // 8,))
        return size

    def decode(self, info: Info, parts: Mapping[str, Tensor]) -> Section:
        """See `Codec`."""
        return UnitIndex.from_bitmap(info["size"], parts["i"], info["scale"])


_BY_SECTION: Final[Mapping[type, Codec]] = {
    Dense: PlainCodec("dense", Dense),
    Statistics: PlainCodec("statistics", Statistics),
    QuantizedTensor: QuantizedCodec(),
    UnitIndex: UnitIndexCodec(),
}
_BY_TYPE: Final[Mapping[str, Codec]] = {codec.name: codec for codec in _BY_SECTION.values()}


def encode(section: Section | Gathered) -> tuple[Info, dict[str, Part]]:
    """A section's `info`, and its parts ready to be written.

    Raises:
        WireError: it holds impossible values. A `Gathered` one is not looked at: what `quantize`
            made is as it should be, and the receiver looks.
    """
    source = section.source if isinstance(section, Gathered) else section
    codec = codec_for_section(source)
    if not isinstance(section, Gathered):
        codec.check_values(source)
    info, parts = codec.encode(source)
    info = {"type": codec.name, **info}
    if not isinstance(section, Gathered):
        return info, {part: Part(_plain(tensor)) for part, tensor in parts.items()}
    if isinstance(source, QuantizedTensor):
        info["shape"][source.axis] = len(section.units)
    rows = section.units
    return info, {part: Part(_plain(tensor), rows) for part, tensor in parts.items()}


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and on the CPU."""
    return tensor.detach().cpu().resolve_neg().contiguous()


def codec_for_section(section: object) -> Codec:
    """The codec of a section object.

    Raises:
        WireError: it is no section.
    """
    codec = _BY_SECTION.get(type(section))
    if codec is None:
        known = ", ".join(kind.__name__ for kind in _BY_SECTION)
        raise WireError("not a section", expected=known, found=type(section).__name__)
    return codec


def codec_for_type(info: Any) -> Codec:
    """The codec that a section's `info` asks for.

    Raises:
        WireError: the type is unknown, or `info` has not exactly that type's keys.
    """
    kind = info.get("type") if isinstance(info, dict) else None
    codec = _BY_TYPE.get(kind) if isinstance(kind, str) else None
    if codec is None:
        known = ", ".join(sorted(_BY_TYPE))
        raise WireError("unknown section type", expected=known, found=f"{kind!r}"[:80])
    if set(info) != codec.keys | {"type"}:
        expected = ", ".join(sorted(codec.keys | {"type"}))
        raise WireError("a section's keys are wrong", expected=expected, found=f"{set(info)}"[:200])
    return codec


def _check_entry(part: str, entry: Entry, dtype: str, shape: tuple[int, ...]) -> None:
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise WireError(
            f"part {part!r} of the section does not fit",
            expected=f"{dtype} {list(shape)}",
            found=f"{entry.dtype} {list(entry.shape)}",
        )
