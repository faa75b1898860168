"""Tensors that share memory without being one: found exactly, and refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from units_families import FAMILIES

import fedveil
from fedveil.errors import ConfigurationError
from fedveil.merging import merge
from fedveil.state import architecture_of, copy_of, read_state
from fedveil.ties import overlaps, refuse_overlaps
from fedveil.units import Slice, UnitGroup, find_units, validate


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two strided views into one memory, and for each the numbers of the bytes that it sees."""
    memory = torch.arange(64, dtype=torch.int32)

    def view() -> Tensor:
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        strides = [draw(st.integers(0, 6)) for _ in shape]
        return memory.as_strided(shape, strides, draw(st.integers(0, 20)))

    return view(), view()


@given(views())
def test_overlaps_are_elements_in_common(pair: tuple[Tensor, Tensor]) -> None:
    one, other = pair
    seen = [set(view.flatten().tolist()) for view in pair]
    same = (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(), other.shape, other.stride(),
    )  # fmt: skip
    expected = {frozenset({"one", "other"})} if seen[0] & seen[1] and not same else set()
    expected |= {
        frozenset({name})
        for name, view, numbers in zip(("one", "other"), pair, seen, strict=True)
        if len(numbers) < view.numel()
    }
    assert {frozenset(found) for found in overlaps({"one": one, "other": other})} == expected


def test_other_types_over_the_same_bytes_overlap() -> None:
    memory = torch.zeros(8)
    found = list(overlaps({"a": memory, "b": memory.view(torch.int16)[3:5], "c": torch.zeros(8)}))
    assert found == [("a", "b")]
    assert not list(overlaps({"a": memory[:4], "b": memory.view(torch.int16)[8:]}))


def test_two_storages_over_one_memory_overlap() -> None:
    array = torch.zeros(4, 4).numpy()
    state = {"a": torch.from_numpy(array), "b": torch.from_numpy(array[1:3])}
    assert list(overlaps(state)) == [("a", "b")]


def test_the_meta_device_tells_of_views_too() -> None:
    memory = torch.zeros(4, 4, device="meta")
    assert list(overlaps({"a": memory, "b": memory.t()})) == [("a", "b")]
    assert not list(
        overlaps({"a": memory[:2], "b": memory[2:], "c": torch.zeros(4, device="meta")})
    )


class Coder(nn.Module):
    """An autoencoder whose decoder is some view of its encoder."""

    def __init__(self, view) -> None:
        super().__init__()
        self.encode, self.mid = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode = nn.Linear(6, 6)
        view(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mid(self.encode(x).relu()).relu())


def tie(view):
    def make(net: Coder) -> None:
        net.decode.weight = nn.Parameter(view(net.encode.weight.detach()))

    return make


def _bias_in_weight(net: Coder) -> None:
    net.decode.bias = nn.Parameter(net.encode.weight.detach()[0])


def _buffer(net: Coder) -> None:
    net.register_buffer("turned", net.encode.weight.detach().t())


def _unsaved_buffer(net: Coder) -> None:
    net.register_buffer("turned", net.encode.weight.detach().t(), persistent=False)


def _expanded(net: Coder) -> None:
    net.decode.bias = nn.Parameter(torch.zeros(1).expand(6))


VIEWS = {
    "transposed": tie(lambda w: w.t()),
    "turned around twice": tie(lambda w: w.t()[:6].as_strided((6, 6), (1, 6))),
    "permuted": tie(lambda w: w.view(2, 3, 6).transpose(0, 1)[:, 0]),
    "rows": tie(lambda w: w[:3]),
    "columns": tie(lambda w: w[:, 2:]),
    "reshaped": tie(lambda w: w.reshape(3, 12)),
    "strided": tie(lambda w: w.as_strided((5, 5), (7, 1))),
    "a bias in a weight": _bias_in_weight,
    "a buffer": _buffer,
    "a buffer that is not saved": _unsaved_buffer,
    "expanded": _expanded,
}
SCHEMES = [
    fedveil.FedAvg(),
    fedveil.FedAvg(aggregation="regmean"),
    fedveil.FedQSN(server_mask=0.3, client_mask=0.0, bits=None),
    fedveil.FedLPP(),
]


@pytest.mark.parametrize("kind", VIEWS)
def test_no_scheme_takes_a_model_that_is_tied_by_a_view(kind: str) -> None:
    net = Coder(VIEWS[kind])
    net.mid.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    for scheme in SCHEMES:
        with pytest.raises(ConfigurationError, match="memory") as caught:
            scheme.server(net, fedveil.Secret.generate())
        assert caught.value.where in {"decode.weight", "decode.bias", "turned", "encode.weight"}
    for make in (copy_of, architecture_of, refuse_overlaps):
        with pytest.raises(ConfigurationError, match="memory"):
            make(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_both_names_and_a_way_out_are_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        refuse_overlaps(Coder(VIEWS["transposed"]))
    assert (caught.value.where, caught.value.found) == (
        "decode.weight",
        "a view of 'encode.weight'",
    )
    assert "clone" in caught.value.fix


def test_a_client_whose_own_model_is_tied_by_a_view_refuses() -> None:
    server = fedveil.FedAvg().server(Coder(lambda net: None), fedveil.Secret.generate())
    server.begin_round(1)
    message = server.release("a")
    client = fedveil.FedAvg().client()
    with pytest.raises(ConfigurationError, match="share memory"):
        client.load(message, Coder(VIEWS["transposed"]))
    client.load(message, Coder(lambda net: None))


def test_models_that_are_merged_may_not_be_tied_by_a_view() -> None:
    with pytest.raises(ConfigurationError, match=r"share memory.*model 2"):
        merge([Coder(lambda net: None), Coder(VIEWS["transposed"])])


@pytest.mark.parametrize("kind", ["transposed", "rows", "columns"])
def test_units_of_a_tensor_that_is_seen_elsewhere_are_refused(kind: str) -> None:
    net = Coder(VIEWS[kind])
    with pytest.raises(ConfigurationError, match="share memory"):
        find_units(net)
    group = UnitGroup("g", "neurons", 6, (Slice("encode.weight", 0),))
    with pytest.raises(ConfigurationError, match="share memory"):
        validate([group], net.state_dict())
    other = UnitGroup("g", "neurons", 6, (Slice("mid.weight", 0),))
    validate([other], net.state_dict())


class Side(nn.Module):
    """Two layers that are the two halves of one memory, and three that are columns of another."""

    def __init__(self) -> None:
        super().__init__()
        halves, columns = torch.randn(12, 6), torch.randn(6, 18)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        for number, layer in enumerate(self.layers):
            part = slice(6 * (number % 3), 6 * (number % 3) + 6)
            own = halves[6 * (number - 3) :][:6] if number > 2 else columns[:, part]
            layer.weight = nn.Parameter(own)


def test_neighbours_in_one_memory_are_not_tied() -> None:
    net: Any = Side()
    assert len({layer.weight.untyped_storage().data_ptr() for layer in net.layers}) == 2
    refuse_overlaps(net)
    for name, tensor in read_state(copy_of(net)).items():
        assert torch.equal(tensor, net.state_dict()[name])


def _same(net: Coder) -> None:
    net.decode.weight = net.encode.weight


def _same_memory(net: Coder) -> None:
    net.decode.weight = nn.Parameter(net.encode.weight.detach())


@pytest.mark.parametrize("ordinary", [_same, _same_memory])
def test_ordinary_ties_stay_ties(ordinary) -> None:
    net = Coder(ordinary)
    refuse_overlaps(net)
    again: Any = copy_of(net)
    assert again.decode.weight.data_ptr() == again.encode.weight.data_ptr()
    server = fedveil.FedAvg().server(net, fedveil.Secret.generate())
    assert "decode.weight" not in server.view("global")


def test_an_unsaved_name_of_a_tensor_goes_with_it_into_copies() -> None:
    net = Coder(lambda net: net.register_buffer("alias", net.encode.weight.detach(), False))
    again: Any = architecture_of(net)
    assert again.alias.data_ptr() == again.encode.weight.data_ptr()
    assert not again.alias.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_tied_by_a_view(name: str) -> None:
    refuse_overlaps(FAMILIES[name].build())


def test_a_recurrent_net_whose_weights_are_flattened_is_not_tied() -> None:
    refuse_overlaps(nn.LSTM(4, 4, 2, bidirectional=True))
