"""The part of a model that a coalition holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.run.manifest import Manifest
from fedveil.run.shown import Proxy

__all__ = ["PartialModel"]


@dataclass
class PartialModel:
    """Stolen values, and where there are any.

    Attributes:
        values: By tensor, whole: float32 for weights; zero where nothing is known.
        known: By tensor, bool of the same shape.
    """

    values: dict[str, Tensor]
    known: dict[str, Tensor]

    @classmethod
    def empty(cls, manifest: Manifest) -> PartialModel:
        """Nothing at all."""
        values, known = {}, {}
        for name, info in manifest.tensors.items():
            dtype = torch.float32 if info.is_floating_point else getattr(torch, info.dtype)
            values[name] = torch.zeros(info.shape, dtype=dtype)
            known[name] = torch.zeros(info.shape, dtype=torch.bool)
        return cls(values, known)

    def take(self, proxy: Proxy) -> None:
        """Add a proxy; where it shows something, that replaces what was known before."""
        for name in proxy.tensors:
            proxy.selection.scatter(name, proxy.part(name), self.values[name])
            self.known[name] |= proxy.shows(name)

    def share(self) -> float:
        """Which share of all weights is known, from 0 to 1."""
        weights = [name for name, value in self.values.items() if value.is_floating_point()]
        total = sum(self.known[name].numel() for name in weights)
        return sum(int(self.known[name].sum()) for name in weights) / total
