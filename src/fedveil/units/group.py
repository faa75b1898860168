"""The two values this room hands out: a slice of one tensor, and a mask's group of slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.errors import ConfigurationError

KINDS = ("columns", "neurons", "heads", "channels")


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie along one axis of one tensor.

    Unit u owns the positions offset + u * width ... offset + (u + 1) * width - 1 of the axis, over
    the whole of every other axis.

    Attributes:
        tensor: state_dict key.
        axis: the axis that is cut, counted from 0.
        width: consecutive positions per unit: 1 for a neuron, head_dim for a head, H * W for a
            channel that was flattened into the next layer's input.
        offset: the position where unit 0 begins; a fused query-key-value tensor has three slices.
        scaled: True where the factor 1/(1-p) of inverted-dropout scaling belongs if it is on
            (FedQSN, arXiv 2508.18911, the mask equation). Scaling every scaled slice of a group
            multiplies what a unit contributes exactly once.
    """

    tensor: str
    axis: int
    width: int = 1
    offset: int = 0
    scaled: bool = False

    def __post_init__(self) -> None:
        for field, least in (("axis", 0), ("width", 1), ("offset", 0)):
            if (value := getattr(self, field)) < least:
                raise ConfigurationError(
                    f"a slice's {field} is too small",
                    expected=f"{least} or more",
                    found=str(value),
                    where=self.tensor,
                )

    def indices(self, units: Tensor) -> Tensor:
        """The positions on the axis that belong to some units.

        Args:
            units: unit numbers, int64 [k], in any order, each below the group's size (unchecked).

        Returns:
            int64 [k * width] on the device of `units`: unit after unit in the order given, the
            positions of one unit ascending.

        Raises:
            ConfigurationError: `units` is not a list of numbers, for instance a boolean mask.
        """
        if units.dtype != torch.int64 or units.dim() != 1:
            raise ConfigurationError(
                "unit numbers are not a list of integers",
                expected="int64 [k]",
                found=f"{units.dtype} {list(units.shape)}",
                where=self.tensor,
                fix="Turn a boolean mask into numbers with mask.nonzero().flatten().",
            )
        within = torch.arange(self.width, device=units.device)
        return (self.offset + units[:, None] * self.width + within).flatten()

    def end(self, size: int) -> int:
        """The position after the last one that `size` units own."""
        return self.offset + size * self.width


@dataclass(frozen=True)
class UnitGroup:
    """Tensors cut by one mask: hiding unit u hides position range u of every slice.

    A tensor with several state_dict names (tied) is listed under each of them with the same slice.
    Whoever changes tensors in place must therefore touch tied storage once only.

    What it does NOT protect: the number of units, the shape of every tensor, and all tensors that
    no group lists are known to every client.

    Attributes:
        name: unique in the model and stable, e.g. "bert.encoder.layer.0.mlp".
        kind: "columns", "neurons", "heads" or "channels".
        size: the number of units.
        slices: what is cut, in the order in which the tensors are computed with.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
