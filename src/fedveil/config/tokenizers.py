"""Which tokenizer owner and clients use, and whether it is the model's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from fedveil.config.file import Config
from fedveil.errors import ConfigurationError, FedveilWarning
from fedveil.hub.settings import RANDOM, is_function
from fedveil.hub.tokenizers import is_in
from fedveil.tasks.task import longest_input

__all__ = [
    "agree",
    "check_length",
    "check_vocabulary",
    "public_brings_tokenizer",
    "tokenizer_name",
]

_FEW = 0.05
"""A tokenizer that knows a smaller share of the tokens that a model has is worth a word."""


def tokenizer_name(config: Config) -> str:
    """Where the tokenizer is that owner and clients use.

    With what clients are sent a proxy of, unless the file says otherwise: the public model, if one
    is released and brings a tokenizer, since its tokens are what it was trained on and what anybody
    may have. Else with the owner's model.

    Raises:
        ConfigurationError: The model is made by a function, so nothing is with it.
    """
    name = config.model.tokenizer or (
        config.model.public if public_brings_tokenizer(config) else config.model.name
    )
    assert name is not None
    if is_function(name):
        raise ConfigurationError(
            "A model that a function makes brings no tokenizer",
            where=f"{config.path.name}: [model]",
            fix='Add tokenizer = "a folder or hub name".',
        )
    return name


def public_brings_tokenizer(config: Config) -> bool:
    """Whether there is a public model with a tokenizer of its own.

    Of a folder its files tell: transformers makes a tokenizer without any vocabulary where there
    are none.
    """
    public = config.model.public
    if public is None or public == RANDOM:
        return False
    place = config.path.parent / Path(public).expanduser()
    if is_function(public) or not place.is_dir():
        return True  # a name on the hub, or one of which the error tells
    return is_in(place)


def agree(tokenizer: Any, model: nn.Module, config: Config) -> None:
    """Padding, vocabulary and length as the model needs them.

    Raises:
        ConfigurationError: They cannot be.
    """
    own: Any = getattr(model, "config", None)
    if own is None:
        return
    check_vocabulary(tokenizer, _embedded(model), config)
    if getattr(own, "pad_token_id", None) is None:
        own.pad_token_id = tokenizer.pad_token_id
    check_length(model, config)


def check_length(model: nn.Module, config: Config) -> None:
    """Refuse texts of more tokens than a model has positions for.

    Raises:
        ConfigurationError: They may be so long.
    """
    longest = longest_input(model)
    if longest is not None and config.data.max_length > longest:
        raise ConfigurationError(
            "Texts are longer than the model can read",
            expected=f"at most {longest}",
            found=str(config.data.max_length),
            where=f"{config.path.name}: [data] max_length",
        )


def check_vocabulary(tokenizer: Any, embedded: int | None, config: Config) -> None:
    """Refuse a tokenizer with tokens of which the model knows nothing.

    Args:
        tokenizer: Of transformers.
        embedded: Of how many tokens the model has embeddings; None if nobody knows.
        config: Which names both.

    Raises:
        ConfigurationError: It has such tokens.
    """
    if embedded is None:
        return
    last = max(tokenizer.get_vocab().values(), default=0)
    where = f"{config.path.name}: {tokenizer_name(config)}"
    if last >= embedded:
        raise ConfigurationError(
            "The tokenizer is of another model: it has tokens that the model has no embedding of",
            expected=f"at most {embedded} tokens",
            found=str(last + 1),
            where=where,
            fix="Take the tokenizer that the model was made with (tokenizer in [model]).",
        )
    if last + 1 < _FEW * embedded:
        warnings.warn(
            f"The tokenizer has {last + 1:,} tokens, and the model embeddings of {embedded:,}: is "
            f"it the model's own? ({where})",
            FedveilWarning,
            stacklevel=2,
        )


def _embedded(model: nn.Module) -> int | None:
    """Of how many tokens a model has embeddings; None if it does not say."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
