"""Which axes of a layer's tensors carry its output and input positions.

The one place that knows memory layouts, so that rules need to name layers only:

    layer                       weight                output axis   input axis
    Linear                      [out, in]             0             1
    Conv1d/2d/3d                [out, in, ...]        0             1 (groups = 1)
    Embedding                   [vocabulary, out]     1             -
    Conv1D of transformers      [in, out]             1             0
    norms, PReLU                [out]                 0             -
    bare parameter              [..., out]            last          -

Biases and running statistics are [out].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.units.group import Slice

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Everything that a layer may hold per output position ...
_PER_UNIT = ("weight", "bias", "running_mean", "running_var")
# ... and what it may hold for all of them together.
_SHARED = ("num_batches_tracked",)


def output_axis(module: nn.Module) -> int | None:
    """The axis of `module.weight` that holds its output positions; None for unknown layouts."""
    if isinstance(module, nn.Embedding) or _is_transposed(module):
        return 1
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return 0
    weight = getattr(module, "weight", None)
    # A batch norm without affine weights still has statistics to cut.
    return 0 if weight is None or (isinstance(weight, Tensor) and weight.dim() == 1) else None


def input_axis(module: nn.Module) -> int | None:
    """The axis of `module.weight` that holds its input positions; None if it has no such axis."""
    if _is_transposed(module):
        return 0
    if isinstance(module, CONVOLUTIONS):
        return 1 if module.groups == 1 else None
    return 1 if isinstance(module, nn.Linear) else None


def tensors_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a module, or the bare parameter itself under ""; empty if neither is."""
    if name in state:
        return {"": state[name]}
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in state.items()
        if key.startswith(f"{name}.")
    }


def is_readable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of a layer is one that this file knows where to cut.

    Weight norms, adapters and the like put further tensors into a layer, and those would carry
    what hiding the known ones is meant to hide.
    """
    return bool(tensors) and set(tensors) <= {"", *_PER_UNIT, *_SHARED}


def output_slices(
    name: str,
    module: nn.Module | None,
    state: Mapping[str, Tensor],
    size: int,
    fused: int | Sequence[int] = 1,
) -> tuple[Slice, ...]:
    """Slices for all that a layer holds per output position.

    Args:
        name: the layer's full name, or that of a bare parameter.
        module: the layer; None for a bare parameter.
        state: the model's state_dict.
        size: the number of units; the output axis holds `fused` runs of them.
        fused: the number of equal parts of the output axis, or their sizes next to each other.

    Raises:
        ConfigurationError: a layout is not known, or the axis does not fall into `size` units.
    """
    tensors = tensors_of(name, state)
    axis = output_axis(module) if module is not None else tensors[""].dim() - 1
    if axis is None or not is_readable(tensors):
        raise _unreadable(name, module, tensors)
    slices: list[Slice] = []
    for leaf, tensor in tensors.items():
        if leaf not in _SHARED:
            key = f"{name}.{leaf}" if leaf else name
            cut = axis if leaf in ("", "weight") else 0
            slices += _parts(key, tensor, cut, size, fused)
    return tuple(slices)


def input_slice(
    name: str, module: nn.Module | None, state: Mapping[str, Tensor], size: int
) -> Slice:
    """The slice of a layer's weight that reads the units, marked as the one to scale.

    Raises:
        ConfigurationError: the layer has no such axis, or it does not fall into `size` units.
    """
    axis = input_axis(module) if module is not None else None
    tensors = tensors_of(name, state)
    if axis is None or "weight" not in tensors or not is_readable(tensors):
        raise _unreadable(name, module, tensors)
    width = unit_width(f"{name}.weight", state[f"{name}.weight"], axis, size)
    return Slice(f"{name}.weight", axis, width, scaled=True)


def bare_slices(
    name: str, axis: int, state: Mapping[str, Tensor], size: int, fused: int | Sequence[int] = 1
) -> tuple[Slice, ...]:
    """Slices of one bare tensor along an axis that a rule names; see :func:`output_slices`."""
    return tuple(_parts(name, state[name], axis, size, fused))


def _parts(
    name: str, tensor: Tensor, axis: int, size: int, fused: int | Sequence[int]
) -> Iterator[Slice]:
    """The slices of the parts that an axis falls into, which follow one another."""
    shares = [1] * fused if isinstance(fused, int) else list(fused)
    least = min(shares)
    if any(share % least for share in shares):
        raise ConfigurationError(
            "the parts of a layer do not fall into the same units",
            expected="sizes that are multiples of the least",
            found=str(shares),
            where=name,
        )
    whole = sum(share // least for share in shares)
    width, offset = unit_width(name, tensor, axis, size * whole), 0
    for share in shares:
        yield Slice(name, axis, width * (share // least), offset)
        offset += size * width * (share // least)


def unit_width(name: str, tensor: Tensor, axis: int, count: int) -> int:
    """How many positions each of `count` units has on an axis.

    Raises:
        ConfigurationError: the axis is not there or does not divide evenly.
    """
    length = tensor.shape[axis] if axis < tensor.dim() else 0
    if count < 1 or not length or length % count:
        raise ConfigurationError(
            "an axis does not fall into equal units",
            expected=f"a multiple of {count} on axis {axis}",
            found=f"shape {list(tensor.shape)}",
            where=name,
        )
    return length // count


def _is_transposed(module: nn.Module) -> bool:
    # By name, since the core does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _unreadable(
    name: str, module: nn.Module | None, tensors: Mapping[str, Tensor]
) -> ConfigurationError:
    return ConfigurationError(
        "it is not known how this layer lays out its units",
        expected="a Linear, Conv, Conv1D, Embedding or norm layer without adapters or weight norms",
        found=f"{type(module).__name__ if module else 'no module'} with {sorted(tensors)}",
        where=name,
        fix="Merge adapters first, or write the UnitGroup by hand.",
    )
