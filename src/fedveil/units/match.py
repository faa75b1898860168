"""From a rule and a model to unit groups."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.units.group import Slice, UnitGroup
from fedveil.units.layers import bare_slices, input_slice, output_axis, output_slices, unit_width
from fedveil.units.rule import Pattern, Rule
from fedveil.units.ties import copies, tied_names


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
        if (
            inside
            and pattern.matches(name)
            and anatomy.has(_join(name, pattern.outputs[0].partition("@")[0]))
        ):
            blocks.setdefault(id(module), name)
    return list(blocks.values())


def _group(pattern: Pattern, block: str, anatomy: Anatomy, config: object) -> UnitGroup | None:
    """One block's group, or None if it cannot be cut without cutting a head tied to it."""
    outputs = _layers(pattern.outputs, "lora_B", block, anatomy)
    inputs = _layers(pattern.inputs, "lora_A", block, anatomy)
    if pattern.inputs and not inputs:
        return None
    size = _size(pattern, outputs[0], anatomy, config)
    modules, state = anatomy.modules, anatomy.state
    fused = _shares(pattern, config)
    cuts = [
        bare_slices(*_bare(name), size=size, fused=fused, state=state)
        if "@" in name
        else output_slices(name, modules.get(name), state, size, fused)
        for name in outputs
    ]
    if pattern.kind == "columns":
        cuts = _scale(cuts, anatomy)
    slices = [cut for layer in cuts for cut in layer]
    for name in inputs:
        if "@" in name:
            read = bare_slices(*_bare(name), size=size, state=state)
            slices += (replace(cut, scaled=True) for cut in read)
        else:
            slices.append(input_slice(name, modules.get(name), state, size))
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
    if "@" in first:
        name, number = _bare(first)
        return unit_width(first, anatomy.state[name], number, len(_shares(pattern, config)))
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


def _bare(name: str) -> tuple[str, int]:
    """A bare parameter and the axis that a rule cuts, of "name@axis"."""
    tensor, _, axis = name.partition("@")
    return tensor, int(axis)


def _layers(names: Collection[str], adapter: str, block: str, anatomy: Anatomy) -> list[str]:
    """The layers that a rule names; where PEFT has adapted one, itself and what stands beside it.

    LoRA adds B A x to what a layer makes of x: a unit that a layer computes is a row of its B, and
    one that it reads is a column of its A.
    """
    layers: list[str] = []
    wanted = (
        _join(block, name.removesuffix("?"))
        for name in names
        if not name.endswith("?") or anatomy.has(_join(block, name.removesuffix("?")))
    )
    for name in (_present(name, anatomy) for name in wanted):
        base, beside = f"{name}.base_layer", anatomy.modules.get(f"{name}.{adapter}")
        layers.append(base if anatomy.has(base) else name)
        if beside is not None:
            layers += [f"{name}.{adapter}.{child}" for child, _ in beside.named_children()]
    return layers


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
