"""A rule for the units of a model that a file names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedveil.config.code import Approved
from fedveil.config.file import Config
from fedveil.errors import ConfigurationError
from fedveil.hub.names import find_named
from fedveil.hub.settings import is_function
from fedveil.units import Rule, register_rule

__all__ = ["register_named_rule"]


def register_named_rule(config: Config, approved: Approved | None = None) -> None:
    """Register the rule that `rule` in [model] names, if it names one.

    Args:
        config: The owner's file, or a client's.
        approved: At a client's, the code that may run there: no other does.

    Raises:
        ConfigurationError: It cannot be found, or is no rule; at a client's, it is not approved.
    """
    name = config.model.rule
    if name is None:
        return
    where = f"{config.path.name}: [model] rule"
    if not is_function(name):
        raise ConfigurationError(
            "A rule is named like a function", expected='"module:RULE"', found=name, where=where
        )
    find: Callable[[str], object] = partial(find_named, folder=config.path.parent)
    named = approved.named(name) if approved is not None else find(name)
    rule = named() if callable(named) and not isinstance(named, Rule) else named
    if not isinstance(rule, Rule):
        raise ConfigurationError(
            "What a file names as a rule is none",
            expected="a fedveil.units.Rule, or a function without arguments that returns one",
            found=type(rule).__name__,
            where=f"{where} = {name!r}",
        )
    register_rule(rule)
