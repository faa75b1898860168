"""Tokenizers by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedveil.errors import ConfigurationError
from fedveil.hub.foreign import refuse_code
from fedveil.hub.library import quiet_transformers
from fedveil.hub.names import explained, place_of
from fedveil.tasks.reading import check_made_of_something

__all__ = ["is_in", "load_tokenizer"]

_FILE = re.compile(r"token|vocab|merges|spiece|sentencepiece|bpe|\.model$")


def load_tokenizer(name: str, folder: Path, *, guarded: bool = False) -> Any:
    """A tokenizer that can pad, from a folder or the hub.

    Args:
        name: What it is called.
        folder: What paths are relative to.
        guarded: Refuse one that wants code of its own to be run: at a client's.

    Raises:
        FedveilError: It cannot be found or loaded, has no vocabulary, or is refused.
    """
    place = place_of(name, folder)
    if Path(place).is_dir() and not is_in(Path(place)):
        raise ConfigurationError(
            "There is no tokenizer in the folder",
            expected="what tokenizer.save_pretrained writes, such as tokenizer.json",
            found=", ".join(sorted(path.name for path in Path(place).iterdir())[:8]) or "no file",
            where=place,
            fix="Save the model's own tokenizer beside it, or name one: tokenizer in [model].",
        )
    with quiet_transformers() as transformers, explained("tokenizer", place):
        if guarded:
            tokenizers = transformers.models.auto.tokenization_auto
            refuse_code(tokenizers.get_tokenizer_config(place, trust_remote_code=False), place)
        trust = {"trust_remote_code": False} if guarded else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **trust)
        if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
    check_made_of_something(tokenizer, place)
    return tokenizer


def is_in(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer's."""
    return any(_FILE.search(path.name) for path in folder.iterdir())
