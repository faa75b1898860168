"""RegMean's sums and steps, against float64 equations."""

from typing import Any

import pytest
import torch
from aggregation_samples import (
    EVERYTHING,
    FEW_MASKS,
    LAYERS,
    OWN_MASKS,
    SERVER_MASK,
    SETTINGS,
    SHAPES,
    WHOLE,
    Client,
    as_matrix,
    common_step,
    exact_step,
    gram_of,
    oracles,
    sums_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import FedAvg, RegMean
from fedveil.aggregation import AVERAGES, RegMeanSums, StreamingMean
from fedveil.aggregation.gram import Gram
from fedveil.aggregation.linear import LinearLayer
from fedveil.training import TrainingRecord
from toys import SECRET, reply_of

ONE = {"w": LinearLayer("w", "", 0)}
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def check(found, name, expected):
    found = torch.zeros(SHAPES[name]) if found is None else found
    assert found.shape == SHAPES[name]
    torch.testing.assert_close(as_matrix(name, found).double(), expected, **CLOSE)


def check_all(clients, settings_, shared, step):
    sums = sums_of(clients, settings_, shared=shared)
    assert sums.clients == len(clients)
    for name in LAYERS:
        members = oracles(clients, name, settings_)
        if members:
            check(sums.mean(name), name, step(members))
        else:
            assert sums.mean(name) is None


class TestStreamedSums:
    @settings(max_examples=60)
    @given(FEW_MASKS, SETTINGS)
    def test_under_few_masks_solve_each_output_over_its_holders(self, clients, settings_):
        check_all(clients, settings_, True, exact_step)

    @settings(max_examples=25)
    @given(SERVER_MASK, SETTINGS, st.booleans())
    def test_under_a_server_mask_solve_each_output_over_all(self, clients, settings_, shared):
        check_all(clients, settings_, shared, exact_step)

    @settings(max_examples=60)
    @given(OWN_MASKS, SETTINGS)
    def test_under_own_masks_solve_one_system_for_all(self, clients, settings_):
        check_all(clients, settings_, False, common_step)

    @settings(max_examples=30)
    @given(OWN_MASKS, SETTINGS)
    def test_are_exact_under_own_masks_too_if_kept_apart(self, clients, settings_):
        # Each mask has its own system then, and no two masks need agree on anything but outputs.
        members = {name: oracles(clients, name, settings_) for name in LAYERS}
        sums = sums_of(clients, settings_, shared=True)
        for name in LAYERS:
            if members[name]:
                check(sums.mean(name), name, exact_step(members[name]))

    @settings(max_examples=25)
    @given(OWN_MASKS, SETTINGS, st.booleans(), st.randoms(use_true_random=False))
    def test_depend_on_the_order_of_clients_in_last_bits_only(
        self, clients, settings_, shared, dice
    ):
        turned = list(clients)
        dice.shuffle(turned)
        one, other = (sums_of(c, settings_, shared=shared) for c in (clients, turned))
        for name in SHAPES:
            if one.mean(name) is not None:
                torch.testing.assert_close(one.mean(name), other.mean(name), **CLOSE)

    @settings(max_examples=40)
    @given(OWN_MASKS | FEW_MASKS, SETTINGS, st.booleans())
    def test_leave_what_nobody_held_at_exactly_zero(self, clients, settings_, shared):
        sums = sums_of(clients, settings_, shared=shared)
        for name in LAYERS:
            members = oracles(clients, name, settings_)
            if members:
                mean = sums.mean(name)
                assert mean is not None
                held = torch.stack([m.held for m in members]).any(0)
                assert not bool(as_matrix(name, mean)[~held].any())

    @settings(max_examples=25)
    @given(OWN_MASKS, SETTINGS, st.sampled_from(AVERAGES))
    def test_average_everything_else_as_asked(self, clients, settings_, average):
        sums = sums_of(clients, settings_, shared=True, average=average)
        mean = StreamingMean({"bias": SHAPES["bias"]}, average)
        for client in clients:
            mine = client.selection
            mean.add({"bias": mine.gather("bias", client.update("bias"))}, mine, client.weight)
        one, other = sums.mean("bias"), mean.mean("bias")
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)

    def test_change_nothing_of_what_is_added(self):
        update, gram = torch.ones(2, 3), gram_of(torch.randn(5, 3), RegMean())
        assert gram.pairs is not None
        before = gram.diagonal.clone(), gram.pairs.clone()
        sums = RegMeanSums({"w": torch.Size([2, 3])}, ONE, RegMean())
        for weight in (3.0, 4.0):
            sums.add({"w": update}, EVERYTHING, weight, {"w": gram})
        assert torch.equal(update, torch.ones(2, 3))
        assert torch.equal(gram.diagonal, before[0])
        assert torch.equal(gram.pairs, before[1])
        first, second = sums.mean("w"), sums.mean("w")
        assert first is not None
        assert second is not None
        assert torch.equal(second, first)


def step(updates, grams, settings_, weights=None):
    """The step of one layer whose clients held all of it."""
    sums = RegMeanSums({"w": updates[0].shape}, ONE, settings_)
    for number, (update, gram) in enumerate(zip(updates, grams, strict=True)):
        weight = 1.0 if weights is None else weights[number]
        sums.add({"w": update}, EVERYTHING, weight, {} if gram is None else {"w": gram})
    return sums.mean("w")


def draw(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


ANY = st.builds(RegMean, off_diagonal=st.floats(0, 1), ridge=st.floats(0, 10), bits=st.none())


class TestTheStep:
    @settings(max_examples=40)
    @given(ANY, st.integers(0, 99), st.integers(1, 9), st.booleans(), OWN_MASKS)
    def test_is_the_mean_of_the_holders_where_grams_are_alike(
        self, settings_, seed, rows, shared, clients
    ):
        # Inputs uncut, outputs cut in any way.
        clients = [
            Client({**WHOLE, "classes": c.units["classes"]}, c.seed, c.weight, c.rows)
            for c in clients
        ]
        # Without a ridge, few rows would leave directions in which there is rounding only.
        rows = rows if settings_.ridge >= 0.01 else 40
        gram = gram_of(draw(1, rows, 5, seed=seed)[0], settings_)
        shapes = {"transposed": SHAPES["transposed"]}
        sums = RegMeanSums(shapes, LAYERS, settings_, "holders", shared)
        mean = StreamingMean(shapes, "holders")
        for client in clients:
            mine = client.selection
            update = {"transposed": mine.gather("transposed", client.update("transposed"))}
            sums.add(update, mine, float(client.weight), {"transposed": gram})
            mean.add(update, mine, float(client.weight))
        torch.testing.assert_close(sums.mean("transposed"), mean.mean("transposed"), **CLOSE)

    @settings(max_examples=40)
    @given(ANY, st.integers(0, 99), st.floats(-10, 10))
    def test_moves_with_the_model_that_updates_are_counted_from(self, settings_, seed, size):
        updates = draw(3, 2, 4, seed=seed)
        grams = [gram_of(rows, settings_) for rows in draw(3, 9, 4, seed=seed + 1)]
        shift = size * draw(1, 2, 4, seed=seed + 2)[0]
        plain = step(updates, grams, settings_, [1.0, 2.0, 5.0])
        moved = step([u + shift for u in updates], grams, settings_, [1.0, 2.0, 5.0])
        torch.testing.assert_close(moved - shift, plain, rtol=1e-3, atol=2e-3)

    @settings(max_examples=30)
    @given(ANY, st.sampled_from([1e-9, 1e-3, 1e6, 1e19]), st.sampled_from([1e-3, 1e4]))
    def test_depends_on_neither_the_scale_of_weights_nor_of_inputs(self, settings_, weight, size):
        updates, rows = draw(3, 2, 4), draw(3, 9, 4, seed=1)
        plain = step(updates, [gram_of(r, settings_) for r in rows], settings_, [1.0, 2.0, 5.0])
        scaled = step(
            updates,
            [gram_of(size * r, settings_) for r in rows],
            settings_,
            [weight * w for w in (1.0, 2.0, 5.0)],
        )
        torch.testing.assert_close(scaled, plain, **CLOSE)

    @settings(max_examples=20)
    @given(st.integers(0, 99))
    def test_weights_each_input_by_itself_without_off_diagonals(self, seed):
        settings_ = RegMean(off_diagonal=0.0, ridge=0.0)
        updates, rows = draw(2, 2, 4, seed=seed), draw(2, 9, 4, seed=seed + 1)
        strengths = [r.square().mean(0) for r in rows]
        total = strengths[0] + strengths[1]
        expected = (updates[0] * strengths[0] + updates[1] * strengths[1]) / total
        found = step(updates, [gram_of(r, settings_) for r in rows], settings_)
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_is_that_of_the_client_whose_data_speak_of_an_input(self):
        one, other = torch.zeros(6, 4), torch.zeros(6, 4)
        one[:, :2], other[:, 2:] = draw(2, 6, 2)
        updates = draw(2, 3, 4)
        settings_ = RegMean(off_diagonal=1.0, ridge=0.0)
        found = step(updates, [gram_of(one, settings_), gram_of(other, settings_)], settings_)
        expected = torch.cat([updates[0][:, :2], updates[1][:, 2:]], dim=1)
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_with_a_large_ridge_is_close_to_the_mean(self):
        settings_ = RegMean(off_diagonal=1.0, ridge=1e4)
        updates = draw(2, 3, 4)
        grams = [gram_of(rows / rows.square().mean().sqrt(), settings_) for rows in draw(2, 6, 4)]
        torch.testing.assert_close(
            step(updates, grams, settings_), (updates[0] + updates[1]) / 2, rtol=1e-2, atol=1e-2
        )

    def test_of_half_precision_and_double_updates_is_float32(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            updates = [u.to(dtype) for u in draw(2, 3, 4)]
            found = step(updates, [gram_of(r, RegMean()) for r in draw(2, 9, 4)], RegMean())
            assert found.dtype == torch.float32


class TestHardCases:
    def test_directions_that_no_client_excites_take_the_mean(self):
        settings_ = RegMean(off_diagonal=1.0, ridge=1e-3)
        # A client's ridge grows with its inputs: let them be as strong here and there.
        rows = [torch.cat([r / r.norm(), torch.zeros(8, 2)], dim=1) for r in draw(2, 8, 3)]
        updates = draw(2, 4, 5)
        found = step(updates, [gram_of(r, settings_) for r in rows], settings_, [1.0, 3.0])
        torch.testing.assert_close(found[:, 3:], (updates[0] + 3 * updates[1])[:, 3:] / 4, **CLOSE)

    @pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-6, 1e-3])
    @pytest.mark.parametrize("width", [2, 32, 128])
    @pytest.mark.parametrize("kind", ["duplicate", "constant", "one example", "few examples"])
    def test_inputs_that_depend_on_each_other_do_not_blow_the_step_up(self, ridge, width, kind):
        settings_ = RegMean(off_diagonal=1.0, ridge=ridge, bits=None)
        count = {"one example": 1, "few examples": width // 2}.get(kind, 4 * width)
        for seed in range(4):
            rows = draw(3, count, width, seed=seed)
            for one in rows:
                if kind == "duplicate":
                    one[:, 1] = one[:, 0]
                if kind == "constant":
                    one[:, :2] = torch.tensor([1.0, 2.0])
            # Agreement must survive, and disagreement may be weighed but not grow without bound.
            updates = draw(3, 4, width, seed=seed + 50)
            grams = [gram_of(one, settings_) for one in rows]
            agreed = step([updates[0]] * 3, grams, settings_)
            assert float((agreed - updates[0]).norm() / updates[0].norm()) < 0.5
            disagreed = step(updates, grams, settings_)
            assert float(disagreed.norm()) < 50 * max(float(u.norm()) for u in updates)

    def test_a_client_with_one_example_decides_along_it_only(self):
        settings_ = RegMean(off_diagonal=1.0, ridge=1e-4)
        example = torch.tensor([[3.0, 4.0, 0.0]])
        silent = gram_of(torch.zeros(1, 3), settings_)
        updates = [torch.tensor([[1.0, 1.0, 1.0]]), torch.zeros(1, 3)]
        found = step(updates, [gram_of(example, settings_), silent], settings_)
        along = example @ found.t() / 5
        assert float(along) == pytest.approx(7 / 5, rel=1e-3)

    def test_a_layer_that_never_fires_on_one_client_is_left_to_the_other(self):
        updates, gram = draw(2, 3, 4), gram_of(draw(1, 9, 4)[0], RegMean())
        for nothing in (None, gram_of(torch.zeros(3, 4), RegMean())):
            found = step(updates, [gram, nothing], RegMean(), [1.0, 100.0])
            torch.testing.assert_close(found, updates[0], **CLOSE)

    def test_a_layer_that_fires_on_no_client_takes_the_mean(self):
        updates = draw(2, 3, 4)
        for nothing in (None, gram_of(torch.zeros(3, 4), RegMean())):
            found = step(updates, [nothing, nothing], RegMean(), [1.0, 3.0])
            torch.testing.assert_close(found, (updates[0] + 3 * updates[1]) / 4, **CLOSE)

    def test_a_layer_that_nobody_changed_takes_no_step(self):
        sums = RegMeanSums({"w": torch.Size([2, 3])}, ONE, RegMean())
        sums.add({}, EVERYTHING, 1.0, {})
        assert sums.mean("w") is None
        assert sums.clients == 1

    def test_a_client_that_left_a_layer_unchanged_has_no_say_in_it(self):
        updates, grams = draw(2, 2, 3), [gram_of(r, RegMean()) for r in draw(2, 9, 3)]
        sums = RegMeanSums({"w": torch.Size([2, 3])}, ONE, RegMean())
        sums.add({"w": updates[0]}, EVERYTHING, 1.0, {"w": grams[0]})
        sums.add({}, EVERYTHING, 1.0, {"w": grams[1]})
        torch.testing.assert_close(sums.mean("w"), updates[0], **CLOSE)
        assert sums.clients == 2

    def test_an_output_that_few_held_is_not_made_larger_or_smaller(self):
        # Layers cut along both axes: holders of an element agree, so the step must be theirs.
        held = [
            {"channels": {0, 1, 2}, "neurons": {0, 1}},
            {"channels": {3}, "neurons": {2}},
            {"channels": {2, 3, 4}, "neurons": {0, 3}},
        ]
        clients = [Client({**WHOLE, **units}, 1, 1, 30) for units in held]
        sums = sums_of(clients, RegMean(off_diagonal=0.0), shared=False)
        expected = torch.zeros(SHAPES["linear"])
        for client in clients:
            mine = client.selection
            mine.scatter("linear", mine.gather("linear", client.update("linear")), expected)
        torch.testing.assert_close(sums.mean("linear"), expected, **CLOSE)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("lift", [0.05, 0.5])
    def test_grams_that_noise_made_indefinite_still_give_a_bounded_step(self, seed, lift):
        generator = torch.Generator().manual_seed(seed)
        updates, rows = draw(3, 4, 40, seed=seed), draw(3, 20, 40, seed=seed)
        grams = []
        for one in rows:
            gram = gram_of(one, RegMean())
            noise = lift * torch.randn(gram.pairs.shape, generator=generator)
            grams.append(Gram(gram.diagonal, gram.bounds, pairs=(gram.pairs + noise).clamp(-1, 1)))
        found = step(updates, grams, RegMean(off_diagonal=1.0, ridge=0.0))
        assert bool(torch.isfinite(found).all())
        assert float(found.norm()) < 100 * max(float(u.norm()) for u in updates)

    @pytest.mark.parametrize("square", [0.0, 1e-30, 1e8])
    @pytest.mark.parametrize("weight", [1e-9, 1e20])
    @pytest.mark.parametrize("correlation", [-1.0, 0.0, 1.0])
    def test_extreme_numbers_that_are_legal_stay_finite(self, square, weight, correlation):
        # As many clients as it takes for their sums to leave float32.
        gram = Gram(
            torch.full((512,), square), (0, 512), pairs=torch.full((512 * 511 // 2,), correlation)
        )
        sums = RegMeanSums({"w": torch.Size([1, 512])}, ONE, RegMean())
        for _ in range(99):
            sums.add({"w": torch.full((1, 512), 1e6)}, EVERYTHING, weight, {"w": gram})
        sums.add({"w": torch.zeros(1, 512)}, EVERYTHING, 1.0, {})
        found = sums.mean("w")
        assert found is not None
        assert bool(torch.isfinite(found).all())
        assert float(found.abs().max()) < 1e12


class LeastSquares:
    """Trains a linear model to its client's exact solution, and lets it be watched."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __call__(self, model):
        solution = torch.linalg.lstsq(self.inputs.double(), self.targets.double()).solution
        with torch.no_grad():
            model[0].weight.copy_(solution.t().reshape(model[0].weight.shape))
        return TrainingRecord(len(self.inputs), 1, 1.0, 0.0)

    def replay(self, model, examples):
        for part in self.inputs[:examples].split(7):
            yield {"inputs": part}
            with torch.no_grad():
                model(part)


class TestOnALinearModel:
    """Local least squares, merged, are the least squares of all data together."""

    SCHEME = FedAvg(aggregation=RegMean(off_diagonal=1.0, ridge=0.0, bits=None, examples=10_000))

    def merged(self, model, data, scheme=SCHEME):
        server = scheme.server(model, SECRET)
        server.begin_round(1)
        for number, (inputs, targets) in enumerate(data):
            name = f"partner-{number}"
            trainer = LeastSquares(inputs, targets)
            reply = reply_of(scheme, server.release(name), model, trainer)
            server.absorb(name, reply, float(reply.scalars["examples"]))
        server.end_round()
        return server.final()["0.weight"].flatten(1)

    def data(self, seed, counts, inputs=6, outputs=2):
        generator = torch.Generator().manual_seed(seed)
        turns = [
            torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q for _ in counts
        ]
        mixes = [turn * torch.linspace(0.5, 2.0, inputs) @ turn.t() for turn in turns]
        data = [
            torch.randn(count, inputs, generator=generator) @ mix
            for count, mix in zip(counts, mixes, strict=True)
        ]
        return [(x, torch.randn(len(x), outputs, generator=generator)) for x in data]

    def union(self, data):
        inputs, targets = (torch.cat(parts).double() for parts in zip(*data, strict=True))
        return torch.linalg.lstsq(inputs, targets).solution.t().float()

    @settings(max_examples=15)
    @given(st.integers(0, 10**6), st.lists(st.integers(20, 60), min_size=1, max_size=4))
    def test_whatever_the_model_it_starts_from(self, seed, counts):
        data = self.data(seed, counts)
        model = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False))
        torch.testing.assert_close(self.merged(model, data), self.union(data), rtol=0.01, atol=0.01)

    def test_and_the_mean_is_not(self):
        data = self.data(1, [12, 60])
        model = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False))
        mean = self.merged(model, data, FedAvg())
        assert float((mean - self.union(data)).norm()) > 0.1
