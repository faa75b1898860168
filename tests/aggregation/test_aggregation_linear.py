"""Which weights are linear maps, and the rows that they multiply."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.aggregation.linear import linear_layers, reading, rows_of
from fedveil.state import read_state
from toys import bert, convnet, gpt2, mlp

MODES = ["zeros", "reflect", "replicate", "circular"]


def check(module, inputs):
    """Rows times the matrix are what the module puts out."""
    layer = linear_layers(module)["weight"]
    weight = module.weight.detach()
    matrix = layer.matrix(weight)
    assert tuple(matrix.shape) == layer.matrix_shape(weight.shape)
    assert torch.equal(layer.weight(matrix, weight.shape), weight)
    rows = rows_of(module, inputs)
    with torch.no_grad():
        output = module(inputs)
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    expected = output.flatten(2).transpose(1, 2) if convolution else output
    bias = module.bias.detach() if module.bias is not None else 0.0
    found = rows @ matrix.t() + bias
    assert found.shape[0] == len(inputs)
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 5), st.booleans())
def test_rows_of_a_linear_layer(examples, between, inputs, bias):
    check(nn.Linear(inputs, 3, bias=bias), torch.randn(examples, *between, inputs))


def test_rows_of_the_transposed_layer_of_transformers():
    from transformers.pytorch_utils import Conv1D

    check(Conv1D(7, 4), torch.randn(2, 5, 4))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=80)
@given(st.data())
def test_rows_of_convolutions(data):
    axes = data.draw(st.sampled_from([1, 2]))
    each = lambda low, high: data.draw(st.tuples(*[st.integers(low, high)] * axes))  # noqa: E731
    kernel, dilation = each(1, 3), each(1, 2)
    padding = data.draw(st.sampled_from(["same", "valid", "number"]))
    stride = (1,) * axes if padding == "same" else each(1, 3)
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    module = kind(
        data.draw(st.integers(1, 3)),
        3,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=each(0, 2) if padding == "number" else padding,
        padding_mode=data.draw(st.sampled_from(MODES)),
        bias=data.draw(st.booleans()),
    )
    check(module, torch.randn(2, module.in_channels, *each(5, 7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_other_types(dtype):
    module, inputs = nn.Conv2d(2, 3, 3, padding=1).to(dtype), torch.randn(2, 2, 5, 5).to(dtype)
    expected = rows_of(module, inputs.float())
    torch.testing.assert_close(rows_of(module, inputs).float(), expected)


class Odd(nn.Module):
    """One of everything that is no single linear map of its input, and a few that are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.deep = nn.Conv3d(1, 2, 3)
        self.back = nn.ConvTranspose2d(2, 2, 3)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.norm, self.batch = nn.LayerNorm(4), nn.BatchNorm2d(4)
        self.recurrent = nn.GRU(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.plain = nn.Linear(4, 4)
        self.image = nn.Conv2d(1, 2, 3)


def test_weights_that_are_shared_or_no_linear_map_are_left_out():
    assert set(linear_layers(Odd())) == {"plain.weight", "image.weight"}


EXPECTED = {
    mlp: {"1.weight", "3.weight", "5.weight"},
    convnet: {"0.weight", "3.weight", "8.weight"},
}


@pytest.mark.parametrize("build", EXPECTED, ids=lambda b: b.__name__)
def test_all_layers_of_plain_nets_are_found(build):
    assert set(linear_layers(build())) == EXPECTED[build]


@pytest.mark.parametrize(("build", "count"), [(bert, 8), (gpt2, 4)], ids=["bert", "gpt2"])
def test_all_but_embeddings_and_what_is_tied_to_them_are_found_in_transformers(build, count):
    model = build()
    layers = linear_layers(model)
    assert len(layers) == count
    assert layers.keys() <= read_state(model).keys()
    assert not any("embed" in n or "wte" in n or "lm_head" in n or "norm" in n for n in layers)
    modules = dict(model.named_modules())
    assert all(modules[layer.module].weight.dim() == 2 for layer in layers.values())


def test_a_head_of_its_own_is_found():
    assert "lm_head.weight" in linear_layers(gpt2(tied=False))


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})

    def forward(self, inputs):
        return self.base(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))


def test_both_parts_of_an_adapter_are_found():
    assert set(linear_layers(Adapted())) == {
        "base.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


def test_convolutions_are_read_alike_only_if_their_rows_are():
    inputs = torch.randn(2, 3, 8, 8)
    variants: list[dict[str, Any]] = [
        {"kernel_size": 3}, {"kernel_size": 1}, {"kernel_size": (3, 1)}, {"kernel_size": (1, 3)},
        {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": "same"},
        *({"kernel_size": 3, "padding": 1, "padding_mode": mode} for mode in MODES[1:]),
    ]  # fmt: skip
    modules = [nn.Conv2d(3, 2, **variant) for variant in variants]
    for one in modules:
        for other in modules:
            if reading(one) == reading(other):
                assert torch.equal(rows_of(one, inputs), rows_of(other, inputs))
    assert reading(nn.Conv2d(3, 2, 3)) == reading(nn.Conv2d(3, 9, 3, bias=False))
    assert reading(nn.Linear(3, 2)) == reading(nn.Linear(3, 9))
    assert reading(nn.Conv1d(3, 2, 1)) != reading(nn.Linear(3, 2))


def test_unfolded_rows_are_those_of_torch():
    inputs = torch.randn(2, 3, 6, 6)
    module = nn.Conv2d(3, 2, 3, padding=1)
    assert torch.equal(rows_of(module, inputs), F.unfold(inputs, 3, padding=1).transpose(1, 2))
