"""Which weights of a model are linear maps, and how each lies in memory as a matrix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.selection import Selection
from fedveil.state import read_state
from fedveil.units.layers import input_axis, output_axis

__all__ = ["LinearLayer", "linear_layers", "reading", "rows_of"]


@dataclass(frozen=True)
class LinearLayer:
    """A weight that multiplies its layer's inputs, seen as a matrix [outputs, inputs].

    Attributes:
        name: The weight's name in the model's state.
        module: The name of its module.
        output_axis: The axis of the weight that holds its outputs.
        kernel: Weights per output and input channel: 1, but for convolutions, whose inputs are
            unfolded: [outputs, channels * kernel].
    """

    name: str
    module: str
    output_axis: int
    kernel: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight, or its released part, as [outputs, inputs]."""
        return weight.flatten(1) if self.output_axis == 0 else weight.t()

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`matrix`, for a weight of this shape."""
        return matrix.reshape(shape) if self.output_axis == 0 else matrix.t()

    def matrix_shape(self, shape: torch.Size) -> tuple[int, int]:
        """The shape of :meth:`matrix`, for a weight of this shape."""
        outputs = shape[self.output_axis]
        return outputs, shape.numel() // outputs if outputs else 0

    def outputs(self, selection: Selection) -> Tensor | None:
        """Released outputs (int64, ascending), or None if this axis is not cut."""
        return selection.positions(self.name).get(self.output_axis)

    def inputs(self, selection: Selection) -> Tensor | None:
        """Released inputs (int64, ascending) of the matrix, or None if this axis is not cut."""
        channels = selection.positions(self.name).get(1 - self.output_axis)
        if channels is None or self.kernel == 1:
            return channels
        return (channels[:, None] * self.kernel + torch.arange(self.kernel)).flatten()


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Every weight that is one linear map of its module's input, by its name in the state.

    Linear, transformers' Conv1D, Conv1d and Conv2d; LoRA's A and B are Linear. Left out: grouped
    convolutions, and weights that two modules share (a head tied to the embedding), since those
    have two inputs.
    """
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    known = read_state(model)
    layers = {}
    for module_name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and _is_linear(module) and shared[id(weight)] == 1:
            name = names[id(weight)]
            axis = output_axis(module)
            assert axis is not None
            if name in known:
                kernel = weight[0, 0].numel() if weight.dim() > 2 else 1
                layers[name] = LinearLayer(name, module_name, axis, kernel)
    return layers


def rows_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear layer multiplies with its matrix, [examples, positions, inputs].

    Args:
        module: A module that :func:`linear_layers` knows.
        inputs: Its input: [examples, ..., inputs], or [examples, channels, ...] of a convolution;
            of one example without that axis, if it has none.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _unfold(module, inputs if inputs.dim() == module.weight.dim() else inputs[None])
    whole = inputs if inputs.dim() > 1 else inputs[None]
    return whole.flatten(1, -2) if whole.dim() > 2 else whole[:, None]


def reading(module: nn.Module) -> object:
    """How a module reads its input: two that read the same tensor alike have the same rows."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        shape = module.kernel_size, module.stride, module.dilation
        return *shape, module.padding, module.padding_mode
    return None


def _is_linear(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    transposed = type(module).__name__ == "Conv1D"
    return input_axis(module) is not None and (
        convolution or transposed or isinstance(module, nn.Linear)
    )


def _unfold(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    one_axis = isinstance(module, nn.Conv1d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, _padding(module), mode)
    flat = padded.unsqueeze(2) if one_axis else padded
    lead = (1,) if one_axis else ()
    columns = F.unfold(
        flat,
        kernel_size=(*lead, *module.kernel_size),
        dilation=(*lead, *module.dilation),
        stride=(*lead, *module.stride),
    )
    return columns.transpose(1, 2)


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Padding as `F.pad` wants it: last axis first, before and after."""
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            total = total if module.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [int(module.padding[axis])] * 2
    return pads
