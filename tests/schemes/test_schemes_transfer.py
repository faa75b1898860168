"""A public model is released in the place of the owner's, to which what it is taught is added."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from fedveil import CheckpointError, ConfigurationError, FedAvg, FedLPP, FedQSN
from fedveil.audit import Evidence, audit
from fedveil.schemes import Transfer
from fedveil.state import read_state

ONCE = FedQSN.once(server_mask=0.0)
SCHEMES = [FedAvg(), FedQSN(), FedQSN.paper(), ONCE]


def tuned(public, seed, size=0.05):
    """What an owner has who fine-tuned a public model."""
    own = copy.deepcopy(public)
    toys.Nudge(seed, size)(own)
    for name, tensor in read_state(own).items():
        if name.endswith("running_var"):
            tensor.abs_()
    return own


def sent(server, model, scheme, rounds=2):
    """All bytes that clients receive of a server side, who answer them."""
    received = []
    for number in range(1, rounds + 1):
        server.begin_round(number)
        for client in ("a", "b"):
            message = server.release(client)
            received.append(bytes(message.to_bytes()))
            reply = toys.reply_of(scheme, message, toys.bare(model), toys.Nudge(number, 0.01))
            server.absorb(client, reply, 1.0)
        server.end_round()
    return received


class TestNoByteDependsOnTheOwnersModel:
    @settings(max_examples=15, deadline=None)
    @given(
        kind=st.sampled_from(sorted(toys.MODELS)),
        scheme=st.sampled_from(SCHEMES),
        seed=st.integers(1, 1000),
        size=st.sampled_from([1e-4, 0.05, 3.0]),
    )
    def test_over_rounds_and_whatever_it_is(self, kind, scheme, seed, size):
        public = toys.MODELS[kind](0)
        one, other = (
            Transfer(scheme, public, own, toys.SECRET)
            for own in (tuned(public, seed, size), tuned(public, seed + 1, size))
        )
        assert sent(one, public, scheme) == sent(other, public, scheme)
        assert not toys.same(one.final(), other.final())

    @pytest.mark.parametrize("scheme", SCHEMES, ids=["fedavg", "fedqsn", "paper", "once"])
    def test_in_a_whole_federation(self, scheme, tmp_path):
        public, kept = toys.bert(), []
        for seed in (1, 2):
            out = tmp_path / str(seed)
            run = {"public": public, "scheme": scheme, "out": out, "keep_messages": True}
            toys.federation(tuned(public, seed), **run).run(2)
            kept.append({n: d for n, d in toys.files(out).items() if n.startswith("messages")})
        assert kept[0] == kept[1]
        assert len(kept[0]) == 2 * 2 * 3

    def test_clients_get_no_tensor_of_it_beside_the_messages(self):
        public = toys.convnet()
        own = tuned(public, 1)
        own.register_buffer("mine", torch.ones(3), persistent=False)
        place = toys.federation(own, public=public).workplace()
        assert "mine" not in dict(place.architecture.named_buffers())


class TestWhatIsTaughtIsAdded:
    @pytest.mark.parametrize("kind", sorted(toys.MODELS))
    @pytest.mark.parametrize("scheme", SCHEMES, ids=["fedavg", "fedqsn", "paper", "once"])
    def test_to_every_weight(self, kind, scheme):
        public = toys.MODELS[kind](0)
        own = tuned(public, 7)
        taught = toys.weights(toys.federation(public, scheme=scheme).run(2).global_model)
        result = toys.federation(own, public=public, scheme=scheme).run(2)
        begun, mine = toys.weights(public), toys.weights(own)
        moved = 0.0
        for name, tensor in toys.weights(result.global_model).items():
            if name.endswith("running_var"):
                wanted = mine[name] * taught[name] / begun[name]
            elif tensor.is_floating_point():
                wanted = mine[name] + taught[name] - begun[name]
                moved += float((taught[name] - begun[name]).abs().sum())
            else:
                wanted = mine[name]
            torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
        assert moved > 0

    def test_and_nothing_else_changes(self):
        public = toys.bert()
        own = tuned(public, 7)
        before = {name: tensor.clone() for name, tensor in toys.weights(own).items()}
        start = {name: tensor.clone() for name, tensor in toys.weights(public).items()}
        federation = toys.federation(own, public=public, copy=False)
        result = federation.run(1)
        assert toys.same(toys.weights(own), before)
        assert toys.same(toys.weights(public), start)
        assert not toys.same(toys.weights(result.global_model), before)
        assert federation.model is own
        assert federation.released is public

    def test_with_the_public_model_as_ones_own_it_is_the_same_federation(self):
        public = toys.bert()
        plain = toys.federation(public, scheme=FedQSN()).run(2)
        same = toys.federation(copy.deepcopy(public), public=public, scheme=FedQSN()).run(2)
        for name, tensor in toys.weights(plain.global_model).items():
            other = toys.weights(same.global_model)[name]
            torch.testing.assert_close(tensor, other, atol=1e-6, rtol=1e-6)

    def test_in_small_steps_that_half_precision_would_lose(self):
        public = nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 3))
        public = public.to(torch.bfloat16)
        with torch.no_grad():
            for parameter in public.parameters():
                parameter.fill_(1.0)
        own = copy.deepcopy(public)
        with torch.no_grad():
            own[1].weight.zero_()
        server = Transfer(FedAvg(), public, own, toys.SECRET)
        server.begin_round(1)
        message = server.release("a")
        reply = toys.reply_of(FedAvg(), message, copy.deepcopy(public).float(), _step(2**-12))
        server.absorb("a", reply, 1.0)
        server.end_round()
        # 1 + 2^-12 is 1 in bfloat16, but 0 + 2^-12 is not 0.
        assert torch.all(server.final()["1.weight"] == 2**-12)
        assert server.final()["1.weight"].dtype == torch.bfloat16

    def test_variances_stay_positive(self):
        public = toys.convnet()
        own = tuned(public, 3)
        own[1].running_var.fill_(1e-3)
        result = toys.federation(own, public=public, scheme=FedAvg()).run(3)
        assert float(toys.weights(result.global_model)["1.running_var"].min()) > 0

    def test_a_resumed_run_is_the_same(self, tmp_path):
        public = toys.bert()
        run = {"public": public, "scheme": FedQSN(), "out": tmp_path}
        own = tuned(public, 7)
        toys.federation(own, **run).run(1)
        resumed = toys.federation(own, **run).run(2, resume=True)
        whole = toys.federation(own, **{**run, "out": None}).run(2)
        resumed, whole = (toys.weights(result.global_model) for result in (resumed, whole))
        assert toys.same(resumed, whole)

    def test_a_run_is_not_resumed_with_another_public_model(self, tmp_path):
        own = tuned(toys.bert(), 7)
        run = {"scheme": FedQSN(), "out": tmp_path}
        toys.federation(own, public=toys.bert(), **run).run(1)
        for public in (toys.bert(seed=1), None):
            with pytest.raises(CheckpointError, match="configuration"):
                toys.federation(own, public=public, **run).run(2, resume=True)


def _step(size):
    def train(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size
        return toys.TrainingRecord(5, 1, 1.0, 0.5)

    return toys.TrainBy(train)


class TestAdapters:
    pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

    @staticmethod
    def adapted(backbone):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
        )
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return peft.get_peft_model(backbone, config)

    @staticmethod
    def federation(own, public, scheme):
        clients = {f"partner-{i}": toys.texts(6 + 2 * i, seed=i) for i in range(3)}
        task = toys.NextToken()
        return toys.federation(own, public=public, scheme=scheme, clients=clients, task=task)

    def models(self):
        public = toys.gpt2(tied=False)
        own = tuned(public, 4)
        return self.adapted(public), self.adapted(own)

    def test_are_trained_on_the_public_backbone_and_stand_on_the_private_one(self):
        public, own = self.models()
        result = self.federation(own, public, ONCE).run(1)
        mine, taught = toys.weights(own), toys.weights(result.global_model)
        adapter = {name for name in mine if "lora_" in name}
        assert all(torch.equal(mine[name], taught[name]) for name in mine.keys() - adapter)
        assert any(not torch.equal(mine[name], taught[name]) for name in adapter)

    def test_a_private_backbone_is_refused_where_clients_hold_it(self):
        public, own = self.models()
        with pytest.raises(ConfigurationError, match="Clients hold the backbone exactly"):
            self.federation(own, public, FedLPP())
        self.federation(copy.deepcopy(public), public, FedLPP()).run(1)


class TestWhatItIsRefusedFor:
    def test_another_architecture(self):
        with pytest.raises(ConfigurationError) as caught:
            toys.federation(toys.mlp(), public=toys.convnet())
        assert "of another architecture" in str(caught.value)
        assert caught.value.where == "0.bias"

    def test_a_head_of_another_size(self):
        other = nn.Sequential(*list(toys.mlp().children())[:-1], nn.Linear(64, 5))
        with pytest.raises(ConfigurationError, match=r"another architecture.*\[3\].*\[5\]"):
            toys.federation(toys.mlp(), public=other)


class TestTheAudit:
    @pytest.fixture(scope="class")
    @staticmethod
    def found(tmp_path_factory):
        public, out = toys.mlp(), tmp_path_factory.mktemp("run")
        own = copy.deepcopy(public)
        toys.federation(own, clients={"o": toys.rows(60, seed=9)}, scheme=FedAvg()).run(1)
        federation = toys.federation(
            tuned(public, 2), public=public, scheme=ONCE, out=out, keep_messages="proxies",
            test=toys.rows(90, seed=8), exposure_limit=0.01,
        )  # fmt: skip
        federation.run(1)
        return audit(Evidence(out), federation.stage(), full=True, coalitions=(1, 3))

    def test_nothing_of_the_owners_was_shown(self, found):
        assert set(found.coalitions.values()) == {0.0}
        assert {client.share for client in found.exposure.values()} == {0.0}

    def test_attackers_have_the_public_model(self, found):
        assert "public" in found.models
        origins = {a.holes for a in found.attacks if not a.released}
        assert origins == {"public", "nothing"}

    def test_what_was_sent_is_the_public_model_as_attackers_have_it(self, found):
        union = [a for a in found.attacks if a.attack == "union" and not a.polish]
        for attack in union:
            assert attack.measures["loss"] == pytest.approx(found.models["public"]["loss"], rel=0.2)
        assert not [alarm for alarm in found.alarms if alarm.raised]
