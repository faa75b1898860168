"""What schemes know of adapters: which tensors belong to one, and what it stands beside."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fedveil.errors import ConfigurationError

__all__ = ["A_MATRICES", "check_train_only", "frozen_names", "is_adapter", "long_rows"]

_MARKS = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_",
    ".lora_magnitude_vector.",
    ".modules_to_save.",
)


A_MATRICES = "*.lora_*A.*"
"""The names of what clients leave alone who train the B matrices of an adapter only."""


def check_train_only(train_only: str | None, names: Iterable[str]) -> None:
    """Refuse to train only B matrices where there are none.

    Raises:
        ConfigurationError: None of the named tensors belongs to a LoRA adapter.
    """
    if train_only == "B" and not any(fnmatchcase(name, A_MATRICES) for name in names):
        raise ConfigurationError(
            "The model has no LoRA adapter of which only B could be trained",
            expected="a LoRA adapter",
            found="none",
            fix="Leave train_only out, or add one with peft.get_peft_model.",
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
