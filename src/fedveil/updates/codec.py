"""An update as a section of a message, exact or quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.errors import ConfigurationError, ProtocolError
from fedveil.quantization import MAX_BLOCK, QuantizedTensor, add_part, quantize
from fedveil.selection import Selection
from fedveil.wire import Dense, Section

__all__ = ["SMALL", "UpdateCodec", "Updates", "check_bits"]

# Quantizing a tensor this small saves nothing worth its error: biases, norms, a few class logits.
SMALL = 4096
# No trained weight moves this far in a round; beyond it sums could overflow float32.
LARGEST = 1e6


@dataclass(frozen=True)
class UpdateCodec:
    """Encodes updates, and decodes and checks them; both directions in one place.

    Attributes:
        bits: Bits per parameter of a quantized update (2, 3, 4 or 8), or None for exact float32.
        block: Values per quantization block.

    Does NOT protect: a quantized update tells the server almost as much of the client's data as an
    exact one.
    """

    bits: int | None = None
    block: int = 64

    def __post_init__(self) -> None:
        check_bits(self.bits, "update bits")
        _check_block(self.block)

    def encode(self, update: Tensor, axis: int = 0) -> Section:
        """One tensor's update, with ``axis`` the axis along which its units are cut."""
        bits = self._bits(update.shape)
        if bits is None:
            return Dense(update)
        return quantize(update, bits=bits, axis=axis, block=self.block)

    def read(
        self,
        sections: Mapping[str, Section],
        shapes: Mapping[str, torch.Size],
        selection: Selection,
    ) -> Updates:
        """Check a whole reply before any of it is used; nothing is decoded yet.

        Args:
            sections: Updates by tensor name.
            shapes: The full shape of every tensor that may have changed.
            selection: What the client was released.

        Raises:
            ProtocolError: If a section is for a tensor that was not sent, or is no fit update:
                encoded as agreed, of the released shape, finite and of a plausible size.
        """
        for name, section in sections.items():
            if name not in shapes:
                raise ProtocolError(
                    "An update is for a tensor that was not sent",
                    where=name,
                    fix="A client returns an update for what it was sent, and nothing else.",
                )
            self._check(name, section, selection.shape(name, shapes[name]))
        return Updates(sections, selection)

    def _check(self, name: str, section: Section, shape: torch.Size) -> None:
        bits = self._bits(shape)
        expected = "float32" if bits is None else f"{bits} bits"
        if _encoding(section) not in (expected, expected.replace("32", "64")):
            raise ProtocolError(
                "An update has the wrong type",
                expected=expected,
                found=_encoding(section),
                where=name,
                fix="Server and clients must use the same scheme with the same settings.",
            )
        assert isinstance(section, QuantizedTensor | Dense)  # _encoding says so
        found = tuple(
            section.shape if isinstance(section, QuantizedTensor) else section.tensor.shape
        )
        if found != tuple(shape):
            raise ProtocolError(
                "An update has the wrong shape",
                expected=str(list(shape)),
                found=str(list(found)),
                where=name,
                fix="A client returns an update for the units that it was sent, and no others.",
            )
        if not _is_plausible(section):
            raise ProtocolError(
                "An update holds NaN, infinite or absurdly large values",
                expected=f"finite numbers up to {LARGEST:g}",
                where=name,
                fix="Lower the client's learning rate; nothing of this reply was used.",
            )

    def _bits(self, shape: torch.Size) -> int | None:
        """The bits at which an update of this shape travels; None for exact."""
        wide = len(shape) >= 2 and shape.numel() >= SMALL
        return self.bits if wide else None


class Updates(Mapping[str, Tensor]):
    """One client's checked updates by tensor name, each decoded when it is asked for.

    They are on released elements only, at their released shapes, free of the unbiased factors of
    their units: changes of the weights as the server holds them.
    """

    def __init__(self, sections: Mapping[str, Section], selection: Selection) -> None:
        self._sections, self._selection = sections, selection

    def __getitem__(self, name: str) -> Tensor:
        section = self._sections[name]
        assert isinstance(section, QuantizedTensor | Dense)
        update = section.dequantize() if isinstance(section, QuantizedTensor) else section.tensor
        return self._selection.unscale(name, update)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    def norm(self) -> float:
        """The Euclidean norm of all updates together."""
        # Of plausible updates no square leaves float32; one tensor is decoded at a time.
        squares = (float(torch.linalg.vector_norm(self[name])) ** 2 for name in self)
        return math.sqrt(sum(squares))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one update: float32, or float64 of a float64 model."""
        section = self._sections[name]
        return section.tensor.dtype if isinstance(section, Dense) else torch.float32

    def add_to(self, name: str, total: Tensor, weight: float) -> None:
        """Add one update times ``weight`` to a sum over all elements of its tensor.

        Packed updates are added as they are decoded, without a decoded copy, where blocks lie along
        the units that are cut.
        """
        section, cuts = self._sections[name], self._selection.positions(name)
        scaled = self._selection.is_scaled(name)
        if isinstance(section, QuantizedTensor) and not scaled and set(cuts) <= {section.axis}:
            units = cuts.get(section.axis)
            section.add_to(total, torch.arange(section.units) if units is None else units, weight)
        else:
            add_part(self[name], cuts, total, weight)


def _encoding(section: Section) -> str:
    if isinstance(section, QuantizedTensor):
        return f"{section.bits} bits"
    if isinstance(section, Dense):
        return str(section.tensor.dtype).removeprefix("torch.")
    return type(section).__name__


def _check_block(block: int) -> None:
    if type(block) is not int or not 1 <= block <= MAX_BLOCK:
        raise ConfigurationError(
            "The setting 'block' is impossible",
            expected=f"an integer from 1 to {MAX_BLOCK}",
            found=repr(block),
        )


def _is_plausible(section: QuantizedTensor | Dense) -> bool:
    if isinstance(section, QuantizedTensor):
        return section.largest <= LARGEST
    if not section.tensor.numel():
        return True
    low, high = torch.aminmax(section.tensor)  # one pass, no copy; NaN if any element is
    return bool(low >= -LARGEST) and bool(high <= LARGEST)


def check_bits(bits: int | None, name: str) -> None:
    """Refuse a bit width that no codebook has.

    Raises:
        ConfigurationError: If ``bits`` is neither None nor 2, 3, 4 or 8.
    """
    if bits is not None and (type(bits) is not int or bits not in (2, 3, 4, 8)):
        raise ConfigurationError(
            f"The setting {name!r} is impossible",
            expected="2, 3, 4 or 8, or None for no quantization",
            found=repr(bits),
        )
