import pytest
import torch
from torch import nn

from fedveil import ConfigurationError
from fedveil.state import (
    architecture_of,
    check_trainable,
    copy_of,
    load_state,
    read_state,
    wipe,
    with_state,
    working_copy,
)  # fmt: skip
from toys import bert, convnet, gpt2, mlp, same, weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


def test_tied_tensors_are_read_once_under_their_first_name():
    assert list(read_state(Tied())) == ["one.weight", "one.bias", "two.bias"]
    state = read_state(gpt2())
    assert "transformer.wte.weight" in state
    assert "lm_head.weight" not in state


def test_untied_tensors_of_equal_values_are_read_twice():
    model = Tied()
    model.two.weight = nn.Parameter(model.one.weight.detach().clone())
    assert "two.weight" in read_state(model)


def test_empty_tensors_are_all_read():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    assert list(read_state(model)) == ["a", "b"]


def test_loading_keeps_ties():
    model = Tied()
    load_state(model, {"one.weight": torch.ones(3, 3)})
    assert model.two.weight is model.one.weight
    assert torch.equal(model.two.weight, torch.ones(3, 3))


def test_buffers_are_read_and_buffers_that_are_not_saved_are_not():
    model = convnet()
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    state = read_state(model)
    assert "1.running_mean" in state
    assert "1.num_batches_tracked" in state
    assert "scratch" not in state


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_comes_back_as_it_was(half):
    model = mlp().to(half)
    before = weights(model)
    copy = working_copy(read_state(model))
    assert {tensor.dtype for tensor in copy.values()} == {torch.float32}
    load_state(model, copy)
    assert all(torch.equal(before[n], t) and t.dtype == half for n, t in weights(model).items())


def test_doubles_and_counters_keep_their_types():
    copy = working_copy(read_state(convnet().double()))
    assert copy["0.weight"].dtype == torch.float64
    assert copy["1.num_batches_tracked"].dtype == torch.int64


def test_a_working_copy_shares_no_memory_and_is_contiguous():
    model = convnet().to(memory_format=torch.channels_last)
    copy = working_copy(read_state(model))
    assert not model[3].weight.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in copy.values())
    copy["3.weight"].zero_()
    assert model[3].weight.abs().sum() > 0


@pytest.mark.parametrize("build", [mlp, convnet, bert, gpt2])
def test_wiping_leaves_nothing_but_zeros(build):
    model = build()
    wipe(model)
    assert all(not bool(tensor.any()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_float_is_looked_at(value, dtype):
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    check_trainable({"w": largest, "none": torch.zeros(0, 3, dtype=dtype)})
    check_trainable({"w": -largest})
    for place in range(40):
        odd = largest.clone()
        odd[place] = value
        with pytest.raises(ConfigurationError, match="NaN or infinite"):
            check_trainable({"w": odd.view(5, 8).t()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = mlp()
    with torch.no_grad():
        model[3].bias[2] = value
    with pytest.raises(ConfigurationError, match=r"3\.bias"):
        check_trainable(read_state(model))


def test_a_model_without_data_or_without_weights_is_refused():
    with pytest.raises(ConfigurationError, match="no data"):
        check_trainable(read_state(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ConfigurationError, match="no floating-point"):
        check_trainable({"counter": torch.tensor(1)})


class TiedBothWays(nn.Module):
    """Ties of both kinds: one parameter under two names, and two parameters of one memory."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.two.weight = self.one.weight
        self.three.weight = nn.Parameter(self.one.weight.data, requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.alias = [self.one.weight]


MAKERS = [
    architecture_of,
    copy_of,
    lambda model: with_state(model, working_copy(read_state(model))),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("build", [mlp, convnet, bert, gpt2, TiedBothWays])
def test_a_model_made_from_another_is_like_it_and_shares_no_memory(make, build):
    model = build()
    before, made = weights(model), make(model)
    assert list(read_state(made)) == list(read_state(model))
    names = lambda m: [(n, p.requires_grad) for n, p in m.named_parameters()]  # noqa: E731
    assert names(made) == names(model)
    assert made.training == model.training
    mine, other = (
        {t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())}
        for m in (model, made)
    )
    assert not mine & other
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.fill_(1)
    assert same(weights(model), before)


@pytest.mark.parametrize("make", MAKERS)
def test_a_model_made_from_another_is_tied_in_the_same_way(make):
    made = make(TiedBothWays())
    assert made.two.weight is made.one.weight is made.alias[0]
    assert made.three.weight.data_ptr() == made.one.weight.data_ptr()
    assert list(read_state(made)) == ["one.weight"]
    assert torch.equal(made.table, torch.arange(3.0))


@pytest.mark.parametrize("build", [mlp, convnet, bert, gpt2, TiedBothWays])
def test_an_architecture_holds_no_weight_and_none_is_copied_for_it(build, monkeypatch):
    model = build()
    for name in ("clone", "copy_", "to", "__deepcopy__"):
        call = getattr(torch.Tensor, name)

        def told(tensor, *arguments, call=call, **options):
            assert not {tensor.data_ptr()} & pointers
            return call(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, told)
    pointers = {t.data_ptr() for t in read_state(model).values()}
    made = architecture_of(model)
    monkeypatch.undo()
    assert all(not bool(tensor.any()) for tensor in made.state_dict().values())
    assert {n: t.stride() for n, t in read_state(made).items()} == {
        n: t.stride() for n, t in read_state(model).items()
    }


@pytest.mark.parametrize("build", [convnet, bert, gpt2, TiedBothWays])
def test_an_architecture_can_wait_on_the_meta_device(build):
    model = build()
    waiting = architecture_of(model, "meta")
    assert all(tensor.is_meta for tensor in waiting.state_dict().values())
    made = architecture_of(waiting, "cpu")
    assert list(read_state(made)) == list(read_state(waiting)) == list(read_state(model))
    load_state(made, read_state(model))
    assert same(weights(made), weights(model))


def test_with_state_takes_over_what_fits_and_copies_the_rest():
    model = convnet().to(memory_format=torch.channels_last)
    state = working_copy(read_state(model))
    state["8.weight"] += 1
    made = with_state(model, state)
    assert same(weights(made), {n: t.to(read_state(model)[n].dtype) for n, t in state.items()})
    own = read_state(made)
    shared = {n for n, t in state.items() if t.data_ptr() == own[n].data_ptr()}
    assert {"0.bias", "1.running_mean", "8.weight"} <= shared
    assert "3.weight" not in shared
    assert own["3.weight"].stride() == read_state(model)["3.weight"].stride()


def test_with_state_casts_to_the_models_own_dtypes():
    model = mlp().to(torch.bfloat16)
    made = with_state(model, working_copy(read_state(model)))
    assert same(weights(made), weights(model))
