"""An untrained model: what an attacker begins with who has nothing of the owner's."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fedveil.state import read_state

__all__ = ["untrained"]

_STD = 0.02
"""Of matrices that no layer knows how to begin: what most transformers begin with."""

_LORA_ZEROS = (".lora_B.", ".lora_embedding_A.")
"""The half of a LoRA adapter that begins at zero."""


@torch.no_grad()
def untrained(model: nn.Module, names: Collection[str], seed: int) -> dict[str, Tensor]:
    """A new start for some tensors of a model, in which nothing is left of their values.

    Layers that know how to begin do so (``reset_parameters``). Others, such as GPT-2's, begin as
    most transformers do: matrices small and random, scales at one, the rest at zero. New LoRA
    adapters change nothing until they are trained.

    Args:
        model: The architecture; its tensors of these names are overwritten.
        names: Which, as :func:`fedveil.state.read_state` has them: what is the owner's. Under an
            adapter the backbone is not: everybody holds it.
        seed: Decides what is random, with PyTorch's own generator, which is left there.

    Returns:
        Copies of all tensors of the model.
    """
    torch.manual_seed(seed)
    state = read_state(model)
    chosen = [state[name] for name in names if state[name].is_floating_point()]
    for tensor in chosen:
        tensor.fill_(torch.nan)
    resets = [
        getattr(layer, "reset_parameters", None) for layer in model.modules() if _is_open(layer)
    ]
    for reset in resets:
        if callable(reset):
            reset()
    for name in names:
        if state[name].isnan().any():
            _begin(name, state[name])
        if any(part in name for part in _LORA_ZEROS):
            state[name].zero_()
    return {name: tensor.clone() for name, tensor in state.items()}


def _is_open(layer: nn.Module) -> bool:
    """Whether all values of a layer, and of what is below it, are to be found anew."""
    tensors = [tensor for tensor in read_state(layer).values() if tensor.is_floating_point()]
    return bool(tensors) and all(bool(tensor.isnan().all()) for tensor in tensors)


def _begin(name: str, tensor: Tensor) -> None:
    if tensor.dim() > 1:
        tensor.normal_(0.0, _STD)
    else:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
