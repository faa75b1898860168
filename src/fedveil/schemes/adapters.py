"""What schemes know of adapters: which tensors belong to one, and what it stands beside."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["frozen_names", "is_adapter", "long_rows"]

_MARKS = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_",
    ".lora_magnitude_vector.",
    ".modules_to_save.",
)


def is_adapter(name: str) -> bool:
    """Whether a tensor is of an adapter, by the names that PEFT gives."""
    return any(mark in name for mark in _MARKS)


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Names of parameters that require no gradients: the backbone of an adapter."""
    named = model.named_parameters()
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def long_rows(tensor: Tensor) -> int:
    """The axis along which a matrix has the fewest units, and the longest: each has a scale."""
    return min(range(tensor.dim()), key=lambda axis: tensor.shape[axis])
