from typing import Any

import pytest
import torch

from fedveil import CheckpointError, ConfigurationError, FedAvg, FedQSN, ProtocolError
from fedveil.schemes import ServerState, scheme_class, scheme_names
from fedveil.units import find_units
from fedveil.wire import Dense, Message
from toys import (
    CHOICES,
    SECRET,
    Nudge,
    TrainBy,
    bare,
    convnet,
    federation,
    gpt2,
    mlp,
    play,
    reply_of,
    same,
    weights,
    withheld,
)  # fmt: skip

IMPOSSIBLE = [
    {"server_mask": 1.0}, {"server_mask": -0.1}, {"client_mask": float("nan")},
    {"bits": 5}, {"bits": True}, {"bits": 4.0}, {"update_bits": 1}, {"policy": "weekly"},
    {"draw": "dice"}, {"groups": 0}, {"average": "median"}, {"merge": "and"}, {"block": 0},
    {"block": 6.5},
]  # fmt: skip


@pytest.mark.parametrize("setting", IMPOSSIBLE, ids=str)
def test_an_impossible_setting_is_refused_at_once(setting):
    with pytest.raises(ConfigurationError):
        FedQSN(**setting)


def test_an_unknown_choice_of_units_is_refused_before_the_first_round():
    with pytest.raises(ConfigurationError, match="choice of units"):
        federation(mlp(), scheme=FedQSN(units="layers"))


def test_schemes_are_known_by_name():
    assert {"fedavg", "fedlpp", "fedqsn"} <= set(scheme_names())
    assert scheme_class("fedqsn") is FedQSN
    with pytest.raises(ConfigurationError, match="fedavg or fedlpp or fedqsn"):
        scheme_class("fedsgd")


def test_the_recipe_of_the_paper():
    paper = FedQSN.paper(bits=2)
    assert (paper.units, paper.policy, paper.draw) == ("columns", "fresh", "bernoulli")
    assert (paper.unbiased, paper.average, paper.merge) == (True, "participants", "original")
    assert paper.bits == 2


@pytest.mark.parametrize("scheme", [FedAvg(), FedQSN(), FedQSN.paper()], ids=lambda s: s.name)
def test_a_client_is_released_the_same_all_round_long(scheme):
    server = scheme.server(mlp(), SECRET)
    server.begin_round(1)
    first = server.release("a").to_bytes()
    server.release("b")
    server.absorb("a", reply_of(scheme, server.release("a"), bare(mlp())), 1.0)
    assert server.release("a").to_bytes() == first


@pytest.mark.parametrize("scheme", [FedAvg(), FedQSN(bits=4, policy="fresh")], ids=lambda s: s.name)
def test_the_owners_model_is_copied(scheme):
    model = mlp()
    play(scheme, model, rounds=2)
    assert same(weights(model), weights(mlp()))


def _views(server):
    return {name: server.view(name) for name in server.views}


class TestViews:
    SCHEME = FedQSN(server_mask=0.5, client_mask=0.25, bits=None, units="neurons")

    def test_the_server_model_lacks_the_server_masked_units_and_nothing_else(self):
        views = _views(self.SCHEME.server(mlp(), SECRET))
        only_server = FedQSN(server_mask=0.5, client_mask=0.0, bits=None, units="neurons")
        server = only_server.server(mlp(), SECRET)
        server.begin_round(1)
        gone = withheld(server.release("any"), mlp(), "neurons")
        assert any(mask.any() for mask in gone.values())
        for name, tensor in weights(mlp()).items():
            assert torch.equal(views["server_model"][name], tensor.masked_fill(gone[name], 0.0))
            assert torch.equal(views["global"][name], tensor)

    def test_the_merge_decides_which_of_them_is_kept(self):
        server = play(self.SCHEME, mlp())
        assert same(server.final(), server.view("global"))
        server = play(FedQSN(server_mask=0.5, merge="server"), mlp())
        assert same(server.final(), server.view("server_model"))

    def test_views_are_copies(self):
        server = self.SCHEME.server(mlp(), SECRET)
        for view in _views(server).values():
            for tensor in view.values():
                tensor.zero_()
        assert same(server.final(), weights(mlp()))


@pytest.mark.parametrize(
    "scheme", [FedAvg(), FedQSN(policy="fresh"), FedQSN.paper()], ids=lambda s: s.name
)
def test_a_restored_server_goes_on_as_the_one_that_was_saved(scheme):
    through = play(scheme, convnet(), rounds=2)
    half = play(scheme, convnet(), rounds=1).state()
    state = ServerState(dict(half.tensors), dict(half.values))
    server = scheme.server(convnet(seed=9), SECRET)
    server.restore(state)
    server.begin_round(2)
    for index in range(3):
        nudge, name = Nudge(seed=20 + index), f"partner-{index}"
        server.absorb(
            name, reply_of(scheme, server.release(name), bare(convnet()), nudge), 3.0 + index
        )
    server.end_round()
    assert same(server.final(), through.final())


def test_the_state_of_another_model_is_refused():
    server = FedQSN().server(mlp(), SECRET)
    with pytest.raises(CheckpointError, match="another model"):
        server.restore(play(FedQSN(), convnet()).state())
    assert same(server.final(), weights(mlp()))


class TestClient:
    def test_a_proxy_of_another_architecture_is_refused(self):
        server = FedQSN().server(convnet(), SECRET)
        server.begin_round(1)
        with pytest.raises(ProtocolError, match="another architecture"):
            FedQSN().client().load(server.release("a"), bare(mlp()))

    def test_a_proxy_of_another_width_is_refused(self):
        server = FedQSN().server(mlp(), SECRET)
        server.begin_round(1)
        wide: Any = bare(mlp())
        wide[5] = torch.nn.Linear(64, 4)
        with pytest.raises(ProtocolError, match=r"wrong shape.*5\.weight"):
            FedQSN().client().load(server.release("a"), wide)

    def test_a_message_of_another_scheme_is_refused(self):
        server = FedAvg().server(mlp(), SECRET)
        server.begin_round(1)
        with pytest.raises(ProtocolError, match="wrong message"):
            FedQSN().client().load(server.release("a"), bare(mlp()))

    def test_another_choice_of_units_is_refused(self):
        server = FedQSN(units="neurons").server(mlp(), SECRET)
        server.begin_round(1)
        with pytest.raises(ProtocolError):
            FedQSN(units="columns").client().load(server.release("a"), bare(mlp()))

    def test_what_the_model_held_before_does_not_matter(self):
        server = FedQSN(policy="fresh").server(mlp(), SECRET)
        server.begin_round(1)
        client, one, other = FedQSN().client(), bare(mlp()), mlp(seed=8)
        client.load(server.release("a"), one)
        client.load(server.release("a"), other)
        assert same(weights(one), weights(other))

    @pytest.mark.parametrize("choice", CHOICES)
    def test_a_loaded_proxy_is_zero_where_it_is_withheld_and_scaled_elsewhere(self, choice):
        scheme = FedQSN(
            server_mask=0.0, client_mask=0.25, bits=None, units=choice, draw="exact", unbiased=True
        )
        server, model, own = scheme.server(mlp(), SECRET), mlp(), mlp(seed=8)
        server.begin_round(1)
        proxy = server.release("a")
        scheme.client().load(proxy, own)
        factors = {name: torch.ones_like(tensor) for name, tensor in weights(model).items()}
        for group in find_units(model, choice):
            for cut in (cut for cut in group.slices if cut.scaled):
                factors[cut.tensor] *= proxy.sections[f"units/{group.name}"].scale
        for name, mask in withheld(proxy, model, choice).items():
            expected = (weights(model)[name] * factors[name]).masked_fill(mask, 0)
            torch.testing.assert_close(weights(own)[name], expected, msg=name)
        assert any(bool((factor != 1).any()) for factor in factors.values())

    @pytest.mark.parametrize("shrink", [True, False])
    @pytest.mark.parametrize("choice", CHOICES)
    def test_withheld_elements_are_zero_and_stay_zero_in_training(self, choice, shrink):
        scheme = FedQSN(server_mask=0.25, client_mask=0.25, units=choice, shrink=shrink)
        model = mlp()
        model[2] = torch.nn.Sigmoid()  # not zero at zero: a neuron that is zero has gradients
        server, model = scheme.server(model, SECRET), bare(model)
        server.begin_round(1)
        proxy = server.release("a")

        def train(net):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
            for _ in range(3):
                net(torch.ones(4, 16)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return Nudge(size=0.0)(net)

        reply = scheme.client().fit(proxy, model, TrainBy(train))
        assert reply.sections
        for name, mask in withheld(proxy, model, choice).items():
            assert not bool(weights(model)[name][mask].any()), name

    def test_a_tensor_that_training_left_alone_is_not_returned(self):
        server = FedQSN().server(mlp(), SECRET)
        server.begin_round(1)

        def train(net):
            with torch.no_grad():
                net[5].bias += 1
            return Nudge(size=0.0)(net)

        reply = FedQSN().client().fit(server.release("a"), bare(mlp()), TrainBy(train))
        assert set(reply.sections) == {"5.bias"}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_trained_whether_its_head_is_tied_or_not(tied, choice):
    model = gpt2(tied=tied)
    result = federation(model, scheme=FedQSN(units=choice, bits=4, policy="fresh")).run(1)
    tuned = result.global_model
    assert result.rounds[0].failed == {}
    assert (tuned.lm_head.weight is tuned.transformer.wte.weight) == tied
    assert not same(weights(tuned), weights(model))


def test_an_embedding_with_a_copy_elsewhere_is_not_cut():
    model = gpt2(tied=False)
    model.lm_head.weight.data.copy_(model.transformer.wte.weight.data)
    scheme = FedQSN(units="columns", server_mask=0.5)
    server = scheme.server(model, SECRET)
    server.begin_round(1)
    proxy = server.release("a")
    assert "units/transformer.wte" not in proxy.sections
    assert reply_of(scheme, proxy, bare(model)).sections


@pytest.mark.parametrize(
    "scheme", [FedAvg(), FedQSN(bits=4), FedQSN.paper(bits=None)], ids=lambda s: s.name
)
def test_a_bfloat16_model_is_trained_and_comes_back_as_bfloat16(scheme):
    result = federation(mlp().to(torch.bfloat16), scheme=scheme, test=None).run(2)
    after = weights(result.global_model)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert not same(after, weights(mlp().to(torch.bfloat16)))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_small_updates_to_a_bfloat16_model_are_not_lost_on_the_server():
    model = mlp().to(torch.bfloat16)
    server = FedQSN(bits=None, server_mask=0.0, client_mask=0.0).server(model, SECRET)
    step = 1e-5
    for number in range(1, 201):
        server.begin_round(number)
        proxy = server.release("a")
        update = {"5.bias": torch.full((3,), step)}
        sections = {name: Dense(tensor) for name, tensor in update.items()}
        server.absorb("a", Message("update", "fedqsn", number, "a", sections, {}), 1.0)
        server.end_round()
        assert proxy.sections["5.bias"].tensor.dtype == torch.bfloat16
    moved = server.state().tensors["5.bias"] - model[5].bias.detach().float()
    torch.testing.assert_close(moved, torch.full((3,), 200 * step), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scheme", [FedAvg(), FedQSN(units="neurons")], ids=lambda s: s.name)
def test_a_channels_last_model_is_trained_and_saved(tmp_path, scheme):
    model = convnet().to(memory_format=torch.channels_last)
    result = federation(model, scheme=scheme, out=tmp_path).run(1)
    expected = federation(convnet(), scheme=scheme).run(1)
    torch.testing.assert_close(weights(result.global_model), weights(expected.global_model))


@pytest.mark.parametrize("bits", [None, 4])
def test_units_may_all_be_withheld_by_chance(bits):
    scheme = FedQSN(
        draw="bernoulli", server_mask=0.99, client_mask=0.99, units="neurons", bits=bits
    )
    server = play(scheme, mlp())
    server.begin_round(2)
    assert server.release("a").sections["units/1"].released.numel() == 0


def test_unbiased_proxies_are_scaled_on_the_client():
    plain, scaled = (
        FedQSN(bits=None, server_mask=0.0, client_mask=0.5, units="columns", unbiased=flag)
        for flag in (False, True)
    )
    models = []
    for scheme in (plain, scaled):
        server, model = scheme.server(mlp(), SECRET), bare(mlp())
        server.begin_round(1)
        scheme.client().load(server.release("a"), model)
        models.append(weights(model))
    torch.testing.assert_close(models[1]["1.weight"], 2 * models[0]["1.weight"])
    torch.testing.assert_close(models[1]["5.weight"], models[0]["5.weight"])


def test_a_server_does_not_keep_packed_weights_between_rounds():
    server = play(FedQSN(), mlp())
    assert server._sources == {}
