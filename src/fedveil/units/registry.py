"""The rules that this process knows: the table's, and those that users register."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedveil.units.rule import Rule
from fedveil.units.table import RULES

_rules: list[Rule] = list(RULES)


def register_rule(rule: Rule) -> None:
    """Make a rule known to this process; later rules win over earlier ones and over the table."""
    _rules[:] = [*(known for known in _rules if known != rule), rule]


def registered() -> tuple[Rule, ...]:
    """The rules that were registered in this process, oldest first: another process needs them."""
    return tuple(rule for rule in _rules if rule not in RULES)


def rule_for(labels: Iterable[str]) -> Rule | None:
    """The latest rule that serves one of some model types or class names."""
    wanted = set(labels)
    return next((rule for rule in reversed(_rules) if wanted & set(rule.model_types)), None)


def nearest_type(label: str) -> str:
    """The known model type with the most similar spelling, or ""."""
    known = [model_type for rule in _rules for model_type in rule.model_types]
    return next(iter(difflib.get_close_matches(label.lower(), known, n=1, cutoff=0.6)), "")
