"""Models that cannot take part say so before anything starts, and what to do; odd tensors do."""

from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import toys
from fedveil import (
    ConfigurationError,
    FedAvg,
    FedLPP,
    FedQSN,
    ImageClassification,
    Secret,
    Training,
)
from fedveil.state import architecture_of, copy_of, with_state
from fedveil.unsupported import check_supported


class Net(nn.Module):
    """Reads toys.rows; `more` puts something into it, which `use` then works with."""

    def __init__(self, more=None, use=lambda net, logits: logits):
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 3)
        self.use = use
        if more is not None:
            more(self)

    def forward(self, images):
        return self.use(self, self.last(self.first(images.flatten(1)).relu()))


def scaled(net, logits):
    return logits * net.odd


def parameter(value):
    return lambda net: setattr(net, "odd", nn.Parameter(value))


def buffer(value, *, persistent=True):
    return lambda net: net.register_buffer("odd", value, persistent=persistent)


class Extra(nn.Module):
    def get_extra_state(self):
        return {"count": 1}

    def set_extra_state(self, state):
        """Nothing."""


class Wrapper(torch.Tensor):
    """A tensor of a library that quantizes."""


REFUSED = {
    "float8 parameter": (lambda: Net(parameter(torch.ones(3).to(torch.float8_e4m3fn))), "8 bits"),
    "float8 buffer": (lambda: Net(buffer(torch.ones(3).to(torch.float8_e5m2))), "8 bits"),
    "complex": (lambda: Net(parameter(torch.ones(3, dtype=torch.complex64))), "view_as_real"),
    "quantized": (
        lambda: Net(lambda net: setattr(
            net, "odd", nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
        )),
        "quantized already",
    ),
    "subclass": (lambda: Net(buffer(torch.ones(3).as_subclass(Wrapper))), "quantized already"),
    "extra state": (lambda: Net(lambda net: setattr(net, "odd", Extra())), "register_buffer"),
    "lazy": (lambda: Net(lambda net: setattr(net, "odd", nn.LazyLinear(3))), "one batch"),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), "_orig_mod"),
    "compiled inside": (
        lambda: nn.Sequential(torch.compile(Net(), backend="eager")), "_orig_mod"  # type: ignore[call-overload]
    ),
    "data parallel": (lambda: nn.DataParallel(Net()), "'module'"),
    "script": (lambda: torch.jit.trace(Net(), torch.ones(2, 16)), "TorchScript"),
    "meta": (lambda: Net().to("meta"), "no data"),
    "meta buffer": (lambda: Net(buffer(torch.ones(3, device="meta"), persistent=False)), "no data"),
}  # fmt: skip


def adapted(change=lambda model: None):
    """A net with an adapter, after something was done to it."""
    config = peft.LoraConfig(target_modules=["first"], modules_to_save=["last"])
    model = peft.get_peft_model(Net(), config)
    change(model)
    return model


IDLE = {
    "merged": (lambda model: model.merge_adapter(), r"merged.*unmerge_adapter"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), r"disabled.*enable_"),
    "merged by its base": (lambda model: model.base_model.merge_adapter(), r"merged.*unload"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scheme", [FedAvg(), FedLPP(), FedQSN(server_mask=0.0, client_mask=0.0)], ids=lambda s: s.name
)
@pytest.mark.parametrize("kind", IDLE)
def test_adapters_that_the_model_does_not_compute_with_are_refused(kind, scheme):
    """They would be sent, trained on nothing, and come back as they were."""
    change, words = IDLE[kind]
    settings = {"clients": [toys.rows(4)], "task": ImageClassification(), "scheme": scheme}
    toys.federation(adapted(), **settings)
    with pytest.raises(ConfigurationError, match=words):
        toys.federation(adapted(change), **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_fail_later_is_refused_with_what_to_do(kind):
    make, words = REFUSED[kind]
    with pytest.raises(ConfigurationError, match=words):
        toys.federation(make(), clients=[toys.rows(4)], task=ImageClassification(),
                        scheme=FedAvg())  # fmt: skip


@pytest.mark.parametrize("scheme", [FedAvg(), FedLPP(), FedQSN()], ids=lambda scheme: scheme.name)
def test_a_server_by_itself_refuses_what_is_no_tensor_too(scheme):
    """Whoever writes a strategy asks the scheme, and no federation."""
    net = Net(lambda net: setattr(net, "odd", Extra()))
    net.first.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"odd.*register_buffer"):
        scheme.server(net, Secret.generate())


def test_what_is_not_sent_may_be_complex_and_a_frozen_embedding_sparse():
    net = Net(buffer(torch.ones(3, dtype=torch.complex64)))
    net.embedding = nn.Embedding(4, 2, sparse=True).requires_grad_(False)
    check_supported(net, lambda model: {"last.weight"})
    with pytest.raises(ConfigurationError, match="complex64"):
        check_supported(net, lambda model: {"odd"})


class Dropping(Net):
    """Its state leaves something out, which would stay in copies for clients."""

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("first")}


def hooked(module):
    def drop(_, state, prefix, __):
        for name in [name for name in state if name.startswith(f"{prefix}odd")]:
            del state[name]

    module.register_state_dict_post_hook(drop)


HIDDEN = {
    "a state without a layer": (Dropping, r"leaves out.*first\.weight"),
    "a hook that drops a parameter": (
        lambda: Net(lambda net: (parameter(torch.ones(3))(net), hooked(net))), r"leaves out.*odd"
    ),
    "a hook that drops a buffer": (
        lambda: Net(lambda net: (buffer(torch.ones(3))(net), hooked(net))), r"leaves out.*odd"
    ),
    "a list of layers": (
        lambda: Net(lambda net: setattr(net, "odd", [nn.Linear(2, 2)])), r"plain list.*ModuleList"
    ),
    "a dictionary of layers": (
        lambda: Net(lambda net: setattr(net, "odd", {"a": nn.Linear(2, 2)})), "plain list"
    ),
    "a tuple of layers": (
        lambda: Net(lambda net: setattr(net, "odd", (nn.Linear(2, 2),))), "plain list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_no_state_holds_is_refused(kind):
    """It would be in no message, and in every copy of the model that a client is given."""
    make, words = HIDDEN[kind]
    with pytest.raises(ConfigurationError, match=words):
        toys.federation(make(), clients=[toys.rows(4)], task=ImageClassification(),
                        scheme=FedAvg())  # fmt: skip


def test_layers_that_are_also_registered_may_stand_in_a_list():
    net = Net(lambda net: setattr(net, "odd", [net.first]))
    toys.federation(net, clients=[toys.rows(4)], task=ImageClassification(), scheme=FedAvg())


@pytest.mark.parametrize("value", [torch.arange(5), torch.ones(3, dtype=torch.bool)])
def test_a_parameter_of_whole_numbers_is_told_of_buffers(value):
    net = Net(lambda net: setattr(net, "odd", nn.Parameter(value, requires_grad=False)))
    with pytest.raises(ConfigurationError, match="register_buffer"):
        toys.federation(net, clients=[toys.rows(4)], task=ImageClassification(), scheme=FedAvg())


def test_a_model_that_cannot_be_copied_is_named():
    net = Net()
    net.handle = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"cannot be copied \(in Net\)"):
        toys.federation(net, scheme=FedAvg())


ODD = {
    "a number": lambda: Net(parameter(torch.tensor(1.0)), scaled),
    "a number as buffer": lambda: Net(buffer(torch.tensor(2.0)), scaled),
    "a whole number": lambda: Net(buffer(torch.tensor(2)), scaled),
    "a truth": lambda: Net(buffer(torch.tensor(True)), scaled),
    "nothing": lambda: Net(parameter(torch.empty(0, 5))),
    "empty buffer": lambda: Net(buffer(torch.empty(0))),
    "one": lambda: Net(parameter(torch.ones(1)), scaled),
    "a mask": lambda: Net(buffer(torch.ones(3, dtype=torch.bool)), scaled),
    "bytes": lambda: Net(buffer(torch.ones(3, dtype=torch.int8)), scaled),
    "short": lambda: Net(buffer(torch.ones(3, dtype=torch.int16)), scaled),
    "double": lambda: Net(parameter(torch.tensor(1.0)), scaled).double(),
}
SCHEMES = {
    "fedavg": FedAvg(),
    "regmean": FedAvg(aggregation="regmean"),
    "quantized": FedAvg(update_bits=4, error_feedback=True),
    "fedqsn": FedQSN(server_mask=0.1, client_mask=0.3, units="neurons"),
    "fedlpp": FedLPP(),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_shape_and_type_take_part(kind, scheme):
    model = ODD[kind]()
    if scheme.name == "fedlpp":
        model.first.requires_grad_(False)
    result = toys.federation(
        model, clients=[toys.rows(4), toys.rows(4, seed=1)], task=ImageClassification(),
        scheme=scheme,
    ).run(2)  # fmt: skip
    assert not result.rounds[-1].failed
    odd = getattr(result.global_model, "odd", None)
    assert odd.shape == model.odd.shape
    assert odd.dtype == model.odd.dtype


def test_a_single_number_learns_what_its_clients_teach():
    """Of one client the global model is the client's: its number moved as by plain SGD."""
    model: Any = Net(parameter(torch.tensor(1.0)), scaled)
    rows = toys.rows(4)
    words = {"task": ImageClassification(), "scheme": FedAvg()}
    training = Training(steps=1, batch_size=4, learning_rate=0.1, optimizer="sgd",
                             schedule="constant", weight_decay=0.0, max_grad_norm=None)  # fmt: skip
    result = toys.federation(model, clients=[rows], training=training, **words).run(1)
    images = torch.stack([row["image"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    nn.functional.cross_entropy(model(images), labels).backward()
    wanted = model.odd.detach() - 0.1 * model.odd.grad
    torch.testing.assert_close(result.global_model.odd.detach(), wanted)


def used(net):
    net(torch.ones(2, 16))
    return net


DERIVED = {
    "weight norm": lambda net: nn.utils.weight_norm(net.first),
    "spectral norm": lambda net: nn.utils.spectral_norm(net.first),
    "pruned": lambda net: prune.random_unstructured(net.first, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", DERIVED)
class TestWeightsThatHooksCompute:
    def make(self, kind, frozen):
        model = Net(DERIVED[kind])
        if frozen:
            model.first.requires_grad_(False)
        return used(model)

    def test_take_part(self, kind, frozen):
        result = toys.federation(self.make(kind, frozen), scheme=FedAvg()).run(1)
        assert not result.rounds[0].failed
        result.global_model(torch.ones(2, 16))

    def test_are_in_no_architecture(self, kind, frozen):
        bare: Any = architecture_of(self.make(kind, frozen))
        assert not bare.first.weight.any()

    def test_of_a_copy_are_the_copys_own(self, kind, frozen):
        model = self.make(kind, frozen)
        copied: Any = copy_of(model)
        assert torch.equal(copied.first.weight, model.first.weight)
        assert copied.first.weight.data_ptr() != model.first.weight.data_ptr()

    def test_follow_from_the_weights_of_the_result(self, kind, frozen):
        model = self.make(kind, frozen).eval()
        state = {name: tensor.detach() * 2 for name, tensor in model.state_dict().items()}
        made: Any = with_state(
            model, {n: t for n, t in state.items() if n.endswith(("orig", "_g"))}
        )
        told = made.first.weight.detach().clone()
        made.eval()(torch.ones(2, 16))
        torch.testing.assert_close(told, made.first.weight.detach())


def test_a_view_of_a_weight_is_in_no_architecture():
    model = Net()
    model.turned = model.first.weight.detach().T
    bare: Any = architecture_of(model)
    assert not bare.turned.any()


def test_parametrizations_work_in_turn_and_are_refused_in_processes():
    model = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(16, 3)))
    assert not toys.federation(model, scheme=FedAvg()).run(1).rounds[0].failed
    with pytest.raises(ConfigurationError, match="workers=1"):
        toys.federation(model, scheme=FedAvg(), workers=2).run(1)


def test_shared_layers_learn_once():
    layer = nn.Linear(16, 16)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(16, 3))
    result = toys.federation(model, scheme=FedAvg()).run(1)
    assert result.global_model[1] is result.global_model[3]
    assert not torch.equal(result.global_model[1].weight, layer.weight)
