"""Which units a model has: the things that are hidden or released whole.

`find_units` answers with unit groups for the transformer families of a table and for plain PyTorch
nets; `register_rule` adds a family; `validate` checks groups, found or written by hand, against
the tensors they cut; `tried_units` runs the model to see that they are units. See docs/units.md.
"""

from fedveil.units.check import validate
from fedveil.units.find import find_units, tried_units, units_if_known
from fedveil.units.group import Slice, UnitGroup
from fedveil.units.registry import register_rule
from fedveil.units.rule import Pattern, Rule

__all__ = [
    "Pattern",
    "Rule",
    "Slice",
    "UnitGroup",
    "find_units",
    "register_rule",
    "tried_units",
    "units_if_known",
    "validate",
]
