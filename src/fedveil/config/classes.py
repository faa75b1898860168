"""All classes in the order of the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from fedveil.config.file import Config
from fedveil.hub.classes import stated_in
from fedveil.hub.names import place_of
from fedveil.hub.settings import is_function
from fedveil.tasks.classes import contradiction, in_stated_order, same_classes

__all__ = ["settled_classes"]


def settled_classes(config: Config, found: Sequence[str]) -> list[str]:
    """All classes in the order of the model's outputs, as the data spell them.

    The model's own order is taken if it has one, and its head is not to be replaced. Of a model
    that a function makes it is not known yet: it is compared later.

    Args:
        config: An owner's or a client's.
        found: `labels` of the file, or the classes that the data have.

    Raises:
        ConfigurationError: `labels` contradict the model, or the data have a class that it has not.
    """
    table, given = config.model, config.data.labels
    if table.new_head or is_function(table.name):
        return [*found]
    place = place_of(table.name, config.path.parent)
    stated = stated_in(place)
    if stated is None:
        return [*found]
    if given is None:
        return in_stated_order(stated, found, f"{config.path.name}: [data] {config.data.label}")
    if not same_classes(stated, given):
        raise contradiction(stated, given, f"{config.path.name}: [data] labels")
    numbered = given == [str(number) for number in range(len(given))]
    rest = range(len(given), len(stated))
    return [*given, *(str(number) if numbered else stated[number] for number in rest)]
