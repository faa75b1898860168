"""Grams as sections of a message: encoded on clients, decoded and checked on the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.aggregation.base import Observed
from fedveil.aggregation.gram import Form, Gram, block_bounds, count_pairs, restrict
from fedveil.aggregation.linear import LinearLayer
from fedveil.errors import ProtocolError
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.selection import Selection
from fedveil.updates import SMALL
from fedveil.wire import Message, Section, Statistics

__all__ = ["PREFIX", "GramCodec"]

PREFIX = "gram/"
"""Sections and scalars of Grams begin with it, followed by a weight's name."""

# A mean square of layer inputs beyond it would let sums overflow float32.
LARGEST = 1e8


@dataclass(frozen=True)
class GramCodec:
    """Encodes Grams, and decodes and checks them; both directions in one place.

    A Gram is two sections: ``gram/<weight>/diagonal`` and ``gram/<weight>/pairs`` or
    ``/factor``. The scalar ``gram/<other weight>`` names the Gram of each layer.

    Attributes:
        form: See :class:`~fedveil.aggregation.RegMean`.
        size: See there.
        bits: See there.
        noisy: Whether clients add noise.
    """

    form: Form
    size: int
    bits: int | None
    noisy: bool = False

    def encode(self, grams: Mapping[str, Gram], same_input: Mapping[str, str]) -> Observed:
        """Grams by weight name, and for each layer the name of its Gram."""
        sections: dict[str, Section] = {}
        for name, gram in grams.items():
            sections[f"{PREFIX}{name}/diagonal"] = Statistics(gram.diagonal)
            if gram.factor is not None:
                sections[f"{PREFIX}{name}/factor"] = self._pack(gram.factor)
            elif gram.pairs is not None:
                sections[f"{PREFIX}{name}/pairs"] = self._pack(gram.pairs[None])
        return Observed(sections, {f"{PREFIX}{layer}": name for layer, name in same_input.items()})

    def beside(self, name: str, width: int) -> dict[str, int]:
        """Numbers in the sections of one Gram of so many inputs, at most."""
        rest = count_pairs(block_bounds(width, self.form, self.size))
        kind = "pairs"
        if self.form == "low-rank" and width > self.size:
            kind, rest = "factor", width * self.size
        return {f"{PREFIX}{name}/diagonal": width, f"{PREFIX}{name}/{kind}": rest}

    def decode(
        self,
        reply: Message,
        layers: Mapping[str, LinearLayer],
        shapes: Mapping[str, torch.Size],
        selection: Selection,
    ) -> tuple[dict[str, Section], dict[str, Gram]]:
        """The sections of a reply that are no Grams, and the Gram of each layer.

        Raises:
            ProtocolError: If a Gram is not as agreed, or belongs to no layer.
        """
        updates = {n: s for n, s in reply.sections.items() if not n.startswith(PREFIX)}
        named = {
            key.removeprefix(PREFIX): value
            for key, value in reply.scalars.items()
            if key.startswith(PREFIX)
        }
        used: set[str] = set()
        decoded: dict[tuple[object, tuple[int, ...]], Gram] = {}
        grams = {}
        for layer, name in named.items():
            if layer not in layers:
                raise ProtocolError("A Gram is for a weight that is not linear", where=layer)
            if not isinstance(name, str):
                raise ProtocolError("A Gram's name is no text", found=repr(name), where=layer)
            if len(name) > 256 or not name.isprintable():  # it will stand in errors
                raise ProtocolError(
                    "A Gram's name is no weight's name", found=repr(name)[:80], where=layer
                )
            inputs = layers[layer].inputs(selection)
            width = layers[layer].matrix_shape(shapes[layer])[1]
            bounds = restrict(block_bounds(width, self.form, self.size), inputs)
            sketched = self.form == "low-rank" and width > self.size
            if (name, bounds) not in decoded:
                decoded[name, bounds] = self._read(reply, name, bounds, sketched, used)
            grams[layer] = decoded[name, bounds]
        odd = sorted(reply.sections.keys() - updates.keys() - used)
        if odd:
            raise ProtocolError("A Gram belongs to no layer", where=odd[0])
        return updates, grams

    def _pack(self, correlations: Tensor) -> Section:
        if self.bits is None or not self._is_packed(correlations.shape):
            return Statistics(correlations)
        return quantize(correlations, bits=self.bits, axis=0)

    def _is_packed(self, shape: tuple[int, ...]) -> bool:
        return self.bits is not None and torch.Size(shape).numel() >= SMALL

    def _read(
        self, reply: Message, name: str, bounds: tuple[int, ...], sketched: bool, used: set[str]
    ) -> Gram:
        """One Gram on released inputs, checked."""
        diagonal = self._section(reply, f"{PREFIX}{name}/diagonal", (bounds[-1],), None, used)
        if not bool(((diagonal >= 0) & (diagonal <= LARGEST)).all()):  # false for NaN too
            raise ProtocolError(
                "A Gram's diagonal is impossible",
                expected=f"numbers from 0 to {LARGEST:g}",
                where=name,
                fix="Nothing of this reply was used.",
            )
        if sketched:
            shape = (bounds[-1], self.size)
            factor = self._section(reply, f"{PREFIX}{name}/factor", shape, self.bits, used)
            factor = _correlations(factor, name)
            # A row longer than its input would stand for correlations beyond 1.
            factor /= factor.norm(dim=1, keepdim=True).clamp_min(1.0)
            return Gram(diagonal, bounds, factor=factor)
        shape = (1, count_pairs(bounds))
        pairs = self._section(reply, f"{PREFIX}{name}/pairs", shape, self.bits, used)
        rounded = self.noisy or self._is_packed(shape)
        correlations = _correlations(pairs, name)[0]
        return Gram(diagonal, bounds, pairs=correlations, rounded=rounded, received=True)

    def _section(
        self, reply: Message, name: str, shape: tuple[int, ...], bits: int | None, used: set[str]
    ) -> Tensor:
        """The float32 tensor of a section that has this shape and, if it is large, these bits."""
        section = reply.sections.get(name)
        used.add(name)
        packed = bits is not None and self._is_packed(shape)
        expected = f"{bits} bits" if packed else "float32 statistics"
        if _encoding(section) != expected:
            raise ProtocolError(
                "A part of a Gram is missing or of another type",
                expected=expected,
                found=_encoding(section),
                where=name,
                fix="Server and clients must use the same aggregation with the same settings.",
            )
        assert isinstance(section, QuantizedTensor | Statistics)  # _encoding says so
        kept = section.tensor if isinstance(section, Statistics) else section
        if tuple(kept.shape) != shape:
            raise ProtocolError(
                "A part of a Gram has the wrong shape",
                expected=str(list(shape)),
                found=str(list(kept.shape)),
                where=name,
            )
        return kept if isinstance(kept, Tensor) else kept.dequantize()


def _encoding(section: Section | None) -> str:
    if isinstance(section, QuantizedTensor):
        return f"{section.bits} bits"
    if isinstance(section, Statistics):
        return f"{str(section.tensor.dtype).removeprefix('torch.')} statistics"
    return "nothing" if section is None else type(section).__name__


def _correlations(values: Tensor, name: str) -> Tensor:
    """Between -1 and 1, but for rounding."""
    if values.numel() and not all(abs(float(end)) <= 1.02 for end in values.aminmax()):
        raise ProtocolError("A Gram's correlations are impossible", expected="-1 to 1", where=name)
    return values.clamp(-1.0, 1.0)
