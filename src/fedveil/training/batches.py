"""Which examples form which batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Batches", "has_batch_norm", "pieces_of"]


class Batches:
    """Batches of row numbers, in a new random order for each pass over the data.

    Args:
        size: Rows in the data set.
        batch_size: Rows per batch; the last of a pass may be smaller.
        avoid_single: Leave out a last batch of one row, which BatchNorm may be unable to train on.
            Which row that is changes from pass to pass. An only batch is kept all the same.
    """

    def __init__(self, size: int, batch_size: int, *, avoid_single: bool = False) -> None:
        self.size, self.batch_size = size, batch_size
        single = size % batch_size == 1 and size > batch_size > 1
        self._end = size - 1 if avoid_single and single else size

    def __len__(self) -> int:
        """Batches per pass."""
        return -(-self._end // self.batch_size)

    def endless(self, seed: int) -> Iterator[list[int]]:
        """Pass after pass, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.size, generator=generator).tolist()
            for start in range(0, self._end, self.batch_size):
                yield order[start : min(start + self.batch_size, self._end)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def pieces_of(indices: Sequence[int], count: int, *, avoid_single: bool) -> list[Sequence[int]]:
    """A batch in at most so many pieces, all but the last of one size.

    Args:
        indices: The examples of the batch, in order.
        count: How many pieces there may be.
        avoid_single: Make no piece of one example, which BatchNorm may be unable to train on: there
            are fewer pieces then, as equal as can be. An only example is a piece all the same.
    """
    size = -(-len(indices) // count)
    pieces = [indices[start : start + size] for start in range(0, len(indices), size)]
    if not avoid_single or len(pieces[-1]) > 1:
        return pieces
    fewer = max(1, min(count, len(indices) // 2))
    bounds = [len(indices) * number // fewer for number in range(fewer + 1)]
    return [indices[start:stop] for start, stop in pairwise(bounds)]
