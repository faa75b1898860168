"""Tensors that a state_dict holds under more than one name, and tensors that share some memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError

__all__ = ["copies", "overlapping", "overlaps", "refuse_overlaps", "tie_key", "tied_names"]


def tied_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Every name that leads to the same tensor, for every name.

    Two names are tied if their tensors begin at the same address with the same shape and strides.
    Tensors that only overlap (one is a part of the other, or turned) are NOT found: see `overlaps`.

    Returns:
        name -> all names of its tensor in the order of `state`, itself included.
    """
    names: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        names[tie_key(tensor)].append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def tie_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that are one: same memory, seen in the same way.

    Meta and empty tensors have no address: there, only one and the same object is tied.
    """
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


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


def overlaps(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share memory without being one and the same.

    One is seen in another shape, order or dtype than the other (a transpose, a slice, a reshape),
    so that whoever writes one tensor after the other undoes half of it. A tensor that shares memory
    with itself (`expand`) is a pair of one name. Tensors side by side in one storage share nothing.

    Args:
        state: tensors by name, on any device; values are not read.

    Yields:
        Each pair once, the earlier in memory first.
    """
    places: dict[Hashable, list[_Place]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.layout == torch.strided and tensor.numel():
            place = _Place.of(name, tensor)
            if _overlaps_itself(place):
                yield name, name
            places[place.space].append(place)
    for neighbours in places.values():
        open_: list[_Place] = []
        for place in sorted(neighbours, key=lambda place: place.begin):
            open_ = [earlier for earlier in open_ if earlier.end > place.begin]
            for earlier in open_:
                if not earlier.is_same(place) and _share(earlier, place):
                    yield earlier.name, place.name
            open_.append(place)


def refuse_overlaps(model: nn.Module) -> None:
    """Refuse a model of which tensors share memory without being one and the same tensor.

    Such a tie lasts in the model itself and in nothing that is made of it: states travel, are
    changed and are loaded tensor by tensor. Buffers that are not saved count where they share
    memory with something that is.

    Raises:
        ConfigurationError: names the two.
    """
    state = model.state_dict(keep_vars=True)
    # A buffer that is not saved may be whatever it likes, but not a view of what is.
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    for one, other in overlaps({**state, **unsaved}):
        if one in state or other in state:
            raise overlapping(one, other)


def overlapping(one: str, other: str) -> ConfigurationError:
    """The error for two tensors that share memory, or one that does with itself."""
    return ConfigurationError(
        "two tensors of the model share memory without being the same tensor"
        if one != other
        else "several elements of a tensor are one and the same number in memory",
        expected="tensors of their own, or one and the same tensor under two names",
        found=f"a view of {one!r}" if one != other else "an expanded tensor",
        where=other,
        fix="Give each memory of its own, nn.Parameter(tensor.clone()), or compute one from the "
        "other in forward, as F.linear(x, self.encoder.weight.t()).",
    )


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes begin ... end - 1 of some memory, and its steps through them."""

    name: str
    space: Hashable
    begin: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    itemsize: int
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Place:
        size = tensor.element_size()
        space: Hashable = tensor.device
        begin = tensor.data_ptr()
        if tensor.is_meta:  # no addresses, yet views know their storage
            space = ("meta", tensor.untyped_storage()._cdata)
            begin = int(tensor.storage_offset()) * size
        steps = tuple(step * size for step in tensor.stride())
        return cls(name, space, begin, tuple(tensor.shape), steps, size, tensor.dtype)

    @property
    def end(self) -> int:
        reach = sum(
            (length - 1) * step for length, step in zip(self.shape, self.steps, strict=True)
        )
        return self.begin + reach + self.itemsize

    def is_same(self, other: _Place) -> bool:
        mine = (self.begin, self.shape, self.steps, self.dtype)
        return mine == (other.begin, other.shape, other.steps, other.dtype)

    def mark(self, memory: Tensor, begin: int, grain: int) -> Tensor:
        """The tensor's elements in a picture of some memory, one entry for each `grain` bytes."""
        return memory.as_strided(
            (*self.shape, self.itemsize // grain),
            (*(step // grain for step in self.steps), 1),
            (self.begin - begin) // grain,
        )


def _share(one: _Place, other: _Place) -> bool:
    """Whether two tensors whose ranges meet have an element in common: columns may interleave."""
    begin, end = min(one.begin, other.begin), max(one.end, other.end)
    grain = math.gcd(one.itemsize, other.itemsize, other.begin - one.begin)
    memory = torch.zeros((end - begin) // grain, dtype=torch.bool)
    one.mark(memory, begin, grain).fill_(True)
    return bool(other.mark(memory, begin, grain).any())


def _overlaps_itself(place: _Place) -> bool:
    reach = place.itemsize
    for step, length in sorted(zip(place.steps, place.shape, strict=True)):
        if length > 1 and step < reach:
            break
        reach += (length - 1) * step
    else:
        return False
    memory = torch.zeros((place.end - place.begin) // place.itemsize, dtype=torch.bool)
    place.mark(memory, place.begin, place.itemsize).fill_(True)
    return int(memory.sum()) < math.prod(place.shape)
