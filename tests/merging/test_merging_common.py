"""Which tensors are merged, which are kept, and which models are refused."""

from typing import Any

import pytest
import torch
from merging_samples import linear, measured, merged
from torch import nn

from fedveil.errors import ConfigurationError, ProtocolError
from fedveil.merging import fusion, in_common, merge
from fedveil.state import read_state
from toys import bert, gpt2, mlp, same, weights


def two_heads():
    one, other = bert(0), bert(1)
    other.classifier = nn.Linear(16, 5)
    return [one, other]


@pytest.mark.parametrize("method", ["regmean", "fisher", "mean"])
def test_heads_for_other_classes_stay_each_models_own(method):
    models = two_heads()
    assert in_common(models).kept == ("classifier.weight", "classifier.bias")
    results = merged(models, method)
    assert len(results) == 2
    for model, result in zip(models, results, strict=True):
        assert torch.equal(result.classifier.weight, model.classifier.weight)
        assert torch.equal(result.classifier.bias, model.classifier.bias)
        assert not torch.equal(result.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    same_body = [{n: t for n, t in weights(r).items() if n.startswith("bert.")} for r in results]
    assert same(*same_body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_asked_for_is_kept_bit_for_bit(dtype):
    models = [bert(seed).to(dtype) for seed in range(2)]
    results = merge(models, method="mean", keep=["classifier.*", "*.LayerNorm.bias"])
    for model, result in zip(models, results, strict=True):
        for name, tensor in read_state(model).items():
            kept = name.startswith("classifier") or name.endswith("LayerNorm.bias")
            assert torch.equal(read_state(result)[name], tensor) == kept, name


def test_a_tied_tensor_is_kept_by_any_of_its_names():
    common = in_common([gpt2(0), gpt2(1)], keep=["lm_head.*"])
    assert common.kept == ("transformer.wte.weight",)


def test_heads_that_only_one_has_are_kept():
    import transformers

    model = bert(0)
    bare = transformers.BertModel(model.config)
    bare = nn.ModuleDict({"bert": bare})
    common = in_common([model, bare])
    assert common.kept == ("classifier.weight", "classifier.bias")
    results = merge([model, bare], method="mean")
    assert [type(r) for r in results] == [type(model), nn.ModuleDict]


def nan():
    model = mlp(1)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    return model


def counting(value):
    model = mlp(1)
    model.register_buffer("levels", torch.tensor([value]))
    return model


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        ([mlp(0)], {}, ["nothing to merge", "2 models"]),
        (mlp(0), {}, ["nothing to merge"]),
        ([mlp(0), {}], {}, ["not a model", "model 2", "dict"]),
        ([mlp(0), nan()], {}, ["NaN", "model 2, 3.weight"]),
        ([mlp(0), linear()], {}, ["too little in common", "fine-tuned from the same"]),
        ([bert(0), mlp(0)], {}, ["too little in common"]),
        ([gpt2(0), gpt2(1, tied=False)], {}, ["tie different", "lm_head", "model 2"]),
        ([counting(1), counting(2)], {}, ["Integers", "levels", "int64"]),
        ([mlp(0), mlp(1)], {"keep": ["head.*"]}, ["matches no tensor", "'head.*'", "5.bias"]),
        ([mlp(0), mlp(1)], {"keep": "5.*"}, ["keep is impossible"]),
        ([mlp(0), mlp(1)], {"keep": ["*"]}, ["too little in common"]),
        ([mlp(0), mlp(1)], {"weights": [1.0]}, ["weights", "2 numbers"]),
        ([mlp(0), mlp(1)], {"weights": [1, 0]}, ["weights", "above 0"]),
        ([mlp(0), mlp(1)], {"weights": [1, float("nan")]}, ["weights"]),
        ([mlp(0), mlp(1)], {"method": "average"}, ["regmean or mean or fisher", "'average'"]),
        ([mlp(0), mlp(1)], {"method": "regmean"}, ["statistics of each model", "statistics_of"]),
    ],
)
def test_what_cannot_be_merged_is_one_clear_error(models, options, words):
    with pytest.raises(ConfigurationError) as caught:
        merge(models, **{"method": "mean"} | options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_equal_integers_are_no_obstacle():
    (result,) = merge([counting(3), counting(3)], method="mean")
    levels: Any = result.levels
    assert int(levels) == 3


def test_the_mean_takes_no_statistics():
    models = [mlp(0), mlp(1)]
    with pytest.raises(ConfigurationError, match="takes none"):
        merge(models, method="mean", statistics=measured(models, "regmean"))


def test_statistics_in_the_wrong_order_or_for_another_method_are_refused():
    models = [mlp(0), mlp(1)]
    grams, fisher = measured(models, "regmean"), measured(models, "fisher")
    with pytest.raises(ProtocolError, match=r"statistics 1.*order of the models"):
        merge(models, statistics=grams[::-1])
    with pytest.raises(ProtocolError, match=r"statistics 2.*expected regmean, found fisher"):
        merge(models, statistics=[grams[0], fisher[1]])
    with pytest.raises(ConfigurationError, match="expected 2 statistics, found 1"):
        merge(models, statistics=grams[:1])


def test_a_layer_used_in_two_ways_is_refused():
    from transformers.pytorch_utils import Conv1D

    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 3))
    other = nn.Sequential(nn.Flatten(), Conv1D(16, 16), nn.Linear(16, 3))
    with pytest.raises(ConfigurationError, match=r"used differently.*1\.weight"):
        merged([one, other], "regmean")


def test_what_does_not_fit_half_precision_is_refused(monkeypatch):
    models = [linear().half() for _ in range(2)]
    monkeypatch.setattr(fusion, "_mean", lambda name, deltas, weights: deltas[0] + 1e6)
    with pytest.raises(ConfigurationError, match=r"too large.*1\.weight.*finite as float16"):
        merge(models, method="mean")
