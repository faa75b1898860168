"""Two ways to hide units: zeros in all slices, and layers that are physically smaller."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.units import UnitGroup


def masks(groups: Iterable[UnitGroup], state: dict[str, Tensor], hidden: dict[str, list[int]]):
    """For every tensor, which of its elements belong to a hidden unit of some kind."""
    result = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in state.items()}
    for group in groups:
        for cut in group.slices:
            at = cut.indices(torch.tensor(hidden[group.kind]))
            result[cut.tensor].index_fill_(cut.axis, at, True)
    return result


def zeroed(model: nn.Module, covered: dict[str, Tensor], value: float = 0.0) -> Any:
    model = copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        tensor.masked_fill_(covered[name], value)
    return model


def others(count: int, hidden: Iterable[int], width: int = 1, parts: int = 1) -> Tensor:
    """The positions of `count` that remain when units of some width go from each of some parts."""
    length = count // parts
    gone = {p * length + u * width + i for p in range(parts) for u in hidden for i in range(width)}
    return torch.tensor([i for i in range(count) if i not in gone])


def drop_outputs(module: Any, keep: Tensor) -> None:
    """Delete output positions of a layer, in place."""
    if type(module).__name__ == "Conv1D":
        _select(module, "weight", 1, keep)
        module.nf = len(keep)
    elif isinstance(module, nn.Embedding):
        _select(module, "weight", 1, keep)
        module.embedding_dim = len(keep)
    else:
        _select(module, "weight", 0, keep)
    for name in ("bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            _select(module, name, 0, keep)
    for name in ("out_features", "out_channels", "num_features"):
        if hasattr(module, name):
            setattr(module, name, len(keep))


def drop_inputs(module: nn.Module, keep: Tensor) -> None:
    _select(module, "weight", 0 if type(module).__name__ == "Conv1D" else 1, keep)
    for name in ("in_features", "in_channels"):
        if hasattr(module, name):
            setattr(module, name, len(keep))


def drop_heads(outputs: list[Any], reader: Any, units: int, hidden: list[int]) -> None:
    for module in outputs:
        fused = 3 if type(module).__name__ == "Conv1D" else 1
        length = module.nf if fused == 3 else module.out_features
        drop_outputs(module, others(length, hidden, length // fused // units, fused))
    axis = 0 if type(reader).__name__ == "Conv1D" else 1
    length = reader.weight.shape[axis]
    drop_inputs(reader, others(length, hidden, length // units))


def _select(module: nn.Module, name: str, axis: int, keep: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(axis, keep)
    setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


class Scatter(nn.Module):
    """A smaller module whose outputs are put where they belong, with zeros between them."""

    def __init__(self, small: nn.Module, keep: Tensor, width: int) -> None:
        super().__init__()
        self.small, self.keep, self.width = small, keep, width

    def __getattr__(self, name: str):
        # Models look at a layer's dtype before they call it.
        return super().__getattr__(name) if name == "small" else getattr(self.small, name)

    def forward(self, *args, **kwargs) -> Tensor:
        out = self.small(*args, **kwargs)
        whole = out.new_zeros(*out.shape[:-1], self.width)
        whole[..., self.keep] = out
        return whole


class WideNorm(nn.Module):
    """A LayerNorm that knows only some columns but normalises over the whole width."""

    def __init__(self, norm: nn.LayerNorm, keep: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach()[keep])
        self.bias = nn.Parameter(norm.bias.detach()[keep])
        self.keep, self.eps = keep, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        normal = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normal[..., self.keep] * self.weight + self.bias


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def layer_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D" else 0


def scatter_outputs(model: nn.Module, layer: Any, hidden: list[int]) -> None:
    """Make a layer smaller and put zeros in place of what it no longer computes."""
    width = layer.weight.shape[layer_axis(layer)]
    keep = others(width, hidden)
    drop_outputs(layer, keep)
    replace_module(model, layer, Scatter(layer, keep, width))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".small", ""): t for name, t in model.state_dict().items()}
