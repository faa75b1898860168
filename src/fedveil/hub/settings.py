"""What may be said of a model that is loaded by name: the table [model] of a configuration file."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RANDOM", "ModelTable", "Table", "Word", "is_function"]

RANDOM = "random"
"""A public model of the owner's architecture with weights that anybody can draw."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Word = Annotated[str, Field(min_length=1)]


class Table(BaseModel):
    """One table: every key is known, every value is of its type, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelTable(Table):
    """[model]: what is fine-tuned.

    Attributes:
        name: A folder, a name on the hub, or "module:function" that returns an nn.Module.
        public: What it was fine-tuned from, if anybody can get that: named likewise, and released
            in its place. Its head is new, unless it has one of the same size. "random" is a random
            initialization of the same architecture.
        num_labels: Number of classes; by default as many as the data have.
        tokenizer: A folder or hub name, if it is not the model's.
        dtype: What the weights are loaded as.
        new_head: Begin with a new classification head, whatever head the model has. That of a
            public model stays.
        lora: Settings of ``peft.LoraConfig``: adds an adapter, which alone is trained.
        adapter: A folder with an adapter that PEFT saved, to go on training instead of a new one.
        rule: "module:RULE": a :class:`fedveil.units.Rule`, or a function that returns one, for a
            model whose units are not known. Only what withholds units needs it.
    """

    name: Word
    public: Word | None = None
    num_labels: Annotated[int, Field(ge=2)] | None = None
    tokenizer: Word | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    new_head: bool = False
    lora: dict[str, Any] | None = None
    adapter: Word | None = None
    rule: Word | None = None


def is_function(name: str) -> bool:
    """Whether a name is of the form "module:function"."""
    return _FUNCTION.fullmatch(name) is not None
