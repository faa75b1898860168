"""FedLPP: only the adapter travels, quantized on its way down."""

import pytest
import torch
from torch import nn

import toys
from fedveil import ConfigurationError, FedAvg, FedLPP
from fedveil.quantization import QuantizedTensor
from fedveil.training import TrainingRecord
from fedveil.wire import Message

peft = pytest.importorskip("peft")
# PEFT asks transformers in a way that will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CLIENTS = {f"partner-{i}": toys.texts(6 + 2 * i, seed=i) for i in range(3)}


def adapted(seed=0):
    """A small language model with LoRA, whose B matrices are not all zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft.get_peft_model(toys.gpt2(tied=False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def federation(scheme, **changes):
    changes = {"clients": CLIENTS, "task": toys.NextToken(), **changes}
    return toys.federation(adapted(), scheme=scheme, **changes)


def adapter(model):
    return {n: t for n, t in toys.weights(model).items() if "lora_" in n}


def backbone(model):
    return {n: t for n, t in toys.weights(model).items() if "lora_" not in n}


class TestWithoutQuantization:
    def test_it_is_fedavg_on_the_adapter_bit_for_bit(self):
        fedlpp = federation(FedLPP(bits=None)).run(3)
        fedavg = federation(FedAvg()).run(3)
        assert not toys.same(toys.weights(fedlpp.global_model), toys.weights(adapted()))
        assert toys.same(toys.weights(fedlpp.global_model), toys.weights(fedavg.global_model))
        assert [r.loss_last for r in fedlpp.rounds] == [r.loss_last for r in fedavg.rounds]
        assert fedlpp.mean_bytes_down() < fedavg.mean_bytes_down() / 10

    @pytest.mark.parametrize("rule", [1, 2, 3])
    def test_all_rules_are_one(self, rule):
        one = federation(FedLPP(bits=None, rule=rule)).run(2).global_model
        other = federation(FedLPP(bits=None)).run(2).global_model
        for name, tensor in toys.weights(one).items():
            torch.testing.assert_close(tensor, toys.weights(other)[name], atol=1e-6, rtol=0)


class TestWhatTravels:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_is_the_adapter_in_so_many_bits(self, bits):
        model = adapted()
        server = FedLPP(bits=bits).server(model, toys.SECRET)
        server.begin_round(1)
        message = Message.from_bytes(server.release("a").to_bytes())
        assert set(message.sections) == set(adapter(model))
        for section in message.sections.values():
            assert isinstance(section, QuantizedTensor)
            assert section.bits == bits
            assert section.units == 4  # the rank: long rows, few scales
        rest = backbone(model)
        data = message.to_bytes()
        assert all(t.numpy().tobytes() not in data for t in rest.values() if t.numel() > 8)

    def test_the_backbone_stays_as_it_is(self):
        result = federation(FedLPP()).run(2)
        assert toys.same(backbone(result.global_model), backbone(adapted()))
        assert not toys.same(adapter(result.global_model), adapter(adapted()))
        count = sum(t.numel() for t in adapter(adapted()).values())
        assert result.parameters_bytes == 4 * count

    def test_updates_may_be_quantized_too(self):
        exact = federation(FedLPP()).run(1)
        small = federation(FedLPP(update_bits=8, error_feedback=True)).run(1)
        for name, tensor in adapter(small.global_model).items():
            torch.testing.assert_close(
                tensor, adapter(exact.global_model)[name], atol=2e-2, rtol=0.1
            )

    def test_with_worker_processes_it_is_the_same(self):
        one = federation(FedLPP()).run(1).global_model
        other = federation(FedLPP(), workers=2).run(1).global_model
        assert toys.same(toys.weights(one), toys.weights(other))

    def test_a_run_goes_on_where_it_stopped(self, tmp_path):
        expected = federation(FedLPP(), out=tmp_path / "one").run(3).global_model
        federation(FedLPP(), out=tmp_path / "two").run(1)
        found = federation(FedLPP(), out=tmp_path / "two").run(3, resume=True).global_model
        assert toys.same(toys.weights(found), toys.weights(expected))


def by_hand(rule, theta, q, u, number, rate=0.5, rounds=4):
    return {
        1: theta + rate * u,
        2: q + rate * u,
        3: theta + rate * (q + u - theta),
        4: theta + rate * (rounds - number) / rounds * (q + u - theta),
    }[rule]


@torch.no_grad()
def quarter_up(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += 0.25
    return TrainingRecord(3, 1, 1.0, 0.5)


@pytest.mark.parametrize("rule", [1, 2, 3, 4])
def test_rules_are_those_of_the_paper(rule):
    scheme = FedLPP(bits=2, rule=rule, rate=0.5, rounds=4 if rule == 4 else None)
    model, client = adapted(), scheme.client()
    server, theta = scheme.server(model, toys.SECRET), adapter(model)
    for number in (1, 2):
        server.begin_round(number)
        architecture = adapted(seed=1)
        message = server.release("a")
        client.load(message, architecture)
        q = toys.snapshot(adapter(architecture))
        server.absorb("a", client.fit(message, architecture, toys.TrainBy(quarter_up)), 3.0)
        server.end_round()
        for name, tensor in server.view("global").items():
            expected = by_hand(rule, theta[name], q[name], torch.tensor(0.25), number)
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)
        theta = server.view("global")


class TestOnlyB:
    def test_is_trained_and_a_is_not(self):
        result = federation(FedLPP(bits=None, train_only="B")).run(2)
        before = adapter(adapted())
        for name, tensor in adapter(result.global_model).items():
            assert torch.equal(tensor, before[name]) == ("lora_A" in name)

    def test_the_mean_of_adapters_is_then_the_mean_of_products(self):
        scheme = FedLPP(bits=None, train_only="B")
        one = federation(scheme, clients={"a": CLIENTS["partner-0"]}).run(1).global_model
        other = federation(scheme, clients={"b": CLIENTS["partner-0"][::-1]}).run(1).global_model
        products = [product(model) for model in (one, other)]
        mean = adapted()
        state = {n: (t + adapter(other)[n]) / 2 for n, t in adapter(one).items()}
        mean.load_state_dict(state, strict=False)
        torch.testing.assert_close(product(mean), sum(products) / 2)


def product(model):
    state = adapter(model)
    name = next(n for n in state if "lora_A" in n)
    return state[name.replace("lora_A", "lora_B")] @ state[name]


class TestBadInput:
    @pytest.mark.parametrize(
        "words",
        [{"bits": 5}, {"rule": 5}, {"rate": 0.0}, {"rate": "1"}, {"rule": 4}, {"rounds": 3},
         {"train_only": "A"}, {"block": 0}, {"aggregation": "median"}],
    )  # fmt: skip
    def test_impossible_settings(self, words):
        with pytest.raises(ConfigurationError):
            FedLPP(**words)

    def test_a_model_without_an_adapter(self):
        with pytest.raises(ConfigurationError, match=r"no adapter.*nothing that is frozen"):
            toys.federation(toys.mlp(), scheme=FedLPP())

    def test_a_model_of_which_nothing_is_trained(self):
        frozen = toys.mlp().requires_grad_(False)
        with pytest.raises(ConfigurationError, match=r"no adapter.*nothing to be trained"):
            toys.federation(frozen, scheme=FedLPP())
