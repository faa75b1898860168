"""What a rule says about an architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedveil.errors import ConfigurationError
from fedveil.units.group import KINDS


@dataclass(frozen=True)
class Pattern:
    """One unit group per block of a model, told by the names of its layers.

    The axis that is cut follows from each layer's type (`fedveil.units.layers`), the width from its
    shape and the number of units; a layer's bias and running statistics come along by themselves.

    Attributes:
        kind: "columns", "neurons", "heads" or "channels".
        outputs: layers (or bare parameters, cut along their last axis) whose OUTPUT positions
            belong to the units: weight rows, biases, norm entries. A block is a match if it holds
            the first of them; it must then hold all, but for those with a "?" behind their name.
            "name@1" is a bare parameter that is cut along axis 1.
        inputs: layers whose INPUT positions read the units. Their biases are not part of a unit.
            Where a block has none of them, as all have a "?", it has no such units.
        block: the module that holds the layers, with any prefix; "*" stands for a layer number.
            "" matches every module that holds the first output.
        units: how many units: a number, the name of a config attribute, or None for one unit per
            output position of the first output.
        fused: into how many equal parts the output axis falls, each with all units in order
            (3 for a fused query-key-value layer); or the parts' sizes next to each other, as
            numbers or names of config attributes.
        name: ends the group's name; by default "mlp", "heads", or the first output.
        optional: True if some models of the family lack such a block.
    """

    kind: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    block: str = ""
    units: str | int | None = None
    fused: int | tuple[str | int, ...] = 1
    name: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(
                "a pattern has an unknown kind", expected=" or ".join(KINDS), found=repr(self.kind)
            )
        for field in ("outputs", "inputs"):
            names: object = getattr(self, field)
            # ("fc1") without the comma is a string, and would be read letter by letter.
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise ConfigurationError(
                    f"a pattern's {field} are not a tuple of names",
                    expected='for instance ("fc1",)',
                    found=repr(names),
                )
        if not self.outputs or bool(self.inputs) == (self.kind == "columns"):
            raise ConfigurationError(
                f"a pattern of kind {self.kind!r} cannot be cut",
                expected="outputs and no inputs for columns, outputs and inputs for all others",
                found=f"outputs={self.outputs!r}, inputs={self.inputs!r}",
            )

    def matches(self, module_name: str) -> bool:
        """Whether a module's full name is that of a block, whatever its prefix."""
        if not self.block:
            return True
        block = re.escape(self.block).replace(r"\*", r"\d+")
        return re.fullmatch(rf"(?:.*\.)?{block}", module_name) is not None

    def ending(self) -> str:
        """The last part of a group's name."""
        return self.name or {"neurons": "mlp", "heads": "heads"}.get(self.kind, self.outputs[0])


@dataclass(frozen=True)
class Rule:
    """The units of a family of models.

    Attributes:
        model_types: what it serves: values of `model.config.model_type`, or class names of models.
        patterns: the unit groups of all choices; a choice takes those of its kinds.
        shared: parts of the names of tensors that hold something of each unit, but for several
            groups together, so that no group can withhold it: released whole, and no fault of the
            rule. A bias of positions with one number per head that all layers add, for instance.
    """

    model_types: tuple[str, ...]
    patterns: tuple[Pattern, ...]
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: tuple[object, ...] = (self.model_types, self.patterns, self.shared)
        if not all(isinstance(value, tuple) for value in given):
            raise ConfigurationError(
                "a rule's model_types, patterns and shared are tuples",
                expected='Rule(model_types=("my_model",), patterns=(Pattern(...),))',
                found=f"model_types={self.model_types!r}",
            )
