"""Rules, ties, unknown models, and what importing this room loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn
from units_families import FAMILIES, randomise

from fedveil.errors import ConfigurationError, UnknownArchitectureError
from fedveil.units import Pattern, Rule, Slice, find_units, register_rule, registry


@pytest.fixture(autouse=True)
def _forget_rules() -> Iterator[None]:
    before = list(registry._rules)
    yield
    registry._rules[:] = before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.widen, self.narrow = nn.Linear(4, 4), nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.narrow(self.widen(x).relu()) if x.sum() > 0 else x


class MyMixer(nn.Module):
    """Not traceable: it decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def test_the_rule_in_the_error_runs_as_printed() -> None:
    model = MyMixer()
    with pytest.raises(UnknownArchitectureError, match="MyMixer") as caught:
        find_units(model)
    code = [line for line in caught.value.fix.splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(code)), {})  # the point of the test
    neurons = find_units(model)
    assert [group.name for group in neurons] == ["stages.0.mlp", "stages.1.mlp"]
    assert neurons[0].slices == (
        Slice("stages.0.widen.weight", 0),
        Slice("stages.0.widen.bias", 0),
        Slice("stages.0.narrow.weight", 1, scaled=True),
    )
    columns = find_units(model, "columns")
    assert [group.name for group in columns] == ["stages.0.narrow", "stages.1.narrow"]


def test_an_unknown_model_type_names_the_nearest() -> None:
    model = FAMILIES["bert"].build()
    model.config.model_type = "berta"
    with pytest.raises(UnknownArchitectureError, match="nearest known type is 'bert'") as caught:
        find_units(model)
    assert "register_rule" in str(caught.value)


def test_a_rule_may_be_given_and_later_rules_win() -> None:
    model = FAMILIES["bert"].build()
    only_mlp = Rule(
        ("bert",), (Pattern("neurons", ("intermediate.dense",), ("output.dense",), "layer.*"),)
    )
    assert {group.kind for group in find_units(model, rule=only_mlp)} == {"neurons"}
    assert {group.kind for group in find_units(model)} == {"neurons", "heads"}
    register_rule(only_mlp)
    assert {group.kind for group in find_units(model)} == {"neurons"}


def test_any_prefix_matches() -> None:
    bare = FAMILIES["bert"].build().bert
    wrapped = nn.ModuleDict({"student": nn.ModuleList([bare])})
    for choice in ("columns", "neurons"):
        inner, outer = find_units(bare, choice), find_units(wrapped, choice)
        assert [group.name for group in outer] == [f"student.0.{group.name}" for group in inner]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(("x",), (Pattern("neurons", ("up",), ("narrow",), "stages.*"),)), "no block"),
        (Rule(("x",), (Pattern("neurons", ("widen",), ("down",), "stages.*"),)), "lacks a layer"),
        (Rule(("x",), (Pattern("neurons", ("widen",), ("mix",), "stages.*"),)), "equal units"),
        (Rule(("x",), (Pattern("neurons", ("stages",), ("head",)),)), "lays out"),
        (Rule(("x",), (Pattern("columns", ("mix",)),)), "no pattern for this choice"),
        (
            Rule(("x",), (Pattern("heads", ("mix",), ("mix",), "stages.*", units="n_head"),)),
            "number of units",
        ),
        (
            Rule(("x",), (Pattern("heads", ("mix",), ("narrow",), "stages.*", units=3),)),
            "equal units",
        ),
        (
            Rule(
                ("x",),
                (
                    Pattern("neurons", ("widen",), ("narrow",), "stages.*"),
                    Pattern("neurons", ("mix",), ("widen",), "stages.*", name="mix"),
                    Pattern("neurons", ("mix",), ("widen",), "stages.*", name="mix2"),
                ),
            ),
            "cut twice",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_units(MyMixer(), rule=rule)


def test_malformed_patterns_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="kind"):
        Pattern("rows", ("a",))
    with pytest.raises(ConfigurationError, match="tuple of names"):
        Pattern("columns", "fc1")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cannot be cut"):
        Pattern("neurons", ("a",))
    with pytest.raises(ConfigurationError, match="cannot be cut"):
        Pattern("columns", ("a",), ("b",))
    with pytest.raises(ConfigurationError, match="tuples"):
        Rule("bert", ())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="choice"):
        find_units(MyMixer(), "rows")


def test_adapters_in_a_cut_layer_are_refused() -> None:
    model = FAMILIES["bert"].build()
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].intermediate.dense)
    with pytest.raises(ConfigurationError, match="lays out") as caught:
        find_units(model)
    assert caught.value.where == "bert.encoder.layer.0.intermediate.dense"


def test_a_tied_embedding_that_is_cut_is_listed_under_all_names() -> None:
    config = transformers.T5Config(
        d_model=8, d_kv=3, d_ff=6, num_layers=1, num_heads=2, vocab_size=11
    )
    model = randomise(transformers.T5EncoderModel(config))
    group = find_units(model, "columns")[0]
    assert group.slices == (
        Slice("shared.weight", 1, scaled=True),
        Slice("encoder.embed_tokens.weight", 1, scaled=True),
    )


def test_a_head_that_holds_a_copy_of_the_embedding_protects_it_from_being_cut() -> None:
    model = randomise(FAMILIES["llama"].build())
    assert find_units(model, "columns")[0].name == "model.embed_tokens"
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert find_units(model, "columns")[0].name == "model.layers.0.self_attn.o_proj"


def test_masked_language_models_keep_their_tied_embedding() -> None:
    model = transformers.BertForMaskedLM(FAMILIES["bert"].build().config)
    names = [group.name for group in find_units(model, "columns")]
    assert names[0] == "bert.encoder.layer.0.attention.output.dense"


def test_a_layer_shared_by_two_names_is_one_group() -> None:
    model = MyMixer()
    model.stages[1] = model.stages[0]
    rule = Rule(("x",), (Pattern("neurons", ("widen",), ("narrow",), "stages.*"),))
    (group,) = find_units(model, rule=rule)
    assert {cut.tensor for cut in group.slices} == {
        f"stages.{i}.{leaf}"
        for i in (0, 1)
        for leaf in ("widen.weight", "widen.bias", "narrow.weight")
    }


def test_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        model = FAMILIES["gpt2-lm"].build()
    real = FAMILIES["gpt2-lm"].build()
    assert find_units(model) == find_units(real)


def test_importing_units_loads_neither_transformers_nor_flwr() -> None:
    code = "import sys, fedveil.units; print({'transformers', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
