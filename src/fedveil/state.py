"""State dicts: a model's tensors by name, each tied tensor once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError

__all__ = ["StateDict", "check_trainable", "load_state", "read_state", "wipe", "working_copy"]

StateDict = dict[str, Tensor]


def read_state(model: nn.Module) -> StateDict:
    """A model's parameters and persistent buffers, tied tensors under their first name only.

    The tensors are the model's own (no copy); whoever keeps them copies them.
    """
    seen: set[tuple[int, int, torch.Size, tuple[int, ...]]] = set()
    state: StateDict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Tied parameters are one tensor under two names; empty tensors all share address 0.
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach()
    return state


def working_copy(state: Mapping[str, Tensor]) -> StateDict:
    """The server's copy: contiguous, floating-point tensors in float32 (or float64).

    Adding small updates to half-precision weights would lose them.
    """
    layout = torch.contiguous_format
    return {name: _widen(t).clone(memory_format=layout) for name, t in state.items()}


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into a model's tensors, cast to the model's own dtypes; ties stay tied."""
    own = read_state(model)
    for name, tensor in state.items():
        own[name].copy_(tensor)


@torch.no_grad()
def wipe(model: nn.Module) -> None:
    """Set every parameter and persistent buffer to zero: an architecture without its weights."""
    for tensor in read_state(model).values():
        tensor.zero_()


def check_trainable(state: Mapping[str, Tensor]) -> None:
    """Refuse a model that cannot be fine-tuned as it is.

    Raises:
        ConfigurationError: If a weight is NaN or infinite, if a tensor is on the meta device, or if
            there is no floating-point tensor at all.
    """
    if not any(tensor.is_floating_point() for tensor in state.values()):
        raise ConfigurationError("The model has no floating-point tensors to fine-tune")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ConfigurationError(
                "A tensor has no data", where=name, fix="Load the model off the meta device."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigurationError(
                "A weight is NaN or infinite", where=name, fix="Start from an intact model."
            )


def _widen(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if half else tensor.detach()
