"""Whether tokenizers make the same tokens of the same text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedveil.errors import ConfigurationError

__all__ = ["check_same_tokens", "remarks_on_tokenizers"]

_PARTS = ("normalizer", "pre_tokenizer", "post_processor")
_SPECIAL = ("bos", "eos", "unk", "sep", "cls", "mask", "pad")
_OF_NO_TOKEN = ("padding_side", "truncation_side", "model_max_length", "chat_template")


def check_same_tokens(first: Any, other: Any, names: tuple[str, str], keep: str) -> None:
    """Embeddings can only be merged if a token is the same word to both models.

    Args:
        first: A tokenizer.
        other: Another one.
        names: What their models are called.
        keep: The tensor of embeddings, which could be kept apart.

    Raises:
        ConfigurationError: They have other vocabularies, or read texts in other ways.
    """
    advice = (
        "Only models that were fine-tuned from the same one can be merged; embeddings can be kept "
        f"as each model's own: --keep {keep}"
    )
    if first.get_vocab() != other.get_vocab():
        raise ConfigurationError(
            "The models read different vocabularies",
            expected=f"the tokens of {names[0]}",
            found="others",
            where=names[1],
            fix=advice,
        )
    one, two = _reading(first), _reading(other)
    odd = [key for key in one if one[key] != two.get(key)] + [k for k in two if k not in one]
    if odd:
        shown = "; ".join(f"{k} is {_shown(one.get(k))} and {_shown(two.get(k))}" for k in odd[:4])
        raise ConfigurationError(
            "The models make other tokens of the same text",
            expected=f"the tokenizer of {names[0]}",
            found=shown,
            where=names[1],
            fix=advice,
        )


def remarks_on_tokenizers(tokenizers: Sequence[Any]) -> list[str]:
    """What differs though a token stays the same."""
    odd = [
        key
        for key in _OF_NO_TOKEN
        if any(getattr(t, key, None) != getattr(tokenizers[0], key, None) for t in tokenizers[1:])
    ]
    if not odd:
        return []
    return [f"the models' tokenizers differ in {', '.join(odd)}; a result has its model's own."]


def _reading(tokenizer: Any) -> dict[str, Any]:
    """All that decides which tokens a text becomes, besides the vocabulary."""
    found = {f"{name}_token": _text(getattr(tokenizer, f"{name}_token", None)) for name in _SPECIAL}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return found | {
            "class": type(tokenizer).__name__,
            "do_lower_case": getattr(tokenizer, "do_lower_case", None),
        }
    whole = json.loads(backend.to_str())
    found |= {part: whole.get(part) for part in _PARTS}
    rules = {k: v for k, v in whole["model"].items() if k not in ("vocab", "dropout")}
    return found | {f"model.{key}": value for key, value in rules.items()}


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:97]}..."
