"""Messages that are as they should be: there and back, one spelling, and what they cost."""

import math

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import messages, same_message, same_tensor, small_message, taken_apart

from fedveil.errors import ConfigurationError, WireError
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.wire import Dense, Limits, Message, Statistics, UnitIndex


def only(section):
    return Message("update", "fedavg", 0, "c", {"s": section})


def there_and_back(section):
    return Message.from_bytes(only(section).to_bytes()).sections["s"]


@given(messages())
@settings(max_examples=300, deadline=None)
def test_every_message_arrives_as_it_was_sent(message):
    data = message.to_bytes()
    arrived = Message.from_bytes(data)
    assert same_message(arrived, message)
    assert arrived.to_bytes() == data


@given(messages(), st.randoms())
def test_the_order_of_building_does_not_show(message, random):
    sections, scalars = list(message.sections.items()), list(message.scalars.items())
    random.shuffle(sections)
    random.shuffle(scalars)
    again = Message(
        message.kind,
        message.scheme,
        message.round,
        message.client,
        dict(sections),
        dict(scalars),
    )
    assert again.to_bytes() == message.to_bytes()


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
def test_any_buffer_is_read_and_not_kept(container):
    data = bytearray(small_message().to_bytes())
    source = container(data)
    arrived = Message.from_bytes(source)
    for section in arrived.sections.values():
        for part in ("tensor", "codes", "scales"):
            if hasattr(section, part):
                getattr(section, part).zero_()
    if container is not bytes:
        assert bytes(source) == small_message().to_bytes()
        data[:] = bytes(len(data))
    assert arrived.client == "clinic-2"


def test_a_strided_buffer_is_read():
    data = small_message().to_bytes()
    doubled = bytearray(2 * len(data))
    doubled[::2] = data
    assert same_message(Message.from_bytes(memoryview(doubled)[::2]), small_message())


def test_tensors_are_ordered_by_dtype_and_name():
    dtypes = ["int64", "float64", "float32", "int32", "bfloat16", "float16", "uint8", "bool"]
    sections = {
        f"{9 - i}": Dense(torch.ones(1, dtype=getattr(torch, d))) for i, d in enumerate(dtypes)
    }
    sections |= {"b": Dense(torch.ones(1)), "a": Dense(torch.ones(2))}
    header, _ = taken_apart(Message("update", "s", 0, "c", sections).to_bytes())
    names = [name.removeprefix("t:") for name in header if name != "__metadata__"]
    assert names == ["9", "8", "7", "a", "b", "6", "5", "4", "3", "2"]


def test_safetensors_opens_a_message(tmp_path):
    path = tmp_path / "message.safetensors"
    path.write_bytes(small_message().to_bytes())
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["fedveil"]
        assert set(file.keys()) == {
            "q:up.weight", "s:up.weight", "u:up.weight", "t:up.bias", "i:mlp", "t:gram",
        }  # fmt: skip
        assert file.get_tensor("t:up.bias").tolist() == [0.5, -2.0]


def test_nan_and_infinity_travel_in_dense_tensors():
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    assert same_tensor(there_and_back(Dense(odd)).tensor, odd)


@pytest.mark.parametrize("shape", [(), (0,), (0, 384), (3, 0, 2)])
def test_scalars_and_empty_tensors_travel(shape):
    tensor = torch.zeros(shape, dtype=torch.float16)
    assert same_tensor(there_and_back(Dense(tensor)).tensor, tensor)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (0,), (0, 3)])
def test_strides_that_do_not_count_are_no_obstacle(shape):
    tensor = torch.tensor(1.5).expand(shape)
    assert same_tensor(there_and_back(Dense(tensor)).tensor, tensor)


def test_tensors_that_share_memory_travel_apart():
    whole = torch.arange(6.0)
    sections = {"a": Dense(whole), "b": Dense(whole[2:]), "c": Dense(whole.view(2, 3).T)}
    arrived = Message.from_bytes(Message("update", "s", 0, "c", sections).to_bytes()).sections
    assert all(same_tensor(arrived[name].tensor, sections[name].tensor) for name in sections)
    arrived["a"].tensor.zero_()
    assert arrived["b"].tensor[0] == 2


def test_a_parameter_is_sent_without_its_gradient():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not there_and_back(Dense(parameter)).tensor.requires_grad


def test_statistics_do_not_arrive_as_weights():
    assert type(there_and_back(Statistics(torch.eye(2)))) is Statistics


def test_a_message_is_independent_of_the_mappings_it_was_built_from():
    sections, scalars = {"a": Dense(torch.ones(1))}, {"n": 1}
    message = Message("update", "s", 0, "c", sections, scalars)
    sections.clear()
    scalars.clear()
    assert message.sections.keys() == {"a"}
    assert message.scalars == {"n": 1}


def test_a_withheld_unit_leaves_no_byte():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    released = torch.tensor([0, 2, 5])
    other = weight.clone()
    other[[1, 3, 4]] = 1e30
    one, two = (only(quantize(w).select(released)).to_bytes() for w in (weight, other))
    assert one == two


@pytest.mark.parametrize("units", [1, 2, 100])
def test_size_is_the_header_plus_codes_scales_and_nothing_else(units):
    packed = quantize(torch.ones(units, 384))
    _, body = taken_apart(only(packed).to_bytes())
    assert len(body) == packed.nbytes == units * (192 + 6 + 4)
    assert len(only(packed).to_bytes()) - len(body) < 520


@pytest.mark.parametrize("field", ["max_bytes", "max_header_bytes", "max_sections", "max_elements"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_impossible_limits_are_refused(field, value):
    with pytest.raises(ConfigurationError, match=field):
        Limits(**{field: value})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": ""},
        {"kind": "a b"},
        {"scheme": "x" * 65},
        {"client": "../../etc"},
        {"client": "name\n"},
        {"client": 7},
        {"round": -1},
        {"round": 2**63},
        {"round": 1.0},
        {"round": True},
        {"sections": {"": Dense(torch.ones(1))}},
        {"sections": {"a b": Dense(torch.ones(1))}},
        {"sections": {"é": Dense(torch.ones(1))}},
        {"sections": {"n" * 257: Dense(torch.ones(1))}},
        {"sections": {5: Dense(torch.ones(1))}},
        {"sections": {"a": torch.ones(1)}},
        {"sections": {"a": None}},
        {"scalars": {"a": math.nan}},
        {"scalars": {"a": math.inf}},
        {"scalars": {"a": 2**63}},
        {"scalars": {"a": None}},
        {"scalars": {"a": [1]}},
        {"scalars": {"a": torch.tensor(1.0)}},
        {"scalars": {"a": "\ud800"}},
        {"scalars": {'"': 1}},
    ],
)
def test_what_cannot_be_read_cannot_be_written(change):
    fields = {"kind": "proxy", "scheme": "s", "round": 0, "client": "c", "sections": {}}
    with pytest.raises(WireError):
        Message(**fields | change)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, dtype=torch.complex64),
        torch.ones(1, dtype=torch.int8),
        torch.ones(1, device="meta"),
        torch.ones(2, 2).to_sparse(),
        torch.ones((1,) * 9),
        [1.0],
        None,
    ],
)
@pytest.mark.parametrize("section", [Dense, Statistics])
def test_tensors_that_cannot_travel_are_refused(section, tensor):
    with pytest.raises(WireError):
        section(tensor)


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, torch.tensor([], dtype=torch.int64)),
        (4.0, torch.tensor([0])),
        (4, torch.tensor([4])),
        (4, torch.tensor([-1, 2])),
        (4, torch.tensor([1, 1])),
        (4, torch.tensor([2, 1])),
        (4, torch.tensor([2], dtype=torch.int32)),
        (4, torch.tensor([[2]])),
        (4, [2]),
        (4, torch.tensor([2]), 0.0),
        (4, torch.tensor([2]), -1.0),
        (4, torch.tensor([2]), math.nan),
        (4, torch.tensor([2]), math.inf),
        (4, torch.tensor([2]), True),
        (4, torch.tensor([2]), "1"),
    ],
)
def test_impossible_unit_indexes_are_refused(arguments):
    with pytest.raises(WireError):
        UnitIndex(*arguments)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_impossible_scales_are_not_sent(scale):
    packed = quantize(torch.ones(2, 4))
    packed.unit_scales[1] = scale
    with pytest.raises(WireError, match=r"scale is negative, NaN or infinite .in section 's'"):
        only(packed).to_bytes()


def test_a_quantized_tensor_of_many_axes_is_not_sent():
    with pytest.raises(WireError, match="too many axes"):
        only(quantize(torch.ones((1,) * 9))).to_bytes()


def test_quantized_tensors_keep_their_settings():
    packed = quantize(torch.ones(3, 4, 5), bits=3, axis=1, block=7, double=False)
    arrived = there_and_back(packed)
    assert isinstance(arrived, QuantizedTensor)
    assert torch.equal(arrived.dequantize(), packed.dequantize())
