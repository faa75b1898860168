import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil import ConfigurationError, ProtocolError
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup
from fedveil.updates import SMALL, UpdateCodec
from fedveil.wire import Dense, Statistics, UnitIndex

WIDE = torch.Size([64, 80])


EVERYTHING = Selection((), {}, {})


def decode(codec, section, shape):
    return codec.read({"w": section}, {"w": torch.Size(shape)}, EVERYTHING)["w"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99))
def test_an_exact_update_comes_back_bit_for_bit(shape, seed):
    update, codec = noise(*shape, seed=seed), UpdateCodec()
    assert torch.equal(decode(codec, codec.encode(update), update.shape), update)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_quantized_update_comes_back_as_quantization_gives_it(bits, axis):
    update, codec = noise(*WIDE), UpdateCodec(bits, block=16)
    section = codec.encode(update, axis)
    assert isinstance(section, QuantizedTensor)
    assert (section.bits, section.axis, section.block) == (bits, axis, 16)
    expected = quantize(update, bits=bits, axis=axis, block=16).dequantize()
    assert torch.equal(decode(codec, section, update.shape), expected)


@pytest.mark.parametrize("shape", [(SMALL,), (SMALL - 1, 1), (), (0, 5)])
def test_small_updates_and_vectors_travel_exactly(shape):
    update, codec = noise(*shape), UpdateCodec(4)
    section = codec.encode(update)
    assert isinstance(section, Dense)
    assert torch.equal(decode(codec, section, update.shape), update)


def test_a_tensor_that_was_not_sent_is_refused_by_name():
    with pytest.raises(ProtocolError, match=r"not sent.*extra"):
        UpdateCodec().read({"extra": Dense(noise(2))}, {"w": torch.Size([2])}, EVERYTHING)


def test_a_tensor_without_update_is_left_out():
    assert not dict(UpdateCodec().read({}, {"w": torch.Size([2])}, EVERYTHING))


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
        decode(UpdateCodec(), section, WIDE)


@pytest.mark.parametrize("section", [Dense(noise(*WIDE)), quantize(noise(*WIDE), bits=8)])
def test_another_precision_than_agreed_is_refused(section):
    with pytest.raises(ProtocolError, match=r"expected 4 bits, found (float32|8 bits)"):
        decode(UpdateCodec(4), section, WIDE)


@pytest.mark.parametrize("shape", [(80, 64), (64, 81), (64 * 80,), (64, 80, 1), ()])
def test_another_shape_is_refused(shape):
    with pytest.raises(ProtocolError, match="wrong shape"):
        decode(UpdateCodec(), Dense(noise(*shape)), WIDE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1.1e6])
def test_values_that_no_training_gives_are_refused(value):
    update = noise(3, 3)
    update[1, 2] = value
    with pytest.raises(ProtocolError, match="absurdly large"):
        decode(UpdateCodec(), Dense(update), update.shape)


def test_quantized_values_that_no_training_gives_are_refused():
    huge = quantize(noise(*WIDE) * 1e30, bits=4)
    with pytest.raises(ProtocolError, match="absurdly large"):
        decode(UpdateCodec(4), huge, WIDE)


@st.composite
def received(draw):
    """Some units' update of a matrix, in either encoding, with or without unbiased factors."""
    bits, axis = draw(st.sampled_from([None, 4, 8])), draw(st.integers(0, 1))
    shape = torch.Size([90, 70])
    both = draw(st.booleans())
    groups = [UnitGroup("a", "neurons", shape[axis], (Slice("w", axis, scaled=True),))]
    if both:
        groups.append(UnitGroup("b", "neurons", shape[1 - axis], (Slice("w", 1 - axis),)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([1.0, 1.25]))
    released = {
        g.name: Release(
            torch.nonzero(torch.rand(g.size, generator=generator) < 0.9).flatten(), scale
        )
        for g in groups
    }
    selection = Selection(groups, released, {"w": shape})
    update = torch.randn(selection.shape("w", shape), generator=generator)
    codec = UpdateCodec(bits, block=16)
    section = codec.encode(update, draw(st.integers(0, 1)) if both else axis)
    return codec.read({"w": section}, {"w": shape}, selection), selection, shape


@given(received(), st.floats(0.1, 1000))
def test_adding_is_decoding_and_adding(case, weight):
    updates, selection, shape = case
    total = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = total.double()
    change = torch.zeros(shape).double()
    selection.scatter("w", updates["w"].double() * weight, change)
    updates.add_to("w", total, weight)
    torch.testing.assert_close(total.double(), expected + change, rtol=1e-5, atol=1e-4)
    withheld = selection.released("w", shape) == 0
    assert torch.equal(total.double()[withheld], expected[withheld])


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.0, True, "4"])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigurationError, match="update bits"):
        UpdateCodec(bits)


@pytest.mark.parametrize("block", [0, -1, 64.0, True, None, 2**31])
def test_impossible_blocks_are_refused(block):
    with pytest.raises(ConfigurationError, match="block"):
        UpdateCodec(4, block)
