"""From a rule and a model to unit groups."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.ties import copies, tied_names
from fedveil.units.adapters import (
    cut_inputs,
    cut_outputs,
    plain_layer,
    refuse_hidden,
    refuse_prompts,
)
from fedveil.units.group import Slice, UnitGroup
from fedveil.units.layers import bare_slices, output_axis, unit_width
from fedveil.units.rule import Pattern, Rule


@dataclass(frozen=True)
class Anatomy:
    """A model by names: its modules, its tensors, and which names lead to the same tensor."""

    modules: dict[str, nn.Module]
    state: dict[str, Tensor]
    ties: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Read a model; its values are neither copied nor changed."""
        state = dict(model.state_dict(keep_vars=True))
        return cls(dict(model.named_modules(remove_duplicate=False)), state, tied_names(state))

    def has(self, name: str) -> bool:
        """Whether a module or a tensor has this name."""
        return name in self.modules or name in self.state

    def owner(self, tensor: str) -> nn.Module | None:
        """The module that holds a tensor."""
        return self.modules.get(tensor.rpartition(".")[0])


def apply_rule(
    rule: Rule, anatomy: Anatomy, kinds: Collection[str], config: object, scope: str = ""
) -> list[UnitGroup]:
    """The groups of a rule's patterns of some kinds, in the order of the patterns.

    Args:
        rule: which layers make up the units.
        anatomy: the whole model.
        kinds: the kinds of patterns to use.
        config: where patterns look up their number of units.
        scope: the name of the module that the rule speaks of; "" is the whole model.

    Raises:
        ConfigurationError: no pattern is of these kinds, a pattern matches nothing, a block lacks
            a layer, or an axis does not fall into units.
    """
    patterns = [pattern for pattern in rule.patterns if pattern.kind in kinds]
    if not patterns:
        raise ConfigurationError(
            "a rule has no pattern for this choice of units",
            expected=f"a pattern of kind {' or '.join(kinds)}",
            found=", ".join(sorted({pattern.kind for pattern in rule.patterns})),
            where=f"the rule for {', '.join(rule.model_types)}",
        )
    groups: list[UnitGroup] = []
    for pattern in patterns:
        blocks = _blocks(pattern, anatomy, scope)
        if not blocks and not pattern.optional:
            raise _matches_nothing(pattern, rule)
        found = (_group(pattern, block, anatomy, config) for block in blocks)
        groups += (group for group in found if group is not None)
    return groups


def _blocks(pattern: Pattern, anatomy: Anatomy, scope: str) -> list[str]:
    """The names of the modules that hold the pattern's first output; shared modules once only."""
    blocks: dict[int, str] = {}
    for name, module in anatomy.modules.items():
        inside = not scope or name == scope or name.startswith(f"{scope}.")
        if inside and pattern.matches(name):
            first = pattern.outputs[0].partition("@")[0]
            if anatomy.has(_join(name, first)):
                blocks.setdefault(id(module), name)
            elif pattern.block:
                refuse_hidden(name, first, anatomy.modules)
    return list(blocks.values())


def _group(pattern: Pattern, block: str, anatomy: Anatomy, config: object) -> UnitGroup | None:
    """One block's group, or None if it cannot be cut without cutting a head tied to it."""
    modules, state = anatomy.modules, anatomy.state
    outputs, inputs = (
        _layers(names, block, anatomy) for names in (pattern.outputs, pattern.inputs)
    )
    if pattern.inputs and not inputs:
        return None
    first = outputs[0] if "@" in outputs[0] else plain_layer(outputs[0], modules, state)
    size = _size(pattern, first, anatomy, config)
    fused = _shares(pattern, config)
    cuts = [_outputs(name, anatomy, size, fused) for name in outputs]
    if pattern.kind == "columns":
        cuts = _scale(cuts, anatomy)
    slices = [cut for layer in cuts for cut in layer]
    slices += (cut for name in inputs for cut in _inputs(name, anatomy, size))
    refuse_prompts(pattern.kind, slices, modules)
    everywhere = _under_all_names(slices, anatomy)
    if everywhere is None:
        return None
    return UnitGroup(_join(block, pattern.ending()), pattern.kind, size, everywhere)


def _scale(cuts: list[tuple[Slice, ...]], anatomy: Anatomy) -> list[tuple[Slice, ...]]:
    """Mark where columns are scaled: a norm that comes last, else all outputs, which are summed.

    A norm undoes any scale in front of it, so only its own weight and bias scale what leaves it.
    """
    ends_in_norm = len(cuts) > 1 and anatomy.state[cuts[-1][0].tensor].dim() == 1
    first = len(cuts) - 1 if ends_in_norm else 0
    scaled = [tuple(replace(cut, scaled=True) for cut in layer) for layer in cuts[first:]]
    return cuts[:first] + scaled


def _under_all_names(slices: list[Slice], anatomy: Anatomy) -> tuple[Slice, ...] | None:
    """Add every slice under the other names of its tensor, or None if one must not be cut.

    Only the same module under another name and another embedding play the same part. Any other
    tie, above all that of a token embedding to an LM head, would cut something else along with it.
    """
    result: dict[tuple[str, int, int], Slice] = {}
    for cut in slices:
        mine = anatomy.owner(cut.tensor)
        names = anatomy.ties[cut.tensor]
        if isinstance(mine, nn.Embedding):
            names += copies(cut.tensor, anatomy.state)
        for name in dict.fromkeys((cut.tensor, *names)):
            other = anatomy.owner(name)
            embeddings = isinstance(mine, nn.Embedding) and isinstance(other, nn.Embedding)
            if other is not mine and not embeddings:
                return None
            result.setdefault((name, cut.axis, cut.offset), replace(cut, tensor=name))
    return tuple(result.values())


def _size(pattern: Pattern, first: str, anatomy: Anatomy, config: object) -> int:
    if pattern.units is not None:
        return _number(pattern.units, first, config)
    tensor, number = _bare(first)
    if number is not None:
        return unit_width(first, anatomy.state[tensor], number, len(_shares(pattern, config)))
    module = anatomy.modules.get(first)
    weight = anatomy.state.get(f"{first}.weight", anatomy.state.get(first))
    axis = output_axis(module) if module is not None else -1
    if weight is None or axis is None:
        # Not a layer whose layout is known: output_slices says so by name.
        return 1
    return unit_width(first, weight, axis % weight.dim(), len(_shares(pattern, config)))


def _shares(pattern: Pattern, config: object) -> list[int]:
    """The sizes of the parts that the output axis falls into, next to each other."""
    if isinstance(pattern.fused, int):
        return [1] * pattern.fused
    return [_number(one, pattern.outputs[0], config) for one in pattern.fused]


def _number(units: str | int, where: str, config: object) -> int:
    """A number that a pattern gives, or names by what the config calls it."""
    value = getattr(config, units, None) if isinstance(units, str) else units
    if not isinstance(value, int):
        raise ConfigurationError(
            "the number of units is not in the model's config",
            expected=f"an integer {units!r}",
            found=repr(value),
            where=where,
        )
    return value


def _bare(name: str) -> tuple[str, int | None]:
    """A bare parameter and the axis that a rule cuts, of "name@axis"; None for a layer."""
    tensor, _, axis = name.partition("@")
    return tensor, int(axis) if axis else None


def _outputs(name: str, anatomy: Anatomy, size: int, fused: list[int]) -> tuple[Slice, ...]:
    """Slices of a layer, or of a bare parameter along the axis that its name gives."""
    tensor, axis = _bare(name)
    if axis is None:
        return cut_outputs(name, anatomy.modules, anatomy.state, size, fused)
    plain = plain_layer(tensor, anatomy.modules, anatomy.state)
    return bare_slices(plain, axis, anatomy.state, size, fused)


def _inputs(name: str, anatomy: Anatomy, size: int) -> tuple[Slice, ...]:
    """The same of what reads the units."""
    tensor, axis = _bare(name)
    if axis is None:
        return cut_inputs(name, anatomy.modules, anatomy.state, size)
    plain = plain_layer(tensor, anatomy.modules, anatomy.state)
    read = bare_slices(plain, axis, anatomy.state, size)
    return tuple(replace(cut, scaled=True) for cut in read)


def _layers(names: Collection[str], block: str, anatomy: Anatomy) -> list[str]:
    """The layers that a rule names in a block; those of "name?" only where the block has them."""
    wanted = (
        _join(block, name.removesuffix("?"))
        for name in names
        if not name.endswith("?") or anatomy.has(_join(block, name.removesuffix("?")))
    )
    return [_present(name, anatomy) for name in wanted]


def _present(name: str, anatomy: Anatomy) -> str:
    if not anatomy.has(name.partition("@")[0]):
        raise ConfigurationError(
            "a block lacks a layer that its rule names", expected=f"a layer {name!r}", where=name
        )
    return name


def _matches_nothing(pattern: Pattern, rule: Rule) -> ConfigurationError:
    return ConfigurationError(
        f"no block of the model matches a pattern of kind {pattern.kind!r}",
        expected=f"{_join(pattern.block, pattern.outputs[0])!r} under any prefix",
        where=f"the rule for {', '.join(rule.model_types)}",
        fix="Correct the names in the rule, or give the pattern optional=True.",
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
