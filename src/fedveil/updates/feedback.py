"""Error feedback: what quantizing an update loses is added to the client's next update."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.quantization import QuantizedTensor
from fedveil.selection import Selection
from fedveil.updates.codec import UpdateCodec
from fedveil.wire import Section

__all__ = ["ErrorFeedback", "check_error_feedback"]


class ErrorFeedback:
    """Encodes one client's updates of a round, each with what rounds before have lost of it.

    The residual stays on the client: e <- (d + e) - Q(d + e), and Q(d + e) is sent (Seide et al.,
    "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., 1901.09847). Units
    that the client does not hold in a round keep their residual for a round in which it does.

    Args:
        codec: How updates are encoded.
        selection: What the client was released in this round.
        shapes: Full shapes of all tensors.
        memory: Residuals by tensor name, at full shape; only read until :meth:`commit`.

    Does NOT protect: the server learns later what it would have learned at once. A residual is a
    part of the client's updates, as private as they are.
    """

    def __init__(
        self,
        codec: UpdateCodec,
        selection: Selection,
        shapes: Mapping[str, torch.Size],
        memory: MutableMapping[str, Tensor],
    ) -> None:
        self._codec, self._selection, self._shapes = codec, selection, shapes
        self._memory = memory
        self._kept: dict[str, Tensor] = {}

    def outstanding(self) -> list[str]:
        """Tensors with a residual on units that the client holds now."""
        return [
            name
            for name, residual in self._memory.items()
            if bool(self._selection.gather(name, residual).any())
        ]

    def encode(self, name: str, update: Tensor | None, axis: int) -> Section:
        """One tensor's update on released units, or None for no change."""
        residual = self._memory.get(name)
        owed = None if residual is None else self._selection.gather(name, residual)
        if update is None:
            assert owed is not None
            wanted = owed
        else:
            wanted = update if owed is None else update + owed
        section = self._codec.encode(wanted, axis)
        if isinstance(section, QuantizedTensor):
            kept = torch.zeros(self._shapes[name]) if residual is None else residual.clone()
            self._selection.scatter(name, wanted - section.dequantize(), kept)
            self._kept[name] = kept
        return section

    def commit(self) -> None:
        """Remember what this round has lost, once its update is on its way."""
        self._memory.update(self._kept)


def check_error_feedback(wanted: bool, bits: int | None) -> None:
    """Refuse error feedback where there is no error.

    Raises:
        ConfigurationError: If updates travel exactly.
    """
    if wanted and bits is None:
        raise ConfigurationError(
            "error_feedback is for quantized updates",
            expected="update_bits of 2, 3, 4 or 8",
            found="exact updates",
            fix="Set update_bits, or leave error_feedback out.",
        )
