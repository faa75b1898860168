"""Which output of a model is which class: what the model says itself, against what data say."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fedveil.errors import ConfigurationError, FedveilWarning

__all__ = [
    "check_classes",
    "check_stated",
    "contradiction",
    "first_swapped",
    "in_stated_order",
    "same_classes",
    "stated_classes",
]

_NO_NAME = re.compile(r"LABEL_\d+")
"""What transformers calls a class of which nobody said a name."""


def stated_classes(settings: Any, where: str = "") -> list[str] | None:
    """The classes of a model in the order of its outputs, if its configuration names them.

    Args:
        settings: A configuration of transformers, or what is in its config.json: ``id2label``, and
            ``label2id``, which is the same the other way round.
        where: Whose it is, for errors.

    Raises:
        ConfigurationError: Two outputs have one name, the numbers are not those of outputs, or both
            tables contradict each other.
    """
    named = _in_order(_entry(settings, "id2label"), where or "id2label")
    numbers = _entry(settings, "label2id")
    numbered = _in_order({n: name for name, n in numbers.items()}, where or "label2id")
    if named is None:
        return numbered
    if len(set(named)) < len(named):
        raise ConfigurationError(
            "The model has one name for two classes",
            expected="a name of its own for each",
            found=_listed(named),
            where=where or "id2label",
        )
    if numbered is not None and sorted(numbered) == sorted(named) and numbered != named:
        raise ConfigurationError(
            "The model contradicts itself about the order of its classes",
            expected=f"id2label: {_listed(named)}",
            found=f"label2id: {_listed(numbered)}",
            where=where or "id2label",
            fix="Set both in its config.json to the order that it was trained with.",
        )
    return named


def in_stated_order(stated: list[str], found: Sequence[str], where: str = "") -> list[str]:
    """All classes of a model in its own order, as data spell them that name them in any order.

    Whole numbers are the numbers of the model's outputs, unless its classes are called so. Names
    may differ in case and space, of which there is a warning.

    Args:
        stated: Of the model.
        found: Those that the data have.
        where: Whose they are, for errors.

    Raises:
        ConfigurationError: The data have a class that the model has not, or it cannot be told which
            of the model's it is.
    """
    by_name = set(found) <= set(stated)
    numbers = [str(number) for number in range(len(stated))]
    if set(found) <= set(numbers):
        if by_name and any(stated[int(number)] != number for number in found):
            raise ConfigurationError(
                "The labels may be the names of classes, or numbers of outputs",
                expected=f"labels = {json.dumps(stated)} in [data], or numbers that are no names",
                found=_listed(found),
                where=where,
                fix="Say which they are.",
            )
        return numbers
    if by_name:
        _tell_absent(stated, found)
        return [*stated]
    return _respelled(stated, found, where)


def same_classes(stated: Sequence[str], given: Sequence[str]) -> bool:
    """Whether names in a given order can be those of a model's outputs, as far as they go.

    They are the model's own, but for case and space, or the whole numbers from 0.
    """
    if len(given) > len(stated):
        return False
    if list(given) == [str(number) for number in range(len(given))]:
        return True
    return all(_bare(one) == _bare(other) for one, other in zip(given, stated, strict=False))


def first_swapped(one: Sequence[str], other: Sequence[str]) -> int | None:
    """The number of the first class that two orders of the same classes disagree about.

    Returns:
        None if the order is the same, or the classes are not: of those nothing is known.
    """
    mine, theirs = [*map(_bare, one)], [*map(_bare, other)]
    if mine == theirs or sorted(mine) != sorted(theirs):
        return None
    return next(number for number, name in enumerate(mine) if name != theirs[number])


def check_classes(model: nn.Module, given: Sequence[str], where: str) -> None:
    """Refuse names of classes, in order, that contradict those which a model's configuration has.

    Raises:
        ConfigurationError: They do.
    """
    settings = getattr(model, "config", None)
    stated = None if settings is None else stated_classes(settings)
    if stated is not None and not same_classes(stated, given):
        raise contradiction(stated, given, where)


def check_stated(model: nn.Module, task: Any, data: Mapping[str, Any]) -> None:
    """Refuse rows whose numbers of classes are not the model's, or not each other's.

    Args:
        model: Of which a configuration may name the classes (``id2label``).
        task: A classification, if there is anything to look at.
        data: Data sets by whose they are. Those whose column of labels has names for its numbers, a
            ``datasets.ClassLabel``, say what they mean; of others nobody knows.

    Raises:
        ConfigurationError: They contradict each other.
    """
    label, first = getattr(task, "label", None), None
    for who, rows in data.items():
        names = getattr((getattr(rows, "features", None) or {}).get(label), "names", None)
        if not names:
            continue
        check_classes(model, names, f"{who}: column {label!r}")
        if first is not None and first != names:
            raise ConfigurationError(
                "Not all rows number their classes alike",
                expected=_listed(first),
                found=_listed(names),
                where=f"{who}: column {label!r}",
                fix="Give encode_labels() the same names for all.",
            )
        first = names


def contradiction(stated: Sequence[str], given: Sequence[str], where: str) -> ConfigurationError:
    """The error for names that are not those of a model, which would be measured on wrong ones."""
    same = sorted(map(_bare, stated)) == sorted(map(_bare, given))
    return ConfigurationError(
        "The classes are in another order than the model's"
        if same
        else "The classes are not those that the model was trained for",
        expected=f"{_listed(stated)}, as its id2label says",
        found=_listed(given),
        where=where,
        fix="Give them in the model's order, by its names. If that is not what its outputs are, "
        "correct id2label in its config.json; to train it for other classes, begin with a new head "
        "(new_head = true in [model]).",
    )


def _respelled(stated: Sequence[str], found: Sequence[str], where: str) -> list[str]:
    """The model's classes, as the data spell those that differ in case and space."""
    places = {_bare(name): place for place, name in enumerate(stated)}
    meant = [places.get(_bare(name)) for name in found]
    strangers = [name for name, place in zip(found, meant, strict=True) if place is None]
    if strangers or len(places) < len(stated) or len(set(meant)) < len(found):
        raise ConfigurationError(
            "The data have classes that the model has no output for"
            if strangers
            else "It cannot be told which of the model's classes the data mean",
            expected=f"{_listed(stated)}, as the model's id2label says",
            found=_listed(strangers or found),
            where=where,
            fix="Call them in the data what the model calls them, or correct id2label in its "
            "config.json; to train it for other classes, set new_head = true in [model].",
        )
    names = [*stated]
    for name, place in zip(found, meant, strict=True):
        assert place is not None
        names[place] = name
    pairs = [f"{a!r} for {b!r}" for a, b in zip(names, stated, strict=True) if a != b]
    warnings.warn(
        f"The data spell classes otherwise than the model, and are taken to mean the same: "
        f"{', '.join(pairs)}",
        FedveilWarning,
        stacklevel=4,
    )
    return names


def _tell_absent(stated: Sequence[str], found: Sequence[str]) -> None:
    absent = [name for name in stated if name not in set(found)]
    if absent:
        warnings.warn(
            f"The model has classes of which clients have no rows: {_listed(absent)}",
            FedveilWarning,
            stacklevel=4,
        )


def _entry(settings: Any, name: str) -> Mapping[Any, Any]:
    of_file = isinstance(settings, Mapping)
    found = settings.get(name) if of_file else getattr(settings, name, None)
    return found if isinstance(found, Mapping) else {}


def _in_order(names: Mapping[Any, Any], where: str) -> list[str] | None:
    """Names by number; None if there are none, or all are made up.

    Raises:
        ConfigurationError: They are not numbered as outputs are, from 0 on without a gap.
    """
    if all(_NO_NAME.fullmatch(str(name)) for name in names.values()):
        return None
    try:
        by_number = {int(number): str(name) for number, name in names.items()}
    except (TypeError, ValueError):
        by_number = {}
    if sorted(by_number) != list(range(len(names))):
        raise ConfigurationError(
            "The model names its classes, and does not number them as its outputs",
            expected=f"the numbers from 0 to {len(names) - 1}",
            found=_listed([str(number) for number in names]),
            where=where,
            fix="Number id2label and label2id in its config.json in the order of its outputs.",
        )
    return [by_number[number] for number in range(len(by_number))]


def _bare(name: str) -> str:
    """A name without what people change when they type it again."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _listed(names: Iterable[str], most: int = 12) -> str:
    known = [*names]
    text = ", ".join(map(repr, known[:most]))
    return text + (f" and {len(known) - most} more" if len(known) > most else "")
