"""Tensors that a state_dict holds under more than one name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


def tied_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Every name that leads to the same tensor, for every name.

    Two names are tied if their tensors begin at the same address with the same shape and strides.
    Tensors that only overlap (one is a part of the other) are NOT found.

    Returns:
        name -> all names of its tensor in the order of `state`, itself included.
    """
    names: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        names[_address(tensor)].append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def copies(name: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of other tensors with the very same values and shape.

    A tied embedding that was loaded name by name is no longer tied, but whoever reads its copy has
    read it all the same. Nothing is compared on the meta device, which holds no values.
    """
    mine = state[name]
    if mine.is_meta or not mine.numel():
        return ()
    return tuple(
        other
        for other, tensor in state.items()
        if other != name
        and (tensor.shape, tensor.dtype, tensor.device) == (mine.shape, mine.dtype, mine.device)
        and torch.equal(tensor, mine)
    )


def _address(tensor: Tensor) -> Hashable:
    # Meta and empty tensors have no address: there, only one and the same object is tied.
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
