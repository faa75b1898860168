import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import ConfigurationError, Secret
from fedveil.masking import DRAWS, POLICIES, Masking, Masks
from fedveil.units import Slice, UnitGroup
from toys import SECRET

RATES = st.floats(0, 0.99)


def group(size: int, name: str = "mlp") -> UnitGroup:
    return UnitGroup(name, "neurons", size, (Slice("w", 0),))


def released(masks: Masks, client: str = "a", number: int = 1, name: str = "mlp") -> list[int]:
    return masks.release(client, number)[name].units.tolist()


def make(size: int = 200, secret: Secret = SECRET, **settings) -> Masks:
    return Masks([group(size), group(size, "other")], Masking(**settings), secret)


@given(st.integers(1, 300), RATES, RATES)
def test_exact_draws_withhold_exact_counts(size, p1, p2):
    masks = make(size, server=p1, client=p2, draw="exact")
    kept = max(size - round(p1 * size), 1)
    assert len(masks.server()["mlp"]) == kept
    assert len(released(masks)) == max(kept - round(p2 * kept), 1)


@given(st.integers(1, 4), st.floats(0.9, 0.999))
def test_exact_draws_leave_at_least_one_unit(size, rate):
    assert len(released(make(size, server=rate, client=rate))) == 1


@given(st.integers(0, 99), RATES, RATES, st.sampled_from(DRAWS), st.sampled_from(POLICIES))
def test_a_server_masked_unit_is_never_released(seed, p1, p2, draw, policy):
    masks = make(40, Secret(bytes([seed]) * 32), server=p1, client=p2, draw=draw, policy=policy)
    allowed = set(masks.server()["mlp"].tolist())
    for client in "ab":
        for number in range(1, 4):
            assert set(released(masks, client, number)) <= allowed


@given(st.integers(1, 60), RATES, st.sampled_from(DRAWS))
def test_released_units_are_ascending_int64(size, rate, draw):
    units = make(size, server=rate, client=rate, draw=draw).release("a", 1)["mlp"].units
    assert units.dtype == torch.int64
    assert units.tolist() == sorted(set(units.tolist()))


@pytest.mark.parametrize("draw", DRAWS)
def test_without_masks_everything_is_released(draw):
    masks = make(50, server=0.0, client=0.0, draw=draw, unbiased=True)
    assert released(masks) == list(range(50))
    assert masks.release("a", 1)["mlp"].scale == 1.0


@pytest.mark.parametrize("draw", DRAWS)
def test_masks_have_the_rates_that_were_asked_for(draw):
    masks = make(20_000, server=0.2, client=0.5, draw=draw)
    assert len(masks.server()["mlp"]) == pytest.approx(16_000, rel=0.02)
    assert len(released(masks)) == pytest.approx(8_000, rel=0.03)


def test_every_unit_is_withheld_equally_often():
    masks = make(20, server=0.0, client=0.3, policy="fresh")
    counts = np.zeros(20)
    for number in range(1, 1501):
        counts[released(masks, number=number)] += 1
    assert counts.sum() == 1500 * 14
    assert np.abs(counts / 1500 - 0.7).max() < 0.06


class TestPolicies:
    def test_fresh_masks_change_with_client_and_round(self):
        masks = make(policy="fresh")
        drawn = [released(masks, client, number) for client in "ab" for number in (1, 2)]
        assert len(set(map(tuple, drawn))) == 4
        assert released(masks, "a", 1) == drawn[0]

    def test_sticky_masks_change_with_the_client_only(self):
        masks = make(policy="sticky")
        assert released(masks, "a", 1) == released(masks, "a", 9) != released(masks, "b", 1)

    def test_grouped_masks_change_with_the_group_only(self):
        masks = make(policy="grouped", groups=3)
        by_group = {}
        for client in map(str, range(30)):
            mine = by_group.setdefault(masks.group_of(client), set())
            mine.update(tuple(released(masks, client, number)) for number in (1, 2))
        assert set(by_group) == {0, 1, 2}
        assert all(len(masks_of_group) == 1 for masks_of_group in by_group.values())
        assert len(set.union(*by_group.values())) == 3

    @given(st.integers(1, 5), st.integers(0, 40))
    def test_groups_are_of_equal_size_at_any_time(self, groups, clients):
        masks = make(4, policy="grouped", groups=groups)
        found = [masks.group_of(str(client)) for client in range(clients)]
        sizes = [found.count(group) for group in range(groups)]
        assert max(sizes) - min(sizes) <= 1
        assert [masks.group_of(str(client)) for client in range(clients)] == found

    def test_which_client_gets_which_group_is_keyed(self):
        found = set()
        for seed in range(10):
            masks = make(4, Secret(bytes([seed]) * 32), policy="grouped", groups=4)
            found.add(tuple(masks.group_of(client) for client in "abcd"))
        assert len(found) > 5

    def test_enrolled_clients_keep_their_groups(self):
        first, later = (make(policy="grouped", groups=3) for _ in range(2))
        groups = {client: first.group_of(client) for client in "abcdefg"}
        later.enroll(first.clients())
        assert {client: later.group_of(client) for client in "gfedcba"} == groups
        assert later.group_of("new") == first.group_of("new")

    def test_one_group_means_one_mask_for_all(self):
        masks = make(policy="grouped", groups=1)
        assert released(masks, "a", 1) == released(masks, "b", 5)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_server_mask_is_the_same_all_along(self, policy):
        one, other = make(policy=policy), make(policy=policy)
        released(one, "x", 3)
        assert one.server()["mlp"].tolist() == other.server()["mlp"].tolist()


def overlap(one: list[int], other: list[int], size: int) -> float:
    """Correlation of two masks, 0 if they are independent."""
    masks = np.zeros((2, size))
    masks[0, one] = masks[1, other] = 1
    return float(np.asarray(np.corrcoef(masks))[0, 1])


@pytest.mark.parametrize("draw", DRAWS)
def test_masks_of_clients_rounds_groups_and_secrets_are_independent(draw):
    size, settings = 20_000, {"server": 0.0, "client": 0.5, "policy": "fresh", "draw": draw}
    masks = make(size, **settings)
    mine = released(masks)
    others = [
        released(masks, client="b"),
        released(masks, number=2),
        released(masks, name="other"),
        released(make(size, Secret(bytes(32)), **settings)),
        make(size, **{**settings, "server": 0.5}).server()["mlp"].tolist(),
    ]
    assert all(abs(overlap(mine, other, size)) < 0.03 for other in others)


def test_guessable_seeds_have_no_effect():
    before = released(make(policy="fresh"))
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert released(make(policy="fresh")) == before
    assert released(make(policy="fresh", secret=Secret(bytes(32)))) != before


class TestUnbiased:
    def test_exact_scale_is_units_over_released_units(self):
        release = make(10, server=0.2, client=0.5, unbiased=True).release("a", 1)["mlp"]
        assert (len(release.units), release.scale) == (4, 2.5)

    def test_bernoulli_scale_is_one_over_the_probability(self):
        masks = make(10, server=0.2, client=0.5, unbiased=True, draw="bernoulli")
        assert masks.release("a", 1)["mlp"].scale == pytest.approx(2.5)

    def test_scale_is_1_unless_asked_for(self):
        assert make(10).release("a", 1)["mlp"].scale == 1.0

    def test_the_scale_of_an_empty_release_is_finite(self):
        masks = make(1, server=0.99, client=0.99, unbiased=True, draw="bernoulli")
        assert len(released(masks)) == 0
        assert masks.release("a", 1)["mlp"].scale == 1.0

    @pytest.mark.parametrize("draw", DRAWS)
    def test_a_unit_is_released_once_on_average_over_all_masks(self, draw):
        sums = np.zeros(20)
        draws = 1500
        for seed in range(draws):
            secret = Secret(seed.to_bytes(32, "little"))
            masking = Masking(server=0.2, client=0.4, unbiased=True, draw=draw)
            release = Masks([group(20)], masking, secret).release("a", 1)["mlp"]
            sums[release.units.numpy()] += release.scale
        assert statistics.mean(sums / draws) == pytest.approx(1, abs=0.02)
        assert np.abs(sums / draws - 1).max() < 0.12


@settings(max_examples=30)
@given(st.sampled_from([-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.1", None, True]))
def test_impossible_rates_are_refused(rate):
    for name in ("server", "client"):
        with pytest.raises(ConfigurationError, match="mask rate"):
            Masking(**{name: rate})


@pytest.mark.parametrize("groups", [0, -1, 2.0, True, None])
def test_impossible_group_counts_are_refused(groups):
    with pytest.raises(ConfigurationError, match="groups"):
        Masking(groups=groups)


@pytest.mark.parametrize("wrong", [{"policy": "often"}, {"draw": "dice"}, {"policy": ""}])
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="unknown"):
        Masking(**wrong)
