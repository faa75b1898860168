"""Which operations of a traced net keep units apart, and where the units lie behind them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedveil.units.layers import CONVOLUTIONS

# Elementwise: no value looks at another one. Softmax and the like do.
_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink,
    nn.LogSigmoid, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout,
)  # fmt: skip
_ELEMENTWISE_NAMES = (
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu",
    "silu", "mish", "tanh", "sigmoid", "softplus", "softsign", "hardtanh", "hardswish",
    "hardsigmoid", "logsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "contiguous",
)  # fmt: skip
# What works within one channel if it has the dimension of the convolution before it. A pool of
# another takes the batch for channels and the channels for one more axis of the image: it mixes
# them (a MaxPool3d behind a Conv2d is maxout), and so would a batch norm or a convolution.
_POOL_MODULES: Mapping[int, tuple[type[nn.Module], ...]] = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
_POOL_NAMES: Mapping[int, tuple[str, ...]] = {
    n: (f"max_pool{n}d", f"avg_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d")
    for n in (1, 2, 3)
}
_BATCH_NORMS: Mapping[int, type[nn.Module]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the units of a layer lie in a value that was computed from its output.

    Attributes:
        size: the number of units.
        spatial: axes behind the channel axis of a convolution; 0 if units are on the last axis.
        flat: True once a channel's positions lie side by side in [batch, size * positions].
    """

    size: int
    spatial: int
    flat: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Layout | None:
        """The layout of a layer's own output; None if its outputs are no units."""
        if isinstance(module, CONVOLUTIONS):
            # A depthwise convolution has no neurons of its own: it carries those of another layer.
            return (
                None if _is_depthwise(module) else cls(module.out_channels, len(module.kernel_size))
            )
        return cls(module.out_features, 0) if isinstance(module, nn.Linear) else None

    def feeds(self, module: nn.Module) -> bool:
        """Whether a layer reads the units as its input positions."""
        if isinstance(module, nn.Linear):
            whole = module.in_features % self.size == 0
            return whole if self.flat else not self.spatial and module.in_features == self.size
        return isinstance(module, CONVOLUTIONS) and module.groups == 1 and self.is_channels(module)

    def is_channels(self, module: nn.Module) -> bool:
        """Whether the units are what a convolution takes for its input channels."""
        assert isinstance(module, CONVOLUTIONS)
        same = module.in_channels == self.size and len(module.kernel_size) == self.spatial
        return self.is_image() and same

    def is_image(self) -> bool:
        """Whether channels lie on axis 1 with their positions behind them."""
        return bool(self.spatial) and not self.flat


def step(node: fx.Node, module: nn.Module | None, layout: Layout) -> Layout | None:
    """Where the units lie behind one operation.

    Args:
        node: the operation; its first argument is the value.
        module: the module that it calls, if it calls one.
        layout: where the units lie in its input.

    Returns:
        The new layout, or None if the operation may mix units or is not known.
    """
    if module is not None:
        keeps = isinstance(module, _ELEMENTWISE_MODULES) or _carries_units(module, layout)
        pools = isinstance(module, _POOL_MODULES.get(layout.spatial, ()))
        flattens = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    else:
        keeps = _calls(node, _ELEMENTWISE_NAMES)
        pools = _calls(node, _POOL_NAMES.get(layout.spatial, ()))
        flattens = _flattens(node)
        if _calls(node, {"mean"}) and layout.is_image():
            return _mean(node, layout)
    if keeps or (pools and layout.is_image()):
        return layout
    return replace(layout, flat=layout.spatial > 0) if flattens else None


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node looks at the shape of a value and at none of its numbers."""
    if node.op == "call_method":
        return bool(node.target in ("size", "dim"))
    return node.target is getattr and node.args[1] in {"shape", "ndim", "device", "dtype"}


def _carries_units(module: nn.Module, layout: Layout) -> bool:
    """Whether a layer with tensors of its own treats every unit by itself."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        # Behind a Linear, units are on axis 1 if a sample is one row: see `fedveil.units.rows`.
        fits = isinstance(module, _BATCH_NORMS[layout.spatial if layout.is_image() else 1])
        count = int(module.num_features)
        return fits and (count % layout.size == 0 if layout.flat else count == layout.size)
    if isinstance(module, nn.PReLU):
        per_unit = module.num_parameters == layout.size and not layout.flat
        return module.num_parameters == 1 or per_unit
    if isinstance(module, CONVOLUTIONS):
        return _is_depthwise(module) and layout.is_channels(module)
    return False


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def _calls(node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node calls a tensor method or a function of torch with one of some names."""
    if node.op == "call_method":
        return node.target in names
    return node.op == "call_function" and any(
        node.target is getattr(space, name, None) for space in (F, torch) for name in names
    )


def _flattens(node: fx.Node) -> bool:
    """Whether a node turns [batch, ...] into [batch, everything else].

    `view(-1, K)` is taken for that: K is then the size of one sample, as it nearly always is, and
    the next layer's input size has to be a multiple of the number of units.
    """
    if _calls(node, {"flatten"}):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        return bool(start == 1 and end == -1)
    if not _calls(node, {"view", "reshape"}):
        return False
    shape = node.args[1:]
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    return len(shape) == 2 and bool(shape[0] == -1 or _is_batch_size(shape[0]))


def _is_batch_size(value: object) -> bool:
    """Whether a value is x.size(0), x.size()[0] or x.shape[0] of some x."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return bool(value.target == "size" and value.args[1:] == (0,))
    whole = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else None
    return isinstance(whole, fx.Node) and reads_shape_only(whole)


def _mean(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout behind a mean over all positions of each channel; None for any other mean."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    axes = layout.spatial + 2
    taken = {dim % axes for dim in dims if isinstance(dim, int)}
    if len(node.args) > 2 or taken != set(range(2, axes)) or len(taken) != len(dims):
        return None
    return replace(layout, flat=not node.kwargs.get("keepdim", False))
