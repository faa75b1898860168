"""A model without its withheld units learns what one with zeros in their place learns."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "units"))
from units_families import FAMILIES, randomise

from fedveil import Evaluation, FedQSN, RegMean, Training
from fedveil.errors import ConfigurationError
from fedveil.masking import Release
from fedveil.shrinking import shrinkable, shrunk
from fedveil.state import read_state
from fedveil.tasks import Prepared
from fedveil.training import LocalRun, Trainer
from fedveil.units import Pattern, Rule, find_units, registry, validate
from fedveil.wire import Message, Statistics
from toys import (
    CHOICES,
    SECRET,
    TrainBy,
    bare,
    bert,
    convnet,
    federation,
    gpt2,
    rows,
    texts,
    weights,
)  # fmt: skip

# Nets -------------------------------------------------------------------------------------------


class LeNet(nn.Module):
    """As in tutorials: the flattened size is written down, so the channels before it cannot go."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(6 * 4, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, 6 * 4)
        return self.fc2(F.relu(self.fc1(x)))


class Divides(nn.Module):
    """Divides by a size that it reads off: a smaller layer would be divided by less."""

    def __init__(self, size):
        super().__init__()
        self.size, self.fc1, self.fc2 = size, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = F.relu(self.fc1(x))
        return self.fc2(hidden) / self.size(hidden)


class Gated(nn.Module):
    """No plain chain: a rule says what its units are."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = -x if x.sum() > 1e9 else x
        return self.fc2(F.relu(self.fc1(x)))


class Twice(Branching):
    """Uses a layer in two places."""

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x))) + self.fc1(x).mean()


class Normed(Branching):
    """With a layer between, of which its rule does not tell."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.fc2(F.relu(self.norm(self.fc1(x))))


chain = nn.Sequential
PLAIN = {
    "mlp": (
        lambda: chain(
            nn.Flatten(), nn.Linear(16, 12), nn.Sigmoid(), nn.Linear(12, 10), nn.ReLU(),
            nn.Linear(10, 3),
        ),
        (1, 4, 4), 2,
    ),
    "tokens": (lambda: chain(nn.Linear(5, 9), nn.PReLU(), nn.Linear(9, 3)), (4, 5), 1),
    "slopes": (lambda: chain(nn.Linear(5, 9), nn.PReLU(9), nn.Linear(9, 3)), (5,), 1),
    "conv": (
        lambda: chain(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(8, 3),
        ),
        (1, 4, 4), 2,
    ),
    "flat": (
        lambda: chain(
            nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(30),
            nn.Linear(30, 3),
        ),
        (2, 5), 1,
    ),
    "depthwise": (
        lambda: chain(
            nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(),
            nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        (1, 4, 4), 2,
    ),
    # The outputs of a convolution in groups must stay in equal groups: the first layer stays.
    "grouped": (
        lambda: chain(
            nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 3),
        ),
        (2, 4, 4), 1,
    ),
    "lenet": (LeNet, (1, 4, 4), 1),
    "divides by units": (lambda: Divides(lambda h: h.shape[-1]), (4,), 0),
    "divides by size": (lambda: Divides(lambda h: h.size(1)), (4,), 0),
    "divides by sizes": (lambda: Divides(lambda h: h.size()[1]), (4,), 0),
    "divides by batch": (lambda: Divides(lambda h: h.shape[0] * h.dim() * h.size(0)), (4,), 1),
}  # fmt: skip
"""Per net: how to build it, the shape of one input, and how many of its groups can be shrunk."""
NAMES = sorted(PLAIN) + sorted(FAMILIES)


def build(name):
    """A random model without dropout, and one batch of its inputs.

    Dropout among fewer values draws other numbers.
    """
    if name in PLAIN:
        make, shape, _ = PLAIN[name]
        generator = torch.Generator().manual_seed(1)
        return randomise(make()), {"x": torch.randn(6, *shape, generator=generator)}
    model = randomise(FAMILIES[name].build())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, FAMILIES[name].inputs()


# Training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """One batch of inputs; outputs shall be some fixed numbers."""

    batch: dict

    name = "fixed"

    def validate(self, data):
        """Everything goes."""

    def prepare(self, data):
        return data if isinstance(data, Prepared) else Prepared(data)

    def collate(self, rows):
        return {key: tensor[list(rows)] for key, tensor in self.batch.items()}

    def loss(self, model, batch):
        dtype = next(model.parameters()).dtype
        batch = {k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()}
        out = model(batch["x"]) if "x" in batch else model(**batch).logits
        wanted = torch.linspace(-1, 1, out[0].numel(), dtype=dtype).view_as(out[0])
        return (out - wanted).square().mean().float()


SGD = Training(steps=3, batch_size=2, learning_rate=0.02, optimizer="sgd", momentum=0.5)
ADAM = Training(steps=3, batch_size=2, learning_rate=0.01, weight_decay=0.1)
TRAININGS = (SGD, ADAM, replace(SGD, max_grad_norm=0.01), replace(ADAM, max_grad_norm=None))


def run_on(batch, training=SGD):
    count = len(next(iter(batch.values())))
    return LocalRun(Trainer(Fixed(batch), range(count), training), seed=5)  # type: ignore[arg-type]


def proxy_of(model, scheme):
    server = scheme.server(model, SECRET)
    server.begin_round(1)
    return Message.from_bytes(server.release("a").to_bytes())


def both(model, scheme, trainer):
    """What a client returns and the model it is left with: shrunk, and zero-filled."""
    results = []
    for shrink in (True, False):
        own = bare(model)
        for parameter, like in zip(own.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
        client = replace(scheme, shrink=shrink).client()
        results.append((client.fit(proxy_of(model, scheme), own, trainer), own))
    return results


def check_equal(results, **tolerance):
    (one, small), (other, full) = results
    for name in one.sections.keys() | other.sections.keys():
        check_sections(*(reply.sections.get(name) for reply in (one, other)), **tolerance)
    for key in ("loss_first", "loss_last"):
        assert one.scalars[key] == pytest.approx(other.scalars[key], rel=1e-2)
    for name, tensor in weights(small).items():
        torch.testing.assert_close(tensor, weights(full)[name], **tolerance)


def check_sections(found, wanted, **tolerance):
    """Equal but for rounding; a tensor that did not change at all is not in a reply."""
    like = (found or wanted).tensor
    found, wanted = (torch.zeros_like(like) if s is None else s.tensor for s in (found, wanted))
    torch.testing.assert_close(found, wanted, **tolerance)


# The same update --------------------------------------------------------------------------------


@st.composite
def schemes(draw):
    rates = st.sampled_from([0.0, 0.2, 0.5, 0.8])
    return FedQSN(
        server_mask=draw(rates),
        client_mask=draw(rates),
        bits=draw(st.sampled_from([None, 4])),
        units=draw(st.sampled_from(CHOICES)),
        draw=draw(st.sampled_from(["exact", "bernoulli"])),
        unbiased=draw(st.booleans()),
    )


@settings(max_examples=150)
@given(st.sampled_from(NAMES), schemes(), st.sampled_from(TRAININGS), st.data())
def test_the_update_is_that_of_zeros_in_their_place(name, scheme, training, data):
    # In float64: Adam makes steps of full size out of gradients that are zero but for rounding.
    model, batch = build(name)
    model.double()
    names = [n for n, _ in model.named_parameters()]
    frozen, fixed = (data.draw(st.sampled_from(names)) for _ in range(2))
    model.get_parameter(fixed).requires_grad_(False)
    training = replace(training, frozen=(frozen,))
    check_equal(both(model, scheme, run_on(batch, training)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str
)
def test_so_it_is_in_lower_precision_but_for_rounding(name, dtype, tolerance):
    model, batch = build(name)
    scheme = FedQSN(units="neurons", server_mask=0.0, client_mask=0.4, bits=4)
    (one, _), (other, _) = both(model.to(dtype), scheme, run_on(batch))
    assert one.sections.keys() == other.sections.keys()
    found, wanted = (
        torch.cat([reply.sections[name].tensor.flatten() for name in sorted(one.sections)])
        for reply in (one, other)
    )
    assert wanted.norm() > 0
    assert (found - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "conv", "t5"])
def test_so_are_grams(name):
    # They are taken from the model as it is after training.
    model, batch = build(name)
    model.double()
    scheme = FedQSN(units="neurons", client_mask=0.5, aggregation=RegMean(bits=None))
    results = both(model, scheme, run_on(batch))
    check_equal(results, rtol=1e-5, atol=1e-6)
    assert any(isinstance(section, Statistics) for section in results[0][0].sections.values())


@pytest.mark.parametrize("make", [bert, gpt2, convnet])
def test_so_is_a_federation_with_all_that_it_measures(make):
    # Default units of a transformer have no dropout among them: it draws the same numbers.
    model, measure = make(), Evaluation(1, proxies_every=1)
    test = (texts if hasattr(model, "config") else rows)(6, seed=9)
    one, other = (
        federation(
            model, scheme=FedQSN(client_mask=0.5, shrink=shrink), test=test, evaluation=measure
        ).run(2)
        for shrink in (True, False)
    )
    for first, second in zip(one.rounds, other.rounds, strict=True):
        assert first.failed == second.failed == {}
        assert first.loss_last == pytest.approx(second.loss_last, rel=1e-4)
        assert len(first.measures) == 4
        for name, measures in first.measures.items():
            assert measures == pytest.approx(second.measures[name], rel=1e-4), name
    for name, tensor in weights(one.global_model).items():
        torch.testing.assert_close(
            tensor, weights(other.global_model)[name], rtol=1e-4, atol=1e-5, msg=name
        )


# What is made smaller ---------------------------------------------------------------------------


def cut_in_half(model, choice="neurons"):
    """A model's groups, with every second unit withheld."""
    groups = find_units(model, choice)
    return groups, {g.name: Release(torch.arange(0, g.size, 2), 1.0) for g in groups}


def withheld(model, groups, released):
    """Per tensor, True where an element belongs to a withheld unit of one of the groups."""
    gone = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in read_state(model).items()}
    for group in groups:
        for unit in set(range(group.size)) - set(released[group.name].units.tolist()):
            for cut in (cut for cut in group.slices if cut.tensor in gone):
                gone[cut.tensor].narrow(cut.axis, cut.offset + unit * cut.width, cut.width).fill_(1)
    return gone


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", CHOICES)
def test_all_units_go_but_columns_and_those_whose_place_has_one_width(name, choice):
    model, _ = build(name)
    smaller = shrinkable(model, *cut_in_half(model, choice))
    if choice == "columns":
        assert smaller == ()
    elif name in PLAIN:
        assert len(smaller) == PLAIN[name][2]
    else:
        # T5 hands a position bias of one number per head from layer to layer.
        fixed = {"heads"} if name.startswith("t5") else set()
        assert list(smaller) == [g for g in find_units(model, choice) if g.kind not in fixed]


@pytest.mark.parametrize("name", NAMES)
def test_inside_there_is_nothing_of_a_withheld_unit(name):
    model, _ = build(name)
    groups, released = cut_in_half(model)
    before, everything = weights(model), withheld(model, groups, released)
    gone = withheld(model, shrinkable(model, groups, released), released)
    with shrunk(model, groups, released) as still:
        inside = weights(model)
        assert list(inside) == list(before)
        for tensor, values in inside.items():
            assert torch.equal(values.flatten(), before[tensor][~gone[tensor]]), tensor
            left = still.gather(tensor, values).numel()
            assert left == int((~everything[tensor]).sum()), tensor


@pytest.mark.parametrize("name", NAMES)
def test_layers_say_their_size(name):
    model, _ = build(name)
    words = repr(model)
    with shrunk(model, *cut_in_half(model)):
        for module in model.modules():
            kind = type(module).__name__
            shape = getattr(getattr(module, "weight", None), "shape", ())
            if kind == "Linear":
                assert (module.out_features, module.in_features) == shape
            elif kind == "Conv1D":
                assert (module.nx, module.nf) == shape
            elif kind in ("Conv1d", "Conv2d"):
                assert (module.out_channels, module.in_channels // module.groups) == shape[:2]
            elif kind.startswith("BatchNorm"):
                assert module.num_features == len(module.running_mean)
            elif kind == "PReLU":
                assert module.num_parameters == len(module.weight)
    assert repr(model) == words


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_whole_again_with_zeros(name, fails):
    model, _ = build(name)
    groups, released = cut_in_half(model)
    before, objects = weights(model), dict(model.named_parameters())
    gone = withheld(model, shrinkable(model, groups, released), released)
    try:
        with shrunk(model, groups, released):
            for parameter in model.parameters():
                parameter.data += 1
            if fails:
                raise InterruptionError
    except InterruptionError:
        assert fails
    assert list(dict(model.named_parameters()).items()) == list(objects.items())
    for tensor, values in weights(model).items():
        expected = before[tensor] + 1 if tensor in objects else before[tensor]
        assert torch.equal(values, expected.masked_fill(gone[tensor], 0)), tensor


def test_a_model_of_which_nothing_is_withheld_is_left_alone():
    model, _ = build("gpt2-lm")
    groups = find_units(model, "neurons")
    addresses = [p.data_ptr() for p in model.parameters()]
    everything = {g.name: Release(torch.arange(g.size), 1.0) for g in groups}
    with shrunk(model, groups, everything) as still:
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert not any(still.positions(name) for name in read_state(model))


def test_a_group_of_which_nothing_is_released_keeps_its_zeros():
    # A layer without any output is one that many operations refuse.
    model, _ = build("gpt2-lm")
    groups = find_units(model, "neurons")
    nothing = {g.name: Release(torch.arange(0), 1.0) for g in groups}
    assert shrinkable(model, groups, nothing) == ()


def test_memory_of_the_full_size_is_given_back_inside():
    model, _ = build("mlp")
    weight = model[1].weight
    with shrunk(model, *cut_in_half(model)):
        assert weight.untyped_storage().nbytes() == 0
        assert model[1].weight.untyped_storage().nbytes() == 4 * 6 * 16


def test_a_layout_in_memory_is_kept():
    model = build("conv")[0].to(memory_format=torch.channels_last)
    strides = {name: tensor.stride() for name, tensor in read_state(model).items()}
    with shrunk(model, *cut_in_half(model)):
        assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert {name: tensor.stride() for name, tensor in read_state(model).items()} == strides


def test_a_graph_that_someone_kept_does_not_get_in_the_way():
    model, batch = build("mlp")
    kept = model(batch["x"]).sum()
    with shrunk(model, *cut_in_half(model)):
        model(batch["x"]).sum().backward()
        assert model[1].weight.grad.shape == (6, 16)
    model(batch["x"]).sum().backward()
    assert model[1].weight.grad.shape == (12, 16)
    del kept


def test_gradients_from_before_are_gone_inside_and_after():
    model, batch = build("mlp")
    model(batch["x"]).sum().backward()
    with shrunk(model, *cut_in_half(model)):
        assert model[1].weight.grad is None
    assert model[1].weight.grad is None


# Where something is tied, or unknown ------------------------------------------------------------


def test_blocks_that_are_one_under_two_names_shrink_once():
    model, batch = build("gpt2-lm")
    model.config.use_cache = False  # both blocks would write to the same place
    model.transformer.h[1] = model.transformer.h[0]
    scheme = FedQSN(units="neurons", client_mask=0.5)
    check_equal(both(model.double(), scheme, run_on(batch, ADAM)), rtol=1e-6, atol=1e-8)
    with shrunk(model, *cut_in_half(model)):
        assert model.transformer.h[1].mlp.c_fc.nf == 3
        assert model.lm_head.weight is model.transformer.wte.weight


def test_a_weight_that_another_layer_shares_is_not_cut():
    model = build("mlp")[0]
    groups, released = cut_in_half(model)
    assert len(shrinkable(model, groups, released)) == 2
    model.add_module("other", nn.Linear(16, 12))
    model.other.weight = model[1].weight
    assert [g.name for g in shrinkable(model, groups, released)] == ["3"]


def test_an_axis_that_two_groups_share_is_not_cut():
    model = build("tokens")[0]
    (group,), _ = cut_in_half(model)
    one, two = (
        replace(
            group, name=f"part {first}", size=size,
            slices=tuple(replace(cut, offset=first) for cut in group.slices),
        )
        for first, size in ((0, 4), (4, 5))
    )  # fmt: skip
    released = {g.name: Release(torch.arange(0, g.size, 2), 1.0) for g in (one, two)}
    validate((one, two), model.state_dict())
    assert shrinkable(model, (one, two), released) == ()


def test_a_layer_of_which_only_a_part_is_cut_stays():
    model = build("tokens")[0]
    (group,), released = cut_in_half(model)
    without_bias = replace(group, slices=tuple(c for c in group.slices if c.tensor != "0.bias"))
    assert len(shrinkable(model, (group,), released)) == 1
    assert shrinkable(model, (without_bias,), released) == ()


class MyLinear(nn.Linear):
    """It may do anything."""


def test_a_layer_of_an_unknown_type_stays():
    model = build("bert")[0]
    names = [g.name for g in shrinkable(model, *cut_in_half(model))]
    model.bert.encoder.layer[0].intermediate.dense = MyLinear(8, 6)
    names.remove("bert.encoder.layer.0.mlp")
    assert [g.name for g in shrinkable(model, *cut_in_half(model))] == names


RULES: dict[type[nn.Module], Rule] = {
    Gated: Rule(("Gated",), (Pattern("neurons", ("gate", "up"), ("down",)),)),
    **{
        kind: Rule((kind.__name__,), (Pattern("neurons", ("fc1",), ("fc2",)),))
        for kind in (Branching, Twice, Normed)
    },
}


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_of_ones_own_whose_net_is_no_plain_chain_keeps_zeros(kind, monkeypatch):
    monkeypatch.setattr(registry, "_rules", [*registry._rules, RULES[kind]])
    model = randomise(kind())
    assert shrinkable(model, *cut_in_half(model)) == ()


@pytest.mark.parametrize("kind", [Twice, Normed])
def test_a_rule_that_leaves_out_a_reader_or_a_norm_is_refused(kind, monkeypatch):
    monkeypatch.setattr(registry, "_rules", [*registry._rules, RULES[kind]])
    with pytest.raises(ConfigurationError, match="A rule for units is wrong"):
        FedQSN(units="neurons").server(randomise(kind()), SECRET)


@pytest.mark.parametrize("kind", [kind for kind in RULES if kind not in (Twice, Normed)])
def test_under_a_rule_of_ones_own_zeros_train_as_zeros(kind, monkeypatch):
    monkeypatch.setattr(registry, "_rules", [*registry._rules, RULES[kind]])
    model = randomise(kind())
    results = both(model, FedQSN(units="neurons", client_mask=0.5), run_on({"x": torch.ones(6, 5)}))
    check_equal(results, rtol=0, atol=0)


def test_a_rule_of_ones_own_for_a_plain_chain_does_not_keep_them(monkeypatch):
    rule = Rule(("LeNet",), (Pattern("neurons", ("fc1",), ("fc2",)),))
    monkeypatch.setattr(registry, "_rules", [*registry._rules, rule])
    model = randomise(LeNet())
    assert [g.name for g in shrinkable(model, *cut_in_half(model))] == ["mlp"]


def test_a_rule_that_leaves_out_a_layer_of_a_known_block_keeps_zeros(monkeypatch):
    # Without its up_proj a gated block would multiply layers of two widths.
    pattern = Pattern("neurons", ("mlp.gate_proj",), ("mlp.down_proj",), block="layers.*")
    monkeypatch.setattr(registry, "_rules", [*registry._rules, Rule(("llama",), (pattern,))])
    model, _ = build("llama")
    assert shrinkable(model, *cut_in_half(model)) == ()


def test_the_client_trains_it_and_a_setting_turns_it_off():
    widths = []

    def train(model):
        widths.append(model.bert.encoder.layer[0].intermediate.dense.out_features)
        raise InterruptionError

    for shrink in (True, False):
        scheme, own = FedQSN(server_mask=0.0, client_mask=0.25, shrink=shrink), bare(bert())
        with pytest.raises(InterruptionError):
            scheme.client().fit(proxy_of(bert(), scheme), own, TrainBy(train))
        assert own.bert.encoder.layer[0].intermediate.dense.out_features == 264
    assert widths == [198, 264]
