"""Whether masks come from a generator whose seed can be guessed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedveil.run.shown import Proxy
from fedveil.units import UnitGroup

__all__ = ["FEWEST", "SEEDS", "guess_masks", "guessed_group", "rates_to_try"]

SEEDS = 5000
"""Seeds that are tried: 0 and up, where people begin to count, rounds and client numbers too."""

FEWEST = 40
"""Units that a guessed mask must withhold: so many agree by chance not once in a lifetime."""

_SURE = 0.8
"""Of units drawn one by one fewer may be withheld than the rate says: these surely are."""


def guessed_group(proxy: Proxy) -> UnitGroup | None:
    """The largest group of which a proxy withholds units: the one whose mask is guessed at."""
    cut = [g for g in proxy.groups if len(proxy.released[g.name].units) < g.size]
    return max(cut, key=lambda group: group.size, default=None)


def rates_to_try(proxy: Proxy, rates: Sequence[float]) -> list[float]:
    """Those rates at which a mask withholds enough units to tell a guess from chance."""
    group = guessed_group(proxy)
    return [] if group is None else [rate for rate in rates if rate * group.size >= FEWEST]


def guess_masks(proxy: Proxy, rates: Sequence[float]) -> str | None:
    """Try the usual generators with small seeds; says which one it was, if one was.

    A guess is right if none of the units that it withholds was released. It needs no more than one
    message, and finds a server mask as well as a client mask, as each withholds a part.

    Args:
        proxy: What some client was sent.
        rates: Mask rates that the scheme states; those of :func:`rates_to_try` are tried, and None
            says nothing of the others.
    """
    group = guessed_group(proxy)
    if group is None:
        return None
    released = np.zeros(group.size, bool)
    released[proxy.released[group.name].units.numpy()] = True
    sizes = [round(_SURE * rate * group.size) for rate in rates_to_try(proxy, rates)]
    if not sizes:
        return None
    for seed in range(SEEDS):
        for name, order in _orders(seed, group.size):
            for size in sizes:
                if not released[order[:size]].any() or not released[order[-size:]].any():
                    return f"{name} with seed {seed}"
    return None


def _orders(seed: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Orders of units that people draw masks with: permutations, and ranks of uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    yield "torch.randperm", torch.randperm(count, generator=generator).numpy()
    generator = torch.Generator().manual_seed(seed)
    yield "torch.rand", torch.rand(count, generator=generator).numpy().argsort()
    yield "numpy's RandomState.permutation", np.random.RandomState(seed).permutation(count)
    yield "numpy's RandomState.rand", np.random.RandomState(seed).rand(count).argsort()
    yield "numpy's default_rng.permutation", np.random.default_rng(seed).permutation(count)
    yield "numpy's default_rng.random", np.random.default_rng(seed).random(count).argsort()
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311
    yield "random.shuffle", np.array(order)
    sample = random.Random(seed).sample(range(count), count)  # noqa: S311
    yield "random.sample", np.array(sample)
