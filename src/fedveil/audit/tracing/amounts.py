"""How much of each released unit a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.audit.tracing.masks import Bools, UnitMap
from fedveil.run.shown import Proxy

__all__ = ["Amounts", "Leak", "Reference"]

Floats = NDArray[np.float64]

_NOTHING = 1e-12  # of the mean square of a tensor: less is rounding


class Reference:
    """The values that clients were sent, put together from several proxies.

    Tensors are decoded as they are asked for. Where a tensor is cut along two axes its values were
    quantized for each client, and those of one stand for all: nearly the same.

    Args:
        proxies: Later ones over earlier ones.
        shapes: Of the whole tensors.
    """

    def __init__(self, proxies: Sequence[Proxy], shapes: Mapping[str, torch.Size]) -> None:
        self._proxies, self._shapes = proxies, shapes

    def tensor(self, name: str) -> Tensor:
        """Float32 at the tensor's whole shape, NaN where nobody was sent anything."""
        whole = torch.full(self._shapes[name], torch.nan)
        for proxy in (proxy for proxy in self._proxies if name in proxy.tensors):
            proxy.selection.scatter(name, proxy.part(name).float(), whole)
        return whole


@dataclass(frozen=True)
class Amounts:
    """What comparing a file with one round's values gives, per unit: float64 [units].

    Attributes:
        held: How much of the released unit is in the file: 1 all of it, 0 nothing; 1/k if the file
            is the average of k models of which one has it.
        own, product, released: Sums of squares of the file's values, of products of both, and of
            squares of the released values; every element weighted alike.
    """

    held: Floats
    own: Floats
    product: Floats
    released: Floats

    def misfit(self, mask: Bools, share: float) -> float:
        """Which part of the file's values on some units is not ``share`` times the released ones.

        From 0, all explained, to about 1.
        """
        own, product, released = (
            float(v[mask].sum()) for v in (self.own, self.product, self.released)
        )
        if own <= 0:
            return 1.0
        return max(own - 2 * share * product + share**2 * released, 0.0) / own


class Leak:
    """A file's values on the tensors that masks cut, less what suspects already explain.

    Two views are kept. Where holes are zeros, the values themselves tell them; where they were
    filled from the public base, the differences from it do, since quantization and training have
    moved every released unit away from it. A unit counts as far as both views show it.

    Args:
        tensors: Of the file, by the run's names and at the run's shapes. Taken over: changed later.
        base: Of the public base, where it has them; None if it is not known.
        units: Of the run.
    """

    def __init__(
        self, tensors: dict[str, Tensor], base: Mapping[str, Tensor] | None, units: UnitMap
    ) -> None:
        self._units, self._values = units, tensors
        self._base = {
            name: tensor.float()
            for name, tensor in (base or {}).items()
            if name in tensors and tensor.shape == tensors[name].shape
        }
        self._moved = {name: tensors[name] - tensor for name, tensor in self._base.items()}

    def amounts(self, reference: Reference) -> Amounts:
        """Compare with what was released."""
        plain = torch.zeros(3, self._units.total, dtype=torch.float64)
        moved = torch.zeros(3, self._units.total, dtype=torch.float64)
        for name, values in self._values.items():
            released = reference.tensor(name)
            known = ~released.isnan()
            released.nan_to_num_(0.0)
            size = float(released.square().mean())
            self._add(name, values * known, released, size, 0.0, plain)
            if name in self._base:
                released = (released - self._base[name]) * known
                self._add(name, self._moved[name] * known, released, size, _NOTHING, moved)
        held = _ratio(plain[1], plain[2], torch.zeros(()))
        held = torch.minimum(held, _ratio(moved[1], moved[2], held)).clamp(0.0, 1.0)
        return Amounts(held.numpy(), *plain.numpy())

    def proxy(self, mask: Bools, reference: Reference) -> Leak:
        """What this file would be, were it the proxy with a mask, with holes as in the base."""
        per_unit = torch.from_numpy(mask).float()
        tensors = {}
        for name, values in self._values.items():
            part = self._units.spread(per_unit, name, values.shape)
            hole = self._base.get(name, torch.zeros(()))
            tensors[name] = torch.where(part > 0, reference.tensor(name), hole).nan_to_num_(0.0)
        return Leak(tensors, self._base, self._units)

    def explain(self, mask: Bools, share: float, reference: Reference) -> None:
        """Take away ``share`` times the released values on some units: what is left tells more."""
        per_unit = torch.from_numpy(mask).float()
        for name, values in self._values.items():
            released = reference.tensor(name)
            part = self._units.spread(per_unit, name, values.shape) * share
            values -= (part * released).nan_to_num_(0.0)
            if name in self._base:
                self._moved[name] -= (part * (released - self._base[name])).nan_to_num_(0.0)

    def _add(
        self, name: str, own: Tensor, released: Tensor, size: float, least: float, out: Tensor
    ) -> None:
        """Add a tensor's squares and products, weighted so that all elements count alike."""
        mean_square = float(released.square().mean())
        if mean_square <= least * size:
            return
        for row, product in enumerate((own * own, own * released, released * released)):
            self._units.add(product / mean_square, name, out[row])


def _ratio(product: Tensor, square: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(square > 0, product / square.clamp(min=1e-300), otherwise)
