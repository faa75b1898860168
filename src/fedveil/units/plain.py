"""Units of plain PyTorch nets: from one weight layer along the traced graph to the next.

A layer is cut only if all that it computes runs through a chain of steps that keep units apart
(activations, dropout, pooling, batch norm, flattening) into exactly one further Linear or Conv.
Whatever else happens to its output, such as a residual sum, a concatenation, a second reader, an
attention or a softmax, leaves it uncut: better released whole than cut wrongly. The net's last
layer has no next layer, so class logits are never cut.

Why f(0) does not matter: a hidden neuron's input is zero, so an activation such as the sigmoid
still puts out f(0) != 0, but the next layer's column that would multiply it is hidden with it. The
contribution is zero for every f that is finite at zero. For "columns" the next layer is not cut:
there, a hidden column is a pre-activation of zero, and f(0) is what the next layer reads.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from fedveil.errors import ConfigurationError
from fedveil.units.adapters import is_adapted
from fedveil.units.group import Slice, UnitGroup
from fedveil.units.layers import CONVOLUTIONS, input_slice, output_slices
from fedveil.units.match import Anatomy
from fedveil.units.steps import Layout, reads_shape_only, step


def plain_groups(model: nn.Module, anatomy: Anatomy, *, columns: bool) -> list[UnitGroup]:
    """The groups of all layers that can be cut, in the order in which the net runs them.

    Args:
        model: a net that torch.fx can trace; its forward is run on symbols.
        anatomy: the same model.
        columns: output columns without the next layer's inputs, instead of neurons and channels.

    Raises:
        Exception: whatever tracing raises for a net with data-dependent control flow.
    """
    graph = fx.Tracer().trace(model)
    reached = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    chains = (_Chain.follow(node, anatomy) for node in graph.nodes if node.op == "call_module")
    found = (chain.group(anatomy, columns) for chain in chains if chain and chain.is_alone(reached))
    return [group for group in found if group is not None]


class _Chain:
    """A weight layer, what holds tensors per unit behind it, and the layer that reads it."""

    def __init__(self, source: str, between: list[str], target: str) -> None:
        self.source, self.between, self.target = source, between, target

    @classmethod
    def follow(cls, source: fx.Node, anatomy: Anatomy) -> _Chain | None:
        """Walk from a layer to the next; None if another path or an unknown step comes first."""
        module = anatomy.modules[str(source.target)]
        layout = Layout.of(module)
        node, between = source, list[str]()
        while layout is not None:
            users = [user for user in node.users if not reads_shape_only(user)]
            # The value must go on as the first argument, and as that alone.
            if len(users) != 1 or users[0].args[:1] != (node,) or _mentions(users[0], node) > 1:
                return None
            node = users[0]
            called = anatomy.modules[str(node.target)] if node.op == "call_module" else None
            if called is not None and layout.feeds(called):
                return cls(str(source.target), between, str(node.target))
            layout = step(node, called, layout)
            if called is not None and called.state_dict() and not _is_one_for_all(called):
                between.append(str(node.target))
        return None

    def is_alone(self, reached: list[str]) -> bool:
        """Whether the graph uses each of the chain's layers once, and their tensors nowhere."""
        layers = [self.source, *self.between, self.target]
        return all(
            sum(name == layer or name.startswith(f"{layer}.") for name in reached) == 1
            for layer in layers
        )

    def group(self, anatomy: Anatomy, columns: bool) -> UnitGroup | None:
        """The chain's group, or None if one of its tensors is tied or of an unknown layout."""
        module, state = anatomy.modules[self.source], anatomy.state
        names = [self.source, *self.between, self.target]
        if any(is_adapted(name, anatomy.modules) for name in names):
            return None  # merged or switched off, or the graph would show it; and sent all the same
        size = module.out_channels if isinstance(module, CONVOLUTIONS) else module.out_features
        assert isinstance(size, int)  # Layout.of saw a Linear or a Conv
        try:
            layers = [
                list(output_slices(name, anatomy.modules[name], state, size))
                for name in (self.source, *self.between)
            ]
            reader = input_slice(self.target, anatomy.modules[self.target], state, size)
        except ConfigurationError:
            return None
        if columns:
            layers = self._scale_last(layers, anatomy)
        slices = [cut for layer in layers for cut in layer] + ([] if columns else [reader])
        if any(len(anatomy.ties[cut.tensor]) > 1 for cut in slices):
            return None
        neurons = "neurons" if isinstance(module, nn.Linear) else "channels"
        return UnitGroup(self.source, "columns" if columns else neurons, size, tuple(slices))

    def _scale_last(self, layers: list[list[Slice]], anatomy: Anatomy) -> list[list[Slice]]:
        """Mark weight and bias of the last layer that multiplies; a PReLU only bends.

        A batch norm in front of it would undo the factor. One without weights cannot be scaled.
        """
        names = [self.source, *self.between]
        last = max(i for i, n in enumerate(names) if not isinstance(anatomy.modules[n], nn.PReLU))
        layers[last] = [
            replace(cut, scaled=cut.tensor.endswith((".weight", ".bias"))) for cut in layers[last]
        ]
        return layers


def _is_one_for_all(module: nn.Module) -> bool:
    """Whether a layer's tensors belong to no unit: a PReLU with one slope for all of them."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _mentions(user: fx.Node, node: fx.Node) -> int:
    """How often a node takes another one as an input."""
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((user.args, user.kwargs), look)
    return count
