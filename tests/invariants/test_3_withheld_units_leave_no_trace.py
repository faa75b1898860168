import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import FedAvg, FedQSN, ProtocolError, RegMean
from fedveil.quantization import QuantizedTensor
from fedveil.state import read_state
from fedveil.wire import Dense, Message, UnitIndex
from toys import (
    CHOICES,
    MODELS,
    SECRET,
    bare,
    federation,
    gpt2,
    mlp,
    play,
    reply_of,
    same,
    snapshot,
    weights,
    withheld,
)  # fmt: skip

BITS = [None, 2, 3, 4, 8]


def proxy_of(model, scheme, client="partner-0") -> Message:
    server = scheme.server(model, SECRET)
    server.begin_round(1)
    return server.release(client)


def perturbed(model, gone, seed, size):
    """The model with other values wherever it is withheld."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in read_state(other).items():
        if tensor.is_floating_point():
            noise = torch.empty(tensor.shape).normal_(generator=generator) * size
            tensor.copy_(torch.where(gone[name], noise, tensor))
    return other


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_no_value_of_a_withheld_unit_shows_in_the_message(build, choice, bits):
    # Huge values would show in any scale, norm or statistic that they share with released ones.
    scheme = FedQSN(server_mask=0.25, client_mask=0.25, units=choice, bits=bits, unbiased=True)
    model = build()
    proxy = proxy_of(model, scheme)
    gone = withheld(proxy, model, choice)
    assert sum(int(mask.sum()) for mask in gone.values()) > 100
    for seed, size in enumerate((1e-30, 1.0, 1e30)):
        other = perturbed(model, gone, seed, size)
        assert not same(weights(other), weights(model))
        assert proxy_of(other, scheme).to_bytes() == proxy.to_bytes()


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(CHOICES),
    st.sampled_from(BITS),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.sampled_from(["exact", "bernoulli"]),
    st.integers(0, 10**6),
    st.sampled_from([1e-6, 1.0, 1e6, 1e37]),
)
def test_nor_for_any_rates_and_values(name, choice, bits, p1, p2, draw, seed, size):
    scheme = FedQSN(server_mask=p1, client_mask=p2, units=choice, bits=bits, draw=draw)
    model = MODELS[name]()
    proxy = proxy_of(model, scheme)
    other = perturbed(model, withheld(proxy, model, choice), seed, size)
    assert proxy_of(other, scheme).to_bytes() == proxy.to_bytes()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tied", [True, False])
def test_nor_of_a_language_model(choice, tied):
    scheme = FedQSN(server_mask=0.25, client_mask=0.25, units=choice)
    model = gpt2(tied=tied)
    proxy = proxy_of(model, scheme)
    gone = withheld(proxy, model, choice)
    assert any(mask.any() for mask in gone.values())
    assert proxy_of(perturbed(model, gone, 0, 1e30), scheme).to_bytes() == proxy.to_bytes()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_message_holds_as_many_numbers_as_are_released(build, choice, bits):
    model, scheme = build(), FedQSN(server_mask=0.25, client_mask=0.25, units=choice, bits=bits)
    proxy = proxy_of(model, scheme)
    gone = withheld(proxy, model, choice)
    for name in read_state(model):
        section = proxy.sections[name]
        quantized = isinstance(section, QuantizedTensor)
        shape = torch.Size(section.shape) if quantized else section.tensor.shape
        assert shape.numel() == int((~gone[name]).sum()), name
    assert sum(int(mask.sum()) for mask in gone.values()) > 0


@pytest.mark.parametrize("bits", [None, 4])
def test_messages_shrink_with_what_is_withheld(build, bits):
    sizes = [
        len(proxy_of(build(), FedQSN(server_mask=0, client_mask=rate, bits=bits)).to_bytes())
        for rate in (0.0, 0.25, 0.5, 0.75)
    ]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("policy", ["fresh", "sticky", "grouped"])
def test_elements_that_were_never_released_never_change(build, choice, policy, tmp_path):
    scheme = FedQSN(server_mask=0.3, client_mask=0.3, units=choice, policy=policy, bits=4)
    check_never_released(build(), scheme, tmp_path)


@pytest.mark.parametrize("policy", ["fresh", "sticky", "grouped"])
@pytest.mark.parametrize("form", ["blocks", "low-rank"])
def test_nor_if_layers_are_solved_for(build, policy, form, tmp_path):
    # Equations tie all inputs of a layer together, also those that nobody held.
    scheme = FedQSN(
        server_mask=0.2, client_mask=0.6, units="neurons", policy=policy,
        aggregation=RegMean(form=form, size=24),
    )  # fmt: skip
    check_never_released(build(), scheme, tmp_path)


def check_never_released(model, scheme, tmp_path):
    result = federation(model, scheme=scheme, out=tmp_path, keep_messages=True).run(2)
    proxies = [
        Message.from_bytes(path.read_bytes()) for path in tmp_path.rglob("*.proxy.safetensors")
    ]
    assert len(proxies) == 6
    masks = [withheld(proxy, model, scheme.units) for proxy in proxies]
    before, after, never_released = weights(model), weights(result.global_model), 0
    for name, tensor in before.items():
        never = torch.stack([mask[name] for mask in masks]).all(0)
        never_released += int(never.sum())
        assert torch.equal(after[name][never], tensor[never]), name
    assert never_released > 0
    assert not same(after, before)


@pytest.mark.parametrize("choice", CHOICES)
def test_even_if_the_client_trains_them(build, choice):
    # `Nudge` changes withheld weights and statistics as well.
    model, scheme = build(), FedQSN(client_mask=0.5, units=choice, unbiased=True)
    gone = withheld(proxy_of(model, scheme), model, choice)
    before, after = weights(model), play(scheme, model, clients=1).final()
    for name, tensor in before.items():
        assert torch.equal(after[name][gone[name]], tensor[gone[name]]), name
        if tensor.is_floating_point():
            assert not torch.equal(after[name], tensor), name


def test_an_update_for_more_than_was_sent_is_refused_and_changes_nothing():
    scheme = FedQSN(client_mask=0.5, units="neurons")
    server = scheme.server(mlp(), SECRET)
    server.begin_round(1)
    proxy = server.release("a")
    before = snapshot(server.state().tensors)
    honest = reply_of(scheme, proxy, bare(mlp()))
    full = weights(mlp())
    index = UnitIndex(96, torch.arange(96))
    for extra in ({"1.weight": Dense(full["1.weight"])}, {"1.bias": Dense(full["1.bias"])},
                  {"units/1": index}, {"secret.weight": Dense(torch.ones(3))}):  # fmt: skip
        greedy = Message("update", "fedqsn", 1, "a", {**honest.sections, **extra}, honest.scalars)
        with pytest.raises(ProtocolError):
            server.absorb("a", greedy, 5.0)
    assert same(server.state().tensors, before)
    server.absorb("a", honest, 5.0)


def test_fedavg_by_contrast_sends_everything():
    proxy = proxy_of(mlp(), FedAvg())
    assert all(torch.equal(proxy.sections[n].tensor, t) for n, t in weights(mlp()).items())
