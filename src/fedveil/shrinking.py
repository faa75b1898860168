"""A model that is physically without its withheld units, for as long as it is trained.

Where a withheld unit is a zero in every tensor that it belongs to, a network whose layers are that
much smaller computes the same and learns the same, at less time and memory. Only layers are made
smaller whose surroundings are known to work at any width: the blocks of a table, and chains of
layers in plain nets. Whatever is not known stays as it is, with zeros in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fedveil.masking import Release
from fedveil.selection import Selection
from fedveil.state import read_state
from fedveil.units import Slice, UnitGroup
from fedveil.units.layers import CONVOLUTIONS, input_axis, tensors_of
from fedveil.units.match import Anatomy
from fedveil.units.steps import Layout, reads_shape_only, step

__all__ = ["shrinkable", "shrunk"]

_SIZES: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Conv3d: ("out_channels", "in_channels"),
    nn.BatchNorm1d: ("num_features", ""),
    nn.BatchNorm2d: ("num_features", ""),
    nn.BatchNorm3d: ("num_features", ""),
    nn.PReLU: ("num_parameters", ""),
}
"""Where a layer keeps the number of its outputs and inputs. No layer norm is among them: it would
take mean and variance over fewer values."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_BLOCKS: Mapping[str, tuple[str, ...]] = {
    **{f"{name}SelfAttention": ("query", "key", "value")
       for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")},
    **{f"{name}{block}": ("dense",)
       for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
       for block in ("SelfOutput", "Intermediate", "Output")},
    "DistilBertSelfAttention": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "FFN": ("lin1", "lin2"),
    "GPT2Attention": ("c_attn", "c_proj"),
    "GPT2MLP": ("c_fc", "c_proj"),
    **{f"{name}Attention": _ATTENTION
       for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "ViT")},
    **{f"{name}MLP": _GATED for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")},
    "T5DenseActDense": ("wi", "wo"),
    "T5DenseGatedActDense": ("wi_0", "wi_1", "wo"),
    "ViTMLP": ("fc1", "fc2"),
}  # fmt: skip
"""Blocks of transformers 5 whose forward takes widths from the tensors that it is handed, with all
of their layers that one unit group cuts. T5Attention is not among them: its position bias, of one
number per head, is handed from layer to layer."""

_COUNTS = {"GPT2Attention": "split_size"}
"""Blocks that keep a number of positions, in proportion to their heads."""


@contextmanager
def shrunk(
    model: nn.Module, groups: Sequence[UnitGroup], released: Mapping[str, Release]
) -> Iterator[Selection]:
    """Make ``model`` smaller by its withheld units inside, and restore its shapes after.

    Inside, cut parameters are other objects, at their released shapes and under their own names;
    their gradients are gone. After, also after an error, parameters are the former objects, what
    was trained is in its place, and withheld elements are zero, whatever they were before. Memory
    of the full size is given back in between, so that whoever else looked at a cut tensor's
    storage no longer shares it.

    Dropout on activations that became smaller draws other numbers than it would at full size.

    Args:
        model: On the CPU; its withheld elements are taken for zeros.
        groups: Its unit groups.
        released: Per group name, the released units.

    Yields:
        What is still cut in the smaller model: the units of groups that are not `shrinkable`.
    """
    smaller = shrinkable(model, groups, released)
    gone = {group.name for group in smaller}
    still = [g for g in groups if g.name not in gone and _withholds(g, released)]
    shapes = {name: tensor.shape for name, tensor in read_state(model).items()}
    cut = Selection(smaller, released, shapes)
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for name in shapes:
            if cut.positions(name):
                path, _, leaf = name.rpartition(".")
                stack.enter_context(_smaller(modules[path], leaf, name, cut))
        for group in smaller:
            for module, attribute, size in _new_sizes(group, released[group.name], modules):
                stack.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, size)
        yield Selection(
            still, released, {name: tensor.shape for name, tensor in read_state(model).items()}
        )


def shrinkable(
    model: nn.Module, groups: Sequence[UnitGroup], released: Mapping[str, Release]
) -> tuple[UnitGroup, ...]:
    """The groups by whose withheld units `shrunk` makes a model smaller.

    Left out are groups that withhold nothing or everything, "columns" (the residual stream adds
    up whole), layers of an unknown type or tied to another, and everything whose surroundings are
    not known to work at any width.
    """
    fitting = _of_any_width(model, tuple(groups))
    return tuple(
        group
        for group in groups
        if group in fitting and _withholds(group, released) and len(released[group.name].units)
    )


_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, frozenset[UnitGroup]]]
_KNOWN = WeakKeyDictionary()
"""What was found out about a model: a client is sent many proxies of one architecture."""


def _of_any_width(model: nn.Module, groups: tuple[UnitGroup, ...]) -> frozenset[UnitGroup]:
    """The groups whose layers, and what is around them, are known to work at any width."""
    tensors = [(name, tensor.shape) for name, tensor in read_state(model).items()]
    looks = groups, tensors, [type(module) for module in model.modules()]
    known = _KNOWN.get(model)
    if known is None or known[0] != looks:
        known = _KNOWN[model] = looks, frozenset(_find_of_any_width(model, groups))
    return known[1]


def _find_of_any_width(model: nn.Module, groups: Sequence[UnitGroup]) -> Iterator[UnitGroup]:
    anatomy = Anatomy.of(model)
    users = Counter(axis for g in groups for axis in {(c.tensor, c.axis) for c in g.slices})
    candidates = [
        group
        for group in groups
        if group.kind != "columns"
        and all(users[c.tensor, c.axis] == 1 and _is_plain(c, anatomy) for c in group.slices)
        and _cuts_whole_layers(group, anatomy)
    ]
    graph: fx.Graph | None = None
    for group in candidates:
        if _is_foreign(group, anatomy):
            fits = _fills_known_blocks(group, anatomy)
        else:
            graph = graph or _trace(model)
            fits = _is_chain_of_any_width(group, graph, anatomy)
        if fits:
            yield group


def _withholds(group: UnitGroup, released: Mapping[str, Release]) -> bool:
    return len(released[group.name].units) < group.size


# One tensor -------------------------------------------------------------------------------------


@contextmanager
def _smaller(module: nn.Module, leaf: str, name: str, cut: Selection) -> Iterator[None]:
    """A parameter or buffer at its released shape inside, scattered into zeros after."""
    full = getattr(module, leaf)
    layout = torch.empty_like(full, device="meta")
    device, part = full.device, _laid_out_like(full, cut.gather(name, full.detach()))
    is_parameter = isinstance(full, nn.Parameter)
    # A parameter of its own: what autograd remembers of the full one has another shape.
    setattr(module, leaf, nn.Parameter(part, full.requires_grad) if is_parameter else part)
    full.grad = None
    full.data = part.new_empty(0)
    try:
        yield
    finally:
        trained = getattr(module, leaf).detach()
        full.data = torch.zeros_like(layout, device=device)
        cut.scatter(name, trained, full.detach())
        setattr(module, leaf, full)


def _laid_out_like(full: Tensor, part: Tensor) -> Tensor:
    """A part of a tensor with its axes in the same order in memory: kernels choose by it."""
    if full.is_contiguous():
        return part
    order = sorted(range(full.dim()), key=full.stride, reverse=True)
    return torch.empty_permuted(part.shape, order, dtype=part.dtype, device=part.device).copy_(part)


# One layer --------------------------------------------------------------------------------------


def _is_plain(cut: Slice, anatomy: Anatomy) -> bool:
    """Whether a cut tensor belongs to one layer only, of a type whose sizes are known."""
    module = anatomy.owner(cut.tensor)
    alone = all(anatomy.owner(name) is module for name in anatomy.ties[cut.tensor])
    ordinary = type(anatomy.state[cut.tensor]) in (nn.Parameter, Tensor)
    return module is not None and alone and ordinary and _sizes(module) is not None


def _cuts_whole_layers(group: UnitGroup, anatomy: Anatomy) -> bool:
    """Whether everything that a layer holds per output is cut with its outputs."""
    cut = {c.tensor for c in group.slices}
    names = {
        c.tensor.rpartition(".")[0]
        for c in group.slices
        if not _reads(c, anatomy.modules[c.tensor.rpartition(".")[0]])
    }
    return all(
        f"{name}.{leaf}" in cut or leaf == "num_batches_tracked"
        for name in names
        for leaf in tensors_of(name, anatomy.state)
    )


def _sizes(module: nn.Module) -> tuple[str, str] | None:
    """The names of a layer's numbers of outputs and inputs; None if it cannot be made smaller."""
    if isinstance(module, CONVOLUTIONS) and module.groups > 1 and not _is_depthwise(module):
        return None  # its outputs fall into groups that must stay equal
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers
        return "nf", "nx"
    return _SIZES.get(type(module))


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == module.in_channels
        and module.groups == module.out_channels
    )


def _reads(cut: Slice, module: nn.Module) -> bool:
    """Whether a slice cuts the inputs of its layer, rather than the outputs."""
    return cut.tensor.endswith(".weight") and cut.axis == input_axis(module)


def _new_sizes(
    group: UnitGroup, release: Release, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Module, str, int]]:
    """Which attribute of which module becomes what, once the group's tensors are smaller."""
    for cut in group.slices:
        path, _, leaf = cut.tensor.rpartition(".")
        module = modules[path]
        outputs, inputs = _sizes(module) or ("", "")
        size = getattr(module, leaf).shape[cut.axis]
        yield module, inputs if _reads(cut, module) else outputs, size
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:  # depthwise
            yield module, "in_channels", size
            yield module, "groups", size
    # One block may have several names.
    for block in {modules[_parent(cut.tensor)] for cut in group.slices}:
        attribute = _COUNTS.get(type(block).__name__)
        if attribute is not None:
            yield block, attribute, getattr(block, attribute) // group.size * len(release.units)


# The surroundings of a layer --------------------------------------------------------------------


def _parent(tensor: str) -> str:
    """The name of the block that holds a tensor's layer."""
    return tensor.rpartition(".")[0].rpartition(".")[0]


def _is_foreign(group: UnitGroup, anatomy: Anatomy) -> bool:
    """Whether one of the group's layers sits in a block of transformers."""
    blocks = (anatomy.modules[_parent(cut.tensor)] for cut in group.slices)
    return any(type(block).__module__.startswith("transformers.") for block in blocks)


def _fills_known_blocks(group: UnitGroup, anatomy: Anatomy) -> bool:
    """Whether every block that the group cuts is in the table, with all layers named there."""
    layers: dict[str, set[str]] = {}
    for cut in group.slices:
        name = cut.tensor.rpartition(".")[0].rpartition(".")[2]
        layers.setdefault(_parent(cut.tensor), set()).add(name)
    return all(
        type(anatomy.modules[block]).__module__.startswith("transformers.models.")
        and names == set(_BLOCKS.get(type(anatomy.modules[block]).__name__, ()))
        for block, names in layers.items()
    )


def _trace(model: nn.Module) -> fx.Graph:
    """The graph of a plain net; an empty one if it cannot be traced."""
    try:
        return fx.Tracer().trace(model)
    except Exception:
        # Tracing runs the model's own forward: it may raise anything.
        return fx.Graph()


def _is_chain_of_any_width(group: UnitGroup, graph: fx.Graph, anatomy: Anatomy) -> bool:
    """Whether the group is a layer, what follows it, and its reader, and no size is written down.

    `find_units` finds such groups in plain nets; those of a rule for one's own net are checked
    here. A size that is read off the value is as bad as a number: it would change with the units.
    """
    owners = {cut.tensor.rpartition(".")[0]: cut for cut in group.slices}
    readers = {name for name, cut in owners.items() if _reads(cut, anatomy.modules[name])}
    calls = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    once = all(sum(_touches(node, name) for node in calls) == 1 for name in owners)
    source = next((node for node in calls if node.target == next(iter(owners))), None)
    if not once or len(readers) != 1 or source is None:
        return False
    node, layout = source, Layout.of(anatomy.modules[str(source.target)])
    met = {str(source.target), *readers}
    while layout is not None:
        onward = [user for user in node.users if not reads_shape_only(user)]
        if len(onward) != 1 or any(_reads_width(user) for user in node.users):
            return False
        node = onward[0]
        if node.op == "call_module" and node.target in readers:
            return met == set(owners)
        if _writes_width(node):
            return False
        called = anatomy.modules[str(node.target)] if node.op == "call_module" else None
        if called is not None and called.state_dict() and not _has_one_slope(called):
            met.add(str(node.target))
        layout = step(node, called, layout)
    return False


def _has_one_slope(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _touches(node: fx.Node, layer: str) -> bool:
    return node.target == layer or str(node.target).startswith(f"{layer}.")


def _reads_width(node: fx.Node) -> bool:
    """Whether a node reads another size than that of the batch."""
    if not reads_shape_only(node) or node.target == "dim":
        return False
    if node.op == "call_method" and node.args[1:]:
        return node.args[1:] != (0,)
    if node.op == "call_function" and node.args[1] != "shape":
        return False
    return any(user.args[1:] != (0,) for user in node.users)


def _writes_width(node: fx.Node) -> bool:
    """Whether a node gives a value a size that is written in the net's code."""
    if getattr(node.target, "__name__", node.target) not in {"view", "reshape"}:
        return False
    shape = node.args[1:]
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return not shape or bool(shape[-1] != -1)
