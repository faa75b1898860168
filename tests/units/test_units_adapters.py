"""Adapters on cut layers: cut with the layer like the merged weight, or refused by name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from units_families import FAMILIES, HIDDEN, randomise
from units_removal import drop_inputs, drop_outputs, masks, others, zeroed

import fedveil
from fedveil.errors import ConfigurationError, UnknownArchitectureError
from fedveil.masking import Release
from fedveil.shrinking import shrinkable
from fedveil.units import Pattern, Rule, find_units
from fedveil.wire import Message

HIDDEN_UNITS = {"heads": [1], "neurons": [0, 3], "columns": [1, 2]}
CAUSAL = {"task_type": "CAUSAL_LM"}


def llama(**changes: object) -> Any:
    """A LLaMA with sizes that every tuner of PEFT can divide."""
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 17, **changes,
        }
    )  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config))


pytestmark = [
    # Of PEFT, about what is meant here.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]


def adapted(model: nn.Module, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Adapters begin as zeros or ones, which would hide what is left of them.
        return randomise(peft.get_peft_model(model, config))


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# What is cut ------------------------------------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "attention only": {"target": "attention"},
    "mlp only": {"target": "mlp"},
}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"attention": ["q_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "down_proj"]},
    "bert": {"attention": ["query", "value"], "mlp": ["intermediate.dense", "output.dense"]},
    "gpt2-untied": {"attention": ["c_attn"], "mlp": ["c_fc", "mlp.c_proj"]},
    "vit": {"attention": ["k_proj", "o_proj"], "mlp": ["fc1", "fc2"]},
}


def lora(family: str, **changes: Any) -> peft.LoraConfig:
    target = changes.pop("target", None)
    targets = [TARGETS[family][target]] if target else TARGETS[family].values()
    return peft.LoraConfig(
        r=2, target_modules=[name for names in targets for name in names], **changes
    )


def assert_zeros_do_what_they_do_when_merged(
    model: Any, inputs: dict[str, Tensor], choice: str
) -> None:
    """Zeros in an adapter and its layer are zeros in the merged weight, which removal proves."""
    merged = copy.deepcopy(model).merge_and_unload()
    hidden, whole = (
        zeroed(one, masks(find_units(one, choice), one.state_dict(), HIDDEN_UNITS))
        for one in (model, merged)
    )
    after = run(hidden, inputs)
    torch.testing.assert_close(after, run(whole, inputs), rtol=1e-4, atol=1e-5)
    assert (after - run(model, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("family", "choice", "kind"),
    [(family, choice, "bias") for family in TARGETS for choice in ("neurons", "columns")]
    + [("llama", "neurons", kind) for kind in PLAIN],
)
def test_zeros_in_lora_equal_zeros_in_the_merged_weight(
    family: str, choice: str, kind: str
) -> None:
    model = adapted(FAMILIES[family].build(), lora(family, **PLAIN[kind]))
    assert_zeros_do_what_they_do_when_merged(model, FAMILIES[family].inputs(), choice)


@pytest.mark.parametrize("choice", ["neurons", "columns"])
@pytest.mark.parametrize("family", ["llama", "gpt2-untied"])
def test_a_factor_scales_an_adapter_as_it_does_the_merged_weight(family: str, choice: str) -> None:
    model = adapted(FAMILIES[family].build(), lora(family))
    merged = copy.deepcopy(model).merge_and_unload()
    for one in (model, merged):
        state = one.state_dict()
        scaled = {(c.tensor, c.axis) for g in find_units(one, choice) for c in g.slices if c.scaled}
        for tensor, axis in scaled:
            shape = [1] * state[tensor].dim()
            shape[axis] = -1
            factor = torch.linspace(0.5, 2.0, state[tensor].shape[axis])
            state[tensor].mul_(factor.view(shape))
    inputs = FAMILIES[family].inputs()
    torch.testing.assert_close(run(model, inputs), run(merged, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [["one"], ["one", "two"]])
def test_every_adapter_of_a_layer_is_cut(active: list[str]) -> None:
    family = FAMILIES["llama"]
    model = peft.get_peft_model(family.build(), lora("llama"), adapter_name="one")
    model.add_adapter("two", lora("llama", lora_bias=True, target="mlp"))
    model.base_model.set_adapter(active)
    cut = {c.tensor for g in find_units(randomise(model)) for c in g.slices}
    place = "base_model.model.model.layers.0.mlp"
    for leaf in ("lora_B.one.weight", "lora_B.two.weight", "lora_B.two.bias"):
        assert f"{place}.gate_proj.{leaf}" in cut
    assert f"{place}.down_proj.lora_A.two.weight" in cut
    assert_zeros_do_what_they_do_when_merged(model, family.inputs(), "neurons")


def test_zeros_equal_a_network_and_an_adapter_without_the_neurons() -> None:
    family = FAMILIES["llama"]
    model = adapted(family.build(), lora("llama", target="mlp", lora_bias=True))
    small, keep = copy.deepcopy(model), others(HIDDEN, HIDDEN_UNITS["neurons"])
    for layer in small.base_model.model.model.layers:
        for module in (layer.mlp.gate_proj.base_layer, layer.mlp.gate_proj.lora_B.default):
            drop_outputs(module, keep)
        drop_outputs(layer.mlp.up_proj, keep)
        for module in (layer.mlp.down_proj.base_layer, layer.mlp.down_proj.lora_A.default):
            drop_inputs(module, keep)
    covered = masks(find_units(model, "mlp"), model.state_dict(), HIDDEN_UNITS)
    hidden = run(zeroed(model, covered), family.inputs())
    torch.testing.assert_close(hidden, run(small, family.inputs()), rtol=1e-5, atol=1e-5)
    for name, whole in model.state_dict().items():
        assert torch.equal(whole[~covered[name]], small.state_dict()[name].flatten()), name


@pytest.mark.parametrize("how", ["lora", "copies"])
def test_an_embedding_is_cut_with_its_adapter(how: str) -> None:
    where = ["embed_tokens"]
    config = (
        peft.LoraConfig(r=2, target_modules=where)
        if how == "lora"
        else peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=where)
    )
    model = adapted(llama(), config)
    groups = find_units(model, "columns")
    cut = {(c.tensor.split("embed_tokens.")[1], c.axis) for c in groups[0].slices}
    assert cut == (
        {("base_layer.weight", 1), ("lora_embedding_B.default", 0)}
        if how == "lora"
        else {("original_module.weight", 1), ("modules_to_save.default.weight", 1)}
    )
    tokens = {"input_ids": torch.randint(17, (2, 5))}
    assert_zeros_do_what_they_do_when_merged(model, tokens, "columns")


def test_copies_of_a_layer_that_is_trained_beside_an_adapter_are_cut() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"])
    model = adapted(llama(), config)
    (group, _) = find_units(model, "mlp")
    own = [c.tensor.split("up_proj.")[1] for c in group.slices if "up_proj" in c.tensor]
    assert own == ["original_module.weight", "modules_to_save.default.weight"]
    assert_zeros_do_what_they_do_when_merged(
        model, {"input_ids": torch.randint(17, (2, 5))}, "neurons"
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_a_rule_may_name_the_layer_below_its_adapter() -> None:
    net = randomise(Convolutions())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["one", "two"]), net)
    outer, inner = (
        Rule(("Convolutions",), (Pattern("channels", (f"one{below}",), (f"two{below}",)),))
        for below in ("", ".base_layer")
    )
    assert find_units(net, rule=outer)[0].slices == find_units(net, rule=inner)[0].slices


def test_lora_of_convolutions_is_cut() -> None:
    net = randomise(Convolutions())
    config = peft.LoraConfig(r=2, target_modules=["one", "two"])
    peft.inject_adapter_in_model(config, net)
    rule = Rule(("Convolutions",), (Pattern("channels", ("one",), ("two",)),))
    (group,) = find_units(randomise(net), rule=rule)
    small, keep = copy.deepcopy(net), others(6, [1, 4])
    for module in (small.one.base_layer, small.one.lora_B.default):
        drop_outputs(module, keep)
    for module in (small.two.base_layer, small.two.lora_A.default):
        drop_inputs(module, keep)
    hidden = zeroed(net, masks([group], net.state_dict(), {"channels": [1, 4]}))
    x = torch.randn(2, 2, 7, 7)
    torch.testing.assert_close(hidden(x), small(x), rtol=1e-5, atol=1e-5)
    release = {group.name: Release(keep, 1.0)}
    assert not shrinkable(net, [group], release)


@pytest.mark.parametrize("target", [["up_proj"], ["down_proj"], ["gate_proj", "up_proj"]])
def test_layers_with_an_adapter_stay_zeros_where_others_shrink(target: list[str]) -> None:
    model = llama()
    released = {g.name: Release(torch.arange(30), 1.0) for g in find_units(model, "mlp")}
    assert len(shrinkable(model, find_units(model, "mlp"), released)) == 2
    config = peft.LoraConfig(r=2, target_modules=target, layers_to_transform=[1])
    model = adapted(model, config)
    groups = find_units(model, "mlp")
    released = {g.name: Release(torch.arange(30), 1.0) for g in groups}
    assert [g.name for g in shrinkable(model, groups, released)] == [groups[0].name]


# What is refused --------------------------------------------------------------------------------

EXTRA: dict[str, dict[str, object]] = {
    "ADALORA": {"total_step": 9, "tinit": 1, "tfinal": 2, "init_r": 2},
    "ADAPTION_PROMPT": {
        "adapter_layers": 1, "adapter_len": 2, "target_modules": "self_attn", **CAUSAL,
    },
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], **CAUSAL},
    "FOURIERFT": {"n_frequency": 4},
    "IA3": {"feedforward_modules": []},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 4},
}  # fmt: skip
ELSEWHERE = {"TRAINABLE_TOKENS", "LN_TUNING", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "P_TUNING",
             "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}  # fmt: skip
"""What PEFT does not put on the layers of an MLP."""
NOT_BUILT = {"ADAMSS", "XLORA"}
"""One wants another package; the other is tried by itself."""


def tuner(name: str, target: list[str]) -> peft.PeftConfig:
    kind = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.name == name)
    fields = kind.__dataclass_fields__
    settings: dict[str, object] = {"target_modules": target} if "target_modules" in fields else {}
    settings |= {"r": 2} if "r" in fields and name != "ADALORA" else {}
    settings |= {"num_virtual_tokens": 2} if "num_virtual_tokens" in fields else {}
    return kind(**{**settings, **CAUSAL, **EXTRA.get(name, {})})


every_tuner = pytest.mark.parametrize(
    "name", sorted({t.name for t in PEFT_TYPE_TO_CONFIG_MAPPING} - ELSEWHERE - NOT_BUILT)
)


@every_tuner
@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
def test_every_tuner_but_lora_is_refused_on_a_cut_layer(name: str, target: str) -> None:
    model = adapted(llama(), tuner(name, [target]))
    if name == "LORA":
        find_units(model, "mlp")
        return
    with pytest.raises(ConfigurationError, match="cannot be cut") as caught:
        find_units(model, "mlp")
    assert caught.value.where == f"base_model.model.model.layers.0.mlp.{target}"
    assert name.replace("_", "") in caught.value.found.upper().replace("-", "").replace("_", "")


@every_tuner
def test_every_tuner_may_stay_where_nothing_is_cut(name: str) -> None:
    model = llama()
    before = find_units(model, "mlp")
    if name == "SHADOW":  # it puts a small copy of the model beside it
        with pytest.raises(ConfigurationError, match="shadow"):
            find_units(adapted(model, tuner(name, ["q_proj"])), "mlp")
        return
    after = find_units(adapted(model, tuner(name, ["q_proj"])), "mlp")
    assert [f"base_model.model.{g.name}" for g in before] == [g.name for g in after]


VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "ALoraLinearVariant": {"alora_invocation_tokens": [1], **CAUSAL},
    "MiCALinearVariant": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_refused_by_name(variant: str, target: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=[target], **VARIANTS[variant])
    with pytest.raises(ConfigurationError, match=variant) as caught:
        find_units(adapted(llama(), config), "mlp")
    assert caught.value.where.endswith(target)


def test_lora_of_a_parameter_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.up_proj.weight"])
    with pytest.raises(ConfigurationError, match="ParamWrapper"):
        find_units(adapted(llama(), config), "mlp")


def test_an_adapter_that_weighs_others_by_token_is_refused(tmp_path: Path) -> None:
    adapted(llama(), peft.LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(tmp_path)
    base = llama(use_cache=False)
    config = peft.XLoraConfig(hidden_size=16, adapters={"a": str(tmp_path)}, **CAUSAL)
    with pytest.raises(ConfigurationError, match="X-LoRA"):
        find_units(peft.get_peft_model(base, config), "mlp")


@pytest.mark.parametrize("order", [("IA3", "LORA"), ("LORA", "IA3")])
def test_an_adapter_below_or_above_lora_is_refused(order: tuple[str, str]) -> None:
    model = llama()
    for name in order:
        peft.inject_adapter_in_model(tuner(name, ["up_proj"]), model, adapter_name=name.lower())
    layer = model.model.layers[0].mlp.up_proj
    if not hasattr(layer.base_layer, "base_layer"):
        pytest.skip("this PEFT does not put one into the other")
    with pytest.raises(ConfigurationError, match="IA3"):
        find_units(model, "mlp")


class Wrapped(nn.Module):
    """Somebody's own LoRA, with the names of PEFT."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Inside(nn.Linear):
    """LoRA within the layer, as loralib has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.lora_A = nn.Parameter(torch.zeros(2, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, 2))


class Learned(peft.tuners.lora.layer.Linear):
    """A class of one's own over that of PEFT."""


@pytest.mark.parametrize("leaf", ["up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["wrapped", "inside", "subclass"])
def test_adapters_of_ones_own_are_refused(kind: str, leaf: str) -> None:
    model = llama()
    if kind == "subclass":
        model = adapted(model, peft.LoraConfig(r=2, target_modules=[leaf]))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaMLP":
            layer = getattr(module, leaf)
            if kind == "subclass":
                layer.__class__ = Learned
            elif kind == "wrapped":
                setattr(module, leaf, Wrapped(layer))
            else:
                setattr(module, leaf, Inside(layer.in_features, layer.out_features))
    with pytest.raises(ConfigurationError) as caught:
        find_units(model, "mlp")
    assert caught.value.where.endswith(leaf)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("PREFIX_TUNING", {"neurons", "columns"}),
        ("CARTRIDGE", {"neurons", "columns"}),
        ("PROMPT_TUNING", {"columns"}),
        ("P_TUNING", {"columns"}),
        ("MULTITASK_PROMPT_TUNING", {"columns"}),
        ("CPT", {"columns"}),
        ("ADAPTION_PROMPT", {"neurons", "columns"}),
        ("LN_TUNING", set()),
    ],
)
def test_prompts_are_refused_where_they_hold_something_of_a_unit(
    name: str, refused: set[str]
) -> None:
    model = adapted(llama(), tuner(name, ["input_layernorm"]))
    for choice in ("mlp", "neurons", "columns"):
        if choice in refused:
            with pytest.raises(ConfigurationError, match="cannot be cut"):
                find_units(model, choice)
        else:
            assert find_units(model, choice)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]), "columns"),
        (peft.LoraConfig(trainable_token_indices=[1], target_modules=["q_proj"]), "columns"),
        (peft.LNTuningConfig(target_modules=["norm"]), ""),
        (peft.VeraConfig(r=2, target_modules=["q_proj"]), "neurons"),
        (peft.LoraConfig(use_dora=True, target_modules=["embed_tokens"]), "columns"),
    ],
)
def test_only_choices_that_cut_the_adapted_layer_are_refused(config, refused: str) -> None:
    model = adapted(llama(), config)
    for choice in ("mlp", "neurons", "columns"):
        if choice == refused:
            with pytest.raises(ConfigurationError, match="cannot be cut"):
                find_units(model, choice)
        else:
            assert find_units(model, choice)


def bert_norms() -> nn.Module:
    return adapted(FAMILIES["bert"].build(), peft.LNTuningConfig(target_modules=["LayerNorm"]))


def test_a_tuned_norm_that_columns_cut_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LN tuning"):
        find_units(bert_norms(), "columns")
    assert find_units(bert_norms(), "neurons")


@pytest.mark.parametrize("name", ["LORA", "IA3", "LOHA"])
@pytest.mark.parametrize("how", ["merged", "switched off", "active"])
def test_a_plain_net_is_not_cut_at_layers_with_an_adapter(name: str, how: str) -> None:
    net: Any = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    peft.inject_adapter_in_model(tuner(name, ["0"]), net)
    if how == "merged":
        net[0].merge()
    elif how == "switched off":
        net[0].enable_adapters(False)
    try:
        found = [group.name for group in find_units(net)]
    except UnknownArchitectureError:
        assert how == "active"  # PEFT's own forward cannot be traced
    else:
        assert found == ["2"]


def test_a_plain_net_whose_hidden_layers_all_have_adapters_is_refused() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    peft.inject_adapter_in_model(tuner("LORA", ["0"]), net)
    net[0].enable_adapters(False)
    with pytest.raises(UnknownArchitectureError):
        find_units(net)


# What travels -----------------------------------------------------------------------------------


def test_nothing_of_a_withheld_unit_is_in_a_message() -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["up_proj", "down_proj", "v_proj"], modules_to_save=["gate_proj"]
    )
    model = adapted(llama(), config)
    scheme = fedveil.FedQSN(server_mask=0.5, client_mask=0.0, bits=None, units="neurons")
    server = scheme.server(model, fedveil.Secret.generate())
    server.begin_round(1)
    sections = Message.from_bytes(bytes(server.release("a").to_bytes())).sections
    shapes = {name: s.tensor.shape for name, s in sections.items() if hasattr(s, "tensor")}
    mlp = {name: shape for name, shape in shapes.items() if ".mlp." in name}
    assert len(mlp) == 2 * 8
    assert all(32 not in shape and (16 in shape or "lora_" in name) for name, shape in mlp.items())
    assert all(shapes[n][0] == 8 for n in shapes if ".v_proj." in n and "lora_A" not in n)


@pytest.mark.parametrize("shrink", [True, False])
def test_withheld_parts_of_an_adapter_stay_zero_while_it_is_trained(shrink: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"])
    model = adapted(llama(), config).train()
    scheme = fedveil.FedQSN(server_mask=0.5, client_mask=0.0, bits=None, units="mlp", shrink=shrink)
    server = scheme.server(model, fedveil.Secret.generate())
    server.begin_round(1)
    message = server.release("a")

    class Trainer:
        replay = None

        def __call__(self, proxy: nn.Module) -> object:
            optimiser = torch.optim.AdamW([p for p in proxy.parameters() if p.requires_grad], 0.1)
            ids = torch.randint(17, (2, 5))
            for _ in range(2):
                optimiser.zero_grad()
                proxy(input_ids=ids, labels=ids).loss.backward()
                optimiser.step()
            return SimpleNamespace(examples=2, steps=2, loss_first=1.0, loss_last=1.0)

    trained = copy.deepcopy(model)
    reply = scheme.client().fit(message, trained, Trainer())  # type: ignore[arg-type]
    updates = {name: s.tensor for name, s in reply.sections.items()}
    place = "base_model.model.model.layers.0.mlp"
    assert list(updates[f"{place}.up_proj.lora_B.default.weight"].shape) == [16, 2]
    assert list(updates[f"{place}.down_proj.lora_A.default.weight"].shape) == [2, 16]
    assert all(bool(t.isfinite().all()) for t in updates.values())
    state = trained.state_dict()
    for group in find_units(model, "mlp"):
        have = set(message.sections[f"units/{group.name}"].released.tolist())
        gone = torch.tensor([u for u in range(group.size) if u not in have])
        for cut in group.slices:
            assert not state[cut.tensor].index_select(cut.axis, cut.indices(gone)).any()
            assert state[cut.tensor].any()
