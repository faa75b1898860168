"""A public model is released in the place of the owner's, to which what it is taught is added."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transfer_samples import ONCE, OWNER, SCHEMES, TEXTS, first, sent, transfer, tuned

import toys
from fedveil import CheckpointError, ConfigurationError, DataError, FedAvg, FedLPP, FedQSN, Training
from fedveil.audit import Evidence, audit
from fedveil.schemes.transfer import COEFFICIENTS
from fedveil.training import TrainingRecord


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
            transfer(scheme, public, own, judge=lambda state: 0.0)
            for own in (tuned(public, seed, size), tuned(public, seed + 1, size))
        )
        assert sent(one, public, scheme) == sent(other, public, scheme)
        assert not toys.same(one.final(), other.final())

    @pytest.mark.parametrize("scheme", SCHEMES, ids=["fedavg", "fedqsn", "paper", "once"])
    def test_in_a_whole_federation(self, scheme, tmp_path):
        public, kept = toys.bert(), []
        for seed in (1, 2):
            out = tmp_path / str(seed)
            owner = toys.texts(9, seed=seed)
            run = {"public": public, "owner": owner, "scheme": scheme, "out": out}
            toys.federation(tuned(public, seed), keep_messages=True, **run).run(2)
            kept.append({n: d for n, d in toys.files(out).items() if n.startswith("messages")})
        assert kept[0] == kept[1]
        assert len(kept[0]) == 2 * 2 * 3

    def test_clients_get_no_tensor_of_it_beside_the_messages(self):
        public = toys.convnet()
        own = tuned(public, 1)
        own.register_buffer("mine", torch.ones(3), persistent=False)
        place = toys.federation(own, public=public, **OWNER).workplace()
        assert "mine" not in dict(place.architecture.named_buffers())


class TestTheOwnersModelLearnsWhatIsTaught:
    @pytest.mark.parametrize("kind", sorted(toys.MODELS))
    @pytest.mark.parametrize("pair", COEFFICIENTS, ids=str)
    def test_as_much_as_the_owners_data_say(self, kind, pair):
        public = toys.MODELS[kind](0)
        own = tuned(public, 7)
        server = transfer(FedAvg(), public, own, judge=first(*pair))
        plain = FedAvg().server(public, toys.SECRET)
        for one in (server, plain):
            one.begin_round(1)
            reply = toys.reply_of(FedAvg(), one.release("a"), toys.bare(public), toys.Nudge(3, 0.1))
            one.absorb("a", reply, 1.0)
            metrics = one.end_round()
            assert one is plain or (metrics["own"], metrics["taught"]) == pair
        begun, mine, taught = toys.weights(public), toys.weights(own), plain.final()
        for name, tensor in server.final().items():
            wanted = mine[name]
            if tensor.is_floating_point():
                wanted = begun[name] + pair[0] * (mine[name] - begun[name])
                wanted = wanted + pair[1] * (taught[name] - begun[name])
            if name.endswith("running_var"):
                assert float(tensor.min()) > 0
                wanted = torch.maximum(wanted, torch.minimum(mine[name], taught[name]))
            torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
        assert toys.same(server.view("global"), server.final())

    def test_and_stays_as_it_is_to_the_bit_if_that_is_nothing(self):
        public = toys.bert()
        own = tuned(public, 7, 1e-3)
        server = transfer(FedAvg(), public, own, judge=lambda state: 0.0)
        sent(server, public, FedAvg())
        assert toys.same(server.final(), toys.weights(own))

    def test_a_fresh_head_is_taken_whole(self):
        public = toys.bert()
        own = tuned(public, 7)
        server = transfer(FedAvg(), public, own, judge=first(1.0, 1.0), fresh=("classifier.*",))
        sent(server, public, FedAvg(), rounds=1)
        inside = server.state().tensors
        begun, mine = toys.weights(public), toys.weights(own)
        for name, tensor in server.final().items():
            less = 0.0 if name.startswith("classifier.") else begun[name]
            torch.testing.assert_close(tensor, mine[name] + inside[name] - less)

    def test_in_a_federation_it_gets_better(self):
        public, test = toys.mlp(), toys.rows(90, seed=8)
        scheme = FedQSN.once(server_mask=0.0)
        training = Training(steps=30, batch_size=4, learning_rate=0.05)
        result = toys.federation(
            tuned(public, 2), public=public, owner=toys.rows(30, seed=9), scheme=scheme,
            training=training, test=test,
        ).run()  # fmt: skip
        assert result.base["accuracy"] < 60
        assert result.rounds[0].measures["global"]["accuracy"] > result.base["accuracy"] + 20

    def test_and_no_other_model_changes(self):
        public = toys.bert()
        own = tuned(public, 7)
        before = {name: tensor.clone() for name, tensor in toys.weights(own).items()}
        start = {name: tensor.clone() for name, tensor in toys.weights(public).items()}
        federation = toys.federation(own, public=public, copy=False, **TEXTS)
        result = federation.run(1)
        assert toys.same(toys.weights(own), before)
        assert toys.same(toys.weights(public), start)
        assert federation.model is own
        assert federation.released is public
        assert result.global_model is not own

    def test_in_small_steps_that_half_precision_would_lose(self):
        public = nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 3))
        public = public.to(torch.bfloat16)
        with torch.no_grad():
            for parameter in public.parameters():
                parameter.fill_(1.0)
        own = copy.deepcopy(public)
        with torch.no_grad():
            own.get_parameter("1.weight").zero_()
        server = transfer(FedAvg(), public, own, judge=first(1.0, 1.0))
        server.begin_round(1)
        message = server.release("a")
        reply = toys.reply_of(FedAvg(), message, copy.deepcopy(public).float(), _step(2**-12))
        server.absorb("a", reply, 1.0)
        server.end_round()
        # 1 + 2^-12 is 1 in bfloat16, but 0 + 2^-12 is not 0.
        assert torch.all(server.final()["1.weight"] == 2**-12)
        assert server.final()["1.weight"].dtype == torch.bfloat16

    def test_a_resumed_run_is_the_same(self, tmp_path):
        public = toys.bert()
        run = {"public": public, "scheme": FedQSN(), "out": tmp_path, **TEXTS}
        own = tuned(public, 7)
        toys.federation(own, **run).run(1)
        resumed = toys.federation(own, **run).run(2, resume=True)
        again = toys.federation(own, **run).run(2, resume=True)
        whole = toys.federation(own, **{**run, "out": None}).run(2)
        for result in (resumed, again):
            assert toys.same(toys.weights(result.global_model), toys.weights(whole.global_model))

    def test_a_run_is_not_resumed_with_another_public_model(self, tmp_path):
        own = tuned(toys.bert(), 7)
        run = {"scheme": FedQSN(), "out": tmp_path}
        toys.federation(own, public=toys.bert(), **TEXTS, **run).run(1)
        for other in ({"public": toys.bert(seed=1), **TEXTS}, {}):
            with pytest.raises(CheckpointError, match="configuration"):
                toys.federation(own, **other, **run).run(2, resume=True)


def _step(size):
    def train(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size if parameter.requires_grad else 0.0
        return TrainingRecord(5, 1, 1.0, 0.5)

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
        return toys.federation(
            own, public=public, scheme=scheme, clients=clients, task=task, **TEXTS
        )

    def models(self):
        public = toys.gpt2(tied=False)
        own = tuned(public, 4)
        return self.adapted(public), self.adapted(own)

    def test_are_trained_on_the_public_backbone_and_stand_on_the_private_one(self):
        public, own = self.models()
        server = transfer(ONCE, public, own, judge=first(1.0, 1.0))
        server.begin_round(1)
        reply = toys.reply_of(ONCE, server.release("a"), toys.bare(public), _step(0.01))
        server.absorb("a", reply, 1.0)
        server.end_round()
        mine, taught = toys.weights(own), server.final()
        adapter = {name for name in mine if "lora_" in name}
        assert all(torch.equal(mine[name], taught[name]) for name in mine.keys() - adapter)
        assert all(not torch.equal(mine[name], taught[name]) for name in adapter)

    def test_a_private_backbone_is_refused_where_clients_hold_it(self):
        public, own = self.models()
        with pytest.raises(ConfigurationError, match="Clients hold the backbone exactly"):
            self.federation(own, public, FedLPP())
        self.federation(copy.deepcopy(public), public, FedLPP()).run(1)


class TestWhatItIsRefusedFor:
    def test_the_owners_own_model(self):
        own = toys.mlp()
        for copied in (True, False):
            with pytest.raises(ConfigurationError, match="would be released as it is"):
                toys.federation(own, public=own, copy=copied, **OWNER)

    def test_another_architecture(self):
        with pytest.raises(ConfigurationError) as caught:
            toys.federation(toys.mlp(), public=toys.convnet(), **OWNER)
        assert "of another architecture" in str(caught.value)
        assert caught.value.where == "0.bias"

    def test_a_head_of_another_size(self):
        other = nn.Sequential(*list(toys.mlp().children())[:-1], nn.Linear(64, 5))
        with pytest.raises(ConfigurationError, match=r"another architecture.*\[3\].*\[5\]"):
            toys.federation(toys.mlp(), public=other, **OWNER)

    @pytest.mark.parametrize(
        ("settings", "found"),
        [
            ({"public": toys.mlp()}, "no data of the owner"),
            (OWNER, "no public model"),
            ({"fresh": ("5.*",)}, "no public model"),
        ],
    )
    def test_one_without_the_other(self, settings, found):
        with pytest.raises(ConfigurationError, match=found):
            toys.federation(toys.mlp(), **settings)

    def test_a_fresh_head_that_is_not_there(self):
        with pytest.raises(ConfigurationError, match=r"matches none.*5\.bias.*'classifier"):
            toys.federation(toys.mlp(), public=toys.mlp(), fresh=("classifier.*",), **OWNER)

    def test_data_that_the_task_cannot_use(self):
        with pytest.raises(DataError, match="the owner's data"):
            toys.federation(toys.mlp(), public=toys.mlp(), owner=[{"image": 1}])


class TestTheAudit:
    @pytest.fixture(scope="class")
    @staticmethod
    def found(tmp_path_factory):
        public, out = toys.mlp(), tmp_path_factory.mktemp("run")
        federation = toys.federation(
            tuned(public, 2), public=public, scheme=ONCE, out=out, **OWNER, keep_messages="proxies",
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
        assert origins == {"public", "nothing", "simulated"}

    def test_what_was_sent_is_the_public_model_as_attackers_have_it(self, found):
        pooled = [a for a in found.attacks if a.attack == "pooling" and not a.polish]
        for attack in pooled:
            assert attack.measures["loss"] == pytest.approx(found.models["public"]["loss"], rel=0.2)
        assert not found.answering("alarm")
