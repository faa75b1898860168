"""Wrong rules are refused by running the model, right ones are not; the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from units_families import FAMILIES, randomise

from fedveil import Federation, FedQSN, ImageClassification, Secret
from fedveil.errors import ConfigurationError, UnknownArchitectureError
from fedveil.units import Pattern, Rule, find_units, tried_units
from fedveil.units.trial import UntriedError, try_units

SECRET = Secret(bytes(32))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def heads(outputs=QKV, units="num_key_value_heads", inputs=("self_attn.o_proj",)) -> Pattern:
    return Pattern("heads", outputs, inputs, "layers.*", units=units)


def neurons(outputs, inputs, block="layers.*") -> Pattern:
    return Pattern("neurons", outputs, inputs, block)


BERT_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
BERT_O = ("attention.output.dense",)
GATED = ("mlp.gate_proj", "mlp.up_proj")
WRONG = {
    "without a gate": ("llama", neurons(("mlp.up_proj",), ("mlp.down_proj",))),
    "without what is gated": ("llama", neurons(("mlp.gate_proj",), ("mlp.down_proj",))),
    "without values": ("llama", heads(QKV[:2])),
    "without keys": ("llama", heads((QKV[0], QKV[2]))),
    "without queries": ("llama", heads(QKV[1:])),
    "as many as queries": ("llama", heads(units="num_attention_heads")),
    "another layer of that size": ("llama", neurons(("self_attn.o_proj",), GATED[:1])),
    "another reader of that size": (
        "bert", neurons(("attention.self.value",), (*BERT_O, "intermediate.dense"), "layer.*"),
    ),
    "half heads": ("bert", Pattern("heads", BERT_QKV, BERT_O, "layer.*", units=8)),
    "the residual stream": ("bert", neurons(BERT_O, ("intermediate.dense",), "layer.*")),
    "not fused": ("gpt2-lm", Pattern("heads", ("attn.c_attn",), ("attn.c_proj",), "h.*", units=4)),
}  # fmt: skip


def model_of(family: str, made: str) -> nn.Module:
    model = FAMILIES[family].build()
    if made == "random":
        randomise(model)
    if made == "bfloat16":
        model.to(torch.bfloat16)
    if made == "float16":
        model.half()
    return model.train()


@pytest.mark.parametrize("made", ["new", "random", "bfloat16"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_refused(name: str, made: str) -> None:
    family, pattern = WRONG[name]
    model = model_of(family, made)
    with pytest.raises(ConfigurationError, match="rule for units is wrong") as caught:
        tried_units(model, rule=Rule(("x",), (pattern,)))
    assert caught.value.where.startswith(("model.layers.", "bert.encoder.", "transformer.h."))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2-lm", "t5-gated", "vit"])
@pytest.mark.parametrize("made", ["new", "float16"])
@pytest.mark.parametrize("choice", ["neurons", "columns"])
def test_a_right_rule_is_not_and_the_model_stays_as_it_was(family, made, choice) -> None:
    model = model_of(family, made)
    frozen = next(model.parameters()).requires_grad_(False)
    other = list(model.parameters())[1]
    other.grad = torch.ones_like(other)
    before = {n: (t, t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    assert tried_units(model, choice) == find_units(model, choice)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, tensor in model.state_dict(keep_vars=True).items():
        was, address, values = before[name]
        assert tensor is was
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, values)
    assert all(module.training for module in model.modules())
    assert not frozen.requires_grad
    assert torch.equal(other.grad, torch.ones_like(other))
    assert frozen.grad is None


def test_a_rule_may_leave_layers_uncut() -> None:
    model = FAMILIES["t5"].build()
    only = neurons(("DenseReluDense.wi",), ("DenseReluDense.wo",), "decoder.block.*.layer.*")
    groups = tried_units(model, rule=Rule(("x",), (only,)))
    assert [group.name[:7] for group in groups] == ["decoder", "decoder"]


# Nets of one's own ------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.other = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = self.fc1(x).relu()
        return self.fc2(x) + self.other(x).sigmoid()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x)).relu())


class LayerNormed(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)  # type: ignore[assignment]


class Unused(nn.Module):
    """Its inputs never reach a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 12), nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x if x.isfinite().all() else self.fc2(self.fc1(x)))


class SharedBias(nn.Module):
    """One number per neuron, that another layer adds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 12, bias=False), nn.Linear(12, 3)
        self.slope = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.slope)


CHAIN = neurons(("fc1",), ("fc2",), "")
ONES_OWN = {
    "a gate": (Gated, neurons(("up",), ("down",), "")),
    "a reader": (TwoReaders, CHAIN),
    "a norm": (Normed, CHAIN),
    "a norm over units": (LayerNormed, neurons(("fc1", "norm"), ("fc2",), "")),
    "a bare parameter": (SharedBias, CHAIN),
}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ONES_OWN)
def test_what_a_rule_of_ones_own_forgets_is_found(name: str, fresh: bool) -> None:
    build, pattern = ONES_OWN[name]
    model = build()
    if not fresh:
        randomise(model)
    with pytest.raises(ConfigurationError, match="rule for units is wrong"):
        tried_units(model, rule=Rule(("x",), (pattern,)))


def test_what_several_groups_share_may_be_said() -> None:
    rule = Rule(("x",), (CHAIN,), shared=("slope",))
    assert len(tried_units(SharedBias(), rule=rule)) == 1
    tried_units(SharedBias(), rule=Rule(("x",), (neurons(("fc1", "slope"), ("fc2",), ""),)))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Softplus, nn.Tanh, nn.GELU])
def test_units_that_tracing_finds_are_tried_with_any_activation(activation) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), activation(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 12), activation(), nn.Linear(12, 3),
    )  # fmt: skip
    assert len(tried_units(net)) == 3


def test_units_that_no_input_reaches_are_not_called_right() -> None:
    with pytest.raises(UntriedError, match="nothing reaches") as caught:
        tried_units(Unused(), rule=Rule(("x",), (CHAIN,)))
    assert "example_inputs" in caught.value.fix


def test_without_any_input_it_is_said_how_to_give_one() -> None:
    class Needy(TwoReaders):
        def forward(self, *, x, scale):  # type: ignore[override]
            return self.fc2(self.fc1(x).relu()) * scale

    model, rule = Needy(), Rule(("x",), (CHAIN,))
    with pytest.raises(UntriedError, match="example_inputs"):
        tried_units(model, rule=rule)
    model.example_inputs = {"x": torch.randn(2, 5), "scale": torch.ones(())}  # type: ignore[assignment]
    assert len(tried_units(model, rule=rule)) == 1


def test_an_example_may_be_a_tensor_and_goes_with_copies() -> None:
    model = nn.Sequential(nn.Unflatten(1, (2, 5)), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    model.example_inputs = torch.randn(2, 10)
    assert len(tried_units(copy.deepcopy(model))) == 1


def test_a_federation_is_tried_on_its_rows() -> None:
    model = nn.Sequential(nn.Unflatten(-1, (2, 2)), nn.Flatten(), nn.Linear(16, 70), nn.ReLU(),
                          nn.Linear(70, 3))  # fmt: skip
    with pytest.raises(UntriedError):
        FedQSN().server(model, SECRET)
    rows = [{"image": torch.randn(1, 4, 4), "label": i % 3} for i in range(6)]
    Federation(model, [rows, rows], task=ImageClassification(), scheme=FedQSN())


def test_what_withholds_nothing_tries_nothing() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 5), nn.GRU(5, 4))
    with pytest.raises(UnknownArchitectureError, match="public=") as caught:
        FedQSN().server(model, SECRET)
    assert "no rule is needed" in caught.value.fix
    server = FedQSN.once(server_mask=0.0).server(model, SECRET)
    server.begin_round(1)
    assert not any(name.startswith("units/") for name in server.release("a").sections)


def test_values_that_hide_everything_are_replaced() -> None:
    model = FAMILIES["bert"].build()
    for parameter in model.parameters():
        parameter.data.fill_(1e30)
    tried_units(model)
    with pytest.raises(ConfigurationError, match="rule for units is wrong"):
        tried_units(model, rule=Rule(("x",), (WRONG["half heads"][1],)))


def test_a_model_that_fails_while_it_is_tried_comes_out_as_it_was() -> None:
    class Failing(TwoReaders):
        fails = 0

        def forward(self, x):
            self.fails += 1
            if self.fails % 3 == 0:
                raise RuntimeError("out of paper")
            return super().forward(x)

    model = Failing()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(UntriedError, match="out of paper"):
        tried_units(model, rule=Rule(("x",), (CHAIN,)))
    for name, parameter in model.named_parameters():
        was, values = before[name]
        assert parameter is was
        assert torch.equal(parameter, values)
        assert parameter.grad is None
    assert model.training


def test_a_model_is_tried_once(monkeypatch) -> None:
    model, calls = FAMILIES["bert"].build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    groups = find_units(model)
    try_units(model, groups)
    before = len(calls)
    assert before > 3
    try_units(model, groups)
    assert len(calls) == before
    try_units(model, groups[:1])
    assert len(calls) > before


class Gate(nn.Module):
    """Something that no derivative tells of stands beside the units of `a`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 2)
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.register_buffer("scale", torch.rand(16) + 0.5)
        self.kind, self.example_inputs = kind, torch.randn(6, 8)

    def forward(self, x):
        unit, gate = self.a(x), self.g(x)
        made = {
            "scale": lambda: unit.relu() * self.scale,
            "offset": lambda: (unit - self.scale).relu(),
            "detached": lambda: unit.relu() * gate.detach(),
            "hard": lambda: unit.relu() * (gate > 0).float(),
            "norm": lambda: self.norm(unit).relu(),
            "none": lambda: unit.relu(),
        }
        return self.b(made[self.kind]())


@pytest.mark.parametrize("kind", ["scale", "offset", "detached", "hard", "norm"])
def test_what_has_no_derivative_and_belongs_to_units_may_not_be_left_out(kind) -> None:
    rule = Rule(("x",), (Pattern("neurons", ("a",), ("b",)),))
    with pytest.raises(ConfigurationError, match="leaves out something"):
        tried_units(Gate(kind), rule=rule)


def test_what_has_no_derivative_and_is_of_no_unit_is_in_nobodys_way() -> None:
    tried_units(Gate("none"), rule=Rule(("x",), (Pattern("neurons", ("a",), ("b",)),)))


class Halves(nn.Module):
    """A gate and a value side by side, of which statistics or a table stand beside each other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 32), nn.Linear(16, 2)
        self.norm = nn.BatchNorm1d(32, affine=False)
        self.table = nn.Parameter(torch.rand(64) + 0.5)
        self.kind, self.example_inputs = kind, torch.randn(6, 8)

    def forward(self, x):
        both = self.both(x)
        if self.kind == "norm":
            both = self.norm(both)
        gate, value = both.chunk(2, -1)
        unit = gate.sigmoid() * value
        if self.kind == "table":
            one, two, three, four = self.table.chunk(4)
            unit = (unit * one + two * unit.square() + three * unit.sin()) * four
        return self.down(unit)


@pytest.mark.parametrize("kind", ["norm", "table"])
def test_nor_may_what_lies_in_several_parts(kind) -> None:
    rule = Rule(("x",), (Pattern("neurons", ("both",), ("down",), fused=2),))
    with pytest.raises(ConfigurationError, match="leaves out something"):
        tried_units(Halves(kind), rule=rule)
    tried_units(Halves("none"), rule=rule)


class Odd:
    """A configuration of one's own, of which nothing can be made."""

    def __init__(self, **settings: object) -> None:
        self.__dict__ |= settings


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": {"height": 8, "width": 8}},
        {"image_size": "8"},
        {"pad_token_id": [0], "vocab_size": 8},
        {"max_position_embeddings": "long"},
    ],
)
def test_a_configuration_that_says_nothing_is_in_nobodys_way(settings) -> None:
    class Own(nn.Sequential):
        def forward(self, pixel_values=None, input_ids=None):
            return super().forward(pixel_values)

    model = Own(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    model.__dict__["config"] = Odd(**settings)
    rule = Rule(("x",), (Pattern("neurons", ("0",), ("2",)),))
    assert tried_units(model, run=lambda net: net(torch.ones(3, 8)), rule=rule)
