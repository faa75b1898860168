"""What to tell the owner of a model whose units are not known, with a rule to start from."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedveil.errors import FedveilError, UnknownArchitectureError
from fedveil.units.layers import input_axis, output_axis
from fedveil.units.match import Anatomy, apply_rule
from fedveil.units.registry import nearest_type
from fedveil.units.rule import Pattern, Rule
from fedveil.units.trial import NO_RULE_NEEDED, try_units

_SNIPPET = """\
from fedveil.units import Pattern, Rule, register_rule

rule = Rule(
    model_types=({label!r},),
    patterns=(
{patterns}
    ),
)
register_rule(rule)
"""

_TRIED = (
    "This rule was tried on your model and holds, for what it names; look at `fedveil units` for "
    "what it leaves uncut."
)
_TEMPLATE = (
    "This is a template to fill in, whose names are guessed from shapes: `outputs` are all layers "
    "that compute a unit, gates and norms too, `inputs` all that read it, `block` what holds both "
    "(* is a layer number). A rule that is wrong is refused."
)
_HOW = (
    'In a file, `rule = "module:rule"` in [model] names it; find_units(model, rule=rule) takes it '
    "for one model alone."
)

_MOST = 300_000_000
"""Parameters of a model on which guesses are tried before they are printed."""

_HEADS = ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")


def unknown_architecture(
    model: nn.Module, label: str, problem: str, choice: str = "neurons"
) -> UnknownArchitectureError:
    """The error for a model that no rule serves.

    Its `fix` says what needs no rule, and holds a rule: one that was tried on the model, if a guess
    can be, else a template that says so.

    Args:
        model: whose layers to name.
        label: the model type or class name that the rule would have to serve.
        problem: the first sentence of the message.
        choice: "columns", or any of the others: which kinds of patterns are wanted.
    """
    blocks = list(_blocks(model))
    guesses = [guess for block in blocks for guess in block.guesses(getattr(model, "config", None))]
    columns = [column for block in blocks for column in block.columns()]
    good = _holding(model, label, guesses)
    patterns = [*good, *(c for c in columns if not good or _stands_by(c, good))]
    if not good:
        patterns = [*guesses[:1], *columns[:1]] or [
            Pattern("neurons", ("fc1",), ("fc2",)),
            Pattern("columns", ("fc1",)),
        ]
    lines = textwrap.indent("\n".join(map(_written, patterns)), " " * 8)
    code = _SNIPPET.format(label=label, patterns=lines)
    nearest = nearest_type(label)
    return UnknownArchitectureError(
        problem,
        found=f"{label!r}" + (f"; the nearest known type is {nearest!r}" if nearest else ""),
        where=type(model).__name__,
        fix=f"{NO_RULE_NEEDED} To withhold units, say which there are. "
        f"{_TRIED if good else _TEMPLATE} {_HOW}\n\n{textwrap.indent(code, ' ' * 4)}",
    )


def _holding(model: nn.Module, label: str, guesses: list[Pattern]) -> list[Pattern]:
    """The guesses that hold when the model is run, of each block and kind the first."""
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters) or sum(p.numel() for p in parameters) > _MOST:
        return []
    good: dict[tuple[str, str], Pattern] = {}
    for guess in guesses:
        if (guess.block, guess.kind) not in good and _holds(model, Rule((label,), (guess,))):
            good[guess.block, guess.kind] = guess
    return list(good.values())


def _holds(model: nn.Module, rule: Rule) -> bool:
    kinds = {pattern.kind for pattern in rule.patterns}
    try:
        groups = apply_rule(rule, Anatomy.of(model), kinds, getattr(model, "config", model))
        try_units(model, groups)
    except FedveilError:
        return False
    return bool(groups)


def _stands_by(column: Pattern, good: list[Pattern]) -> bool:
    """Whether a pattern of columns is of a layer that reads units which hold."""
    return any(column.block == one.block and column.outputs == one.inputs for one in good)


def _written(pattern: Pattern) -> str:
    """A pattern as one would write it."""
    parts = [repr(pattern.kind), f"outputs={pattern.outputs!r}"]
    parts += [f"inputs={pattern.inputs!r}"] if pattern.inputs else []
    parts += [f"block={pattern.block!r}"] if pattern.block else []
    parts += [f"units={pattern.units!r}"] if pattern.units is not None else []
    return f"Pattern({', '.join(parts)}),"


@dataclass(frozen=True)
class _Block:
    """The layers of the first of some blocks that are built alike, with outputs and inputs."""

    name: str
    layers: dict[str, tuple[int, int]]

    def guesses(self, config: Any) -> Iterator[Pattern]:
        """Patterns that its names and shapes allow, likeliest first."""
        # Attention layers are mostly square; an MLP's are not, and are mostly wider inside.
        by_width = sorted(self.layers.items(), key=lambda one: one[1][0] - one[1][1])
        for reader, (narrow, wide) in by_width:
            feeding = [n for n, shape in self.layers.items() if shape == (wide, narrow)]
            if narrow != wide and feeding:
                yield Pattern("neurons", tuple(feeding), (reader,), self.name)
                if len(feeding) > 1:
                    yield from (Pattern("neurons", (n,), (reader,), self.name) for n in feeding)
        triple = [self._named(pattern) for pattern in (r"q(uery)?", r"k(ey)?", r"v(alue)?")]
        output = self._named(r"o(ut)?|dense|output")
        units = next((u for u in _HEADS if isinstance(getattr(config, u, None), int)), None)
        if all(triple) and output and units:
            names = tuple(name for name in triple if name)
            yield Pattern("heads", names, (output,), self.name, units=units)

    def columns(self) -> Iterator[Pattern]:
        """Layers that write what is as wide as what they all read."""
        for name, (outputs, inputs) in self.layers.items():
            # Inside a block the reader writes into the stream; outside it may be the class head.
            writes = outputs < inputs if self.name else outputs > inputs
            if writes and (inputs, outputs) in self.layers.values():
                yield Pattern("columns", (name,), block=self.name)

    def _named(self, pattern: str) -> str | None:
        wanted = re.compile(rf"(.*[._])?({pattern})([._]?(proj|lin|linear|layer|dense))?")
        return next((name for name in self.layers if wanted.fullmatch(name)), None)


def _blocks(model: nn.Module) -> Iterator[_Block]:
    """Blocks with numbers, of each name the first; and what is in none."""
    found: dict[str, dict[str, dict[str, tuple[int, int]]]] = defaultdict(lambda: defaultdict(dict))
    for name, module in model.named_modules():
        shape = _shape(module) if name else None
        if shape is not None:
            at, block, layer = _split(name)
            found[block][at][layer] = shape
    for block in sorted(found, key=lambda name: not name):
        yield _Block(block, next(iter(found[block].values())))


def _split(name: str) -> tuple[str, str, str]:
    """A layer's full block name, the block as a pattern writes it, and the rest of its name."""
    numbered = re.match(r"((?:.*\.)?([A-Za-z_]\w*)\.\d+)\.(.+)", name)
    if numbered is None:
        return "", "", name
    return numbered[1], f"{numbered[2]}.*", numbered[3]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """How many outputs and inputs a layer has; None if it is not known how they lie."""
    axes, weight = (output_axis(module), input_axis(module)), getattr(module, "weight", None)
    if axes[0] is None or axes[1] is None or not isinstance(weight, Tensor):
        return None
    return weight.shape[axes[0]], weight.shape[axes[1]]
