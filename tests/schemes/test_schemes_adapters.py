"""FedQSN with an adapter: a masked and quantized backbone, sent once, and what is trained on it."""

from dataclasses import replace

import pytest
import torch
from test_schemes_fedlpp import CLIENTS, adapted, adapter, backbone

import toys
from fedveil import ConfigurationError, Evaluation, FedAvg, FedQSN, ProtocolError
from fedveil.quantization import QuantizedTensor
from fedveil.state import read_state
from fedveil.units import find_units
from fedveil.wire import Dense, Message

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ONCE = FedQSN(units="neurons", client_mask=0.25, backbone="once")


def federation(scheme, **changes):
    changes = {"clients": CLIENTS, "task": toys.NextToken(), **changes}
    return toys.federation(adapted(), scheme=scheme, **changes)


def sent(folder, client, number):
    path = folder / "messages" / f"round-{number:06d}" / f"{client}.proxy.safetensors"
    return Message.from_bytes(path.read_bytes())


@pytest.mark.parametrize("choice", ["mlp", "neurons"])
def test_units_take_their_part_of_the_adapter_along(choice):
    groups = {group.name.rpartition(".")[2]: group for group in find_units(adapted(), choice)}
    cut = {(part.tensor.split(".h.0.")[1], part.axis) for part in groups["mlp"].slices}
    assert ("mlp.c_fc.base_layer.weight", 1) in cut
    assert ("mlp.c_fc.lora_B.default.weight", 0) in cut
    assert not any("lora_A" in name for name, _ in cut)  # what c_fc reads belongs to no unit
    if choice == "neurons":
        parts = [p for p in groups["heads"].slices if "lora_B" in p.tensor]
        assert [p.offset for p in parts] == [0, 16, 32]  # query, key, value


def test_without_masks_it_is_fedavg_bit_for_bit():
    scheme = FedQSN(units="neurons", backbone="once", **toys.NO_MASK)
    one = federation(scheme).run(3).global_model
    other = federation(FedAvg()).run(3).global_model
    assert toys.same(toys.weights(one), toys.weights(other))


class TestTheBackbone:
    def test_goes_out_once(self, tmp_path):
        result = federation(ONCE, out=tmp_path, keep_messages="proxies").run(3)
        first, second = result.rounds[0].bytes_down, result.rounds[1].bytes_down
        assert all(second[client] < first[client] / 2 for client in first)
        later = sent(tmp_path, "partner-0", 2)
        names = {name for name in later.sections if not name.startswith("units/")}
        assert names == set(adapter(adapted()))

    def test_that_is_sent_in_every_round_changes_nothing(self):
        once = federation(ONCE).run(3).global_model
        always = federation(FedQSN(units="neurons", client_mask=0.25)).run(3).global_model
        assert toys.same(toys.weights(once), toys.weights(always))
        assert toys.same(backbone(once), backbone(adapted()))

    def test_is_sent_again_to_who_did_not_answer(self):
        scheme, client = ONCE, ONCE.client()
        server, architecture = scheme.server(adapted(), toys.SECRET), adapted(seed=1)
        memory, sizes = {}, []
        for number, answers in enumerate((True, False, True, True), start=1):
            server.begin_round(number)
            message = Message.from_bytes(server.release("a").to_bytes())
            sizes.append(len(message.sections))
            reply = client.fit(message, architecture, toys.TrainBy(up), memory)
            if answers:
                server.absorb("a", Message.from_bytes(reply.to_bytes()), 1.0)
            server.end_round()
        whole, thin, again, last = sizes
        assert whole == again > thin == last

    def test_that_a_client_has_lost_is_said(self):
        server, client = ONCE.server(adapted(), toys.SECRET), ONCE.client()
        server.begin_round(1)
        reply = client.fit(server.release("a"), adapted(seed=1), toys.TrainBy(up), {})
        server.absorb("a", reply, 1.0)
        server.end_round()
        server.begin_round(2)
        with pytest.raises(ProtocolError, match=r"no backbone.*sent it again"):
            client.fit(server.release("a"), adapted(seed=1), toys.TrainBy(up), {})

    def test_survives_a_stop(self, tmp_path):
        expected = federation(ONCE, out=tmp_path / "one").run(3)
        federation(ONCE, out=tmp_path / "two").run(2)
        found = federation(ONCE, out=tmp_path / "two").run(3, resume=True)
        assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
        assert found.rounds[2].bytes_down == expected.rounds[2].bytes_down

    def test_of_the_owner_is_neither_copied_nor_in_checkpoints(self):
        for scheme in (ONCE, FedQSN(units="neurons"), FedAvg()):
            model = adapted().to(torch.bfloat16)
            server = scheme.server(model, toys.SECRET)
            assert set(server.state().tensors) == set(adapter(model))
            own = read_state(model)
            for name, tensor in server._global.tensors.items():
                if "lora_" in name:
                    assert tensor.dtype == torch.float32
                else:
                    assert tensor.data_ptr() == own[name].data_ptr()

    def test_cannot_be_changed_by_a_client(self):
        server, client = ONCE.server(adapted(), toys.SECRET), ONCE.client()
        server.begin_round(1)
        reply = client.fit(server.release("a"), adapted(seed=1), toys.TrainBy(up), {})
        name = next(name for name in backbone(adapted()) if name.endswith("ln_1.weight"))
        shape = toys.weights(adapted())[name].shape
        forged = {**reply.sections, name: Dense(torch.ones(shape))}
        with pytest.raises(ProtocolError, match=name):
            server.absorb("a", replace(reply, sections=forged), 1.0)

    def test_is_there_when_proxies_are_measured(self):
        test = toys.texts(4, seed=9)
        words = {"test": test, "evaluation": Evaluation(proxies_every=1)}
        once = federation(ONCE, **words).run(2).rounds[1].measures
        always = federation(FedQSN(units="neurons", client_mask=0.25), **words).run(2)
        assert once == always.rounds[1].measures


@torch.no_grad()
def up(model):
    from fedveil.training import TrainingRecord

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.01
    return TrainingRecord(3, 1, 1.0, 0.5)


class TestTheAdapter:
    def test_is_exact_unless_told(self, tmp_path):
        federation(ONCE, out=tmp_path, keep_messages="proxies").run(1)
        sections = sent(tmp_path, "partner-1", 1).sections
        assert not any(
            isinstance(s, QuantizedTensor) for name, s in sections.items() if "lora_" in name
        )

    @pytest.mark.parametrize("bits", [2, 4])
    def test_may_be_quantized_on_its_own(self, bits, tmp_path):
        scheme = FedQSN(units="neurons", client_mask=0.25, backbone="once", adapter_bits=bits)
        result = federation(scheme, out=tmp_path, keep_messages="proxies").run(2)
        sections = sent(tmp_path, "partner-1", 2).sections
        found = [s.bits for name, s in sections.items() if "lora_" in name]
        assert found == [bits] * len(adapter(adapted()))
        exact = federation(ONCE).run(2)
        assert result.rounds[1].bytes_down["partner-1"] < exact.rounds[1].bytes_down["partner-1"]

    def test_withheld_units_have_none_of_it(self, tmp_path):
        federation(ONCE, out=tmp_path, keep_messages="proxies").run(1)
        message = sent(tmp_path, "partner-2", 1)
        group = next(g for g in find_units(adapted(), "neurons") if g.kind == "neurons")
        released = len(message.sections[f"units/{group.name}"].released)
        part = next(p.tensor for p in group.slices if "lora_B" in p.tensor)
        assert message.sections[part].tensor.shape[0] == released < group.size


def test_a_matrices_may_stay_as_they_are():
    changed = {
        only: adapter(
            federation(FedQSN(units="neurons", backbone="once", train_only=only))
            .run(2)
            .global_model
        )
        for only in ("B", None)
    }
    before = adapter(adapted())
    for name, tensor in before.items():
        assert torch.equal(changed["B"][name], tensor) == ("lora_A" in name)
        assert not torch.equal(changed[None][name], tensor)


class TestBadInput:
    def test_without_an_adapter_there_is_no_b_to_train(self):
        with pytest.raises(ConfigurationError, match="no LoRA adapter"):
            toys.federation(toys.gpt2(), scheme=FedQSN(train_only="B"), task=toys.NextToken())
        with pytest.raises(ConfigurationError, match="train_only"):
            FedQSN(train_only="A")  # type: ignore[arg-type]

    def test_fresh_masks_would_show_another_part_in_every_round(self):
        with pytest.raises(ConfigurationError, match="Fresh masks"):
            FedQSN(policy="fresh", backbone="once")

    def test_a_model_without_a_backbone(self):
        with pytest.raises(ConfigurationError, match="no backbone"):
            toys.federation(toys.gpt2(), scheme=ONCE)

    @pytest.mark.parametrize("words", [{"backbone": "never"}, {"adapter_bits": 5}])
    def test_impossible_settings(self, words):
        with pytest.raises(ConfigurationError):
            FedQSN(**words)
