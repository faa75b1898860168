"""Merging against its papers' formulas in float64, and what must hold whatever the models."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_samples import (
    CLOSE,
    EXACT,
    METHODS,
    data_of,
    doubles,
    fisher_oracle,
    images_of,
    linear,
    measured,
    merged,
    regmean_oracle,
    task_of,
)

from fedveil import RegMean
from fedveil.merging import MergeStatistics, merge, statistics_of
from fedveil.state import read_state
from toys import NextToken, bert, convnet, gpt2, mlp, rows, same, texts, weights


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_model_with_itself_gives_itself(build, method):
    model = build(0)
    (result,) = merged([model, copy.deepcopy(model)], method)
    assert result is not model
    assert same(weights(result), weights(model))


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), counts=st.tuples(st.integers(40, 80), st.integers(40, 80)))
def test_regmean_of_least_squares_is_least_squares_on_the_union(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    models, statistics, inputs, targets = [], [], [], []
    for client, count in enumerate(counts):
        data = rows(count, seed=2 * seed + client)
        x, y = images_of(data), torch.randn(count, 3, generator=generator).double()
        model = linear()
        with torch.no_grad():
            model[1].weight.copy_(torch.linalg.lstsq(x, y).solution.t())
        models.append(model)
        statistics.append(statistics_of(model, data, task=task_of(model), settings=EXACT))
        inputs.append(x)
        targets.append(y)
    (result,) = merge(models, statistics=statistics, settings=EXACT)
    union = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution.t()
    torch.testing.assert_close(result.get_parameter("1.weight").double(), union, **CLOSE)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 1.0])
def test_regmean_is_the_formula_of_the_paper_layer_by_layer(off_diagonal):
    models, how = [mlp(seed) for seed in range(3)], RegMean(off_diagonal, 0.1, bits=None)
    counts = (12, 20, 7)
    (result,) = merge(models, statistics=measured(models, "regmean", how), settings=how)
    inputs, matrices = [], []
    for seed, (model, count) in enumerate(zip(models, counts, strict=True)):
        seen, hidden = [], images_of(data_of(model, count, seed))
        state = doubles(model)
        for layer in (1, 3, 5):
            seen.append(hidden.t() @ hidden / count)
            hidden = hidden @ state[f"{layer}.weight"].t() + state[f"{layer}.bias"]
            hidden = hidden.relu()
        inputs.append(seen)
        matrices.append(state)
    for number, layer in enumerate((1, 3, 5)):
        name = f"{layer}.weight"
        expected = regmean_oracle(
            [grams[number] for grams in inputs], counts, [m[name] for m in matrices],
            off_diagonal, how.ridge,
        )  # fmt: skip
        torch.testing.assert_close(read_state(result)[name].double(), expected, **CLOSE)
        bias = sum(n * m[f"{layer}.bias"] for n, m in zip(counts, matrices, strict=True))
        torch.testing.assert_close(
            read_state(result)[f"{layer}.bias"].double(), bias / sum(counts), **CLOSE
        )


def test_fisher_is_the_formula_of_the_paper():
    models, counts = [mlp(seed) for seed in range(2)], (6, 9)
    data = [
        data_of(model, n, seed) for seed, (model, n) in enumerate(zip(models, counts, strict=True))
    ]
    statistics = [
        statistics_of(model, rows_, task=task_of(model), method="fisher")
        for model, rows_ in zip(models, data, strict=True)
    ]
    expected = [
        fisher_oracle(copy.deepcopy(model), images_of(rows_).view(-1, 1, 4, 4))
        for model, rows_ in zip(models, data, strict=True)
    ]
    for one, oracle, model in zip(statistics, expected, models, strict=True):
        found = one.fisher(model)
        assert found.keys() == oracle.keys()
        for name in oracle:
            torch.testing.assert_close(found[name].double(), oracle[name], rtol=1e-3, atol=1e-6)
    (result,) = merge(models, method="fisher", statistics=statistics)
    states = [doubles(model) for model in models]
    for name, tensor in read_state(result).items():
        shares = [
            n * (one.fisher(m)[name].double() + 1e-10)
            for n, one, m in zip(counts, statistics, models, strict=True)
        ]
        quotient = sum(s * state[name] for s, state in zip(shares, states, strict=True)) / sum(
            shares
        )
        torch.testing.assert_close(tensor.double(), quotient, rtol=1e-4, atol=1e-5)


def test_fisher_of_a_text_classifier_sums_over_all_classes():
    """An embedding that no text uses matters to nothing; the last layer's bias by hand."""
    model = bert(0)
    data = data_of(model, 5)
    found = statistics_of(model, data, task=task_of(model), method="fisher").fisher(model)
    used = {int(word) for row in data for word in row["text"].split()}
    rows_ = found["bert.embeddings.word_embeddings.weight"].sum(dim=1)
    assert {int(i) for i in rows_.nonzero().flatten()} == used
    task = task_of(model)
    model.eval()
    with torch.no_grad():
        p = torch.cat(
            [task.logits(model, task.collate([row])) for row in task.prepare(data).rows]
        ).softmax(dim=1)
    torch.testing.assert_close(found["classifier.bias"], (p * (1 - p)).mean(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_models_does_not_matter(build, method):
    models = [build(seed) for seed in range(3)]
    statistics = measured(models, method)
    results = []
    for order in itertools.permutations(range(3)):
        own = [statistics[i] for i in order] if statistics else None
        (result,) = merge([models[i] for i in order], method=method, statistics=own)
        results.append(doubles(result))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, **CLOSE)


def test_the_mean_is_the_weighted_mean_and_nothing_else(build):
    models = [build(seed) for seed in range(2)]
    (result,) = merge(models, method="mean", weights=(1, 3))
    for name, tensor in doubles(result).items():
        expected = (doubles(models[0])[name] + 3 * doubles(models[1])[name]) / 4
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_examples_unless_given():
    models = [mlp(seed) for seed in range(2)]
    statistics = measured(models, "regmean", counts=(6, 18))
    by_default = merge(models, statistics=statistics)
    by_hand = merge(models, statistics=statistics, weights=(1, 3))
    alone = merge(models, statistics=statistics, weights=(1, 1e-12))
    for name, tensor in doubles(by_default[0]).items():
        torch.testing.assert_close(tensor, doubles(by_hand[0])[name], **CLOSE)
        torch.testing.assert_close(doubles(alone[0])[name], doubles(models[0])[name], **CLOSE)


def test_regmean_does_better_on_both_data_than_the_mean():
    """What it is for: outputs of each layer on each model's own data change as little as can be."""
    models = [linear() for _ in range(2)]
    data = [rows(30, seed) for seed in range(2)]
    for part in (data[0][:], data[1][:]):
        for row in part:
            row["image"][0, 2:] *= 0.01 if part is data[0] else 1.0
    statistics = [
        statistics_of(m, d, task=task_of(m), settings=EXACT)
        for m, d in zip(models, data, strict=True)
    ]

    @torch.no_grad()
    def harm(result):
        return sum(
            float((images_of(d).float() @ (result[1].weight - m[1].weight).t()).square().mean())
            for m, d in zip(models, data, strict=True)
        )

    (fitted,) = merge(models, statistics=statistics, settings=EXACT)
    (mean,) = merge(models, method="mean")
    assert harm(fitted) < 0.95 * harm(mean)


@pytest.mark.parametrize("method", ["regmean", "mean"])
def test_tied_weights_stay_tied_and_count_once(method):
    models = [gpt2(seed) for seed in range(2)]
    statistics = method == "regmean" and [
        statistics_of(model, texts(8, seed), task=NextToken()) for seed, model in enumerate(models)
    ]
    (result,) = merge(models, method=method, statistics=statistics or None)
    assert result.lm_head.weight is result.transformer.wte.weight
    expected = sum(doubles(model)["transformer.wte.weight"] for model in models) / 2
    torch.testing.assert_close(doubles(result)["transformer.wte.weight"], expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_merged_in_float32_and_kept_as_it_was(method, dtype):
    halves = [mlp(seed).to(dtype) for seed in range(2)]
    wide = [copy.deepcopy(model).float() for model in halves]
    statistics = measured(wide, method)
    (result,) = merge(halves, method=method, statistics=statistics)
    (expected,) = merge(wide, method=method, statistics=statistics)
    assert same(weights(result), weights(expected.to(dtype)))
    assert {tensor.dtype for tensor in weights(result).values()} == {dtype}


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_of_half_precision_are_those_of_the_same_values(method):
    model = mlp(0).bfloat16()
    data, task = rows(10), task_of(model)
    half = statistics_of(model, data, task=task, method=method).message
    wide = statistics_of(model.float(), data, task=task, method=method).message
    assert half.to_bytes() == wide.to_bytes()


def test_the_first_models_dtypes_are_kept():
    (result,) = merge([mlp(0).bfloat16(), mlp(1)], method="mean")
    assert result.get_parameter("1.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_models_are_left_as_they_were(build, method):
    models = [build(seed).train() for seed in range(2)]
    next(models[0].parameters()).requires_grad_(False)
    before = [weights(model) for model in models]
    merged(models, method)
    assert all(same(weights(m), b) for m, b in zip(models, before, strict=True))
    assert all(module.training for model in models for module in model.modules())
    assert not next(models[0].parameters()).requires_grad
    assert all(p.grad is None for model in models for p in model.parameters())


def test_running_statistics_of_batch_norm_are_averaged_and_counters_left():
    models = [convnet(seed) for seed in range(2)]
    models[1][1].num_batches_tracked += 5
    (result,) = merged(models, "fisher")
    expected = (12 * models[0][1].running_var + 20 * models[1][1].running_var) / 32
    torch.testing.assert_close(result[1].running_var, expected)
    assert int(result[1].num_batches_tracked) == 0


def test_a_layer_without_a_gram_is_averaged():
    """Nobody's weights are passed over for having shown less."""
    models = [mlp(seed) for seed in range(2)]
    first, second = measured(models, "regmean")
    message = first.message
    left_out = MergeStatistics(
        dataclasses.replace(
            message,
            sections={n: s for n, s in message.sections.items() if "3.weight" not in n},
            scalars={n: s for n, s in message.scalars.items() if "3.weight" not in n},
        )
    )
    (whole,) = merge(models, statistics=[first, second])
    (result,) = merge(models, statistics=[left_out, second])
    excluded = RegMean(exclude=("3.*",))
    (again,) = merge(models, statistics=[first, second], settings=excluded)
    fewer = measured(models, "regmean", excluded)
    assert not [name for name in fewer[0].message.sections if "3.weight" in name]
    (mean,) = merge(models, method="mean", weights=(12, 20))
    for name, tensor in weights(result).items():
        assert torch.equal(tensor, weights(mean if name == "3.weight" else whole)[name])
    assert same(weights(again), weights(result))
    assert same(weights(merge(models, statistics=fewer)[0]), weights(result))


def test_rounding_to_few_bits_does_not_blow_up():
    """Few examples, wide layers: rounded, the Grams have directions of negative square."""
    models = [bert(seed) for seed in range(2)]
    exact, rounded = (
        merged(models, "regmean", RegMean(off_diagonal=1.0, bits=bits))[0] for bits in (None, 4)
    )
    (mean,) = merge(models, method="mean", weights=(12, 20))
    name = "bert.encoder.layer.0.output.dense.weight"
    step = doubles(exact)[name] - doubles(mean)[name]
    assert float((doubles(rounded)[name] - doubles(exact)[name]).norm()) < 2 * float(step.norm())
