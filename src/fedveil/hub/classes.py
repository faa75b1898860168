"""The order of classes that owner, data and clients share: the model's own, if it has one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.hub.library import quiet_transformers
from fedveil.hub.names import explained, place_of
from fedveil.hub.settings import RANDOM, ModelTable, is_function
from fedveil.tasks.classes import (
    first_swapped,
    stated_classes,
)

__all__ = ["check_public_order", "stated_in"]


def stated_in(place: str) -> list[str] | None:
    """The classes that a model's config.json names in order; None if it names none.

    Nor does one of a model that has no head for them: whatever names are there are of another.

    Args:
        place: A folder, or a name on the hub.

    Raises:
        FedveilError: It contradicts itself.
    """
    _refuse_twice(Path(place) / "config.json")
    with quiet_transformers() as transformers, explained("model", place):
        try:
            settings = transformers.PretrainedConfig.get_config_dict(place)[0]
        except OSError:
            return None  # which is said where the model is loaded
    kinds = settings.get("architectures") or ()
    if kinds and not any("Classification" in str(kind) for kind in kinds):
        return None
    return stated_classes(settings, place)


def _refuse_twice(path: Path) -> None:
    """Refuse a configuration in which a key stands twice: whoever reads it keeps one of them.

    Raises:
        ConfigurationError: One does.
    """

    def check(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigurationError(
                "A key stands twice in a model's configuration",
                expected="each once",
                found=repr(twice),
                where=str(path),
                fix="Delete the one that is wrong: of classes, that of another output.",
            )
        return dict(pairs)

    if path.is_file():
        # What else is wrong with it is said where the model is loaded.
        with suppress(OSError, UnicodeError, json.JSONDecodeError):
            json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=check)


def check_public_order(
    table: ModelTable,
    names: Sequence[str],
    folder: Path,
    own: nn.Module | None = None,
    public: nn.Module | None = None,
) -> None:
    """Refuse a public model with the owner's classes in another order, if both can be told.

    What clients teach one output would be added to that of another class. A public model for other
    classes is none of this: its head has only begun elsewhere.

    Args:
        table: Names both.
        names: The classes in order, as the data spell them.
        folder: What paths are relative to.
        own: The owner's, if a function made it: its folder says it otherwise.
        public: Likewise.

    Raises:
        ConfigurationError: The order is another.
    """
    if table.public is None or table.public == RANDOM or not names:
        return
    theirs = _stated_by(table.public, folder, public)
    kept = is_function(table.name) or not table.new_head
    mine = _stated_by(table.name, folder, own) if kept else None
    if theirs is None or (number := first_swapped(theirs, names if mine is None else mine)) is None:
        return
    said = f"class {number} to be {{!r}}, as {{}}".format
    raise ConfigurationError(
        "The public model has its classes in another order than yours",
        expected=said(names[number], "the data say")
        if mine is None
        else said(mine[number], f"the id2label of your model {table.name!r} says"),
        found=said(theirs[number], f"the id2label of the public model {table.public!r} says"),
        where="[model] public",
        fix=_fix_of_order(theirs, known=mine is not None),
    )


def _stated_by(name: str, folder: Path, model: nn.Module | None) -> list[str] | None:
    """The classes that a model names in order, which may be known only once it is made."""
    if not is_function(name):
        return stated_in(place_of(name, folder))
    settings = getattr(model, "config", None)
    return None if settings is None else stated_classes(settings, name)


def _fix_of_order(theirs: Sequence[str], *, known: bool) -> str:
    """What helps; `labels` do only where the owner's model has no order of its own."""
    fitting = (
        "Take a public model with the order of yours, or one without a head, which then gets a new "
        "one."
    )
    if not known:
        return (
            f"If your model has that order, too, or begins with a new head, write labels = "
            f"{json.dumps([*theirs], ensure_ascii=False)} in [data]. If not: {fitting}"
        )
    return (
        "If one of the two is not what the model's outputs are, correct id2label and label2id in "
        f"that model's config.json. If both are right: {fitting} `labels` in [data] change neither."
    )
