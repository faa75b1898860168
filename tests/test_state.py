import pytest
import torch
from torch import nn

from fedveil import ConfigurationError
from fedveil.state import check_trainable, load_state, read_state, wipe, working_copy
from toys import bert, convnet, gpt2, mlp, weights


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
