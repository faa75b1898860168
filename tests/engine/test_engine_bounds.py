"""No client decides: how much one may weigh and change."""

import dataclasses
import math
import re

import pytest
import torch
from engine_samples import claiming, run_with, times
from hypothesis import given
from hypothesis import strategies as st

import toys
from fedveil import Bounds, ConfigurationError, FedAvg, FedLPP, FedQSN, Observer, RegMean
from fedveil.aggregation import WHOLE, Influence
from fedveil.engine.bounds import Claim
from fedveil.wire import Statistics
from toys import federation, mlp, same, weights

CLIENTS = {f"c{i}": toys.rows(6, seed=i) for i in range(5)}
HUGE = 2**63 - 1


def claims(numbers):
    return {f"c{i}": Claim(examples, Influence(norm)) for i, (examples, norm) in enumerate(numbers)}


def distance(one, other):
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))


def run(scheme=None, lies=None, rounds=1, **changes):
    settings = {"clients": CLIENTS, "scheme": scheme or FedAvg(), **changes}
    return run_with(federation(mlp(), **settings), lies or {}, rounds)


class TestWhatIsGiven:
    @given(
        st.lists(
            st.tuples(st.integers(1, HUGE), st.just(0.0) | st.floats(1e-12, 1e10)),
            min_size=1,
            max_size=9,
        ),
        st.floats(1, 10),
        st.floats(1, 10),
    )
    def test_is_at_most_so_many_times_the_median(self, numbers, weight, norm):
        asked = claims(numbers)
        given_ = Bounds(weight=weight, norm=norm, pull=None).apply(asked)
        middle = sorted(examples for examples, _ in numbers)[(len(numbers) - 1) // 2]
        norms = sorted(size for _, size in numbers if size > 0)
        most = norm * norms[(len(norms) - 1) // 2] if norms else math.inf
        for client, bounded in given_.items():
            claim = asked[client]
            assert bounded.weight == min(float(claim.examples), weight * float(middle))
            left = bounded.scales.update * claim.influence.update
            assert left == pytest.approx(min(claim.influence.update, most))
            cut = bounded.weight < claim.examples or bounded.scales is not WHOLE
            assert bool(bounded.cuts) == cut

    @given(st.integers(3, 9), st.floats(0, 1e9), st.integers(1, HUGE))
    def test_does_not_follow_one_who_lies(self, honest, norm, examples):
        liar = [(examples, norm)]
        given_ = Bounds().apply(claims([(20, 1.0)] * honest + liar))
        mine = given_[f"c{honest}"]
        assert mine.weight <= 100
        assert mine.scales.update * norm <= 3 * (1 + 1e-9)
        assert mine.weight * mine.scales.update * norm <= 60 * (1 + 1e-9)
        assert all(given_[f"c{i}"].scales is WHOLE for i in range(honest))

    @given(st.lists(st.tuples(st.integers(1, HUGE), st.floats(1e-6, 1e10)), min_size=1, max_size=9))
    def test_pulls_no_harder_than_three_times_the_median(self, numbers):
        asked, given_ = claims(numbers), Bounds().apply(claims(numbers))
        before = Bounds(pull=None).apply(asked)
        pulls = sorted(
            one.weight * one.scales.update * asked[client].influence.update
            for client, one in before.items()
        )
        most = 3 * pulls[(len(pulls) - 1) // 2] * (1 + 1e-9)
        for client, one in given_.items():
            assert one.weight * one.scales.update * asked[client].influence.update <= most
            assert one.weight <= before[client].weight
            assert one.scales == before[client].scales  # nobody is held back where it was
            assert bool(one.cuts) == (one.weight < asked[client].examples or one.scales.update < 1)

    def test_does_not_depend_on_who_came_first(self):
        numbers = [(5, 1.0), (80, 9.0), (7, 2.0), (6, 0.0)]
        whole = claims(numbers)
        backwards = dict(reversed(whole.items()))
        assert Bounds().apply(whole) == Bounds().apply(backwards)

    def test_of_two_clients_the_larger_is_held_against_the_smaller(self):
        given_ = Bounds().apply(claims([(10, 1.0), (HUGE, 1e9)]))
        # Three times as long, so that with the same weight it pulls three times as hard.
        assert given_["c1"].weight == pytest.approx(10.0)
        assert given_["c1"].scales.update == pytest.approx(3 / 1e9)

    def test_is_everything_of_a_single_client(self):
        assert Bounds().apply(claims([(HUGE, 1e9)]))["c0"].scales is WHOLE

    def test_is_what_the_owner_declares(self):
        given_ = Bounds(examples={"c0": 40}, max_examples=30).apply(
            claims([(HUGE, 1.0), (35, 1.0)])
        )
        assert [bounded.weight for bounded in given_.values()] == [30.0, 30.0]

    def test_is_all_that_is_asked_for_without_bounds(self):
        given_ = Bounds.none().apply(claims([(HUGE, 1e9), (1, 1e-9)]))
        assert [bounded.weight for bounded in given_.values()] == [float(HUGE), 1.0]
        assert all(bounded.scales is WHOLE and not bounded.cuts for bounded in given_.values())


SCHEMES = {
    "fedavg": FedAvg(),
    "4 bits up": FedAvg(update_bits=4),
    "fedqsn": FedQSN(units="neurons", update_bits=4),
    "paper": FedQSN.paper(units="neurons"),
    "regmean": FedQSN(units="neurons", aggregation="regmean"),
}


@pytest.mark.parametrize("name", SCHEMES)
class TestInEveryScheme:
    def test_honest_clients_are_used_to_the_last_bit(self, name):
        bounded, plain = (
            run(SCHEMES[name], rounds=2, bounds=bounds) for bounds in (Bounds(), Bounds.none())
        )
        assert [record.bounded for record in bounded.rounds] == [{}, {}]
        assert same(weights(bounded.global_model), weights(plain.global_model))

    def test_a_claim_moves_the_model_no_further_than_the_cap(self, name):
        lied = run(SCHEMES[name], {"c1": claiming(HUGE)})
        capped = run(SCHEMES[name], {"c1": claiming(30)})
        assert same(weights(lied.global_model), weights(capped.global_model))
        words = lied.rounds[0].bounded["c1"]
        assert re.match(
            rf"its claim of {HUGE} examples counts as [12]\d\.\d+ \(weight .* 30; pull", words
        )
        lied = run(SCHEMES[name], {"c1": claiming(HUGE)}, bounds=Bounds(pull=None))
        assert lied.rounds[0].bounded["c1"].startswith(f"its claim of {HUGE} examples counts as 30")
        unbounded = run(SCHEMES[name], {"c1": claiming(HUGE)}, bounds=Bounds.none())
        assert not same(weights(unbounded.global_model), weights(capped.global_model))

    def test_an_update_moves_the_model_no_further_than_the_bound(self, name):
        # Quantized sections cannot be enlarged by the same factor here, so exact ones are.
        scheme = dataclasses.replace(SCHEMES[name], update_bits=None)  # type: ignore[type-var]
        honest, base = weights(run(scheme).global_model), weights(mlp())
        step = distance(honest, base)
        lied = run(scheme, {"c1": times(-300.0)})
        # Least squares give directions that only one client's data excite wholly to it.
        assert distance(weights(lied.global_model), honest) < (8 if name == "regmean" else 3) * step
        assert "times the median length" in lied.rounds[0].bounded["c1"]
        unbounded = run(scheme, {"c1": times(-300.0)}, bounds=Bounds.none())
        assert distance(weights(unbounded.global_model), honest) > 20 * step


def strong_gram(reply):
    """Claims that its data excite every layer a million times as strongly."""
    sections = {
        name: Statistics((section.tensor * 1e6).clamp(max=1e7))
        if name.startswith("gram/") and name.endswith("/diagonal")
        else section
        for name, section in reply.sections.items()
    }
    return dataclasses.replace(reply, sections=sections)


class TestGrams:
    SCHEME = FedAvg(aggregation=RegMean(bits=None))

    def test_one_client_does_not_take_over_a_layer(self):
        base = weights(mlp())

        def step(**words):
            after = weights(run(self.SCHEME, **words).global_model)
            return torch.cat([(after[n] - base[n]).flatten() for n in base])

        def share(found):
            """Of the step that honest clients make, how much is left."""
            return float(found @ honest / (honest @ honest))

        honest, lies = step(), {"c1": strong_gram}
        assert share(step(lies=lies)) > 0.7
        assert share(step(lies=lies, bounds=Bounds.none())) < 0.2
        assert "Grams" in run(self.SCHEME, lies).rounds[0].bounded["c1"]

    def test_correlations_that_no_data_have_are_shrunk_to_some_that_data_may_have(self):
        def impossible(reply):
            # Everything is the opposite of everything else: squares below zero.
            sections = {
                name: Statistics(torch.full_like(section.tensor, -1.0))
                if name.startswith("gram/") and name.endswith("/pairs")
                else section
                for name, section in reply.sections.items()
            }
            return dataclasses.replace(reply, sections=sections)

        honest = weights(run(self.SCHEME).global_model)
        lied = weights(run(self.SCHEME, {"c1": impossible}).global_model)
        assert distance(lied, honest) < 3 * distance(honest, weights(mlp()))


class TestWhoIsTold:
    def test_the_observer_and_the_record(self, tmp_path):
        heard = []

        class Ear(Observer):
            def client_bounded(self, number, client, cuts):
                heard.append((number, client, cuts))

        result = run(lies={"c1": claiming(HUGE)}, observer=Ear(), out=tmp_path)
        assert heard == [(1, "c1", result.rounds[0].bounded["c1"])]
        assert toys.metrics(tmp_path)[0]["bounded"] == result.rounds[0].bounded


# PEFT asks transformers in a way that will go.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_bounded_like_everything_else():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft.get_peft_model(toys.gpt2(tied=False), config)
    clients = {f"c{i}": toys.texts(6, seed=i) for i in range(5)}

    def trained(lies):
        words = {"clients": clients, "task": toys.NextToken(), "scheme": FedLPP(bits=None)}
        return weights(run_with(federation(model, **words), lies).global_model)

    honest, base = trained({}), weights(model)
    assert distance(trained({"c1": times(1e4)}), honest) < 3 * distance(honest, base)


@pytest.mark.parametrize(
    "words",
    [
        {"weight": 0.5}, {"weight": math.nan}, {"weight": math.inf}, {"weight": True},
        {"norm": 0}, {"norm": -1}, {"norm": "3"}, {"pull": 0.9}, {"max_examples": 0},
        {"max_examples": 1.5}, {"examples": {"c0": 0}}, {"examples": {"c0": "5"}},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_bounds_are_refused(words):
    with pytest.raises(ConfigurationError, match="Bounds"):
        Bounds(**words)


def test_examples_of_a_stranger_are_refused():
    with pytest.raises(ConfigurationError, match="takes no part"):
        federation(mlp(), bounds=Bounds(examples={"nobody": 5}))
