"""Random weights drawn from the federation secret, not from a generator that can be foreseen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedveil.secret import Secret

__all__ = ["KeyedDraws"]

_aten = torch.ops.aten


class KeyedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what PyTorch draws at random comes from a keyed stream.

    PyTorch's own generator (MT19937) is none for secrets. It takes 32 bits of a seed, which can be
    tried one after the other, and its state follows from some ten thousand of its outputs, such as
    the signs of released weights: with it every weight that was never released. A stream of
    :meth:`~fedveil.secret.Secret.words` has neither fault.

    Each call of a sampler has a stream of its own, named by ``purpose`` and its number, so that the
    same code draws the same again. Distributions are PyTorch's; the numbers are others.

    Args:
        secret: The federation secret.
        purpose: What is drawn.

    Does NOT protect: what is drawn by other generators (NumPy's, Python's), or on another device
    than the CPU. Of a sampler that is not known here there is a warning.
    """

    def __init__(self, secret: Secret, *purpose: str | int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._secret, self._purpose, self._calls = secret, purpose, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Draw in the place of a sampler; everything else is done as ever."""
        kwargs = kwargs or {}
        fill = _IN_PLACE.get(func.overloadpacket)
        if fill is not None and _is_drawn_here(args[0]):
            return self._fill(args[0], fill, *args[1:], **kwargs)
        empty = _NEW.get(func.overloadpacket)
        if empty is not None:
            make, fill = empty
            kwargs.pop("generator", None)
            made = make(*args, **kwargs)
            return self._fill(made, fill) if _is_drawn_here(made) else func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and _draws_here(args):
            warnings.warn(
                f"Weights are drawn by {func.overloadpacket}, which is not drawn from the secret: "
                "who sees enough of them may foresee the others",
                stacklevel=2,
            )
        return func(*args, **kwargs)

    def _fill(self, tensor: Tensor, fill: Fill, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("generator", None)
        self._calls += 1

        def words(count: int) -> npt.NDArray[np.uint64]:
            return self._secret.words(count, *self._purpose, self._calls)

        values = torch.from_numpy(fill(words, tensor.numel(), *args, **kwargs))
        return tensor.copy_(values.view(tensor.shape))


Words = Callable[[int], npt.NDArray[np.uint64]]
Fill = Callable[..., npt.NDArray[np.float64]]


def _uniform(
    words: Words, count: int, low: float = 0.0, high: float = 1.0
) -> npt.NDArray[np.float64]:
    """Uniform in [low, high), from 53 bits each."""
    unit = (words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return low + (high - low) * unit


def _normal(
    words: Words, count: int, mean: float = 0.0, std: float = 1.0
) -> npt.NDArray[np.float64]:
    """Gaussian, by Box and Muller (1958) from pairs of uniform numbers."""
    pairs = -(-count // 2)
    unit = _uniform(words, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log1p(-unit[:pairs]))
    angle = 2.0 * math.pi * unit[pairs:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return mean + std * both[:count]


_IN_PLACE: dict[Any, Fill] = {_aten.uniform_: _uniform, _aten.normal_: _normal}
_NEW: dict[Any, tuple[Callable[..., Tensor], Fill]] = {
    _aten.rand: (_aten.empty, _uniform),
    _aten.randn: (_aten.empty, _normal),
    _aten.rand_like: (torch.empty_like, _uniform),
    _aten.randn_like: (torch.empty_like, _normal),
}


def _is_drawn_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_floating_point()


def _draws_here(args: tuple[Any, ...]) -> bool:
    """Whether numbers are drawn at all: on the meta device there are none."""
    return not any(isinstance(one, Tensor) and one.device.type == "meta" for one in args)
