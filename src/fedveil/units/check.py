"""Whether unit groups fit the tensors that they claim to cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.ties import overlapping, overlaps, tied_names
from fedveil.units.group import KINDS, Slice, UnitGroup


def validate(groups: Sequence[UnitGroup], state_dict: Mapping[str, Tensor]) -> None:
    """Check that groups can be hidden and released without two of them meeting.

    Every tensor and axis exists; the units cover a cut axis from end to end, no position twice;
    a tensor with several names is cut the same way under each, and none that is cut shares memory
    with another in any other way.

    What it does NOT check: that the tensors of a group really belong together. Slices of two
    unrelated layers of the same size pass.

    Args:
        groups: all groups of one model.
        state_dict: the model's tensors; only shapes and addresses are read.

    Raises:
        ConfigurationError: names the tensor, or the group, that does not fit.
    """
    names: set[str] = set()
    for group in groups:
        _check_group(group, names)
        names.add(group.name)
        for cut in group.slices:
            _check_slice(cut, group, state_dict)
    _check_cover(groups, state_dict)
    _check_ties(groups, state_dict)


def _check_group(group: UnitGroup, earlier: Iterable[str]) -> None:
    if group.name in earlier:
        raise ConfigurationError("two unit groups have the same name", where=group.name)
    if group.kind not in KINDS or group.size < 1 or not group.slices:
        raise ConfigurationError(
            "a unit group is not one",
            expected=f"a kind of {', '.join(KINDS)}, a size of at least 1, and slices",
            found=f"kind {group.kind!r}, size {group.size}, {len(group.slices)} slices",
            where=group.name,
        )


def _check_slice(cut: Slice, group: UnitGroup, state_dict: Mapping[str, Tensor]) -> None:
    if cut.tensor not in state_dict:
        raise ConfigurationError(
            f"unit group {group.name!r} cuts a tensor that the model does not have",
            where=cut.tensor,
        )
    shape = list(state_dict[cut.tensor].shape)
    if cut.axis >= len(shape) or cut.end(group.size) > shape[cut.axis]:
        raise ConfigurationError(
            f"unit group {group.name!r} reaches past the end of a tensor",
            expected=f"at least {cut.end(group.size)} positions on axis {cut.axis}",
            found=f"shape {shape}",
            where=cut.tensor,
        )


def _check_cover(groups: Sequence[UnitGroup], state_dict: Mapping[str, Tensor]) -> None:
    runs: dict[tuple[str, int], list[tuple[int, int, str]]] = defaultdict(list)
    for group in groups:
        for cut in group.slices:
            runs[cut.tensor, cut.axis].append((cut.offset, cut.end(group.size), group.name))
    for (tensor, axis), cuts in runs.items():
        reached = 0
        for begin, end, name in [*sorted(cuts), (state_dict[tensor].shape[axis],) * 2 + ("",)]:
            if begin != reached:
                raise ConfigurationError(
                    f"axis {axis} of a tensor is "
                    + ("cut twice" if begin < reached else "not wholly divided into units"),
                    expected=f"the next unit at position {reached}",
                    found=f"{begin} ({f'group {name!r}' if name else 'the end of the axis'})",
                    where=tensor,
                )
            reached = end


def _check_ties(groups: Sequence[UnitGroup], state_dict: Mapping[str, Tensor]) -> None:
    cuts: dict[str, set[tuple[str, int, int, int, bool]]] = defaultdict(set)
    for group in groups:
        for cut in group.slices:
            cuts[cut.tensor].add((group.name, cut.axis, cut.offset, cut.width, cut.scaled))
    for one, other in overlaps(state_dict):
        if one in cuts or other in cuts:
            raise overlapping(one, other)
    ties = tied_names(state_dict)
    for tensor, own in list(cuts.items()):
        for other in ties[tensor]:
            if cuts.get(other) != own:
                raise ConfigurationError(
                    "a tensor is not cut the same way under all its names",
                    expected=f"the same slices for {other!r}, which is tied to it",
                    where=tensor,
                    fix="Untie the two, list both in one group, or leave both uncut.",
                )
