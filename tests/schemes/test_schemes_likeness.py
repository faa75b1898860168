"""A public model that is the owner's own, however it was copied, is refused."""

import copy
from dataclasses import replace

import pytest
import torch

import toys
from fedveil import ConfigurationError, FedAvg, FedLPP, FedQSN
from fedveil.errors import FedveilWarning
from fedveil.federation import Tuning
from fedveil.schemes.likeness import check_likeness, likeness_of
from fedveil.state import read_state

OWNER = {"owner": toys.rows(12, seed=9), "scheme": FedQSN(server_mask=0.0)}


def changed(model, change, names=""):
    """A copy, with something done to those tensors whose names begin so."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in read_state(other).items():
            if name.startswith(names):
                tensor.copy_(change(tensor))
    return other


def noisy(size):
    generator = torch.Generator().manual_seed(5)
    return lambda tensor: tensor + size * torch.randn(tensor.shape, generator=generator)


def through(dtype):
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


COPIES = {
    "as it is": lambda tensor: tensor,
    "saved in bfloat16": through(torch.bfloat16),
    "saved in float16": through(torch.float16),
    "with noise": noisy(1e-4),
    "with more noise": noisy(2e-3),
    "scaled": lambda tensor: 1.25 * tensor,
    "turned over": lambda tensor: -tensor,
    "scaled and rounded": lambda tensor: (0.1 * tensor).bfloat16().float(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kept", [True, False])
def test_a_copy_is_refused_and_names_what_is_the_owners(how, kept):
    own = toys.mlp()
    with pytest.raises(ConfigurationError, match="your own, which would be released") as caught:
        toys.federation(own, public=changed(own, COPIES[how]), copy=kept, **OWNER)
    assert "1.weight" in caught.value.found


@pytest.mark.parametrize("build", [toys.bert, toys.gpt2])
@pytest.mark.parametrize("how", ["as it is", "saved in bfloat16"])
def test_a_copy_of_a_transformer_is_refused(build, how):
    own, rows = build(), toys.texts(12, seed=9)
    with pytest.raises(ConfigurationError, match="your own"):
        toys.federation(own, public=changed(own, COPIES[how]), **{**OWNER, "owner": rows})


def test_tensors_that_have_changed_places_are_the_owners():
    own = toys.bert()
    public, state = copy.deepcopy(own), read_state(own)
    with torch.no_grad():
        for name, tensor in read_state(public).items():
            tensor.copy_(state[name.replace("query", "key")])
    found = likeness_of(public, own, state.keys())
    assert any("query.weight" in name for name in found.equal)


@pytest.mark.parametrize("head", ["5.", "3."])
def test_a_copy_with_another_head_or_layer_is_refused(head):
    own = toys.mlp()
    public = changed(own, noisy(0.5), head)
    if head == "3.":  # most of the numbers are others: it may be that the rest was left as it was
        with pytest.warns(FedveilWarning, match="right only if you did not train them"):
            toys.federation(own, public=public, **OWNER)
        return
    with pytest.raises(ConfigurationError, match="Most of the public model is your own"):
        toys.federation(own, public=public, **OWNER)


def test_what_the_owner_froze_may_be_what_is_public():
    own = toys.mlp()
    public = changed(own, noisy(0.5), "5.")
    for module in (own, public):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("5."))
    federation = toys.federation(own, public=public, **OWNER)
    assert federation.likeness.equal == ()
    assert [*federation.likeness.compared] == ["5.weight", "5.bias"]


def test_what_the_owners_tuning_leaves_alone_may_be_what_is_public():
    own = toys.mlp()
    public = changed(own, noisy(0.5), "5.")
    tuned = Tuning(toys.rows(12, seed=8), replace(toys.FAST, frozen=("1.*", "3.*")))
    federation = toys.federation(own, public=public, tuning=tuned, **OWNER)
    assert [*federation.likeness.compared] == ["5.weight", "5.bias"]
    with pytest.raises(ConfigurationError, match=r"your own.*frozen"):
        toys.federation(own, public=public, tuning=replace(tuned, training=toys.FAST), **OWNER)


def test_frozen_alike_but_with_the_owners_trained_part_is_refused():
    own = toys.mlp()
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name.startswith("5."))
    with pytest.raises(ConfigurationError, match="your own"):
        toys.federation(own, public=changed(own, noisy(0.5), "1."), **OWNER)


def test_embeddings_that_were_left_as_they_were_are_worth_a_word():
    own = toys.bert()
    public = changed(own, noisy(0.5))
    words = "bert.embeddings.word_embeddings.weight"
    read_state(public)[words].copy_(read_state(own)[words])
    with pytest.warns(FedveilWarning, match=f"1 tensors of the public model.*{words}"):
        toys.federation(own, public=public, **{**OWNER, "owner": toys.texts(12, seed=9)})


def test_what_moves_little_but_answers_otherwise_is_an_ancestor():
    own = toys.mlp()
    state = read_state(own)
    public = changed(own, noisy(2e-3))
    found = likeness_of(public, own, state.keys())
    assert found.share((*found.near,)) > 0.9

    def judge(model):
        return 0.5 if all(torch.equal(model[name], state[name]) for name in state) else 0.6

    check_likeness(found, public, state, judge)
    with pytest.raises(ConfigurationError, match="but for rounding, noise or a factor"):
        check_likeness(found, public, state, lambda _: 0.5)


def test_an_ancestor_is_compared_and_passes():
    own = toys.mlp()
    federation = toys.federation(own, public=changed(own, noisy(0.05)), **OWNER)
    assert federation.likeness.equal == ()
    assert 0.1 < federation.likeness.distance < 0.3
    assert "0 of 6 tensors are the same" in federation.likeness.words
    assert toys.federation(own, public=toys.mlp(3), **OWNER).likeness.distance > 1


def test_buffers_and_numbers_that_all_begin_alike_tell_nothing():
    own = toys.convnet()
    public = changed(own, noisy(0.5))
    for name, tensor in read_state(public).items():
        if "running" in name or name in ("1.weight", "1.bias"):
            tensor.fill_(1)
            read_state(own)[name].fill_(1)
    found = likeness_of(public, own, read_state(own).keys())
    assert found.equal == ()
    assert not any("running" in name or name == "1.weight" for name in found.compared)


def test_without_a_public_model_nothing_is_compared():
    assert toys.federation(toys.mlp()).likeness is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
class TestAdapters:
    @pytest.fixture(autouse=True)
    def _peft(self):
        self.peft = pytest.importorskip("peft")

    def adapted(self, model, *, trained=0.0):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            settings = self.peft.LoraConfig(r=2, target_modules=["query"])
            adapted = self.peft.get_peft_model(model, settings)
        if trained:
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name:
                        parameter.add_(trained * torch.randn_like(parameter))
        return adapted

    def federation(self, own, public, scheme=None):
        settings = {**OWNER, "owner": toys.texts(12, seed=9)}
        return toys.federation(own, public=public, **{**settings, "scheme": scheme or FedAvg()})

    def test_a_private_backbone_under_a_new_adapter_is_no_public_one(self):
        own, public = self.adapted(toys.bert()), self.adapted(toys.bert())
        with pytest.raises(ConfigurationError, match="your own"):
            self.federation(own, public)

    def test_a_shared_backbone_under_a_trained_adapter_is(self):
        own, public = self.adapted(toys.bert(), trained=0.1), self.adapted(toys.bert())
        assert all("lora_" in name for name in self.federation(own, public).likeness.compared)

    def test_a_copy_of_a_trained_adapter_is_refused(self):
        own = self.adapted(toys.bert(), trained=0.1)
        with pytest.raises(ConfigurationError, match="your own"):
            self.federation(own, copy.deepcopy(own))
        with pytest.raises(ConfigurationError, match="your own"):
            self.federation(own, copy.deepcopy(own), FedLPP())

    def test_where_clients_hold_the_backbone_it_is_not_what_is_released(self):
        federation = self.federation(self.adapted(toys.bert()), self.adapted(toys.bert()), FedLPP())
        assert federation.likeness.compared == {}
