"""The arithmetic of paired times; no time that a test measures is ever judged."""

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speed import timing
from speed.timing import Pairs, alternate, spread

times = st.floats(1e-6, 1e3)
pairs = st.lists(st.tuples(times, times), min_size=1, max_size=20)


def pairs_of(values):
    operation, floor = zip(*values, strict=True)
    return Pairs(list(operation), list(floor))


@given(pairs)
def test_the_ratio_is_the_median_of_the_ratios_of_pairs(values):
    found, ratios = pairs_of(values), [one / other for one, other in values]
    assert found.ratio == pytest.approx(np.median(ratios))
    assert found.quartiles == pytest.approx(np.percentile(ratios, [25, 75]))
    assert min(ratios) <= found.quartiles[0] <= found.ratio <= found.quartiles[1] <= max(ratios)


@given(pairs, st.data())
def test_a_machine_that_slows_down_between_pairs_changes_nothing(values, data):
    slow = data.draw(st.lists(st.floats(0.1, 100), min_size=len(values), max_size=len(values)))
    slowed = [(one * by, other * by) for (one, other), by in zip(values, slow, strict=True)]
    assert pairs_of(slowed).ratio == pytest.approx(pairs_of(values).ratio)


def test_an_outlier_changes_little():
    calm = Pairs([2.0] * 9, [1.0] * 9)
    disturbed = Pairs([2.0] * 8 + [50.0], [1.0] * 9)
    assert disturbed.ratio == calm.ratio == 2.0


@given(pairs, pairs)
def test_sums_are_of_times_not_of_ratios(one, other):
    size = min(len(one), len(other))
    total = pairs_of(one[:size]) + pairs_of(other[:size])
    for index in range(size):
        expected = (one[index][0] + other[index][0]) / (one[index][1] + other[index][1])
        assert total.ratios[index] == pytest.approx(expected)


def test_sums_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        Pairs([1.0], [1.0]) + Pairs([1.0, 1.0], [1.0, 1.0])


def test_the_spread_of_one_sample_is_that_sample():
    assert spread([3.0]) == (3.0, 3.0)


class Clock:
    """A clock that runs only while work is done, and what was done."""

    def __init__(self, monkeypatch):
        self.now, self.done = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)  # type: ignore[attr-defined]

    def work(self, name, *seconds):
        left = list(seconds)

        def call():
            self.done.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_both_are_timed_in_turn_and_the_first_calls_do_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    found = alternate(clock.work("op", 100.0, 3.0), clock.work("floor", 50.0, 2.0), 3)
    assert found == Pairs([3.0] * 3, [2.0] * 3)
    assert clock.done == ["op", "floor", *["op", "floor"], *["floor", "op"], *["op", "floor"]]


def test_cold_calls_count_if_that_is_wanted(monkeypatch):
    clock = Clock(monkeypatch)
    found = alternate(clock.work("op", 5.0, 3.0), clock.work("floor", 1.0), 2, warm=False)
    assert found == Pairs([5.0, 3.0], [1.0, 1.0])


def test_the_collector_rests_meanwhile_and_works_again_after_a_failure():
    seen = []

    def look():
        seen.append(gc.isenabled())

    def fail():
        raise RuntimeError

    assert gc.isenabled()
    alternate(look, look, 2, warm=False)
    assert seen == [False] * 4
    with pytest.raises(RuntimeError):
        alternate(fail, look, 2, warm=False)
    assert gc.isenabled()
