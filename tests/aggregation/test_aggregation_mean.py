import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.aggregation import AVERAGES, StreamingMean
from fedveil.masking import Release
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup

SHAPES = {"cut twice": torch.Size([4, 3]), "cut once": torch.Size([2, 4]), "whole": torch.Size([5])}
GROUPS = (
    UnitGroup("a", "neurons", 4, (Slice("cut twice", 0), Slice("cut once", 1))),
    UnitGroup("b", "neurons", 3, (Slice("cut twice", 1),)),
)
UNITS = {"a": st.sets(st.integers(0, 3)), "b": st.sets(st.integers(0, 2))}
CLIENTS = st.tuples(
    st.fixed_dictionaries(UNITS), st.integers(1, 1000), st.sets(st.sampled_from(sorted(SHAPES)))
)


def selection(units) -> Selection:
    released = {
        g: Release(torch.tensor(sorted(u), dtype=torch.int64), 1.0) for g, u in units.items()
    }
    return Selection(GROUPS, released, SHAPES)


def holds(units, name, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    for group in GROUPS:
        for cut in (cut for cut in group.slices if cut.tensor == name):
            for unit in set(range(group.size)) - units[group.name]:
                mask.select(cut.axis, unit).fill_(False)
    return mask


def update(index, name):
    generator = torch.Generator().manual_seed(index * 7 + len(name))
    return torch.randn(SHAPES[name], generator=generator)


def mean_of(clients, average):
    """Streamed, as a server would."""
    mean = StreamingMean(SHAPES, average)
    for index, (units, weight, missing) in enumerate(clients):
        mine = selection(units)
        sent = {n: mine.gather(n, update(index, n)) for n in SHAPES if n not in missing}
        mean.add(sent, mine, float(weight))
    return mean


@given(st.lists(CLIENTS, min_size=1, max_size=5), st.sampled_from(AVERAGES))
def test_it_is_the_mean_that_a_dense_computation_gives(clients, average):
    mean = mean_of(clients, average)
    for name, shape in SHAPES.items():
        total, weights = torch.zeros(shape).double(), torch.zeros(shape).double()
        for index, (units, weight, missing) in enumerate(clients):
            held = holds(units, name, shape)
            weights += weight * (held if average == "holders" else torch.ones(shape))
            if name not in missing:
                total += weight * update(index, name) * held
        expected = torch.where(weights > 0, total / weights, 0.0)
        found = mean.mean(name)
        found = torch.zeros(shape) if found is None else found
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@given(st.lists(CLIENTS, min_size=1, max_size=4), st.sampled_from(AVERAGES))
def test_an_element_that_nobody_held_has_mean_exactly_zero(clients, average):
    mean = mean_of(clients, average)
    for name, shape in SHAPES.items():
        held = torch.stack([holds(units, name, shape) for units, *_ in clients]).any(0)
        found = mean.mean(name)
        assert found is None or not bool(found[~held].any())


def test_a_tensor_that_nobody_changed_has_no_mean():
    mean = mean_of([({"a": {0}, "b": {0}}, 3, {"whole"})], "holders")
    assert mean.mean("whole") is None
    assert mean.mean("cut once") is not None


def test_an_update_that_is_missing_counts_as_zero():
    everything = Selection((), {}, {})
    mean = StreamingMean({"w": torch.Size([2])})
    mean.add({}, everything, 3.0)
    mean.add({"w": torch.ones(2)}, everything, 1.0)
    assert mean.mean("w").tolist() == [0.25, 0.25]
    assert (mean.clients, mean.total_weight) == (2, 4.0)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_order_of_clients_changes_rounding_only(average):
    clients = [({"a": {0, 2}, "b": {1}}, 5, set()), ({"a": {2, 3}, "b": {0, 1}}, 9, {"whole"})]
    one = StreamingMean(SHAPES, average)
    other = StreamingMean(SHAPES, average)
    updates = [
        {n: selection(u).gather(n, update(i, n)) for n in SHAPES if n not in gone}
        for i, (u, _, gone) in enumerate(clients)
    ]
    for mean, order in ((one, (0, 1)), (other, (1, 0))):
        for i in order:
            mean.add(updates[i], selection(clients[i][0]), float(clients[i][1]))
    for name in SHAPES:
        torch.testing.assert_close(one.mean(name), other.mean(name))


def test_what_is_added_is_not_changed():
    update_ = {"w": torch.ones(2)}
    mean = StreamingMean({"w": torch.Size([2])})
    mean.add(update_, Selection((), {}, {}), 3.0)
    mean.add(update_, Selection((), {}, {}), 4.0)
    assert update_["w"].tolist() == [1, 1]


def test_doubles_are_summed_as_doubles():
    mean = StreamingMean({"w": torch.Size([1])})
    mean.add({"w": torch.tensor([1.0 + 1e-12], dtype=torch.float64)}, Selection((), {}, {}), 3.0)
    found = mean.mean("w")
    assert found is not None
    assert float(found) == pytest.approx(1.0 + 1e-12, abs=1e-15)
