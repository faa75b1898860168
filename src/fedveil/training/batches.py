"""Which examples form which batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Batches", "has_batch_norm", "split"]


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


def split(indices: Sequence[int], pieces: int, least: int) -> list[Sequence[int]]:
    """Row numbers in at most so many pieces of about the same size, in their order.

    Args:
        indices: The rows of one step.
        pieces: At least 1.
        least: No piece has fewer rows than this, unless there are no more: BatchNorm needs two.
    """
    size = max(-(-len(indices) // pieces), least)
    starts = [*range(0, len(indices), size)]
    if len(starts) > 1 and len(indices) - starts[-1] < least:
        starts.pop()  # what is left over goes with the piece before
    ends = [*starts[1:], len(indices)]
    return [indices[start:end] for start, end in zip(starts, ends, strict=True)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
