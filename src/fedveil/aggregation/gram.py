"""Gram matrices of layer inputs: accumulated on a client, packed for the wire, unpacked to solve.

A Gram is kept as its diagonal and its correlations, ``G[i, j] = r[i, j] sqrt(G[i, i] G[j, j])``, so
that 8 bits serve large and small inputs alike, and a message cannot hold a Gram with impossible
off-diagonals.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from fedveil.errors import TrainingError

__all__ = ["FORMS", "Form", "Gram", "Moments", "block_bounds", "count_pairs", "restrict"]

Form = Literal["blocks", "low-rank"]
FORMS = get_args(Form)

_SKETCH_SEED = 0x6665647665696C


@dataclass(frozen=True)
class Gram:
    """Mean second moments of a layer's inputs over one client's examples.

    Attributes:
        diagonal: Mean squares, float32 [inputs], none negative.
        bounds: Where blocks begin and end, ``(0, ..., inputs)``. Correlations between blocks are
            taken to be zero.
        pairs: Correlations above the diagonal, float32, row by row and block after block; between
            -1 and 1. None if a factor stands for them.
        factor: Float32 [inputs, rank]; correlations are ``factor @ factor.T`` off the diagonal.
        rounded: Whether codes or noise may have left a direction with a negative square.
        received: Whether it is a stranger's, who may have made one that no data have.

    Does NOT protect the data: with enough examples a Gram is the covariance of what the layer sees,
    and with few it holds the examples themselves.
    """

    diagonal: Tensor
    bounds: tuple[int, ...]
    pairs: Tensor | None = None
    factor: Tensor | None = None
    rounded: bool = False
    received: bool = False

    def dense(self, off_diagonal: float, ridge: float) -> list[Tensor]:
        """The blocks as float32 matrices [n, n], ready to be summed and solved.

        Args:
            off_diagonal: Factor of everything off the diagonal (a of RegMean, 2212.09849); a
                smaller one is taken for a block that would have negative squares with it.
            ridge: Added to the diagonal, as a share of its mean; never less than rounding makes of
                the sum, nor than a trace, so that a layer that never fired still counts, for next
                to nothing.
        """
        total = float(self.diagonal.sum())
        added = _TRACE + max(ridge * total / max(1, len(self.diagonal)), _ROUNDING * total)
        blocks = []
        for (start, stop), block in zip(pairwise(self.bounds), self._correlations(), strict=True):
            factor = off_diagonal
            if self.rounded or (self.received and self.factor is None):
                slack = 0.0 if self.rounded else _SLACK
                factor = _possible(block, off_diagonal, slack)
            scale = self.diagonal[start:stop].sqrt()
            block *= factor * scale[:, None]
            block *= scale
            block.diagonal().copy_(self.diagonal[start:stop] + added)
            blocks.append(block)
        return blocks

    def _correlations(self) -> Iterator[Tensor]:
        """The blocks' correlations [n, n]; what is on their diagonals means nothing."""
        done = 0
        for start, stop in pairwise(self.bounds):
            size = stop - start
            if self.factor is not None:
                yield self.factor[start:stop] @ self.factor[start:stop].t()
                continue
            assert self.pairs is not None
            count = size * (size - 1) // 2
            upper = torch.zeros(size, size)
            rows, values = upper.numpy(), self.pairs[done : done + count].numpy()
            taken = 0
            for row in range(size - 1):
                width = size - 1 - row
                rows[row, row + 1 :] = values[taken : taken + width]
                taken += width
            done += count
            yield upper + upper.t()

    @classmethod
    def nothing(cls, bounds: tuple[int, ...]) -> Gram:
        """The Gram of a layer that never fired."""
        return cls(torch.zeros(bounds[-1]), bounds, pairs=torch.zeros(count_pairs(bounds)))


# Enough for a Cholesky decomposition in float64, and nothing beside a Gram of any layer that fires.
_TRACE = 1e-10
# What float32 may leave of a square of zero; a ridge covers more.
_SLACK = 1e-4
# Float32 sums hold no more: along inputs that depend on each other the step would be rounding error
# over rounding error, as large as it likes.
_ROUNDING = 2.0**-22


class Moments:
    """Accumulates one Gram from batches of rows.

    Args:
        width: Inputs of the layer.
        form: ``"blocks"`` along the diagonal, or ``"low-rank"``: a Nystroem sketch (Tropp et al.,
            1706.05736) with the exact diagonal, never the whole matrix.
        size: Inputs per block, or rank. A layer of no more inputs gets the whole matrix.
    """

    def __init__(self, width: int, form: Form, size: int, device: torch.device) -> None:
        self.width = width
        self._sketched = form == "low-rank" and width > size
        self.bounds = (0, width) if self._sketched else block_bounds(width, form, size)
        self._diagonal = torch.zeros(width, device=device)
        if self._sketched:
            generator = torch.Generator().manual_seed(_SKETCH_SEED)
            directions = torch.randn(width, size, generator=generator)
            self._directions = torch.linalg.qr(directions).Q.to(device)
            self._sketch = torch.zeros(width, size, device=device)
        else:
            sizes = [stop - start for start, stop in pairwise(self.bounds)]
            self._blocks = [torch.zeros(n, n, device=device) for n in sizes]

    def add(self, rows: Tensor) -> None:
        """Add ``rows.T @ rows``, rows float32 [n, width]."""
        self._diagonal += rows.square().sum(dim=0)
        if self._sketched:
            self._sketch.addmm_(rows.t(), rows @ self._directions)
            return
        for block, start in zip(self._blocks, self.bounds, strict=False):
            part = rows[:, start : start + len(block)]
            block.addmm_(part.t(), part)

    def gram(self, examples: int, released: Tensor | None, deviation: float = 0.0) -> Gram:
        """The mean over examples, on released inputs.

        Args:
            examples: How many examples were added.
            released: Which inputs to keep (int64, ascending); None for all.
            deviation: Standard deviation of Gaussian noise added to each entry of the mean.
        """
        kept = torch.arange(self.width) if released is None else released
        bounds = restrict(self.bounds, released)
        diagonal = self._diagonal.cpu() / examples
        if self._sketched:
            factor = self._factor().cpu() / examples**0.5
            scaled = factor / diagonal.clamp_min(_TINY).sqrt()[:, None]
            # Rounding must not make a row longer than the input that it stands for.
            scaled /= scaled.norm(dim=1, keepdim=True).clamp_min(1.0)
            return Gram(diagonal[kept], bounds, factor=scaled[kept])
        noise = _Noise(deviation)
        noisy = noise.add(diagonal).clamp_min(0.0)
        scale = noisy.clamp_min(_TINY).sqrt()
        pairs = []
        for block, start in zip(self._blocks, self.bounds, strict=False):
            inside = kept[(kept >= start) & (kept < start + len(block))] - start
            part = block.cpu()[inside][:, inside] / examples
            upper = noise.add(part[_above(len(inside))])
            own = scale[start + inside]
            upper /= (own[:, None] * own)[_above(len(inside))]
            pairs.append(upper.clamp_(-1.0, 1.0))
        return Gram(noisy[kept], bounds, pairs=torch.cat(pairs))

    def _factor(self) -> Tensor:
        """F with ``F F.T`` close to the sum, from its sketch (Tropp et al., algorithm 3)."""
        shift = 1e-6 * float(self._sketch.norm()) + _TINY
        shifted = self._sketch + shift * self._directions
        core = self._directions.t() @ shifted
        lower, failed = torch.linalg.cholesky_ex((core + core.t()) / 2)
        if failed or not bool(torch.isfinite(lower).all()):
            raise TrainingError(
                "A layer's inputs are too large to measure",
                fix="Look for a proxy with absurdly large weights.",
            )
        half = torch.linalg.solve_triangular(lower, shifted.t(), upper=False).t()
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        factor: Tensor = left * (singular.square() - shift).clamp_min(0.0).sqrt()
        return factor


_TINY = 1e-30


class _Noise:
    """Gaussian noise from the system's entropy: nobody who knows a seed can take it off again."""

    def __init__(self, deviation: float) -> None:
        self._deviation = deviation
        self._generator = torch.Generator()
        if deviation:
            self._generator.manual_seed(secrets.randbits(63))

    def add(self, values: Tensor) -> Tensor:
        if not self._deviation:
            return values
        return values + self._deviation * torch.randn(values.shape, generator=self._generator)


def block_bounds(width: int, form: Form, size: int) -> tuple[int, ...]:
    """Boundaries of the fewest blocks of at most ``size`` inputs, as equal as can be.

    A low-rank Gram is one block, however wide.
    """
    count = 1 if form == "low-rank" else -(-width // size)
    return tuple(round(width * k / count) for k in range(count + 1))


def restrict(bounds: Sequence[int], released: Tensor | None) -> tuple[int, ...]:
    """Where blocks of all inputs begin and end among the released ones."""
    if released is None:
        return tuple(bounds)
    return tuple(torch.searchsorted(released, torch.tensor(bounds)).tolist())


def count_pairs(bounds: Sequence[int]) -> int:
    """How many pairs of inputs share a block."""
    return sum((stop - start) * (stop - start - 1) // 2 for start, stop in pairwise(bounds))


def _possible(correlations: Tensor, wanted: float, slack: float) -> float:
    """The largest factor up to ``wanted``, in steps, that leaves no square negative.

    Rounding a wide Gram to 8 bits moves its smallest eigenvalues below zero. Least squares would
    blow up what was rounded; shrunk here, both sides of the equations stay those of one Gram. A
    square above ``-slack`` passes for none.
    """
    shrunk = torch.empty_like(correlations)
    for share in (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3):
        torch.mul(correlations, wanted * share, out=shrunk)
        shrunk.fill_diagonal_(1.0 + slack)
        if not torch.linalg.cholesky_ex(shrunk).info:
            return wanted * share
    return 0.0


def _above(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)
