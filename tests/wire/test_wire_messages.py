"""Messages that are as they should be: there and back, one spelling, and what they cost."""

import math

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import messages, same_message, same_tensor, small_message, taken_apart

from arithmetic import arithmetic
from fedveil.errors import ConfigurationError, WireError
from fedveil.quantization import BITS, QuantizedTensor, quantize
from fedveil.wire import Dense, Gathered, Limits, Message, Sections, Statistics, UnitIndex


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


def zero_all(message):
    for section in message.sections.values():
        for part in ("tensor", "codes", "scales"):
            if hasattr(section, part):
                getattr(section, part).zero_()


@pytest.mark.parametrize("container", [bytes, lambda data: memoryview(bytes(data))])
def test_what_cannot_be_written_to_is_copied_once(container):
    source = container(small_message().to_bytes())
    zero_all(Message.from_bytes(source))
    assert bytes(source) == small_message().to_bytes()


@pytest.mark.parametrize("view", [lambda data: data, memoryview])
def test_tensors_are_views_of_bytes_that_can_be_written_to(view):
    data = small_message().to_bytes()
    arrived = Message.from_bytes(view(data))
    assert same_message(arrived, small_message())
    zero_all(arrived)
    assert data != small_message().to_bytes()
    with pytest.raises(WireError, match="altered"):
        Message.from_bytes(data)


@pytest.mark.parametrize("make", [bytearray, lambda n: np.zeros(n, np.uint8)])
def test_a_message_is_written_into_memory_that_is_there(make):
    message = small_message()
    buffer = make(message.nbytes + 5)
    written = message.write_into(buffer)
    assert bytes(written) == message.to_bytes()
    assert bytes(buffer)[message.nbytes :] == bytes(5)


@pytest.mark.parametrize("buffer", [bytearray(3), bytes(10**5), "text", None])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(WireError, match="buffer cannot"):
        small_message().write_into(buffer)


@st.composite
def gathered(draw):
    """Some units of a section, and the section of these units alone."""
    axis, units = draw(st.integers(0, 1)), draw(st.integers(0, 60))
    shape = [draw(st.integers(1, 40))] * 2
    shape[axis] = units
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    rows = draw(st.lists(st.integers(0, units - 1), max_size=80)) if units else []
    chosen = torch.tensor(rows, dtype=torch.int64)
    if draw(st.booleans()):
        options = {"bits": draw(st.sampled_from(BITS)), "double": draw(st.booleans())}
        whole = quantize(weight, axis=axis, block=draw(st.sampled_from([7, 64])), **options)
        return Gathered(whole, chosen), whole.select(chosen)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]))
    plain = weight.movedim(axis, 0).to(dtype)
    return Gathered(Dense(plain), chosen), Dense(plain.index_select(0, chosen))


@pytest.mark.parametrize("way", ["numba", "torch"])
@given(st.lists(gathered(), max_size=5))
def test_gathering_into_the_message_changes_no_byte(way, pairs):
    late = Sections({f"s{i}": late for i, (late, _) in enumerate(pairs)})
    early = {f"s{i}": early for i, (_, early) in enumerate(pairs)}
    with arithmetic(way):
        data = Message("proxy", "s", 0, "c", late).to_bytes()
    assert data == Message("proxy", "s", 0, "c", early).to_bytes()
    assert same_message(Message("proxy", "s", 0, "c", late), Message("proxy", "s", 0, "c", early))


@pytest.mark.parametrize("way", ["numba", "torch"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_units_that_are_not_there_are_not_gathered(way, bad):
    units = torch.tensor([0, bad])
    for whole in (quantize(torch.ones(5, 3)), Dense(torch.ones(5, 3))):
        message = Message("proxy", "s", 0, "c", Sections({"w": Gathered(whole, units)}))
        with arithmetic(way), pytest.raises(ConfigurationError, match="no such unit"):
            message.to_bytes()


def test_units_to_gather_are_whole_numbers():
    for units in (torch.ones(2), torch.ones(1, 1, dtype=torch.int64)):
        with pytest.raises(WireError, match="int64 vector"):
            Gathered(Dense(torch.ones(3)), units)
    with pytest.raises(WireError, match="without axes"):
        Gathered(Dense(torch.ones(())), torch.tensor([0]))


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
    assert packed.unit_scales is not None
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
