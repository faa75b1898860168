"""The way in: which units a model has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.units.check import validate
from fedveil.units.group import UnitGroup
from fedveil.units.match import Anatomy, apply_rule
from fedveil.units.plain import plain_groups
from fedveil.units.registry import rule_for
from fedveil.units.rule import Rule
from fedveil.units.table import RULES
from fedveil.units.trial import Run, try_units
from fedveil.units.unknown import unknown_architecture

CHOICES = {
    "columns": ("columns",),
    "neurons": ("neurons", "heads", "channels"),
    "mlp": ("neurons", "channels"),
}


def find_units(
    model: nn.Module, choice: str = "neurons", *, rule: Rule | None = None
) -> tuple[UnitGroup, ...]:
    """Find the units of a model.

    A rule is looked up by `config.model_type` and by class name, in the model and in the modules
    below it, so a model may be wrapped in another. A model without any config or rule is taken for
    a plain net and traced.

    What hiding these units does NOT protect: classification and LM heads, embeddings under the
    choices "neurons" and "mlp", embeddings tied to an LM head under "columns", layer norms of the
    residual stream, and whatever `fedveil.units.plain` and docs/units.md call not cut. Under
    "columns", the weights that read a hidden column are released too.

    Args:
        model: on any device, of any floating dtype; not changed.
        choice: "columns" cuts output columns of the embedding, the attention output and the MLP
            output, as FedQSN does (arXiv 2508.18911); "neurons" cuts MLP neurons, attention heads
            and channels together with the weights that read them; "mlp" is "neurons" without
            attention heads.
        rule: a rule to use for this model, instead of the registered ones.

    Returns:
        At least one group, in the order of the model's state_dict; disjoint, with unique names.

    Raises:
        ConfigurationError: the choice is unknown, or a rule does not fit the model.
        UnknownArchitectureError: no rule serves the model, or none of its layers can be cut.
    """
    try:
        return _find(model, choice, rule)
    except _UnknownError as error:
        # To name a rule that holds takes a while.
        raise unknown_architecture(model, _label(model), str(error)) from error.__cause__


def _find(model: nn.Module, choice: str, rule: Rule | None) -> tuple[UnitGroup, ...]:
    _check_choice(choice)
    if hasattr(model, "_orig_mod"):
        raise ConfigurationError(
            "The model is compiled, and its parts go by other names",
            expected="a model that torch.compile has not wrapped",
            found=type(model).__name__,
            fix="Give what it was compiled from, model._orig_mod, or compile it in place: "
            "model.compile().",
        )
    anatomy = Anatomy.of(model)
    groups: list[UnitGroup] = []
    served = [("", model, rule)] if rule is not None else list(_served(model))
    for scope, module, known in served:
        config = getattr(module, "config", module)
        groups += apply_rule(known, anatomy, CHOICES[choice], config, scope)
    if not served:
        groups = _trace(model, anatomy, choice)
    if not groups:
        raise _UnknownError(f"no layer of this model can be cut into {choice}")
    order = {tensor: number for number, tensor in enumerate(anatomy.state)}
    groups.sort(key=lambda group: order[group.slices[0].tensor])
    validate(groups, anatomy.state)
    return tuple(groups)


class _UnknownError(Exception):
    """No rule serves a model; the text says why not."""


def _check_choice(choice: str) -> None:
    if choice not in CHOICES:
        raise ConfigurationError(
            "an unknown choice of units", expected=" or ".join(CHOICES), found=repr(choice)
        )


def tried_units(
    model: nn.Module, choice: str = "neurons", run: Run | None = None, *, rule: Rule | None = None
) -> tuple[UnitGroup, ...]:
    """Find the units of a model, and run it to see that they are units.

    Args:
        model: as for :func:`find_units`, with its weights.
        choice: likewise.
        run: runs the model on an example; see :func:`fedveil.units.trial.try_units`.
        rule: as for :func:`find_units`.

    Raises:
        ConfigurationError: as :func:`find_units`; or what was found is not all of a unit, or of
            something else, or there is nothing to run the model with.
        UnknownArchitectureError: as :func:`find_units`.
    """
    groups = find_units(model, choice, rule=rule)
    rules = [rule] if rule is not None else [known for _, _, known in _served(model)]
    try_units(model, groups, run, shared=[name for known in rules for name in known.shared])
    return groups


def units_if_known(model: nn.Module, choice: str) -> tuple[UnitGroup, ...]:
    """The units of a model that anybody's fedveil finds without being told; else none.

    For who withholds nothing: it is then of no account whether they are right.
    """
    _check_choice(choice)
    if any(rule not in RULES for _, _, rule in _served(model)):
        return ()
    try:
        return _find(model, choice, None)
    except (_UnknownError, ConfigurationError):
        return ()


def _served(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, Rule]]:
    """The outermost modules that a rule serves, with their names."""
    rule = rule_for({_label(model), type(model).__name__})
    if rule is not None:
        yield name, model, rule
        return
    for child, module in model.named_children():
        yield from _served(module, f"{name}.{child}" if name else child)


def _has_model_type(model: nn.Module) -> bool:
    """Whether a model, or one that it wraps, is of a family, so that tracing would be a guess."""
    return any(_model_type(module) for module in model.modules())


def _model_type(model: nn.Module) -> str:
    value = getattr(getattr(model, "config", None), "model_type", "")
    return value if isinstance(value, str) else ""


def _label(model: nn.Module) -> str:
    return _model_type(model) or type(model).__name__


def _trace(model: nn.Module, anatomy: Anatomy, choice: str) -> list[UnitGroup]:
    if _has_model_type(model):
        raise _UnknownError("no rule serves this model type")
    try:
        return plain_groups(model, anatomy, columns=choice == "columns")
    except Exception as error:
        # Tracing runs the model's own forward: it may raise anything.
        found = f"{type(error).__name__}: {error}"
        raise _UnknownError(f"this model is neither known nor traceable ({found})") from error
