"""The NormalFloat levels, against published constants."""

import hashlib

import pytest
import torch

from fedveil.errors import ConfigurationError
from fedveil.quantization import BITS, NormalFloat

QLORA_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FEDLPP_TO_FOUR_DIGITS = {
    2: [-1.0, 0.0, 0.3379, 1.0],
    3: [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0],
}


def test_four_bits_are_the_nf4_of_qlora_to_the_last_bit():
    assert torch.equal(NormalFloat(4).levels, torch.tensor(QLORA_NF4))


@pytest.mark.parametrize("bits", FEDLPP_TO_FOUR_DIGITS)
def test_two_and_three_bits_are_those_of_fedlpp(bits):
    published = torch.tensor(FEDLPP_TO_FOUR_DIGITS[bits])
    torch.testing.assert_close(NormalFloat(bits).levels, published, atol=5e-5, rtol=0)


def test_eight_bits_are_the_same_on_every_machine():
    octets = NormalFloat(8).levels.numpy().astype("<f4").tobytes()
    assert hashlib.blake2b(octets, digest_size=8).hexdigest() == "413a4b2be232f7a6"


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_all_different_ascending_and_hold_minus_one_zero_and_one(bits):
    levels = NormalFloat(bits).levels
    assert levels.dtype == torch.float32
    assert levels.shape == (2**bits,)
    assert (levels.diff() > 0).all()
    assert {-1.0, 0.0, 1.0} <= set(levels.tolist())
    assert levels[0] == -1
    assert levels[-1] == 1


@pytest.mark.parametrize("bits", BITS)
def test_thresholds_lie_half_way(bits):
    book = NormalFloat(bits)
    middle = (book.levels[:-1].double() + book.levels[1:].double()) / 2
    torch.testing.assert_close(book.thresholds.double(), middle, atol=0, rtol=2**-24)
    assert book.half_gap == pytest.approx(float(book.levels.diff().max()) / 2)


def test_levels_handed_out_are_a_copy():
    NormalFloat(4).levels.zero_()
    assert NormalFloat(4).levels[0] == -1


@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, 4.0, "4", None, True])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigurationError, match="2, 3, 4 or 8"):
        NormalFloat(bits)
