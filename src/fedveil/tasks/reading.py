"""Whether a tokenizer makes anything of the texts that it is to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from fedveil.errors import ConfigurationError, DataError
from fedveil.tasks.task import Prepared, Task

__all__ = ["check_made_of_something", "check_read"]

_LOOKED_AT = 64
"""Rows of one client: a tokenizer that knows nothing of the texts is seen in few."""

_TOO_MANY = 0.5
"""Of the tokens of all rows: where more are unknown, models are trained on noise."""


def check_made_of_something(tokenizer: Any, where: str = "") -> None:
    """Refuse a tokenizer that has special tokens and nothing else.

    transformers makes one where it finds a model's settings, and no vocabulary.

    Raises:
        ConfigurationError: It is one.
    """
    vocabulary: Mapping[str, int] = getattr(tokenizer, "get_vocab", dict)()
    special = {*getattr(tokenizer, "all_special_tokens", ())}
    if special and vocabulary.keys() <= special:
        raise ConfigurationError(
            "The tokenizer has no vocabulary",
            expected="the tokenizer that the model was trained with",
            found=f"{len(vocabulary)} special tokens, and nothing else",
            where=where,
            fix="Save it beside the model (tokenizer.save_pretrained(folder)), or name one: "
            "tokenizer in [model].",
        )


def check_read(task: Task, data: Mapping[str, Prepared]) -> None:
    """Refuse a tokenizer to which most of the texts are unknown.

    Args:
        task: Of texts, if there is anything to look at: with a tokenizer that says what stands for
            words that it does not know.
        data: Rows by whose they are.

    Raises:
        ConfigurationError: The tokenizer has no vocabulary.
        DataError: More than half of what it makes of the first rows is unknown, or nothing at all.
    """
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None or not data:
        return
    check_made_of_something(tokenizer, getattr(tokenizer, "name_or_path", ""))
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = {*getattr(tokenizer, "all_special_ids", ())} - {unknown}
    if not special and unknown is None:
        return
    read = [token for token in chain.from_iterable(_tokens(data.values())) if token not in special]
    lost = sum(token == unknown for token in read)
    if not read or lost > _TOO_MANY * len(read):
        raise DataError(
            "The tokenizer knows little of these texts: a model would be trained on noise",
            expected="the tokenizer that the model was trained with, for texts of this language",
            found=f"{lost:,} of {len(read):,} tokens unknown" if read else "no tokens",
            where=f"the first rows of {', '.join([*data][:3])}",
            fix="Name the model's own tokenizer; or look at the column of texts.",
        )


def _tokens(data: Iterable[Prepared]) -> Iterable[Iterable[int]]:
    for rows in data:
        for row in rows.select(range(min(_LOOKED_AT, len(rows)))):
            if isinstance(row, Mapping):
                yield row.get("input_ids", ())
