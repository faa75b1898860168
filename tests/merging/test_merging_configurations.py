"""Models of the same shapes that compute something else are refused, and what no output depends on
is only said."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedveil import ConfigurationError
from fedveil.merging import in_common, merge
from fedveil.merging.configurations import check_configurations, remarks_on_configurations
from fedveil.state import read_state
from toys import bert, gpt2, mlp

transformers = pytest.importorskip("transformers")


def llama(**words):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 20,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0,
        } | words
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def small_bert(**words):
    config = transformers.BertConfig(
        **{
            "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 20, "max_position_embeddings": 16, "num_labels": 3,
        } | words
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


OTHERS = {
    "heads": (small_bert, {"num_attention_heads": 8}, ["num_attention_heads is 4 and 8"]),
    "activation": (small_bert, {"hidden_act": "relu"}, ["hidden_act is 'gelu' and 'relu'"]),
    "epsilon": (small_bert, {"layer_norm_eps": 1e-5}, ["layer_norm_eps is 1e-12 and 1e-05"]),
    "padding": (small_bert, {"pad_token_id": 3}, ["pad_token_id is 0 and 3"]),
    "a decoder": (small_bert, {"is_decoder": True}, ["is_decoder is False and True"]),
    "two": (small_bert, {"num_attention_heads": 2, "hidden_act": "relu"},
            ["num_attention_heads is 4 and 2", "hidden_act"]),
    "rope": (llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
             ["rope_parameters.rope_theta is 10000.0 and 500.0"]),
    "scaling": (llama, {"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, ["rope_type", "factor"]),
    "positions": (llama, {"max_position_embeddings": 64}, ["max_position_embeddings is 2048"]),
    "rms epsilon": (llama, {"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
    "groups": (llama, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
               ["head_dim", "num_key_value_heads"]),
}  # fmt: skip


@pytest.mark.parametrize(("build", "words", "named"), OTHERS.values(), ids=OTHERS)
def test_what_computes_something_else_is_refused_with_both_values(build, words, named):
    models = [build(), build(), build(**words)]
    with pytest.raises(ConfigurationError, match=r"architectures that differ") as caught:
        merge(models, method="mean")
    assert "model 1 and model 3" in str(caught.value)
    assert all(word in str(caught.value) for word in named), str(caught.value)


def test_models_of_other_kinds_are_refused():
    one = small_bert()
    other = transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**{k: v for k, v in one.config.to_dict().items()
                                      if k not in ("model_type", "architectures")})
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"architectures that differ|too little in common"):
        merge([one, other], method="mean")


def test_what_no_output_depends_on_is_only_said():
    one = small_bert()
    other = small_bert(hidden_dropout_prob=0.3, initializer_range=0.5, classifier_dropout=0.2)
    other.config.my_note = "of Tuesday"
    other.config._name_or_path = "elsewhere"
    (result,) = merge([one, other], method="mean")
    assert result.config.hidden_dropout_prob == 0.1
    (remark,) = remarks_on_configurations([one, other])
    for word in ("hidden_dropout_prob (0.1 and 0.3)", "classifier_dropout", "my_note (nothing and"):
        assert word in remark
    assert "_name_or_path" not in remark
    assert remarks_on_configurations([one, copy.deepcopy(one), mlp()]) == []


def test_other_generation_settings_are_only_said():
    models = [gpt2(0), gpt2(1)]
    models[1].generation_config.temperature = 0.3
    merge(models, method="mean")
    (remark,) = remarks_on_configurations(models)
    assert "generation settings" in remark
    assert "temperature" in remark


def test_a_larger_vocabulary_that_stays_each_models_own_is_no_obstacle():
    models = [small_bert(), small_bert(vocab_size=44)]
    assert in_common(models).kept == ("bert.embeddings.word_embeddings.weight",)
    assert len(merge(models, method="mean")) == 2
    longer = [small_bert(), small_bert(max_position_embeddings=24)]
    assert len(merge(longer, method="mean")) == 2


class TestClasses:
    def named(self, *names, **words):
        return small_bert(id2label=dict(enumerate(names)), num_labels=len(names), **words)

    def test_in_another_order_are_refused(self):
        models = [self.named("sun", "rain", "snow"), self.named("Rain", "sun", "snow")]
        with pytest.raises(ConfigurationError, match=r"another order.*rain is 1 and 0.*classifier"):
            merge(models, method="mean")

    def test_of_which_one_has_another_place_are_refused(self):
        models = [self.named("sun", "rain", "snow"), self.named("hail", "snow", "fog")]
        with pytest.raises(ConfigurationError, match=r"snow is 2 and 1"):
            merge(models, method="mean")

    def test_may_differ_where_heads_are_kept(self):
        models = [self.named("sun", "rain", "snow"), self.named("rain", "sun", "snow")]
        results: list[Any] = list(merge(models, method="mean", keep=["classifier.*"]))
        for model, result in zip(models, results, strict=True):
            assert torch.equal(result.classifier.weight, model.classifier.weight)
        models = [self.named("sun", "rain", "snow"), self.named("rain", "sun")]
        assert len(merge(models, method="mean")) == 2

    def test_of_the_same_order_or_of_other_names_are_merged(self):
        for names in (("sun", "rain", "snow"), ("good", "bad", "ugly")):
            assert len(merge([self.named("sun", "rain", "snow"), self.named(*names)],
                             method="mean")) == 1  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
class TestAdapters:
    def adapted(self, seed=0, base="base", **words):
        peft = pytest.importorskip("peft")
        torch.manual_seed(seed)
        model = bert(seed if base == "other" else 0)
        model.config._name_or_path = model.name_or_path = base
        settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"} | words
        return peft.get_peft_model(model, peft.LoraConfig(**settings))

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ({"lora_alpha": 32}, "lora_alpha is 8 and 32"),
            ({"r": 4}, "default.r is 2 and 4"),
            ({"target_modules": ["key"]}, "target_modules"),
            ({"use_rslora": True}, "use_rslora"),
        ],
        ids=str,
    )
    def test_of_other_settings_are_refused(self, words, named):
        with pytest.raises(ConfigurationError, match="adapters that differ") as caught:
            merge([self.adapted(), self.adapted(1, **words)], method="mean")
        assert named in str(caught.value)

    def test_of_another_base_are_refused_by_its_weights(self):
        with pytest.raises(ConfigurationError, match=r"bases that differ.*'base' and 'other'"):
            merge([self.adapted(), self.adapted(1, base="other")], method="mean")
        assert merge([self.adapted(), self.adapted(1, base="the same base elsewhere")],
                     method="mean")  # fmt: skip

    def test_of_other_dropout_are_merged(self):
        assert merge([self.adapted(), self.adapted(1, lora_dropout=0.5)], method="mean")


def test_models_without_configurations_are_taken_as_they_are():
    check_configurations([mlp(0), mlp(1), bert(0)], ())


def with_extra(tensor, seed, parameter=False):
    model = mlp(seed)
    if parameter:
        model.extra = nn.Parameter(tensor)
    else:
        model.register_buffer("extra", tensor)
    return model


EXTRA = {
    "int8": torch.arange(4, dtype=torch.int8),
    "bool": torch.tensor([True, False]),
    "uint16": torch.ones(3).to(torch.uint16),
    "complex": torch.ones(3, dtype=torch.complex64),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("method", ["mean", "fisher", "regmean"])
class TestOddTensors:
    def merged(self, models, method):
        from merging_samples import merged

        return merged(models, method)[0]

    @pytest.mark.parametrize("name", EXTRA)
    def test_that_are_equal_are_kept(self, name, method):
        models = [with_extra(EXTRA[name].clone(), seed) for seed in range(2)]
        assert torch.equal(self.merged(models, method).extra, EXTRA[name])

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
    def test_of_narrow_floats_are_averaged_as_wide_ones(self, dtype, method):
        models = [with_extra(torch.tensor([1.0, 2.0 * k]).to(dtype), k) for k in (0, 1)]
        found = self.merged(models, method).extra
        assert found.dtype == dtype
        shares = [1, 1] if method == "mean" else [12, 20]
        expected = torch.tensor([1.0, 2.0 * shares[1] / sum(shares)])
        assert torch.equal(found.float(), expected.to(dtype).float())

    @pytest.mark.parametrize("parameter", [True, False])
    def test_without_axes_are_averaged(self, parameter, method):
        models = [with_extra(torch.tensor(float(k)), k, parameter) for k in (0, 1)]
        found = float(self.merged(models, method).extra.detach())
        assert found == pytest.approx(0.5 if method == "mean" else 20 / 32)

    def test_of_compiled_models_have_the_names_that_they_had(self, method):
        plain = self.merged([mlp(0), mlp(1)], method)
        for models in ([torch.compile(mlp(0), backend="eager"), mlp(1)],
                       [torch.compile(mlp(k), backend="eager") for k in range(2)]):  # fmt: skip
            found = self.merged(models, method)
            assert read_state(found).keys() == read_state(plain).keys()
            assert all(torch.equal(t, read_state(plain)[n]) for n, t in read_state(found).items())


def test_a_part_that_is_compiled_in_one_model_only_is_named():
    models = [mlp(0), mlp(1)]
    models[1][3] = torch.compile(models[1][3], backend="eager")
    with pytest.raises(ConfigurationError, match=r"compiled.*3\..*model\.part"):
        merge(models, method="mean")


def test_other_integers_are_refused_and_counters_are_not():
    models = [with_extra(torch.tensor([k], dtype=torch.int8), k) for k in range(2)]
    with pytest.raises(ConfigurationError, match=r"Integers.*int8"):
        merge(models, method="mean")


def test_sparse_embeddings_have_a_fisher_diagonal():
    from types import SimpleNamespace

    from fedveil.merging.fisher import fisher_diagonal
    from fedveil.tasks import TextClassification
    from toys import NumberTokenizer, texts

    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(300, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask=None):
            return SimpleNamespace(logits=self.head(self.embed(input_ids).mean(1)))

    task = TextClassification(NumberTokenizer())
    one, other = (
        fisher_diagonal(Words(sparse), task, task.prepare(texts(4)), lambda *_: None)
        for sparse in (True, False)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
