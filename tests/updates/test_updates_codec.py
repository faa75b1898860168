import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil import ConfigurationError, ProtocolError
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.updates import SMALL, UpdateCodec
from fedveil.wire import Dense, Statistics, UnitIndex

WIDE = torch.Size([64, 80])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99))
def test_an_exact_update_comes_back_bit_for_bit(shape, seed):
    update, codec = noise(*shape, seed=seed), UpdateCodec()
    assert torch.equal(codec.decode("w", codec.encode(update), update.shape), update)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_quantized_update_comes_back_as_quantization_gives_it(bits, axis):
    update, codec = noise(*WIDE), UpdateCodec(bits, block=16)
    section = codec.encode(update, axis)
    assert isinstance(section, QuantizedTensor)
    assert (section.bits, section.axis, section.block) == (bits, axis, 16)
    expected = quantize(update, bits=bits, axis=axis, block=16).dequantize()
    assert torch.equal(codec.decode("w", section, update.shape), expected)


@pytest.mark.parametrize("shape", [(SMALL,), (SMALL - 1, 1), (), (0, 5)])
def test_small_updates_and_vectors_travel_exactly(shape):
    update, codec = noise(*shape), UpdateCodec(4)
    section = codec.encode(update)
    assert isinstance(section, Dense)
    assert torch.equal(codec.decode("w", section, update.shape), update)


def test_a_tensor_that_was_not_sent_is_refused_by_name():
    with pytest.raises(ProtocolError, match=r"not sent.*extra"):
        UpdateCodec().decode_all({"extra": Dense(noise(2))}, {"w": torch.Size([2])})


def test_a_tensor_without_update_is_left_out():
    assert UpdateCodec().decode_all({}, {"w": torch.Size([2])}) == {}


@pytest.mark.parametrize(
    "section",
    [
        Statistics(noise(*WIDE)),
        UnitIndex(80, torch.arange(80)),
        Dense(torch.ones(WIDE, dtype=torch.int64)),
        Dense(torch.ones(WIDE, dtype=torch.bool)),
        # Sums take the type of what is added: half of that range would overflow.
        Dense(noise(*WIDE).half()),
        Dense(noise(*WIDE).bfloat16()),
        quantize(noise(*WIDE)),
    ],
    ids=["statistics", "index", "int", "bool", "half", "bfloat16", "quantized"],
)
def test_another_type_than_agreed_is_refused(section):
    with pytest.raises(ProtocolError, match="wrong type"):
        UpdateCodec().decode("w", section, WIDE)


@pytest.mark.parametrize("section", [Dense(noise(*WIDE)), quantize(noise(*WIDE), bits=8)])
def test_another_precision_than_agreed_is_refused(section):
    with pytest.raises(ProtocolError, match=r"expected 4 bits, found (float32|8 bits)"):
        UpdateCodec(4).decode("w", section, WIDE)


@pytest.mark.parametrize("shape", [(80, 64), (64, 81), (64 * 80,), (64, 80, 1), ()])
def test_another_shape_is_refused(shape):
    with pytest.raises(ProtocolError, match="wrong shape"):
        UpdateCodec().decode("w", Dense(noise(*shape)), WIDE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1.1e6])
def test_values_that_no_training_gives_are_refused(value):
    update = noise(3, 3)
    update[1, 2] = value
    with pytest.raises(ProtocolError, match="absurdly large"):
        UpdateCodec().decode("w", Dense(update), update.shape)


def test_quantized_values_that_no_training_gives_are_refused():
    huge = quantize(noise(*WIDE) * 1e30, bits=4)
    with pytest.raises(ProtocolError, match="absurdly large"):
        UpdateCodec(4).decode("w", huge, WIDE)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.0, True, "4"])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigurationError, match="update bits"):
        UpdateCodec(bits)


@pytest.mark.parametrize("block", [0, -1, 64.0, True, None, 2**31])
def test_impossible_blocks_are_refused(block):
    with pytest.raises(ConfigurationError, match="block"):
        UpdateCodec(4, block)
