"""Slices and the check of groups against the tensors they cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedveil.errors import ConfigurationError
from fedveil.units import Slice, UnitGroup, validate

numbers = st.integers(0, 6)


@given(width=st.integers(1, 5), offset=numbers, units=st.lists(st.integers(0, 20), max_size=8))
def test_indices_follow_the_units_in_the_order_given(
    width: int, offset: int, units: list[int]
) -> None:
    cut = Slice("w", 0, width, offset)
    found = cut.indices(torch.tensor(units, dtype=torch.int64))
    assert found.dtype == torch.int64
    assert found.tolist() == [offset + u * width + i for u in units for i in range(width)]


@given(size=st.integers(1, 8), width=st.integers(1, 4), parts=st.integers(1, 3), data=st.data())
def test_hidden_and_released_units_divide_the_axis(
    size: int, width: int, parts: int, data: st.DataObject
) -> None:
    hidden = data.draw(st.sets(st.integers(0, size - 1)))
    slices = [Slice("w", 0, width, part * size * width) for part in range(parts)]
    positions = [
        position
        for units in (hidden, set(range(size)) - hidden)
        for cut in slices
        for position in cut.indices(torch.tensor(sorted(units), dtype=torch.int64)).tolist()
    ]
    assert sorted(positions) == list(range(size * width * parts))
    validate([UnitGroup("g", "heads", size, tuple(slices))], {"w": torch.zeros(len(positions))})


@pytest.mark.parametrize(
    "units", [torch.tensor([True, False]), torch.tensor([0.0]), torch.tensor([[0]])]
)
def test_indices_want_numbers(units: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"list of integers \(in w\)"):
        Slice("w", 0).indices(units)


@pytest.mark.parametrize("change", [{"axis": -1}, {"width": 0}, {"offset": -2}])
def test_impossible_slices_are_refused(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"tensor": "w", "axis": 0, **change}
    with pytest.raises(ConfigurationError, match="w"):
        Slice(**settings)


def group(*slices: Slice, name: str = "g", size: int = 4) -> UnitGroup:
    return UnitGroup(name, "neurons", size, slices)


STATE = {"up": torch.zeros(4, 3), "bias": torch.zeros(4), "down": torch.zeros(3, 4)}


@pytest.mark.parametrize(
    ("groups", "tensor", "message"),
    [
        ([group(Slice("gone", 0))], "gone", "does not have"),
        ([group(Slice("bias", 1))], "bias", "past the end"),
        ([group(Slice("up", 1))], "up", "past the end"),
        ([group(Slice("bias", 0, width=2))], "bias", "past the end"),
        ([group(Slice("bias", 0, offset=1))], "bias", "past the end"),
        ([group(Slice("bias", 0), size=2)], "bias", "not wholly divided"),
        ([group(Slice("up", 0), Slice("up", 0))], "up", "cut twice"),
        ([group(Slice("up", 0)), group(Slice("up", 0), name="h")], "up", "cut twice"),
        ([group(Slice("up", 0)), group(Slice("bias", 0))], "g", "same name"),
        ([group()], "g", "is not one"),
        ([group(Slice("up", 0), size=0)], "g", "is not one"),
        ([UnitGroup("g", "rows", 4, (Slice("up", 0),))], "g", "is not one"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    groups: list[UnitGroup], tensor: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        validate(groups, STATE)
    assert caught.value.where == tensor


def test_both_axes_of_a_tensor_may_be_cut() -> None:
    validate([group(Slice("up", 0)), group(Slice("up", 1), name="h", size=3)], STATE)


def test_tied_tensors_are_cut_alike_or_not_at_all() -> None:
    tied = {"embed": torch.zeros(3, 4), "other": STATE["up"]}
    tied["head"] = tied["embed"].detach()
    with pytest.raises(ConfigurationError, match="under all its names"):
        validate([group(Slice("embed", 1))], tied)
    with pytest.raises(ConfigurationError, match="under all its names"):
        validate([group(Slice("embed", 1)), group(Slice("head", 1), name="h")], tied)
    validate([group(Slice("embed", 1), Slice("head", 1))], tied)
    validate([group(Slice("other", 0))], tied)
