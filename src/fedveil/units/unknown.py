"""What to tell the owner of a model whose units are not known: a rule to start from."""

from __future__ import annotations

import itertools
import re
import textwrap

from torch import Tensor, nn

from fedveil.errors import UnknownArchitectureError
from fedveil.units.layers import input_axis, output_axis
from fedveil.units.registry import nearest_type

_SNIPPET = """\
from fedveil.units import Pattern, Rule, register_rule

rule = Rule(
    model_types=({label!r},),
    patterns=(
        Pattern("neurons", outputs=({first!r},), inputs=({second!r},), block={block!r}),
        Pattern("columns", outputs=({column!r},), block={block!r}),
    ),
)
register_rule(rule)
"""


def unknown_architecture(model: nn.Module, label: str, problem: str) -> UnknownArchitectureError:
    """The error for a model that no rule serves.

    Its `fix` holds a rule that runs as printed. Its layer names are a guess: two layers of the
    model of which the first feeds the second by their shapes alone.

    Args:
        model: whose layers to name.
        label: the model type or class name that the rule would have to serve.
        problem: the first sentence of the message.
    """
    block, first, second = _guess(model)
    # Inside a block the second layer writes into the stream; outside it may be the class head.
    column = second if block else first
    code = _SNIPPET.format(label=label, first=first, second=second, column=column, block=block)
    nearest = nearest_type(label)
    return UnknownArchitectureError(
        problem,
        found=f"{label!r}" + (f"; the nearest known type is {nearest!r}" if nearest else ""),
        where=type(model).__name__,
        fix="Say which units it has, then try again. This rule runs as printed, but its layer "
        "names are guessed from shapes: `outputs` must be the layers whose output rows are the "
        "units, `inputs` all layers that read them, `block` what holds both (* is a layer number). "
        "For this one model alone, pass it as find_units(model, rule=rule) instead."
        f"\n\n{textwrap.indent(code, ' ' * 4)}",
    )


def _guess(model: nn.Module) -> tuple[str, str, str]:
    """Block, outputs and inputs of the likeliest pattern; placeholders if no two layers fit."""
    layers = [
        (*_split(name), module)
        for name, module in model.named_modules()
        if name and input_axis(module) is not None and output_axis(module) is not None
    ]
    # Only layers of one and the same block are compared, so that a rule can name them together.
    pairs = [
        (block, first, second, narrow)
        for (at, block, first, one), (also_at, _, second, two) in itertools.combinations(layers, 2)
        if at == also_at and (narrow := _feeds(one, two)) is not None
    ]
    # Attention layers are square; an MLP's are not. max() keeps the first of equals.
    return max(pairs, key=lambda pair: pair[3], default=("", "fc1", "fc2", False))[:3]


def _split(name: str) -> tuple[str, str, str]:
    """A layer's full block name, the block as a pattern writes it, and the rest of its name."""
    numbered = re.match(r"((?:.*\.)?([A-Za-z_]\w*)\.\d+)\.(.+)", name)
    if numbered is None:
        return "", "", name
    return numbered[1], f"{numbered[2]}.*", numbered[3]


def _feeds(one: nn.Module, two: nn.Module) -> bool | None:
    """Whether the two are not square, if the outputs of one fit the inputs of two; else None."""
    axis = output_axis(one), input_axis(one), input_axis(two)
    assert None not in axis  # _guess keeps no others
    first, second = one.weight, two.weight
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    out, into = first.shape[axis[0] or 0], first.shape[axis[1] or 0]
    reads = second.shape[axis[2] or 0]
    return out != into if out == reads else None
