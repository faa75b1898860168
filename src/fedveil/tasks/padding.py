"""Where a classifier finds what it reads a text's class from, and what padding does to that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.tasks.task import Batch

__all__ = ["check_padding", "reads_last_place", "turned_left"]


def check_padding(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a model that looks for the last token of a text by another padding token.

    Models of transformers that read from left to right take the class from the last token that is
    not their configuration's padding token. If that is not the tokenizer's, they read the padding,
    and what they say of a text depends on the other texts of its batch.

    Raises:
        ConfigurationError: The two differ.
    """
    base = _base(model)
    if not hasattr(base, "config") or not _looks_for_padding(type(base)):
        return
    theirs, ours = getattr(base.config, "pad_token_id", None), tokenizer.pad_token_id
    if theirs != ours:
        raise ConfigurationError(
            "The model would take another token for padding than the tokenizer",
            expected=f"pad_token_id = {ours} in the model's config, as the tokenizer has it",
            found=str(theirs),
            where=type(base).__name__,
            fix="It looks for the end of a text by that. Set model.config.pad_token_id = "
            "tokenizer.pad_token_id, or the tokenizer's to the model's.",
        )


def reads_last_place(model: nn.Module) -> bool:
    """Whether a model takes the class from the last place of a batch, whatever is there: XLNet."""
    base = _base(model)
    last = getattr(getattr(base, "config", None), "summary_type", None) == "last"
    return last and hasattr(base, "sequence_summary")


def turned_left(inputs: Mapping[str, Tensor]) -> Batch:
    """Inputs, [B, L] each, with their padding moved to the left: for models that count places from
    one token to another only."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(inputs)
    length = mask.shape[1]
    padding = length - mask.sum(dim=1, keepdim=True)
    places = (torch.arange(length, device=mask.device) - padding) % length
    return {name: tensor.gather(1, places) for name, tensor in inputs.items()}


def _base(model: nn.Module) -> Any:
    """The model inside an adapter of peft."""
    return getattr(model, "get_base_model", lambda: model)()


def _looks_for_padding(kind: type) -> bool:
    forward: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code = getattr(forward, "__code__", None)
    return code is not None and "pad_token_id" in code.co_names
