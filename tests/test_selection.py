import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arithmetic import arithmetic
from fedveil.masking import Release
from fedveil.quantization import add_part
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup


@st.composite
def cuts(draw):
    """A tensor of 1 to 3 axes, some of them cut into units of some width, some units scaled."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    groups, released, shape = [], {}, []
    for axis, count in enumerate(counts):
        width = draw(st.integers(1, 3))
        shape.append(count * width)
        if draw(st.booleans()):
            name = f"group-{axis}"
            cut = Slice("w", axis, width, scaled=draw(st.booleans()))
            groups.append(UnitGroup(name, "neurons", count, (cut,)))
            units = sorted(draw(st.sets(st.integers(0, count - 1))))
            scale = draw(st.sampled_from([1.0, 2.0, 1.7]))
            released[name] = Release(torch.tensor(units, dtype=torch.int64), scale)
    return groups, released, torch.Size(shape)


def oracle(groups, released, shape):
    """Mask and factors element by element."""
    mask, factors = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
    for group in groups:
        (cut,), release = group.slices, released[group.name]
        for position in range(shape[cut.axis]):
            index = (slice(None),) * cut.axis + (position,)
            unit = (position - cut.offset) // cut.width
            if unit not in release.units.tolist():
                mask[index] = False
            elif cut.scaled:
                factors[index] *= release.scale
    return mask, factors


def numbers(shape):
    return torch.arange(1.0, 1 + shape.numel()).reshape(shape)


@given(cuts())
def test_gather_takes_what_the_mask_leaves(cut):
    groups, released, shape = cut
    selection, (mask, _) = Selection(groups, released, {"w": shape}), oracle(*cut)
    part = selection.gather("w", numbers(shape))
    assert part.shape == selection.shape("w", shape)
    assert part.flatten().tolist() == numbers(shape)[mask].tolist()


@given(cuts())
def test_scatter_replaces_what_the_mask_leaves_and_nothing_else(cut):
    groups, released, shape = cut
    selection, (mask, _) = Selection(groups, released, {"w": shape}), oracle(*cut)
    out = -torch.ones(shape)
    selection.scatter("w", selection.gather("w", numbers(shape)), out)
    assert torch.equal(out, torch.where(mask, numbers(shape), -1.0))


@pytest.mark.parametrize("way", ["numba", "torch"])
@given(cuts(), st.sampled_from([1.0, 0.3, 1e4]), st.sampled_from([torch.float32, torch.float64]))
def test_adding_changes_what_the_mask_leaves_and_nothing_else(way, cut, weight, dtype):
    groups, released, shape = cut
    selection, (mask, _) = Selection(groups, released, {"w": shape}), oracle(*cut)
    out, part = torch.full(shape, 0.5, dtype=dtype), numbers(shape).to(dtype)
    expected = torch.where(mask, out + part * weight, out)
    ones = torch.where(mask, expected + weight, expected)
    with arithmetic(way):
        positions = selection.positions("w")
        add_part(selection.gather("w", part), positions, out, weight)
        assert torch.equal(out, expected)
        add_part(torch.ones(1, dtype=dtype), positions, out, weight)
    assert torch.equal(out, ones)


@given(cuts())
def test_released_is_the_mask(cut):
    groups, released, shape = cut
    selection, (mask, _) = Selection(groups, released, {"w": shape}), oracle(*cut)
    assert torch.equal(selection.released("w", shape), mask.float())


@given(cuts())
def test_scale_multiplies_by_the_factors_of_scaled_slices_and_unscale_undoes_it(cut):
    groups, released, shape = cut
    selection, (mask, factors) = Selection(groups, released, {"w": shape}), oracle(*cut)
    part = selection.gather("w", numbers(shape))
    scaled = selection.scale("w", part)
    torch.testing.assert_close(scaled.flatten(), (numbers(shape) * factors)[mask])
    torch.testing.assert_close(selection.unscale("w", scaled), part)
    assert torch.equal(part, selection.gather("w", numbers(shape)))


def test_an_unknown_tensor_is_released_whole():
    selection = Selection((), {}, {})
    assert selection.positions("w") == {}
    assert torch.equal(selection.gather("w", torch.ones(2, 3)), torch.ones(2, 3))
    assert selection.shape("w", torch.Size([2, 3])) == (2, 3)


def test_a_tied_name_that_the_state_does_not_list_is_passed_over():
    group = UnitGroup("g", "columns", 2, (Slice("w", 1), Slice("tied", 1)))
    release = Release(torch.tensor([1]), 1.0)
    selection = Selection([group], {"g": release}, {"w": torch.Size([3, 2])})
    assert selection.positions("tied") == {}
    assert selection.shape("w", torch.Size([3, 2])) == (3, 1)


def test_fused_parts_are_cut_at_their_offsets():
    parts = tuple(Slice("qkv", 0, width=2, offset=4 * i) for i in range(3))
    group = UnitGroup("heads", "heads", 2, parts)
    release = Release(torch.tensor([1]), 1.0)
    selection = Selection([group], {"heads": release}, {"qkv": torch.Size([12])})
    assert selection.positions("qkv")[0].tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_scattering_and_adding_work_through_any_strides(shape):
    group = UnitGroup("g", "neurons", shape[0], (Slice("w", 0),))
    selection = Selection(
        [group], {"g": Release(torch.tensor([0, 2]), 1.0)}, {"w": torch.Size(shape)}
    )
    out = torch.zeros(shape[::-1]).t()
    selection.scatter("w", torch.ones(2, shape[1]), out)
    add_part(torch.ones(2, shape[1]), selection.positions("w"), out, 1.0)
    assert out[:, 0].tolist()[:4] == [2, 0, 2, 0]
