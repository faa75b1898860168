"""What a client measures of its data for RegMean: Grams of layer inputs, by forward hooks."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedveil.aggregation.gram import Form, Moments
from fedveil.aggregation.linear import LinearLayer, reading, rows_of

__all__ = ["GramHooks"]


class GramHooks:
    """Accumulates the Grams of some layers while a model runs on batches.

    An example's part is the mean over its positions (tokens, pixels), padding left out, so that no
    example counts for more than another. Layers that are handed the same tensor (query, key and
    value) share one Gram.

    Args:
        model: The model that will run.
        layers: The layers to watch, by weight name.
        form: See :class:`~fedveil.aggregation.gram.Moments`.
        size: See there.
        clip: Bound on the mean square of what one example gives a layer; an example beyond it is
            scaled down to it. None for no bound.

    Attributes:
        moments: Sums by the weight name of the first layer that saw the input.
        examples: How many examples are in each of them.
        same_input: Weight name of each layer that fired -> a name in ``moments``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LinearLayer],
        form: Form,
        size: int,
        clip: float | None = None,
    ) -> None:
        modules = dict(model.named_modules())
        self._watched = {name: modules[layer.module] for name, layer in layers.items()}
        self._form, self._size, self._clip = form, size, clip
        self._now: dict[tuple[int, int, object], tuple[weakref.ref[Tensor], str]] = {}
        self._mask: Tensor | None = None
        self.moments: dict[str, Moments] = {}
        self.examples: dict[str, int] = defaultdict(int)
        self.same_input: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside."""
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in self._watched.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._now.clear()

    def begin_batch(self, mask: Tensor | None) -> None:
        """Say that another batch comes; ``mask`` [examples, tokens] is 0 where there is padding."""
        self._mask = mask
        self._now.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
            # Called by keyword, it is not observed: its update is averaged.
            if arguments:
                self._observe(name, module, arguments[0])

        return observe

    def _observe(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        # The same tensor, not changed in place in between (inference tensors do not count that).
        version = 0 if inputs.is_inference() else inputs._version
        key = id(inputs), version, reading(module)
        alive, first = self._now.get(key, (None, name))
        if alive is None or alive() is not inputs:
            first = name
            self._now[key] = (weakref.ref(inputs), name)
        if self.same_input.setdefault(name, first) != name:
            return
        rows = self._weighted(rows_of(module, inputs.detach()).float())
        if name not in self.moments:
            self.moments[name] = Moments(rows.shape[-1], self._form, self._size, rows.device)
        self.moments[name].add(rows.flatten(0, 1))
        self.examples[name] += len(rows)

    def _weighted(self, rows: Tensor) -> Tensor:
        """Rows [examples, positions, inputs], so that squares add up to a mean per example."""
        weights = torch.ones(rows.shape[:2], device=rows.device)
        if self._mask is not None and self._mask.numel() == weights.numel():
            rows = rows.view(*self._mask.shape, -1)  # some models flatten examples and tokens
            weights = self._mask.to(rows.device, torch.float32)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        if self._clip is not None:
            power = (weights * rows.square().mean(dim=2)).sum(dim=1, keepdim=True)
            weights = weights * (self._clip / power.clamp_min(1e-30)).clamp_max(1.0)
        return rows * weights.sqrt()[:, :, None]
