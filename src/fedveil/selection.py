"""Which elements of which tensor a client is sent, and how they get there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedveil.masking import Release
from fedveil.units import UnitGroup

__all__ = ["Selection"]


class Selection:
    """One client's cut through the model: per tensor and axis, the positions that are released.

    The server gathers a proxy with it and the client, who rebuilds it from the unit indices in the
    message and the public architecture, puts the proxy back in place. An element is released if
    its position is released along every axis that is cut.

    Args:
        groups: The unit groups of the model.
        released: Per group name, the released units.
        shapes: Shape of every tensor that the groups mention; names missing here (a tied tensor's
            other names) are passed over.
    """

    def __init__(
        self,
        groups: Sequence[UnitGroup],
        released: Mapping[str, Release],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        kept: dict[str, dict[int, Tensor]] = {}
        factors: dict[str, dict[int, Tensor]] = {}
        for group in groups:
            release = released[group.name]
            withheld = torch.ones(group.size, dtype=torch.bool)
            withheld[release.units] = False
            for part in (part for part in group.slices if part.tensor in shapes):
                size = shapes[part.tensor][part.axis]
                keep = kept.setdefault(part.tensor, {}).setdefault(
                    part.axis, torch.ones(size, dtype=torch.bool)
                )
                keep[part.indices(torch.nonzero(withheld).flatten())] = False
                if part.scaled and release.scale != 1.0:
                    factor = factors.setdefault(part.tensor, {}).setdefault(
                        part.axis, torch.ones(size)
                    )
                    factor[part.indices(release.units)] = release.scale
        self._positions = {
            name: {axis: torch.nonzero(keep).flatten() for axis, keep in sorted(axes.items())}
            for name, axes in kept.items()
        }
        self._factors = {
            name: {axis: f[self._positions[name][axis]] for axis, f in axes.items()}
            for name, axes in factors.items()
        }

    def positions(self, name: str) -> Mapping[int, Tensor]:
        """Released positions of a tensor per cut axis (int64, ascending); empty if it is uncut."""
        return self._positions.get(name, {})

    def shape(self, name: str, full: torch.Size) -> torch.Size:
        """The shape of a tensor's released part."""
        size = list(full)
        for axis, positions in self.positions(name).items():
            size[axis] = len(positions)
        return torch.Size(size)

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The released part of ``tensor``, at its released :meth:`shape`."""
        for axis, positions in self.positions(name).items():
            tensor = tensor.index_select(axis, positions)
        return tensor

    def scatter(self, name: str, part: Tensor, out: Tensor) -> None:
        """Put a released part back in its place in ``out``; the other elements stay as they are."""
        _put(list(self.positions(name).items()), part, out)

    def is_scaled(self, name: str) -> bool:
        """Whether units of a tensor have unbiased factors other than 1."""
        return bool(self._factors.get(name))

    def scale(self, name: str, part: Tensor) -> Tensor:
        """Multiply a released part by the unbiased factors of its units."""
        for factor in self._broadcast_factors(name, part):
            part = part * factor
        return part

    def unscale(self, name: str, part: Tensor) -> Tensor:
        """Divide a released part by the unbiased factors of its units."""
        for factor in self._broadcast_factors(name, part):
            part = part / factor
        return part

    def released(self, name: str, shape: torch.Size) -> Tensor:
        """Ones where an element is released, zeros where it is withheld, float32 ``shape``."""
        mask = torch.zeros(shape)
        self.scatter(name, torch.ones(self.shape(name, shape)), mask)
        return mask

    def _broadcast_factors(self, name: str, part: Tensor) -> list[Tensor]:
        shaped = []
        for axis, factor in self._factors.get(name, {}).items():
            shape = [1] * part.dim()
            shape[axis] = -1
            shaped.append(factor.view(shape))
        return shaped


def _put(cuts: Sequence[tuple[int, Tensor]], part: Tensor, out: Tensor) -> None:
    """Copy a part to the elements of ``out`` at the given positions per axis."""
    if not cuts:
        out.copy_(part)
        return
    (axis, positions), *inner_cuts = cuts
    if not inner_cuts:
        out.index_copy_(axis, positions, part.to(out.dtype))
        return
    inner = out.index_select(axis, positions)
    _put(inner_cuts, part, inner)
    out.index_copy_(axis, positions, inner)
